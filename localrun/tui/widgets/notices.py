"""Panels inside the chat: an error with a remedy, and the progress of a load."""

from __future__ import annotations

from collections.abc import Sequence

from textual import on
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.widgets import Button, Collapsible, ProgressBar, Static

from localrun.errors import LocalrunError
from localrun.textsafe import visible, visible_line
from localrun.tui.messages import ErrorAction

BUTTONS = {
    "regenerate": "Try again",
    "models": "Choose a model",
    "settings": "Settings",
    "reload": "Restart the engine",
    "close": "Close",
}


class ErrorPanel(Vertical):
    """An error in plain words, what to do about it, and the details for a bug report folded away.

    Args:
        buttons: names of commands (see `BUTTONS`); `close` removes the panel.
        log: last lines of the engine's output.
    """

    def __init__(
        self, title: str, error: LocalrunError, buttons: Sequence[str] = ("close",), log: Sequence[str] = ()
    ) -> None:
        super().__init__(classes="error-panel")
        self.border_title = title
        self.error = error
        self._buttons = buttons
        notes = list(getattr(error, "__notes__", ()))
        self._details = visible("\n".join([*notes, *log])).strip()

    def compose(self) -> ComposeResult:
        yield Static(Content(visible(str(self.error))), classes="error-message")
        if self.error.hint:
            yield Static(Content(f"→ {visible(self.error.hint)}"), classes="error-hint")
        if self._details:
            with Collapsible(title="Details", collapsed=True):
                yield Static(Content(self._details), classes="error-details")
        with Horizontal(classes="error-buttons"):
            for name in self._buttons:
                yield Button(BUTTONS[name], id=f"do-{name}", compact=True)

    @on(Button.Pressed)
    def press(self, event: Button.Pressed) -> None:
        event.stop()
        name = str(event.button.id).removeprefix("do-")
        if name != "close":
            self.post_message(ErrorAction(name))
        self.remove()


class LoadingPanel(Vertical):
    """A load's progress and plan: a line each, truncated at the screen's edge (`/plan` shows everything)."""

    def __init__(self) -> None:
        super().__init__(id="loading")

    def compose(self) -> ComposeResult:
        yield Static("", id="loading-plan")
        yield Static("", id="loading-text")
        yield ProgressBar(total=1.0, show_eta=False, id="loading-bar")

    def show(self, text: str, progress: float, plan: Sequence[str] = ()) -> None:
        self.display = True
        lines = self.query_one("#loading-plan", Static)
        lines.display = bool(plan)
        lines.update(Content("\n".join(visible_line(line) for line in plan)))
        self.query_one("#loading-text", Static).update(Content(visible(text)))
        self.query_one(ProgressBar).update(progress=progress)
