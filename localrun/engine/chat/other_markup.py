"""Calls in markup without the format's own token: `<|DSML|invoke name="f">`, a missing bar, or a bare `<invoke name="f">`.

Such text may also be an example in an answer. It is treated as a call only if there is no doubt: it starts a line outside of
code blocks, every tag is closed, and the name and all parameters match a tool on offer. Everything else stays text. So, unlike
real calls, it is held back until its end and searched once.
"""

from __future__ import annotations

import re
from collections.abc import Container

from localrun.engine.chat.dsml_tags import DSML_MARK

_BARS = r" ?[|｜]{0,2} ?(?:DSML)? ?[|｜]{0,2} ?"
_NAMES = ("tool_calls", "function_calls", "invoke")
_OPENER = re.compile(rf"(?P<held>\n{{0,2}})<{_BARS}(?P<name>{'|'.join(_NAMES)})(?=[\s>])")
_BEGUN = re.compile(r"<(?: ?[|｜]{0,2} ?(?:D|DS|DSM|DSML)?)? ?[|｜]{0,2} ?(?P<name>[a-z_]*)\Z")
_TAG = re.compile(rf"<(?P<slash>/?){_BARS}(?P<name>{'|'.join(_NAMES)}|parameter)(?=[\s>/])")
_CALLED = re.compile(rf"""(?:[^<>]*>\s*<{_BARS}invoke)?\s+(?:[^<>]*\s)?name\s*=\s*["'“‘]?([^\s"'”’>]+)[^>]*>""")
_CALL_END = re.compile(rf"</{_BARS}invoke\s?>\s*\Z")
_FENCE = re.compile(r"\s{0,3}(?:```|~~~)")
_LONGEST_TAG = 40
_HEAD = 512
"""Within so many characters the tool must be named: text that only looks alike is not held back for long."""
_PATIENCE = 8
"""After this many false positives, the rest of the answer is treated as text."""


class OtherMarkup:
    """Watches an answer's text for the start of such markup, then collects it up to its end. Not thread-safe.

    Args:
        tools: names of the tools on offer.
    """

    def __init__(self, tools: Container[str]) -> None:
        self._tools = tools
        self._line = ""  # the start of the last line
        self._in_code = False
        self._n_refused = 0
        self._opener = ""
        self._pieces: list[str] = []
        self._head = ""  # the text after the opener, until the tool is named
        self._named = False
        self._tail = ""  # the tail of the collected text, in which a closing tag may have begun
        self._close: re.Pattern[str] | None = None

    # --- watching

    def passed(self, text: str) -> None:
        """Text that has become part of the answer."""
        head, *lines = text.split("\n")
        self._line = (self._line + head)[:8]
        for line in lines:
            self._in_code ^= _FENCE.match(self._line) is not None
            self._line = line[:8]

    def find(self, text: str, start: int, end: int) -> re.Match[str] | None:
        """The first thing in `text[start:end]` that looks like an opener; `opens` tells, once all before it has passed."""
        return None if self._n_refused >= _PATIENCE else _OPENER.search(text, start, end)

    def opens(self, match: re.Match[str]) -> bool:
        """Whether it begins a line outside of code. A block within a line is an example, and so is all that follows."""
        if match["held"]:
            return not self._in_code ^ (_FENCE.match(self._line) is not None)
        if not self._in_code and self._line.strip() and match["name"] != "invoke":
            self._n_refused = _PATIENCE
        return not self._in_code and not self._line.strip()

    def held_from(self, text: str) -> int:
        """From where on the end of the text may become an opener."""
        at = text.rfind("<", max(0, len(text) - _LONGEST_TAG))
        begun = _BEGUN.match(text, at) if at >= 0 and self._n_refused < _PATIENCE else None
        if begun is None or not any(name.startswith(begun["name"]) for name in _NAMES):
            return len(text)
        return at - (len(text[:at]) - len(text[:at].rstrip("\n")) > 0) - text.endswith("\n\n", 0, at)

    # --- collecting

    def begin(self, match: re.Match[str]) -> None:
        """Collects from an opener on."""
        word = "invoke" if match["name"] == "invoke" else "(?:tool|function)_calls"
        self._close = re.compile(rf"</{_BARS}{word}\s?>")
        self._opener = match[0]
        self._pieces, self._head, self._tail, self._named = [], "", "", False

    def add(self, text: str) -> int | None:
        """Adds text. Returns how much of it belongs to the call if the call ends here, -1 if this is not a call."""
        assert self._close is not None
        if not self._named:
            self._head = (self._head + text)[:_HEAD]
            called = _CALLED.match(self._head)
            self._named = called is not None and called[1] in self._tools
            if not self._named and (called is not None or len(self._head) == _HEAD):
                self._pieces.append(text)
                return -1
        window = self._tail + text
        match = self._close.search(window)
        if match is None:
            self._pieces.append(text)
            self._tail = window[-_LONGEST_TAG:]
            return None
        n_taken = match.end() - len(self._tail)
        self._pieces.append(text[:n_taken])
        return n_taken

    def collected(self) -> tuple[str, str]:
        """The opener and the text collected after it."""
        return self._opener, "".join(self._pieces)

    def refuse(self) -> None:
        """It was no call."""
        self._n_refused += 1


def ends_with_call(markup: str) -> bool:
    """Whether nothing follows the end of a call."""
    return _CALL_END.search(markup, max(0, len(markup) - 4 * _LONGEST_TAG)) is not None


def official(markup: str) -> str:
    """The same markup with the format's token (as `DSML_MARK`) in every tag."""
    return _TAG.sub(lambda tag: f"<{tag['slash']}{DSML_MARK}{tag['name']}", markup)


def _nested(word: str) -> str:
    """An expression for every beginning of a word."""
    return "".join(f"(?:{re.escape(letter)}" for letter in word) + ")?" * len(word)


_CLOSER = "</(?:parameter|invoke|tool_calls|function_calls)>"
_CLOSER_BEGUN = (
    "(?:<(?:/(?:" + "|".join(map(_nested, ("parameter", "invoke", "tool_calls", "function_calls"))) + "))?)?"
)
PLAIN_CLOSERS = re.compile(rf"\n?</parameter>\s{{0,8}}(?:{_CLOSER}\s{{0,8}}){{0,3}}{_CLOSER_BEGUN}\Z")
"""Closing tags without the token at the end of a text, and nothing else: the end of a value if the output ends there."""
PLAIN_CLOSERS_BEGUN = re.compile(rf"\n?</{_nested('parameter>')}\Z")
LONGEST_CLOSERS = 160
"""Characters that the two can match at most."""
PLAIN_CALL_END = re.compile(r"</(?:invoke|tool_call|function_call|function|tool)>")
"""What ends a call in other formats; between two parameters it can mean nothing else."""
PLAIN_CALL_END_BEGUN = re.compile(r"</?[a-z_]{0,13}\Z")
PLAIN_BLOCK_ENDS = re.compile(r"</(?:parameter|invoke|(?:tool|function)_calls?|function|tool)>")
