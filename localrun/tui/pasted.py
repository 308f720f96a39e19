"""Bracketed paste: anything between the terminal's two marks is text, never keys.

Textual interprets escape sequences inside a paste as keys: a coloured log would be sent line by line, and a byte 0x11 in it
would quit. So pastes are extracted from the terminal's input before Textual parses the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

START = "\x1b[200~"
END = "\x1b[201~"
MAX_CHARS = 64 << 20
"""A terminal that never ends a paste must not fill the memory."""


@dataclass(frozen=True, slots=True)
class Pasted:
    """The text of one paste; line ends are newlines, as the terminal sends carriage returns for them."""

    text: str


class PasteSplitter:
    """Splits what the terminal sends into keys (strings, for Textual's parser) and pastes.

    A paste may contain the end mark itself. The terminal's own mark is the last one before other input, so a paste is complete
    when an end mark is followed by silence or by another paste: call `quiet` when no input arrives.
    """

    def __init__(self) -> None:
        self._held = ""  # the beginning of a start mark, or, in a paste, all of it so far
        self._in_paste = False
        self._seen = 0  # characters of a paste that were searched for an end mark

    @property
    def waiting(self) -> bool:
        """Whether input is held back until more arrives or `quiet` is called."""
        return bool(self._held)

    def feed(self, data: str) -> Iterator[str | Pasted]:
        """Processes input."""
        self._held += data
        while True:
            if not self._in_paste:
                at = self._held.find(START)
                if at < 0:
                    keys, self._held = _split_prefix(self._held, START)
                    if keys:
                        yield keys
                    return
                if at:
                    yield self._held[:at]
                self._held, self._in_paste, self._seen = self._held[at + len(START) :], True, 0
            following = self._next_start()
            if following is None and len(self._held) <= MAX_CHARS:
                return
            yield from self._finish(len(self._held) if following is None else following)

    def quiet(self) -> Iterator[str | Pasted]:
        """No input for a while: what was held back is complete, unless a paste lacks its end mark."""
        if not self._in_paste:
            keys, self._held = self._held, ""
            if keys:
                yield keys
        elif self._held.rfind(END) >= 0:
            yield from self._finish(len(self._held))

    def _next_start(self) -> int | None:
        """Start of the next paste; everything before it is complete if it contains an end mark."""
        end = self._held.find(END, max(0, self._seen - len(END)))
        if end < 0:
            self._seen = len(self._held)
            return None
        self._seen = end
        at = self._held.find(START, end)
        return at if at >= 0 else None

    def _finish(self, limit: int) -> Iterator[str | Pasted]:
        """The paste before `limit`, then the keys after it."""
        end = self._held.rfind(END, 0, limit)
        text, rest = (self._held[:limit], "") if end < 0 else (self._held[:end], self._held[end + len(END) : limit])
        self._held, self._in_paste, self._seen = self._held[limit:], False, 0
        yield Pasted(text.replace("\r\n", "\n").replace("\r", "\n"))
        if rest:
            yield rest


def _split_prefix(text: str, mark: str) -> tuple[str, str]:
    """`text` without, and the longest end of it that could be the beginning of `mark`."""
    for n in range(min(len(mark) - 1, len(text)), 0, -1):
        if text.endswith(mark[:n]):
            return text[:-n], text[-n:]
    return text, ""
