"""The name of a public class or type means one thing in the whole package (docs/architecture.md, "Words")."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "localrun"


def types() -> dict[str, dict[str, str]]:
    """Name of each public top-level class and type alias -> the modules that define it -> what it is there."""
    defined: dict[str, dict[str, str]] = defaultdict(dict)
    for path in sorted(PACKAGE.rglob("*.py")):
        module = path.relative_to(PACKAGE).as_posix()
        for node in ast.parse(path.read_text("utf-8")).body:
            match node:
                case ast.ClassDef(name=name):
                    meaning = module
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    meaning = ast.unparse(value)
                case _:
                    continue
            if re.match("[A-Z]+[a-z]", name):  # constants are in capitals
                defined[name][module] = meaning
    return defined


def test_a_public_class_shares_its_name_with_no_other_type() -> None:
    """Aliases may share one: `Json` is the same everywhere, and a `Progress` is what its module calls back."""
    defined = types()
    assert {"Engine", "ByteRate"} <= defined.keys()
    shared = {
        name: meant
        for name, meant in defined.items()
        if len(meant) > 1 and any(module == meaning for module, meaning in meant.items())
    }
    assert shared == {}, "name each for what it alone is"
