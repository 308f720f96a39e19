"""Streamed text that may still be part of a tag: what is decided is taken from its beginning, the rest waits for more."""

from __future__ import annotations

import re
from collections.abc import Sequence

from localrun.engine.chat.dsml_tags import DSML_MARK, Tag, bracket_before, next_tag
from localrun.engine.chat.other_markup import OtherMarkup
from localrun.engine.chat.parts import DSML

_UNFINISHED_BRACKET = re.compile(r"<\s{0,2}/?\s{0,2}[｜|]?\Z")

Held = Sequence[tuple[re.Pattern[str], int]]
"""Patterns of what may become a tag at the end of a text, and how many characters each can match."""


class PendingText:
    """The end of a text. Not thread-safe.

    Attributes:
        text: with `DSML_MARK` for each DSML token.
        at: everything before it in `text` is done.
        n_scanned: characters scanned so far.
    """

    def __init__(self) -> None:
        self.text = ""
        self.at = 0
        self.n_scanned = 0

    def drop_done(self) -> None:
        """Forgets what is done."""
        self.text, self.at = self.text[self.at :], 0

    def put_back(self, text: str) -> None:
        """This was taken, and is text after all."""
        self.text, self.at = text + self.text[self.at :], 0

    def tag(self, final: bool) -> Tag | None:
        """The next tag, None if there is none or it is incomplete. `final`: no text follows."""
        tag = next_tag(self.text, final=final, start=self.at)
        self.n_scanned += (tag.end if tag is not None else len(self.text)) - self.at
        return tag

    def before(self, tag: Tag) -> str:
        """What precedes it."""
        return self.text[self.at : tag.start]

    def literal(self, end: int) -> str:
        """All up to `end` as text, tokens spelled out."""
        return self.text[self.at : end].replace(DSML_MARK, DSML)

    def decided(self, held: Held, *, final: bool, in_markup: bool, other: OtherMarkup | None) -> str:
        """Takes the text up to the next DSML token, except for an end that may belong to a tag.

        Args:
            in_markup: an opening bracket at the very end of the output is the beginning of a tag.
            other: holds back the beginnings of other markup, too.
        """
        text, at = self.text, self.at
        if (mark := text.find(DSML_MARK, at)) >= 0:
            end = bracket_before(text, mark, at)[0]  # the tag itself is incomplete
            while end > at and text[end - 1] == "\n":
                end -= 1
        elif final:
            end = len(text)
            if in_markup and (bracket := _UNFINISHED_BRACKET.search(text, max(at, end - 6))):
                self.at = end
                return text[at : bracket.start()]
        else:
            end = self._held_from(held, other)
        self.at = end
        return text[at:end]

    def _held_from(self, held: Held, other: OtherMarkup | None) -> int:
        text, at, n = self.text, self.at, len(self.text)
        ends = [n]
        for pattern, longest in held:
            if (match := pattern.search(text, max(at, n - longest))) is not None:
                ends.append(match.start())
        if other is not None:
            ends.append(at + other.held_from(text[at:]))
        return min(ends)
