"""Presets: named system prompt, sampling and thinking, one table each in `presets.toml` in the config folder.

The file is small and may be edited by hand, so it is reread at every use.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from localrun import paths
from localrun.atomic import replacing
from localrun.errors import HostError, UsageError
from localrun.options import THINK_MODES
from localrun.tui.options import NAMES, ChatOptions, from_json, to_json, with_value

FILE_NAME = "presets.toml"
RESERVED = ("save", "delete")
_NAME = re.compile(r"[\w.-]{1,40}")


def path() -> Path:
    return paths.config_dir() / FILE_NAME


def names() -> list[str]:
    """All presets. Raises UsageError for an invalid file."""
    return sorted(_tables())


def load(name: str) -> ChatOptions:
    """The values of a preset; everything else has the program's default.

    Raises:
        UsageError: there is no such preset, or its values are invalid.
    """
    tables = _tables()
    if name not in tables:
        known = f"known: {', '.join(sorted(tables))}" if tables else f"/preset save {name} saves the current settings"
        raise UsageError(f"there is no preset '{name}'", hint=known)
    table = tables[name]
    if not isinstance(table, dict):
        raise UsageError(f"{path()}: {name} is not a table")
    _check(name, table)
    return from_json(table, ChatOptions())


def save(name: str, options: ChatOptions) -> None:
    """Saves settings under a name, replacing an existing preset. Raises UsageError, StoreError."""
    if not _NAME.fullmatch(name) or name in RESERVED:
        raise UsageError(
            f"'{name}' is not a valid preset name", hint="letters, digits, - and _, at most 40; not save or delete"
        )
    _write({**_tables(), name: {key: value for key, value in to_json(options).items() if value is not None}})


def delete(name: str) -> None:
    """Raises UsageError: there is none."""
    load(name)
    _write({other: table for other, table in _tables().items() if other != name})


def _check(name: str, table: Mapping[str, Any]) -> None:
    for key, value in table.items():
        try:
            if key in NAMES:
                with_value(ChatOptions(), key, str(value))
            elif key not in ("system", "think"):
                raise UsageError(f"unknown value '{key}'", hint=f"known: system, think, {', '.join(NAMES)}")
            elif not isinstance(value, str):
                raise UsageError(f"{key}: expected text")
            elif key == "think" and value not in THINK_MODES:
                raise UsageError(f"think '{value}': expected one of {', '.join(THINK_MODES)}")
        except UsageError as error:
            raise UsageError(f"{path()}: [{name}] {error}", hint=error.hint) from None


def _tables() -> dict[str, Any]:
    try:
        return tomllib.loads(path().read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path()}: {error}", hint="fix it, or move it elsewhere") from error
    except OSError as error:
        raise HostError(f"{path()}: {error.strerror}") from error


def _write(tables: Mapping[str, Any]) -> None:
    """Raises UsageError for hand-edited values that can't be written back."""
    lines: list[str] = []
    for name in sorted(tables):
        if not isinstance(tables[name], dict):
            raise UsageError(f"{path()}: {name} is not a table", hint="fix it, or move it elsewhere")
        lines += [f"[{_text(name)}]", *(f"{_text(key)} = {_value(value)}" for key, value in tables[name].items()), ""]
    path().parent.mkdir(parents=True, exist_ok=True)
    with replacing(path()) as file:
        file.write("\n".join(lines).encode())


def _value(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return _text(value)
    raise UsageError(f"{path()}: {value!r} is not a valid preset value", hint="fix it, or move it elsewhere")


def _text(text: str) -> str:
    """A TOML string or key: like JSON, but DEL must be escaped, too."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
