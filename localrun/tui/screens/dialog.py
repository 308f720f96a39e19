"""The base of all dialogs, a centred box that Esc closes, and two small ones: a question and a line of text."""

from __future__ import annotations

from typing import ClassVar, TypeVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Button, Input, Static

from localrun.textsafe import visible

R = TypeVar("R")

MAX_ROW_CELLS = 60
"""Wider buttons are stacked."""


class Dialog(ModalScreen[R | None]):
    """A modal screen whose content is made by `compose_content`; Esc gives None."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "close", "Close")]
    TITLE_TEXT: ClassVar[str] = ""

    def compose(self) -> ComposeResult:
        box = Vertical(id="dialog")
        box.border_title = self.TITLE_TEXT
        box.border_subtitle = "Esc closes"
        with box:
            yield from self.compose_content()

    def compose_content(self) -> ComposeResult:
        """The widgets inside the frame."""
        raise NotImplementedError

    def action_close(self) -> None:
        self.dismiss(None)


class ChoiceDialog(Dialog[str]):
    """A text and some buttons; gives the name of the one that was pressed. The first has the focus: it is the safe one."""

    def __init__(self, title: str, text: str, choices: dict[str, str]) -> None:
        super().__init__(classes="small")
        self._title, self._text, self._choices = title, text, choices

    def compose_content(self) -> ComposeResult:
        yield Static(Content(visible(self._text)), id="question")
        one_row = sum(len(label) + 6 for label in self._choices.values()) <= MAX_ROW_CELLS
        with Horizontal(classes="buttons") if one_row else Vertical(classes="buttons"):
            for name, label in self._choices.items():
                yield Button(label, id=f"choose-{name}", compact=True)

    def on_mount(self) -> None:
        self.query_one("#dialog").border_title = self._title
        self.query(Button).first().focus()

    @on(Button.Pressed)
    def choose(self, event: Button.Pressed) -> None:
        self.dismiss(str(event.button.id).removeprefix("choose-"))


class TextDialog(Dialog[str]):
    """One line of text."""

    def __init__(self, title: str, text: str = "", placeholder: str = "") -> None:
        super().__init__(classes="small")
        self._title, self._value, self._placeholder = title, text, placeholder

    def compose_content(self) -> ComposeResult:
        yield Input(self._value, placeholder=self._placeholder, id="text")

    def on_mount(self) -> None:
        self.query_one("#dialog").border_title = self._title

    @on(Input.Submitted)
    def submit(self, event: Input.Submitted) -> None:
        self.dismiss(event.value)
