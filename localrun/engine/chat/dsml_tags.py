"""Finds DSML tags in streamed text and parses them, including misspelled ones.

The official form is `<｜DSML｜invoke name="f">` and `<｜DSML｜parameter name="k" string="true">`. Models also write attributes in
another order, with missing or typographic quotes, extra spaces, line breaks, invented attributes, extra bars around the token,
or misspelled closing tags. All of this is accepted where it is unambiguous, and marked as `odd`.

Whether a tag is complete depends only on the text up to its end and slightly beyond, never on how the text is chunked. A tag
has at most `MAX_TAG` characters, so rescanning an incomplete one with each chunk has bounded cost.
"""

from __future__ import annotations

import re
from typing import NamedTuple

DSML_MARK = "\ud800"
"""Represents the token `｜DSML｜` in text to be parsed. Decoded text never contains an unpaired surrogate, so no text can imitate
it."""

MAX_TAG = 1024
"""Maximum characters after the mark; anything longer is text, not a tag."""

HELD = re.compile(r"\n{0,2}(?:<\s{0,2}/?\s{0,2}[｜|]?)?\Z")
"""What may precede the mark at the end of a text: line breaks that belong to the markup, and the bracket."""
HELD_IN_VALUE = re.compile(r"\n?(?:<\s{0,2}/?\s{0,2}[｜|]?)?\Z")
HELD_CHARACTERS = 10
"""The most that these two can match."""

_BRACKET = re.compile(r"<\s{0,2}(/?)\s{0,2}[｜|]?\Z")
_NAME = re.compile(r"[｜|]?\s*([A-Za-z_]+)(?![A-Za-z_])")
_UNFINISHED_NAME = re.compile(r"[｜|]?\s*([A-Za-z_]*)\Z")
_KINDS = {"tool_calls": "calls", "function_calls": "calls", "invoke": "invoke", "parameter": "parameter"}
# What closing tags are called by mistake. Opening ones are not guessed: they would begin something.
_MISSPELT = re.compile(
    r"(?P<parameter>par\w*|arg\w*)|(?P<invoke>inv\w*|(?:tool|function)(?:_call)?)|(?P<calls>\w*calls)"
)
_CLOSE = re.compile(r"\s*>")

_KEY = re.compile(r"([A-Za-z_][\w:.-]*)\s*=\s*")
_BARE = re.compile(r"[^\s>=]+")
_UNQUOTED = re.compile(r"""[^\s>"'“”‘’]*""")
_QUOTES = {'"': '"”', "'": "'’", "“": '”“"', "”": '”"', "„": "“”", "‘": "’‘'", "’": "’'", "«": "»", "`": "`"}
# A quote ends a value if the tag or the next attribute follows; otherwise it is part of it (the official expression lets
# names contain quotes).
_BEHIND_QUOTE = re.compile(r"""\s*/?>|\s+[A-Za-z_][\w:.-]*\s*(?:=|/?>)|[A-Za-z_][\w:.-]*\s*=\s*["'“‘]""")
_MAYBE_BEHIND_QUOTE = re.compile(r"\s*/?\Z|\s+[A-Za-z_][\w:.-]*\s*/?\Z|[A-Za-z_][\w:.-]*\s*(?:=\s*)?\Z")

_TRUE, _FALSE = {"true", "1", "yes", "string", "str", "text"}, {"false", "0", "no"}
_JSON_TYPES = {
    "number",
    "integer",
    "int",
    "float",
    "boolean",
    "bool",
    "array",
    "list",
    "object",
    "dict",
    "json",
    "null",
}


class Tag(NamedTuple):
    """A tag in `text[start:end]`.

    Attributes:
        kind: `calls`, `invoke` or `parameter`, preceded by a slash if it closes; `?` for an unknown tag; `cut` if the text ends
            inside it.
        name: of the tool or the parameter.
        mode: a parameter's `string` attribute: `true`, `false`, or empty if missing or invalid.
        odd: not in the official form, but unambiguous.
        broken: its name is unterminated.
        closed: it closes itself (`<... />`).
        hints: values of unknown attributes.
    """

    kind: str
    start: int
    end: int
    name: str = ""
    mode: str = ""
    odd: bool = False
    broken: bool = False
    closed: bool = False
    hints: tuple[str, ...] = ()


def next_tag(text: str, *, final: bool, start: int = 0) -> Tag | None:
    """The first tag in `text[start:]`; None if there is none, or (unless `final`) if more text could still change it."""
    if (mark := text.find(DSML_MARK, start)) < 0:
        return None
    begin, closing, odd = bracket_before(text, mark, start)
    if begin == mark:
        return Tag("?", mark, mark + 1)
    following = text.find(DSML_MARK, mark + 1, mark + 1 + MAX_TAG)
    # A tag contains one mark, so anything after the next one can't be part of it.
    end = bracket_before(text, following, mark + 1)[0] if following >= 0 else min(len(text), mark + 1 + MAX_TAG)
    settled = final or following >= 0 or end < len(text)
    body = text[mark + 1 : end]
    if (unfinished := _UNFINISHED_NAME.match(body)) and following < 0 and end == len(text):
        if not final:
            return None
        if unfinished[1] not in _KINDS and any(name.startswith(unfinished[1]) for name in _KINDS):
            return Tag("cut", begin, end)
    named = _NAME.match(body)
    kind, misspelt = _kind(named[1], closing=closing) if named is not None else (None, False)
    if named is None or kind is None:
        return Tag("?", begin, mark + 1)
    odd = odd or misspelt or named.start(1) > 0
    position = mark + 1 + named.end()
    if closing or kind == "calls":
        close = _CLOSE.match(text, position, end)
        if close is None and not settled and not text[position:end].strip():
            return None
        return Tag(("/" if closing else "") + kind, begin, close.end() if close else position, odd=odd)
    return _opening(kind, text[position:end], begin, position, settled=settled, odd=odd)


def bracket_before(text: str, mark: int, start: int = 0) -> tuple[int, bool, bool]:
    """Start of the bracket right before `text[mark]` (`mark` if there is none), whether it closes, whether it is odd."""
    match = _BRACKET.search(text, max(start, mark - HELD_CHARACTERS), mark)
    if match is None:
        return mark, False, False
    return match.start(), match[1] == "/", len(match[0]) != 1 + len(match[1])


def _kind(name: str, *, closing: bool) -> tuple[str | None, bool]:
    if name in _KINDS:
        return _KINDS[name], False
    if closing and (match := _MISSPELT.fullmatch(name)) is not None:
        return match.lastgroup, True
    return None, False


def _opening(kind: str, body: str, begin: int, position: int, *, settled: bool, odd: bool) -> Tag | None:
    read = _attributes(body, settled=settled)
    if read is None:
        return None
    attributes, end, broken, closed = read
    name, mode = attributes.get("name", ""), _mode(attributes)
    official = f' name="{name}">' if kind == "invoke" else f' name="{name}" string="{mode}">'
    odd = odd or body[:end] != official
    hints = tuple(value for key, value in attributes.items() if key not in ("name", "string", "type"))
    return Tag(kind, begin, position + end, name, mode if kind == "parameter" else "", odd, broken, closed, hints)


def _mode(attributes: dict[str, str]) -> str:
    declared = attributes.get("string", "").lower()
    if declared in _TRUE or declared in _FALSE:
        return "true" if declared in _TRUE else "false"
    kind = attributes.get("type", "").lower()
    return "true" if kind in _TRUE else "false" if kind in _JSON_TYPES else ""


def _attributes(body: str, *, settled: bool) -> tuple[dict[str, str], int, bool, bool] | None:
    """The attributes at the start of `body`, where the tag ends, if a value has no end, and if the tag closes itself.

    None: more text could change it.
    """
    found: dict[str, str] = {}
    position, n = 0, len(body)
    while True:
        while position < n and body[position].isspace():
            position += 1
        if position == n:
            return (found, n, False, False) if settled else None
        if body[position] == ">":
            return found, position + 1, False, False
        if body.startswith("/>", position):
            return found, position + 2, False, True
        key = _KEY.match(body, position)
        if key is None:
            bare = _BARE.match(body, position)
            position = bare.end() if bare is not None else position + 1
            if position == n and not settled:
                return None
            continue
        value = _value(body, key.end(), settled=settled)
        if value is None:
            return None
        text, position, ended = value
        found.setdefault(key[1].lower(), text)
        if not ended:
            return found, position, True, False


def _value(body: str, start: int, *, settled: bool) -> tuple[str, int, bool] | None:
    """An attribute's value, where it ends, and whether it does; None: more text could change it."""
    if start == len(body):
        return ("", start, True) if settled else None
    closers = _QUOTES.get(body[start])
    if closers is None:
        bare = _UNQUOTED.match(body, start)
        assert bare is not None  # it matches the empty string
        end = bare.end()
        if end == len(body) and not settled:
            return None
        return bare[0].removesuffix("/"), max(end, start + (end == start)), True
    for at in range(start + 1, len(body)):
        if body[at] not in closers:
            continue
        if _BEHIND_QUOTE.match(body, at + 1):
            return body[start + 1 : at], at + 1, True
        if _MAYBE_BEHIND_QUOTE.match(body, at + 1):
            return (body[start + 1 : at], at + 1, True) if settled else None
    if not settled:
        return None
    line = body[start + 1 :].split("\n", 1)[0]
    return line, start + 1 + len(line), False
