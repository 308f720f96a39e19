"""The F1 page, generated from the list of commands."""

from __future__ import annotations

from textual.app import ComposeResult
from textual.containers import Horizontal, VerticalScroll
from textual.content import Content
from textual.widgets import Static

from localrun.tui.commands import INPUT_KEYS, MESSAGE_KEYS, groups
from localrun.tui.screens.dialog import Dialog


class HelpScreen(Dialog[None]):
    """All keys and slash commands by group."""

    TITLE_TEXT = "Help"

    def compose_content(self) -> ComposeResult:
        with VerticalScroll(id="help") as body:
            body.can_focus = True
            yield Static("Input", classes="help-group")
            for keys, text in INPUT_KEYS:
                yield from _row(keys, "", text)
            for group, commands in groups().items():
                yield Static(Content(group), classes="help-group")
                if group == "Messages":
                    note = "letters, arrows and Enter need a focused message; slash commands fall back to the last one"
                    yield Static(Content(note), classes="help-note")
                for command in commands:
                    slash = f"/{command.slash[0]} {command.argument}".rstrip() if command.slash else ""
                    yield from _row(command.key_labels, slash, f"{command.title}. {command.help}")
                if group == "Messages":
                    for keys, text in MESSAGE_KEYS:
                        yield from _row(keys, "", text)

    def on_mount(self) -> None:
        self.query_one("#help").focus()


def _row(keys: str, slash: str, text: str) -> ComposeResult:
    with Horizontal(classes="help-row"):
        yield Static(Content.styled(keys, "bold"), classes="help-keys")
        yield Static(Content(slash), classes="help-slash")
        yield Static(Content(text), classes="help-text")
