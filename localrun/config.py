"""The user's settings: defaults < settings file < environment < command line.

The file is `config.toml` in `paths.config_dir()`, with one table per group of options (`options.py`) and `[models]`, names for
paths. Every option has an environment variable `LOCALRUN_<NAME>`. Only flags that were typed override.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from localrun import paths
from localrun.errors import UsageError
from localrun.option import Option, Where
from localrun.options import OPTIONS, TABLES, those

FILE_NAME = "config.toml"
MODELS_TABLE = "models"


@dataclass(frozen=True, slots=True)
class Settings:
    """The value of every option, by its name; defaults included.

    Attributes:
        models: the user's names for models -> path as written.
        given: options that the user set in the file, the environment or by flag, even to the default value.
    """

    values: Mapping[str, Any] = field(default_factory=lambda: {option.name: option.default for option in OPTIONS})
    models: Mapping[str, str] = field(default_factory=dict)
    given: frozenset[str] = field(default=frozenset(), compare=False)

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def changed(self, **values: Any) -> Settings:
        """With these values instead."""
        unknown = values.keys() - self.values.keys()
        assert not unknown, unknown
        return Settings({**self.values, **values}, self.models, self.given | values.keys())

    def overridden(self, typed: object, names: Iterable[str]) -> Settings:
        """Overridden by what was typed: attributes of `typed`, by option name; None means not typed."""
        given = {name: value for name in names if (value := getattr(typed, name, None)) is not None}
        return self.changed(**given)


def load(path: Path | None = None, environment: Mapping[str, str] | None = None) -> Settings:
    """Settings from the file and the environment.

    Args:
        path: default: `config.toml` in the user's configuration directory; need not exist.

    Raises:
        UsageError: an unknown key, or a value that can't be read; names the file or variable.
    """
    path = path or paths.config_dir() / FILE_NAME
    environment = os.environ if environment is None else environment
    tables = _read(path)
    models = _models(tables.pop(MODELS_TABLE, {}), path)
    values = dict(Settings().values)
    given = set()
    for table in TABLES:
        known = {option.name: option for option in those(table, Where.FILE)}
        for key, value in tables.pop(table, {}).items():
            if key not in known:
                raise UsageError(f"{path}: [{table}] has no setting '{key}'", hint=f"known: {', '.join(known)}")
            values[key] = _parse(known[key], value, f"{path}: [{table}] {key}")
            given.add(key)
        for key, option in known.items():
            if text := environment.get(option.variable):
                values[key] = _parse(option, text, option.variable)
                given.add(key)
    if tables:
        names = ", ".join(f"[{table}]" for table in (*TABLES, MODELS_TABLE))
        raise UsageError(f"{path}: unknown table or key '{min(tables)}'", hint=f"known tables: {names}")
    return Settings(values, models, frozenset(given))


def _models(table: Mapping[str, Any], path: Path) -> dict[str, str]:
    for name, value in table.items():
        if not isinstance(value, str) or not value:
            raise UsageError(f"{path}: [{MODELS_TABLE}] {name}: {value!r}: expected a path")
        if "/" in name or name != name.strip() or not name:
            raise UsageError(
                f"{path}: [{MODELS_TABLE}] {name!r}: a name must not contain a slash, or begin or end with a blank"
            )
    return dict(table)


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        tables = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not a settings file: {error}") from None
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise UsageError(f"{path}: unknown table or key '{name}'", hint="settings belong in tables, e.g. [engine]")
    return tables


def _parse(option: Option, value: object, where: str) -> Any:
    try:
        return option.parse(value)
    except UsageError as error:
        reason = str(error).removeprefix(f"{option.name}: ").removeprefix(f"{option.name} ")
        raise UsageError(f"{where}: {reason}", hint=error.hint) from None
