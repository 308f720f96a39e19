"""Moves the parts of system prompts that clients change often: the date, `git status`.

V4's prompt has the tools after the system text, so changing one such line makes the model reread all tools. The format has a
role for volatile information (`latest_reminder`: "date, place and the like"). These lines are moved there verbatim, after the
tools, so that only the conversation follows them. When they change during a conversation, the new ones are placed after the
last answer, and everything before is unchanged.

Only requests with tools are changed, and only known lines (`_DATE`, `_BLOCKS`). Knows nothing about HTTP.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import xxhash

Json = Any
_Message = Mapping[str, Json]

MOST_CONVERSATIONS = 1000
MOST_CHARS = 4 << 20
"""Limits of the memory; the least recently used conversations are dropped first."""

_DATE = re.compile(r"^[ \t]*(?:Today's date|Current date(?: and time)?): [^\n]{1,80}(?:\n|\Z)", re.MULTILINE)
"""Claude Code, OpenCode and Continue; pi."""

_BLOCKS = (
    (
        re.compile(r"^gitStatus: This is the git status at the start of the conversation\b", re.MULTILINE),
        re.compile(r"^Recent commits:\n(?:[0-9a-f]{7,40}\b[^\n]*(?:\n|\Z))*", re.MULTILINE),
    ),
    (re.compile(r'^<context name="gitStatus">', re.MULTILINE), re.compile(r"</context>(?:\n|\Z)")),
)
"""Where `git status` begins and ends: Claude Code's, Continue's."""

MOST_BLOCK_CHARS = 40_000
"""Of a block; Claude Code cuts its own at 2,000. A longer one stays where it is."""


@dataclass(frozen=True, slots=True)
class _Placed:
    """A reminder in front of the client's message number `before`."""

    before: int
    text: str


class Reminders:
    """Remembers where each conversation's reminders are. Use from one thread."""

    def __init__(self, most: int = MOST_CONVERSATIONS, most_chars: int = MOST_CHARS) -> None:
        self._most, self._most_chars = most, most_chars
        self._kept: OrderedDict[str, tuple[_Placed, ...]] = OrderedDict()
        self._n_chars = 0

    def arranged(self, messages: Sequence[_Message], *, learn: bool = True) -> tuple[_Message, ...]:
        """The conversation with such lines moved out of its first system messages.

        Args:
            messages: as `chat/messages.py` reads them.
            learn: remember the positions for the next request; False if tokens are only counted.
        """
        stable, current = _split(messages)
        first = _n_leading(messages)
        if current is None:
            return tuple(messages)
        new, begun = _names(stable, first)
        placed = self._find([begun, new] if begun else [], len(messages)) or (_Placed(first, current),)
        if placed[-1].text != current:
            placed = (*placed, _Placed(_behind_last_answer(messages), current))
        if learn:
            self._put(begun or new, placed)
        result: list[_Message] = []
        for i, message in enumerate(stable):
            result += [{"role": "latest_reminder", "content": each.text} for each in placed if each.before == i]
            result.append(message)
        result += [{"role": "latest_reminder", "content": each.text} for each in placed if each.before == len(stable)]
        return tuple(result)

    def _find(self, names: Sequence[str], n_messages: int) -> tuple[_Placed, ...] | None:
        for name in names:
            placed = self._kept.get(name)
            if placed is not None and placed[-1].before < n_messages:
                self._kept.move_to_end(name)
                return placed
        return None

    def _put(self, name: str, placed: tuple[_Placed, ...]) -> None:
        self._n_chars += _size(placed) - _size(self._kept.pop(name, ()))
        self._kept[name] = placed
        while len(self._kept) > self._most or self._n_chars > self._most_chars:
            _, gone = self._kept.popitem(last=False)
            self._n_chars -= _size(gone)

    @property
    def size(self) -> tuple[int, int]:
        """(conversations, characters) that are kept."""
        return len(self._kept), self._n_chars


def _size(placed: Sequence[_Placed]) -> int:
    return sum(len(each.text) for each in placed)


def _n_leading(messages: Sequence[_Message]) -> int:
    """Number of system messages that the conversation begins with."""
    return next((i for i, message in enumerate(messages) if message["role"] != "system"), len(messages))


def _split(messages: Sequence[_Message]) -> tuple[list[_Message], str | None]:
    """(messages without the volatile lines, these lines; None if there are none)."""
    stable, moved = list(messages), []
    for i in range(_n_leading(messages)):
        content = str(messages[i].get("content") or "")
        spans = sorted(_spans(content))
        kept, end = "", 0
        for start, stop in spans:
            if start >= end:  # a date inside a block goes with it
                kept += content[end:start]
                moved.append(content[start:stop].strip())
                end = stop
        stable[i] = {**messages[i], "content": kept + content[end:]}
    return stable, "\n\n".join(moved) if moved else None


def _spans(text: str) -> Iterator[tuple[int, int]]:
    """Where such lines are. One search each: a stranger's text must not cost more than its length."""
    for date in _DATE.finditer(text):
        yield date.span()
    for opening, closing in _BLOCKS:
        if (start := opening.search(text)) is not None:
            stop = closing.search(text, start.end(), start.end() + MOST_BLOCK_CHARS)
            if stop is not None:
                yield start.start(), stop.end()


def _names(stable: Sequence[_Message], first: int) -> tuple[str, str | None]:
    """A conversation's key before its first answer, and its key from then on (None: no answer yet).

    Two conversations may start the same way; their first answers differ.
    """
    hasher = xxhash.xxh3_128()
    answered = next((i for i in range(first, len(stable)) if stable[i]["role"] == "assistant"), None)
    for message in stable[: len(stable) if answered is None else answered]:
        hasher.update(msgspec.json.encode([message["role"], str(message.get("content") or "").strip()]))
    new = hasher.hexdigest()
    if answered is None:
        return new, None
    answer = stable[answered]
    ids = [call.get("id") for call in answer.get("tool_calls") or ()]
    hasher.update(msgspec.json.encode([str(answer.get("content") or "").strip(), ids]))
    return new, hasher.hexdigest()


def _behind_last_answer(messages: Sequence[_Message]) -> int:
    """Everything up to there has been read before, and no user turn is split."""
    for i in range(len(messages) - 1, -1, -1):
        if messages[i]["role"] == "assistant" and i + 1 < len(messages):
            return i + 1
    return _n_leading(messages)
