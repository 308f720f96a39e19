"""The model's reasoning: one line with its duration, which unfolds. During writing its last lines are shown."""

from __future__ import annotations

from textual.app import ComposeResult
from textual.containers import Vertical
from textual.content import Content
from textual.widgets import Static

from localrun.textsafe import visible
from localrun.units import format_duration

LIVE_LINES = 6


class ThinkingHeader(Static):
    """The clickable line."""

    def on_click(self) -> None:
        parent = self.parent
        assert isinstance(parent, ThinkingBlock)
        parent.toggle()


class ThinkingBlock(Vertical):
    """Reasoning of one answer, as plain text: it is not Markdown, and it can be very long."""

    def __init__(self, text: str, seconds: float | None, *, live: bool = False) -> None:
        super().__init__()
        self._text = visible(text)
        self._seconds = seconds
        self._live = live
        self.folded = True

    def compose(self) -> ComposeResult:
        yield ThinkingHeader(self._header())
        body = Static(Content(self._body()), id="thinking-text")
        body.display = self._shows_body
        yield body

    @property
    def text(self) -> str:
        return self._text

    @property
    def _shows_body(self) -> bool:
        return bool(self._text) and (self._live or not self.folded)

    def show(self, text: str, seconds: float | None, *, live: bool) -> None:
        """New state of the reasoning; `live`: it is being written."""
        if (visible_text := visible(text)) == self._text and live == self._live and not live:
            return
        self._text, self._seconds, self._live = visible_text, seconds, live
        self._refresh()

    def toggle(self) -> None:
        """Folds or unfolds."""
        self.folded = not self.folded
        self._refresh()

    def _refresh(self) -> None:
        if not self.is_mounted:
            return
        self.query_one(ThinkingHeader).update(self._header())
        body = self.query_one("#thinking-text", Static)
        body.display = self._shows_body
        if self._shows_body:
            body.update(Content(self._body()))

    def _body(self) -> str:
        if self._live and self.folded:
            return "\n".join(self._text.rstrip("\n").rsplit("\n", LIVE_LINES)[-LIVE_LINES:])
        return self._text.strip("\n")

    def _header(self) -> Content:
        arrow = "▸" if self.folded else "▾"
        took = f" {format_duration(self._seconds)}" if self._seconds is not None else ""
        return Content(f"{arrow} Thinking…{took}" if self._live else f"{arrow} Thought{' for' if took else ''}{took}")
