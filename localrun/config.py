"""The user's settings: defaults < settings file < environment < command line.

The file is TOML, `config.toml` in `paths.config_dir()`, with one table per dataclass below. Every setting has an environment
variable `LOCALRUN_<NAME>`. The command line overrides with what was typed, nothing else.
"""

from __future__ import annotations

import dataclasses
import os
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from localrun import paths
from localrun.errors import UsageError
from localrun.units import parse_size

FILE_NAME = "config.toml"


def _size(value: object) -> int:
    return parse_size(str(value))


def _count(value: object) -> int:
    number = int(str(value))
    if number < 0:
        raise ValueError("must not be negative")
    return number


def _number(value: object) -> float:
    return float(str(value))


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("must be a string")
    return value


def _switch(value: object) -> bool:
    words = {"true": True, "1": True, "false": False, "0": False}
    if str(value).lower() not in words:
        raise ValueError("must be true or false")
    return words[str(value).lower()]


def _setting(default: Any, parse: Callable[[object], Any]) -> Any:
    return field(default=default, metadata={"parse": parse})


DEFAULT_BATCH = 512
"""llama.cpp's n_ubatch."""


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Table `[engine]`: how models are loaded.

    Attributes:
        model: model to use when none is named; a path. Default: the demo model.
        ram: bytes for expert slots in RAM, e.g. `"16GiB"`. Default: what is available less some headroom.
        vram: bytes on the GPU. Default: what is free.
        gpu: `auto`, `none` or devices' names, separated by commas.
        rpc: `HOST:PORT` of llama.cpp's rpc-server on other machines, separated by commas.
        context: tokens of context; 0: as the model allows, at most 32768.
        threads: CPU threads; 0: one per physical core.
        batch: tokens of a prompt that are read in one step: more need more memory, and each expert less often from the drive.
        kv: number format of the KV cache: f16, bf16, q8_0, q4_0 or f32.
        mirror: path of a second copy of the model on another drive, read in parallel.
        adaptive: answer a miss from the base's smaller copy and fetch the better one later.
    """

    model: str | None = _setting(None, _text)
    ram: int | None = _setting(None, _size)
    vram: int | None = _setting(None, _size)
    gpu: str = _setting("auto", _text)
    rpc: str | None = _setting(None, _text)
    context: int = _setting(0, _count)
    threads: int = _setting(0, _count)
    batch: int = _setting(DEFAULT_BATCH, _count)
    kv: str = _setting("f16", _text)
    mirror: str | None = _setting(None, _text)
    adaptive: bool = _setting(False, _switch)


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """Table `[sampling]`: how tokens are chosen; see `SamplingOptions`.

    Attributes:
        temperature: 0 always takes the most likely token.
        top_p: keep the smallest set of tokens with this probability.
        top_k: keep the k most likely tokens; 0: all.
        min_p: keep tokens at least this fraction as likely as the most likely one.
        think: `off`, `high` or `max`.
    """

    temperature: float = _setting(1.0, _number)
    top_p: float = _setting(1.0, _number)
    top_k: int = _setting(0, _count)
    min_p: float = _setting(0.0, _number)
    think: str = _setting("off", _text)


@dataclass(frozen=True, slots=True)
class Settings:
    """All tables."""

    engine: EngineSettings = EngineSettings()
    sampling: SamplingSettings = SamplingSettings()


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
    result = {}
    for table in dataclasses.fields(Settings):
        kind = type(getattr(Settings(), table.name))
        known = {f.name: f.metadata["parse"] for f in dataclasses.fields(kind)}
        values = {}
        for key, value in tables.pop(table.name, {}).items():
            if key not in known:
                raise UsageError(f"{path}: [{table.name}] has no setting '{key}'", hint=f"known: {', '.join(known)}")
            values[key] = _parse(known[key], value, f"{path}: [{table.name}] {key}")
        for key, parse in known.items():
            variable = f"LOCALRUN_{key.upper()}"
            if environment.get(variable):
                values[key] = _parse(parse, environment[variable], variable)
        result[table.name] = kind(**values)
    if tables:
        raise UsageError(f"{path}: unknown table or key '{min(tables)}'", hint="known tables: [engine], [sampling]")
    return Settings(**result)


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        tables = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not a settings file: {error}") from None
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise UsageError(f"{path}: unknown table or key '{name}'", hint="settings stand in tables, e.g. [engine]")
    return tables


def _parse(parse: Callable[[object], Any], value: object, where: str) -> Any:
    try:
        return parse(value)
    except ValueError as error:
        raise UsageError(f"{where}: {value!r}: {error}") from None
