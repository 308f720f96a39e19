"""Conversion recipes: small TOML files that define the target formats. Some for typical machines are built in.

    description = "24 GB GPU, 64 GB RAM"
    base = "q2_k"               # format that every expert has
    hot = ["mxfp4:12GiB"]       # better copies, each with its bytes
    dense = "q8_0"              # attention and shared experts
    # target = "24GiB-vram,64GiB-ram"   instead of base and hot: the solver chooses

Unknown keys and formats are errors, found before any work. What is typed on the command line wins over a recipe.
"""

from __future__ import annotations

import importlib.resources
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType

from localrun.errors import FormatError, UsageError
from localrun.quant.precision.solver import HotBudget, Target, parse_type
from localrun.reading import read_small

_KEYS = {"description", "base", "hot", "dense", "target"}
_MAX_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Recipe:
    """A checked recipe; None for unset values."""

    name: str
    description: str = ""
    base: GGMLQuantizationType | None = None
    hot: tuple[HotBudget, ...] = ()
    dense: str | None = None
    target: Target | None = None


def installed_recipes() -> dict[str, Recipe]:
    """The recipes that ship, by name."""
    folder = importlib.resources.files("localrun").joinpath("recipes")
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".toml")), key=lambda file: file.name)
    return {
        file.name.removesuffix(".toml"): parse_recipe(file.name.removesuffix(".toml"), file.read_bytes(), file.name)
        for file in files
    }


def read_recipe(name_or_path: str) -> Recipe:
    """A built-in recipe by name, or one from a file.

    Raises:
        UsageError: no such recipe.
        FormatError: not a recipe; names the file and the key.
        StoreError: can't be read.
    """
    path = Path(name_or_path).expanduser()
    if path.suffix != ".toml" and not path.is_file():
        recipes = installed_recipes()
        if name_or_path not in recipes:
            raise UsageError(f"no recipe '{name_or_path}'", hint=f"give a .toml file or one of: {', '.join(recipes)}")
        return recipes[name_or_path]
    return parse_recipe(path.stem, read_small(path, _MAX_BYTES, "a recipe"), str(path))


def parse_recipe(name: str, data: bytes, where: str) -> Recipe:
    """Raises FormatError naming `where` and the key."""
    try:
        values: Mapping[str, Any] = tomllib.loads(data.decode("utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise FormatError(f"{where}: not TOML: {error}") from None
    if unknown := sorted(set(values) - _KEYS):
        raise FormatError(f"{where}: unknown key '{unknown[0]}'", hint=f"known keys: {', '.join(sorted(_KEYS))}")
    for key, value in values.items():
        if key == "hot":
            if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
                raise FormatError(f'{where}: hot: expected a list of strings like "mxfp4:12GiB"')
        elif not isinstance(value, str):
            raise FormatError(f"{where}: {key}: expected a string")
    if "target" in values and ("base" in values or "hot" in values):
        raise FormatError(f"{where}: target can't be combined with base or hot", hint="leave one of them out")
    if not set(values) & {"base", "hot", "target", "dense"}:
        raise FormatError(f"{where}: sets no formats", hint="set base, hot, dense or target")
    try:
        return Recipe(
            name=name,
            description=values.get("description", ""),
            base=parse_type(values["base"]) if "base" in values else None,
            hot=tuple(HotBudget.parse(text) for text in values.get("hot", ())),
            dense=values.get("dense"),
            target=Target.parse(values["target"]) if "target" in values else None,
        )
    except UsageError as error:
        raise FormatError(f"{where}: {error}", hint=error.hint) from None
