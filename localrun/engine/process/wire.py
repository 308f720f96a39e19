"""Messages as bytes: one JSON object per line, checked against the types in `protocol` when it is read.

Imports the standard library only, as `protocol` does.

Departure from strict JSON: infinities and NaN are written as Python's `json` does; both ends are this module.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, TypeVar, Union

from localrun.engine.process import protocol
from localrun.engine.process.protocol import Command, Event
from localrun.errors import LocalrunError


class ProtocolError(LocalrunError, ValueError):
    """A line that is no message of this protocol: the two ends are of different versions, or something else wrote to
    the pipe."""


M = TypeVar("M", bound=Command | Event)


def encode(message: Command | Event) -> bytes:
    """One line, ASCII, ending in a newline."""
    body = {"type": type(message).__name__, **dataclasses.asdict(message)}
    return json.dumps(body, separators=(",", ":")).encode("ascii") + b"\n"


def decode_command(line: bytes) -> Command:
    """Inverse of `encode` for commands. Raises ProtocolError."""
    return _decode(line, Command)


def decode_event(line: bytes) -> Event:
    """Inverse of `encode` for events. Raises ProtocolError."""
    return _decode(line, Event)


def _decode(line: bytes, base: type[M]) -> M:
    try:
        body = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"not a message: {line[:80]!r} ({error})") from None
    if not isinstance(body, dict):
        raise ProtocolError(f"not a message: {line[:80]!r}")
    kind = vars(protocol).get(str(body.get("type")))
    if not (isinstance(kind, type) and issubclass(kind, base) and kind is not base):
        raise ProtocolError(f"unknown {base.__name__.lower()} {body.get('type')!r}")
    del body["type"]
    return typing.cast(M, _build(kind, body, kind.__name__))


@cache
def _field_types(cls: type) -> dict[str, tuple[Any, bool]]:
    """Name -> (type, is required)."""
    hints = typing.get_type_hints(cls)
    missing = dataclasses.MISSING
    return {
        f.name: (hints[f.name], f.default is missing and f.default_factory is missing) for f in dataclasses.fields(cls)
    }


def _build(cls: type, body: object, where: str) -> Any:
    if not isinstance(body, dict):
        raise ProtocolError(f"{where}: expected an object, got {type(body).__name__}")
    known = _field_types(cls)
    if unknown := body.keys() - known.keys():
        raise ProtocolError(f"{where}: unknown field {sorted(unknown)[0]!r}")
    for name, (_, required) in known.items():
        if required and name not in body:
            raise ProtocolError(f"{where}: field {name!r} is missing")
    return cls(**{name: _convert(known[name][0], value, f"{where}.{name}") for name, value in body.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as `hint` says, checked. Knows the kinds of types that the messages use."""
    if hint is Any:
        return value
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (inner,) = (a for a in args if a is not type(None))
        return _convert(inner, value, where)
    if origin is Literal and value in args:
        return value
    if origin is tuple and isinstance(value, list):
        return tuple(_convert(args[0], v, where) for v in value)
    if origin is Mapping and isinstance(value, dict):
        return value
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _build(hint, value, where)
    if hint is float and type(value) in (int, float):
        return float(value)
    if hint in (int, str, bool) and type(value) is hint:
        return value
    raise ProtocolError(f"{where}: {value!r:.80} is not {getattr(hint, '__name__', hint)}")
