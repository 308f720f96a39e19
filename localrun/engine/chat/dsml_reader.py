"""Converts the parameters of a tool call to JSON while the model is writing them.

A value that is declared a string, or must be one by the tool's schema, is streamed. Any other value is passed on when its
parameter ends, because only then is it known to be JSON. All guesses are flagged.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from localrun.engine.chat.dsml import to_json
from localrun.engine.chat.dsml_tags import Tag
from localrun.engine.chat.messages import Json
from localrun.engine.chat.stream_events import Problem
from localrun.engine.chat.tool_types import ALL_TYPES, ToolTypes, fits

WRAPPER = "arguments"
"""A parameter with this name that is not in the schema wraps all others: the encoder does this with arguments it can't parse."""

_IMPOSSIBLE = re.compile(r"[<>\x00-\x1f\ud800-\udfff]")
_PYTHON = {"True": "true", "False": "false", "None": "null"}


class CallReader:
    """Assembles the arguments of one call. Methods return what they append to the arguments' JSON text.

    Args:
        types: from the tool's schema; None: unknown tool.

    Attributes:
        problems: what had to be guessed so far.
        body: text found between parameters.
    """

    def __init__(self, index: int, name: str, types: ToolTypes | None = None) -> None:
        self.index = index
        self.name = name
        self.problems: list[Problem] = [] if name else ["no_name"]
        self.body: list[str] = []
        self._types = types
        self._pieces: list[str] = []
        self._names: set[str] = set()
        self._open: Tag | None = None
        self._streams = False
        self._value: list[str] = []  # of the open parameter, if it may be JSON

    @property
    def arguments(self) -> str:
        """JSON so far."""
        return "".join(self._pieces)

    @property
    def between_parameters(self) -> bool:
        """At least one parameter was read, and nothing else."""
        return bool(self._names) and not self._text()

    @property
    def has_parameters(self) -> bool:
        return bool(self._names)

    def open_value(self, tag: Tag) -> str:
        """A parameter begins."""
        self._value.clear()
        if tag.odd:
            self.problems.append("odd_tag")
        if tag.broken or (tag.odd and (not tag.name or _IMPOSSIBLE.search(tag.name))):
            self.problems.append("bad_name")
        if tag.name in self._names:
            self.problems.append("duplicate_parameter")
            self._open = None
            return ""
        self._open = tag
        types = self._allowed(tag.name)
        if self._may_wrap(tag.name):
            self._streams = False
        elif types == ALL_TYPES or ("string" in types and types - {"string", "null"}):
            self._streams = tag.mode == "true"
        else:
            self._streams = "string" in types and tag.mode != "false"
        return self._add(self._key() + '"') if self._streams else ""

    def add_value(self, text: str) -> str:
        """More of the parameter's text."""
        if self._open is None or not text:
            return ""
        if self._streams:
            return self._add(to_json(text)[1:-1])
        self._value.append(text)
        return ""

    def close_value(self) -> str:
        """The parameter ends."""
        if self._open is None:
            return ""
        if self._streams:
            return self._add('"')
        text = "".join(self._value)
        if self._may_wrap(self._open.name) and (members := self._unwrapped(text)) is not None:
            self.problems.append("unwrapped")
            return self._add(members)
        return self._add(self._key() + self._json(self._open, text))

    def close(self) -> str:
        """The call ends."""
        body = self._text()
        if self._names:
            if body:
                self.problems.append("stray_text")
            return self._add("}")
        if not body:
            return self._add("{}")
        self.problems.append("not_parameters")
        if (members := self._unwrapped(body, WRAPPER)) is not None:
            self.problems.append("unwrapped")
            return self._add(members + "}")
        return self._add(body if body[0] == "{" and _parsed(body) is not None else to_json({WRAPPER: body}))

    def _text(self) -> str:
        return "".join(self.body).strip()

    def _allowed(self, name: str) -> frozenset[str]:
        return ALL_TYPES if self._types is None else self._types.types.get(name, ALL_TYPES)

    def _json(self, tag: Tag, text: str) -> str:
        """The value as JSON: by the schema if that decides, else by what the tag declares, else by its looks."""
        types = self._allowed(tag.name)
        decides = types != ALL_TYPES
        parsed = _parsed(text)
        if tag.mode == "true":
            # The schema has no place for a string, or this may have been a wrapper.
            if decides and "string" not in types and parsed is not None and fits(parsed.value, types):
                self.problems.append("retyped")
                return text.strip()
            return to_json(text)
        if parsed is not None and (not decides or fits(parsed.value, types)):
            if not tag.mode and not decides:
                self.problems.append("guessed_type")
            return text.strip()
        if decides and "string" in types:
            if tag.mode == "false":
                self.problems.append("retyped")
            return to_json(text)
        if decides and (word := _PYTHON.get(text.strip())) is not None and fits(json.loads(word), types):
            self.problems.append("guessed_type")
            return word
        if parsed is not None:
            return text.strip()  # not the type in the schema: left for the tool to reject
        self.problems.append("bad_json" if tag.mode == "false" or decides else "guessed_type")
        return to_json(text)

    def _may_wrap(self, name: str) -> bool:
        known = None if self._types is None else self._types.names
        return name == WRAPPER and not self._names and known is not None and name not in known

    def _unwrapped(self, text: str, inside: str = "") -> str | None:
        """The members of a JSON object, without its end, if all are in the schema; with `inside`, those of the only object in
        it."""
        parsed = _parsed(text)
        value: Json = None if parsed is None else parsed.value
        if inside:
            if not isinstance(value, Mapping) or value.keys() != {inside} or not self._may_wrap(inside):
                return None
            try:
                value = json.loads(text)[inside]
            except ValueError:
                return None  # a number of thousands of digits
            return self._unwrapped(value if isinstance(value, str) else to_json(value))
        if not isinstance(value, Mapping) or not value or self._types is None or not self._types.accepts(value):
            return None
        self._names |= value.keys()
        return text.strip().removesuffix("}").rstrip()

    def _key(self) -> str:
        assert self._open is not None
        separator = ", " if self._names else "{"
        self._names.add(self._open.name)
        return f"{separator}{to_json(self._open.name)}: "

    def _add(self, piece: str) -> str:
        self._pieces.append(piece)
        return piece


class _Parsed:
    __slots__ = ("value",)

    def __init__(self, value: Json) -> None:
        self.value = value


def _parsed(text: str) -> _Parsed | None:
    """The value of a JSON text; None if it is invalid. Numbers keep their type, not their value."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)  # NaN and Infinity, which Python's parser takes

    def whole(digits: str) -> int:
        return 0  # Python refuses to convert thousands of digits

    try:
        return _Parsed(json.loads(text, parse_constant=refuse, parse_int=whole))
    except (ValueError, RecursionError):
        return None
