"""The F1 page, made from the list of commands."""

from __future__ import annotations

from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.content import Content
from textual.widgets import Static

from localrun.tui.commands import INPUT_KEYS, MESSAGE_KEYS, Command, groups
from localrun.tui.screens.dialog import Dialog


class HelpScreen(Dialog[None]):
    """All keys and slash commands by group."""

    TITLE_TEXT = "Help"

    def compose_content(self) -> ComposeResult:
        with VerticalScroll(id="help") as body:
            body.can_focus = True
            yield Static(Content("Input"), classes="help-group")
            for keys, text in INPUT_KEYS:
                yield Static(_row(keys, "", text), classes="help-row")
            for group, commands in groups().items():
                note = "  (letters, arrows and Enter: while a message has the focus; else the last one is meant)"
                yield Static(Content(group + (note if group == "Messages" else "")), classes="help-group")
                for command in commands:
                    yield Static(_command_row(command), classes="help-row")
                if group == "Messages":
                    for keys, text in MESSAGE_KEYS:
                        yield Static(_row(keys, "", text), classes="help-row")

    def on_mount(self) -> None:
        self.query_one("#help").focus()


def _command_row(command: Command) -> Content:
    slash = f"/{command.slash[0]} {command.argument}".rstrip() if command.slash else ""
    return _row(command.key_labels, slash, f"{command.title}. {command.help}")


def _row(keys: str, slash: str, text: str) -> Content:
    return Content.assemble((f"{keys:<17}", "bold"), (f"{slash:<22} ", "$text-accent"), text)
