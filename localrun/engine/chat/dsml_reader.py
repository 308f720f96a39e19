"""Reading DSML that a model wrote: what a tag is, and how the parameters of a call become JSON.

Both work on text that is still being written. Malformed markup is read as far as its meaning is clear, and flagged.
"""

from __future__ import annotations

import json
import re
from typing import NamedTuple

from localrun.engine.chat.dsml import to_json
from localrun.engine.chat.stream_events import Problem

DSML_MARK = "\ud800"
"""Stands for the token `｜DSML｜` in text to be read. Half a surrogate pair can't occur in decoded text, so no text can
imitate it."""

_TAG_NAMES = ("tool_calls", "function_calls", "invoke", "parameter")
_TAG_NAME = re.compile(r"\s*(" + "|".join(_TAG_NAMES) + ")(?![A-Za-z_])")
_UNFINISHED_NAME = re.compile(r"\s*([A-Za-z_]*)\Z")
_CLOSE = re.compile(r"\s*>")
_INVOKE = re.compile(r'\s+name="([^"]*)"[^>]*>')
# The official expression: a name may contain quotes, what follows it is fixed.
_PARAMETER = re.compile(r'\s+name="(.*?)" string="(true|false)">', re.DOTALL)
_LOOSE_NAME = re.compile(r"""\s*(?:name\s*=)?\s*["']?([^"'>\n]*)["']?[^>\n]*>?""")


class Tag(NamedTuple):
    """A tag in `text[start:end]`.

    Attributes:
        kind: `calls`, `invoke` or `parameter`, with a slash before it if it closes; `?` if it is no tag of ours; `cut`
            if the text ends inside its name.
        name: of the tool or the parameter.
        mode: what a parameter's `string=` says; empty if that can't be read.
    """

    kind: str
    start: int
    end: int
    name: str = ""
    mode: str = ""


def next_tag(text: str, *, final: bool) -> Tag | None:
    """The first tag in `text`; None if there is none, or (unless `final`) if more text could still change it."""
    if (mark := text.find(DSML_MARK)) < 0:
        return None
    start = bracket_before(text, mark)
    if start == mark:
        return Tag("?", mark, mark + 1)
    slash = "/" if text[mark - 1] == "/" else ""
    following = text.find(DSML_MARK, mark + 1)
    # A tag contains one mark, so what stands behind the next one can't be part of it.
    settled = final or following >= 0
    body = text[mark + 1 : len(text) if following < 0 else bracket_before(text, following)]
    if following < 0 and (begun := _UNFINISHED_NAME.match(body)) and begun[1] not in _TAG_NAMES:
        if not final:
            return None
        if any(name.startswith(begun[1]) for name in _TAG_NAMES):
            return Tag("cut", start, len(text))
    if not settled and _UNFINISHED_NAME.match(body):
        return None
    if (named := _TAG_NAME.match(body)) is None:
        return Tag("?", start, mark + 1)
    kind = "calls" if named[1].endswith("_calls") else named[1]
    rest, position = body[named.end() :], mark + 1 + named.end()
    if slash or kind == "calls":
        close = _CLOSE.match(rest)
        if close is None and not settled and not rest.strip():
            return None
        return Tag(slash + kind, start, position + (close.end() if close else 0))
    if (strict := (_INVOKE if kind == "invoke" else _PARAMETER).match(rest)) is not None:
        return Tag(kind, start, position + strict.end(), strict[1], strict[2] if kind == "parameter" else "")
    if not settled:
        return None
    loose = _LOOSE_NAME.match(rest)
    assert loose is not None  # it matches the empty string
    return Tag(kind, start, position + loose.end(), loose[1].strip())


def bracket_before(text: str, mark: int) -> int:
    """Where the `<` or `</` right before `text[mark]` begins; `mark` if there is none."""
    if text.endswith("</", 0, mark):
        return mark - 2
    return mark - 1 if text.endswith("<", 0, mark) else mark


class CallReader:
    """Puts the arguments of one call together. Methods return what they add to the JSON text of the arguments.

    Attributes:
        problems: what had to be guessed so far.
        body: text found between the parameters.
    """

    def __init__(self, index: int, name: str) -> None:
        self.index = index
        self.name = name
        self.problems: list[Problem] = [] if name else ["no_name"]
        self.body = ""
        self._pieces: list[str] = []
        self._names: set[str] = set()
        self._open: Tag | None = None
        self._value: list[str] = []  # of the open parameter, if it may be JSON

    @property
    def arguments(self) -> str:
        """JSON so far."""
        return "".join(self._pieces)

    @property
    def between_parameters(self) -> bool:
        """At least one parameter was read, and nothing else."""
        return bool(self._names) and not self.body.strip()

    def open_value(self, tag: Tag) -> str:
        """A parameter begins. A string is passed on as it comes, anything else when it is known to be JSON."""
        self._value.clear()
        if tag.name in self._names:
            self.problems.append("duplicate_parameter")
            self._open = None
            return ""
        self._open = tag
        return self._add(self._key() + '"') if tag.mode == "true" else ""

    def add_value(self, text: str) -> str:
        """More of the parameter's text."""
        if self._open is None or not text:
            return ""
        if self._open.mode == "true":
            return self._add(to_json(text)[1:-1])
        self._value.append(text)
        return ""

    def close_value(self) -> str:
        """The parameter ends."""
        if self._open is None:
            return ""
        if self._open.mode == "true":
            return self._add('"')
        value = "".join(self._value)
        if _is_json(value):
            return self._add(self._key() + value.strip())
        if self._open.mode == "false":
            self.problems.append("bad_json")
        return self._add(self._key() + to_json(value))

    def close(self) -> str:
        """The call ends."""
        body = self.body.strip()
        if self._names:
            if body:
                self.problems.append("stray_text")
            return self._add("}")
        if not body:
            return self._add("{}")
        self.problems.append("not_parameters")
        return self._add(body if body[0] == "{" and _is_json(body) else to_json({"arguments": body}))

    def _key(self) -> str:
        assert self._open is not None
        separator = ", " if self._names else "{"
        self._names.add(self._open.name)
        return f"{separator}{to_json(self._open.name)}: "

    def _add(self, piece: str) -> str:
        self._pieces.append(piece)
        return piece


def _is_json(text: str) -> bool:
    def refuse(constant: str) -> None:
        raise ValueError(constant)  # NaN and Infinity, which Python's parser takes

    try:
        json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return False
    return True
