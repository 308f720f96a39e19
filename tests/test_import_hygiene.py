"""What may be imported when: a quick command line, and a user interface that does not load the engine."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

HEAVY = ("numpy", "numba", "llvmlite", "llama_cpp", "gguf", "textual", "rich", "jinja2", "xxhash")


def loaded_after(code: str) -> set[str]:
    """Top-level packages in a fresh interpreter after `code`."""
    script = f"import sys\n{code}\nprint('\\n'.join(sorted({{name.split('.')[0] for name in sys.modules}})), file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=True
    )
    return set(done.stderr.split())


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["run", "--help"], ["chat", "--help"], ["eval", "--help"], ["doctor", "--help"]],
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    loaded = loaded_after(f"from localrun.cli import main\nassert main({arguments!r}) == 0")
    assert "localrun" in loaded
    assert loaded.isdisjoint(HEAVY), loaded & set(HEAVY)


@pytest.mark.parametrize("command", ["convert", "verify"])
def test_help_of_file_commands_imports_no_engine(command: str) -> None:
    loaded = loaded_after(f"from localrun.cli import main\nassert main([{command!r}, '--help']) == 0")
    assert loaded.isdisjoint({"numba", "llvmlite", "llama_cpp", "textual", "rich"})


def test_the_parent_side_of_the_engine_imports_nothing_heavy() -> None:
    loaded = loaded_after(
        "import localrun.engine.process.process, localrun.engine.process.protocol, localrun.commands.common"
    )
    assert loaded.isdisjoint(HEAVY), loaded & set(HEAVY)


def test_the_engine_never_imports_the_user_interface() -> None:
    loaded = loaded_after(
        "import localrun.engine.process.host, localrun.engine.process.worker, localrun.engine.measure.evaluate"
    )
    assert "llama_cpp" in loaded
    assert loaded.isdisjoint({"textual", "rich"})


def test_every_package_has_its_layers() -> None:
    root = Path(__file__).parents[1]
    linter = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["importlinter"]
    layered = {
        container
        for contract in linter["contracts"]
        if contract["type"] == "layers" and contract["exhaustive"]
        for container in contract["containers"]
    }
    with_modules = {
        ".".join(path.parent.relative_to(root).parts)
        for path in (root / "localrun").rglob("*.py")
        if path.name != "__init__.py" and (path.parent / "__init__.py").exists()
    }
    assert layered == with_modules
