"""A public class's name means one thing in the whole package (docs/architecture.md, "Words")."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "localrun"


def classes() -> dict[str, list[str]]:
    """Name of each public top-level class -> the modules that define it."""
    defined = defaultdict(list)
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                defined[node.name].append(path.relative_to(PACKAGE).as_posix())
    return defined


def test_no_two_public_classes_share_a_name() -> None:
    defined = classes()
    assert "Engine" in defined
    shared = {name: modules for name, modules in defined.items() if len(modules) > 1}
    assert shared == {}, "name each for what it alone is"
