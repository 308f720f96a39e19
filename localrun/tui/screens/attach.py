"""Attaches a text file: path with completion, and its size in tokens before it is attached."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from textual import on
from textual.app import ComposeResult
from textual.content import Content
from textual.message import Message
from textual.suggester import Suggester
from textual.widgets import Button, Input, Static

from localrun.engine.conversations import Attachment
from localrun.engine.conversations.attachments import AttachmentError, read_attachment
from localrun.textsafe import visible, visible_line
from localrun.tui.engine_link import EngineLink
from localrun.tui.screens.dialog import Dialog
from localrun.units import format_size

PREVIEW_LINES = 6


class PathSuggester(Suggester):
    """Completes a path from the file system; → accepts."""

    def __init__(self) -> None:
        super().__init__(use_cache=False, case_sensitive=True)

    async def get_suggestion(self, value: str) -> str | None:
        folder, _, start = value.rpartition("/")
        root = Path(folder + "/" if "/" in value else ".").expanduser()
        try:
            names = sorted(entry.name + ("/" if entry.is_dir() else "") for entry in os.scandir(root))
        except OSError:
            return None
        found = next((name for name in names if start and name.startswith(start) and name.isprintable()), None)
        return None if found is None else value[: len(value) - len(start)] + found


class AttachScreen(Dialog[Attachment]):
    """Returns the file with its token count."""

    TITLE_TEXT = "Attach a text file"

    @dataclass
    class Counted(Message):
        """The file's token count has arrived, from the engine or as an estimate."""

        path: str
        attachment: Attachment
        exact: bool

    def __init__(self, link: EngineLink, room: int, path: str = "") -> None:
        """
        Args:
            room: tokens left in the context; 0: unknown.
        """
        super().__init__(classes="small")
        self._link, self._room, self._path = link, room, path
        self._ready: tuple[str, Attachment] | None = None

    def compose_content(self) -> ComposeResult:
        yield Input(self._path, placeholder="path; → completes, Enter checks the file", suggester=PathSuggester())
        yield Static("", id="attach-size")
        yield Static("", id="attach-preview")
        yield Button("Attach", id="attach-do", disabled=True, compact=True)

    def on_mount(self) -> None:
        if self._path:
            self._look(self._path)

    @on(Input.Submitted)
    def submit(self, event: Input.Submitted) -> None:
        if self._ready is not None and self._ready[0] == event.value:
            self.dismiss(self._ready[1])
        else:
            self._look(event.value)

    def _look(self, value: str) -> None:
        note = self.query_one("#attach-size", Static)
        try:
            attachment = read_attachment(Path(value))
        except AttachmentError as error:
            note.update(Content(visible(f"{error}" + (f"\n→ {error.hint}" if error.hint else ""))))
            return
        note.update("counting tokens…")
        preview = "\n".join(line[:100] for line in attachment.text.splitlines()[:PREVIEW_LINES])
        self.query_one("#attach-preview", Static).update(Content(visible(preview)))

        def counted(n_tokens: int, exact: bool) -> None:
            self.post_message(self.Counted(value, replace(attachment, n_tokens=n_tokens), exact))

        self._link.count_tokens(attachment.text, counted)

    @on(Counted)
    def show(self, event: Counted) -> None:
        attachment = event.attachment
        self._ready = (event.path, attachment)
        about = "" if event.exact else "about "
        room = f", {self._room:,} are left in the context" if self._room else ""
        size = format_size(len(attachment.text.encode("utf-8", "replace")))
        text = f"{visible_line(attachment.name)}: {size}, {about}{attachment.n_tokens:,} tokens{room}"
        if self._room and attachment.n_tokens > self._room:
            text += "\n⚠ too large for the context"
        self.query_one("#attach-size", Static).update(Content(text))
        button = self.query_one(Button)
        button.disabled = False
        button.focus()

    @on(Button.Pressed)
    def attach(self) -> None:
        if self._ready is not None:
            self.dismiss(self._ready[1])
