"""Encodes messages as one JSON object per line; validates them against the types in `protocol` when decoding.

msgspec checks types, missing and unknown fields; the text is produced and parsed by Python's `json`, because messages contain
what strict JSON can't represent: lone surrogates (file names that are not UTF-8), infinities and integers of any size.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any, TypeVar, cast

import msgspec

from localrun.engine.process.protocol import Command, Event, PromptCommand
from localrun.errors import LocalrunError


class ProtocolError(LocalrunError, ValueError):
    """A line that is not a message of this protocol: the two ends have different versions, or something else wrote to the
    pipe."""


M = TypeVar("M", bound=Command | Event)


def messages(base: type[M]) -> Iterator[type[M]]:
    """The messages that can be sent, of all that derive from `base`."""
    for kind in cast(list[type[M]], base.__subclasses__()):
        if kind is not PromptCommand:
            yield kind
        yield from messages(kind)


_COMMANDS = {kind.__name__: kind for kind in messages(Command)}
_EVENTS = {kind.__name__: kind for kind in messages(Event)}


def encode(message: Command | Event) -> bytes:
    """One line, ASCII, ending in a newline. Raises TypeError for values that JSON has no form for."""
    return json.dumps(msgspec.to_builtins(message), separators=(",", ":")).encode("ascii") + b"\n"


def decode_command(line: bytes) -> Command:
    """Inverse of `encode` for commands. Raises ProtocolError."""
    return _decode(line, "command", _COMMANDS)


def decode_event(line: bytes) -> Event:
    """Inverse of `encode` for events. Raises ProtocolError."""
    return _decode(line, "event", _EVENTS)


def _decode(line: bytes, what: str, kinds: dict[str, type[M]]) -> M:
    try:
        body = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"not a message: {line[:80]!r} ({error})") from None
    if not isinstance(body, dict):
        raise ProtocolError(f"not a message: {line[:80]!r}")
    name = body.get("type")
    kind = kinds.get(name) if isinstance(name, str) else None
    if kind is None:
        raise ProtocolError(f"unknown {what} {name!r}")
    try:
        message = msgspec.convert(body, kind)
    except msgspec.ValidationError as error:
        raise ProtocolError(f"{name}: {error}") from None
    _refuse_unknown_parts(message, body)
    return message


def _refuse_unknown_parts(message: Command | Event, body: dict[str, Any]) -> None:
    """msgspec overlooks fields that a dataclass lacks; messages have dataclasses at their top level only."""
    for name, value in body.items():
        part = getattr(message, name, None)
        if dataclasses.is_dataclass(part):
            unknown = value.keys() - {field.name for field in dataclasses.fields(part)}
            if unknown:
                raise ProtocolError(f"{body['type']}: unknown field `{min(unknown)}` - at `$.{name}`")
