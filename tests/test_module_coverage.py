"""Every module has tests of its own: a file of its name in the mirrored place, or a test that imports it."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent

UNTESTED: dict[str, str] = {
    "localrun.__main__": "three lines, run by tests/test_start.py",
    "localrun.api.conversion": "tests/commands/test_convert*.py run it, command by command",
    "localrun.commands.chat": "needs a terminal or an engine: tests/test_cli.py runs it in both",
    "localrun.engine.conversations.store": "what its package exports: tests/engine/test_conversations.py",
    "localrun.engine.measure.choose_dense": "tests/commands/test_convert_copies.py converts with what it chose",
    "localrun.engine.process.worker": "a process: tests/engine/process starts, stops and kills it",
    **{
        f"localrun.offload.device.{name}": "runs in llama.cpp's graph only: tests/offload/test_handover.py and others"
        for name in (
            "calls",
            "compiled",
            "compiled_dense",
            "compiled_experts",
            "compiled_pairs",
            "process",
            "weight_records",
        )
    },
    "localrun.offload.device.compiled_misses": "runs in llama.cpp's graph only: tests/offload/test_misses.py",
    **{
        f"localrun.offload.device.{name}": "what `between` consists of: tests/offload/device/test_between.py"
        for name in ("between_moves", "between_rope", "between_streams", "between_values", "node_rows")
    },
    "localrun.offload.gpu.probe": "needs a device: tests/engine/planner/test_planner.py measures the stand-in",
    "localrun.offload.pool": "tests/offload/test_model.py and others use it through a model",
    "localrun.tui.messages": "declarations",
    **{
        f"localrun.tui.controllers.{name}": "works on the whole screen: tests/tui/test_screen.py, test_answers.py, test_writing.py"
        for name in ("asking", "composer", "conversation", "finder", "library", "model")
    },
}
"""Modules without tests of their own, and why."""


def modules() -> dict[str, Path]:
    """Name -> file, packages' own files left out: they only gather names."""
    files = sorted((ROOT / "localrun").rglob("*.py"))
    return {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files if file.stem != "__init__"}


def imported(file: Path) -> set[str]:
    """Modules that a file imports, and whatever it takes from them."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def without_tests() -> set[str]:
    tests = sorted((ROOT / "tests").rglob("*.py"))
    tested = set[str]().union(*(imported(file) for file in tests))
    found = set()
    for name, file in modules().items():
        place = Path("tests", *file.relative_to(ROOT / "localrun").parts).with_name(f"test_{file.stem}.py")
        if name not in tested and not (ROOT / place).exists():
            found.add(name)
    return found


def test_every_module_has_tests_of_its_own_or_a_reason() -> None:
    found = without_tests()
    assert sorted(found - UNTESTED.keys()) == [], "write tests/<package>/test_<module>.py"
    assert sorted(UNTESTED.keys() - found) == [], "they have tests: take them off the list"


def test_imports_are_seen_however_they_are_written(tmp_path: Path) -> None:
    file = tmp_path / "x.py"
    file.write_text("import a.b\nfrom c import d\ndef f():\n    from e.f import g as h\nfrom . import i\n")
    assert imported(file) == {"a.b", "c", "c.d", "e.f", "e.f.g"}
    assert {"localrun.cli", "localrun.quant.open"} <= set(modules())
