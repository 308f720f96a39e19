"""Search in the open conversation: words, number of matches, next and previous."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal
from textual.message import Message as TextualMessage
from textual.widgets import Input, Static

from localrun.engine.conversations import Message


class FindBar(Horizontal):
    """Owns the words and the place among the messages that contain them."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("down", "step(1)", "Next", show=False),
        Binding("up", "step(-1)", "Previous", show=False),
    ]

    @dataclass
    class Goto(TextualMessage):
        """Show this message."""

        message_id: int

    @dataclass
    class Changed(TextualMessage):
        """Other words; the screen answers with `search`."""

    def __init__(self) -> None:
        super().__init__(id="find")
        self._found: list[int] = []
        self._at = -1

    def compose(self) -> ComposeResult:
        yield Static("Find", id="find-label")
        yield Input(placeholder="words in this conversation", id="find-input", compact=True)
        yield Static("", id="find-count")

    @property
    def words(self) -> str:
        return self.query_one(Input).value

    @property
    def found(self) -> Sequence[int]:
        """Ids of the messages with all words, first to last."""
        return self._found

    def open(self, words: str = "") -> None:
        self.display = True
        field = self.query_one(Input)
        if words:
            field.value = words
        field.focus()

    def search(self, messages: Sequence[Message]) -> None:
        """Looks for the words; the newest place first."""
        words = self.words.casefold().split()
        self._found = [
            message.id
            for message in messages
            if words and all(word in f"{message.content}\n{message.reasoning}".casefold() for word in words)
        ]
        self._at = len(self._found) - 1
        self._show()

    def action_step(self, step: int) -> None:
        if self._found:
            self._at = (self._at + step) % len(self._found)
        self._show()

    def _show(self) -> None:
        count = f"{self._at + 1}/{len(self._found)}" if self._found else ("none" if self.words.strip() else "")
        self.query_one("#find-count", Static).update(count)
        if self._found:
            self.post_message(self.Goto(self._found[self._at]))

    @on(Input.Changed)
    def change(self, event: Input.Changed) -> None:
        event.stop()
        self.post_message(self.Changed())

    @on(Input.Submitted)
    def submit(self, event: Input.Submitted) -> None:
        event.stop()
        self.action_step(-1)
