"""Writing: the input's text, attached files, the message being edited, and sending."""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from textual.app import SuspendNotSupported
from textual.screen import Screen
from textual.timer import Timer

from localrun.engine.conversations import Attachment, Message
from localrun.engine.options import check_answer
from localrun.errors import LocalrunError, UsageError
from localrun.tui.commands import BY_SLASH
from localrun.tui.controllers.asking import Asking, Question
from localrun.tui.controllers.conversation import OpenConversation
from localrun.tui.controllers.model import ModelSwitch
from localrun.tui.controllers.notices import Notices
from localrun.tui.controllers.records import Records
from localrun.tui.controllers.work import Handler, Invocation, WorkQueue
from localrun.tui.files import estimate_tokens, mentioned_files
from localrun.tui.options import with_value
from localrun.tui.screens.attach import AttachScreen
from localrun.tui.screens.dialog import ChoiceDialog
from localrun.tui.widgets.prompt import PromptInput

LARGE_SHARE = 0.1
"""Of the context: files that take more are asked about first."""

CONFIRM = {"back": "Not yet", "send": "Send it"}

DRAFT_DELAY_S = 0.5
"""Delay from the last keystroke to saving the draft."""


class Composer:
    """Owns the id of the message being edited, and saves the draft.

    Args:
        run: runs a command by name.
        room: tokens left in the context; 0: unknown.
        open_settings: shows the dialog.
    """

    def __init__(
        self,
        screen: Screen[Any],
        records: Records,
        queue: WorkQueue,
        notices: Notices,
        model: ModelSwitch,
        asking: Asking,
        current: OpenConversation,
        *,
        run: Callable[[str, str], None],
        room: Callable[[], int],
        open_settings: Callable[[], None],
    ) -> None:
        self._screen, self._records, self._queue, self._notices = screen, records, queue, notices
        self._model, self._asking, self._current = model, asking, current
        self._run, self._room, self._open_settings = run, room, open_settings
        self.editing: Message | None = None
        self._saved_draft: str | None = ""
        """None: a question that is being saved deletes it."""
        self._timer: Timer | None = None

    def commands(self) -> dict[str, Handler]:
        return {
            "attach": self._attach,
            "editor": self._edit_outside,
            "think": self._think,
            "system": self._system,
            "sampling": self._sampling,
        }

    @property
    def prompt(self) -> PromptInput:
        return self._screen.query_one(PromptInput)

    def to_input(self) -> None:
        """Gives the focus to the input."""
        self.prompt.area.focus()

    async def begin(self, typed_early: Callable[[], Awaitable[None]]) -> None:
        """Input and history as the last program left them.

        Args:
            typed_early: types what was typed before. An Enter among it sends just that; the draft then comes before the rest.
        """
        name = self._records.draft_name
        try:
            texts, draft = await self._records(lambda store: (store.recent_user_texts(), store.get_state(name, "")))
        except LocalrunError:
            await typed_early()
            raise
        self._saved_draft = str(draft)
        self.prompt.set_history(texts)
        await typed_early()
        self.prompt.set_text(str(draft) + self.prompt.text)

    # --- sending

    def submit(self, text: str) -> None:
        """Enter was pressed."""
        if text.startswith("/") and not text.startswith("//"):
            self._run_slash(text)
            return
        if not text.strip() and not self.prompt.attachments:
            return
        self._asking.check_free()
        text = text.removeprefix("/") if text.startswith("//") else text
        named = [replace(file, n_tokens=estimate_tokens(file.text)) for file in mentioned_files(text)]
        question = Question(text, (*self.prompt.attachments, *named), self.editing)
        facts, n_tokens = self._model.facts, sum(file.n_tokens for file in named)
        if facts is not None and n_tokens > LARGE_SHARE * facts.n_ctx:
            self._confirm(question, n_tokens, facts.n_ctx)
        else:
            self._send(question)

    def _send(self, question: Question) -> None:
        self._end_editing()
        self.prompt.clear()
        self._saved_draft = None
        self._queue.add(self._ask(question))

    async def _ask(self, question: Question) -> None:
        try:
            await self._asking.ask(question)
        finally:
            self._saved_draft = None
        self.changed()  # what is in the input by now is to be saved again

    def _confirm(self, question: Question, n_tokens: int, n_ctx: int) -> None:
        """Files that take much of the context are asked about; small ones just go along."""
        share = f"about {n_tokens:,} of the context's {n_ctx:,} tokens"

        def decided(choice: str | None) -> None:
            if choice == "send":
                self._send(question)
            self.to_input()

        self._screen.app.push_screen(
            ChoiceDialog("Attach this much?", f"The files named in your message take {share}.", CONFIRM), decided
        )

    def put_back(self, question: Question) -> None:
        """It could not be sent: nothing of it is lost, unless there is something newer in the input."""
        if not self.prompt.text:
            self.prompt.set_text(question.text)
            self.prompt.set_attachments(list(question.attachments))
            if question.instead_of is not None:
                self._begin_editing(question.instead_of)

    def _run_slash(self, text: str) -> None:
        """The text stays in the input if there is no such command."""
        name, _, argument = text[1:].partition(" ")
        command = BY_SLASH.get(name.strip().lower())
        if command is None:
            raise UsageError(
                f"unknown command /{name.strip()}", hint="/help lists them; // sends text that starts with a slash"
            )
        attachments = self.prompt.attachments
        self.prompt.clear()
        self.prompt.set_attachments(attachments)
        self._run(command.name, argument.strip())

    # --- editing

    def edit(self, message: Message) -> None:
        """Puts a message into the input; sending it creates a new version."""
        self.put_into_input(message)
        self._begin_editing(message)

    def put_into_input(self, message: Message) -> None:
        """Its text and files."""
        self.prompt.set_text(message.content)
        self.prompt.set_attachments(list(message.attachments))
        self.to_input()

    def cancel_editing(self) -> bool:
        """Returns whether something was edited."""
        if self.editing is None:
            return False
        self._end_editing()
        self.prompt.clear(remember=False)
        return True

    def _begin_editing(self, message: Message) -> None:
        self.editing = message
        self.prompt.border_title = "editing: Enter sends a new version, Esc cancels"

    def _end_editing(self) -> None:
        self.editing = None
        self.prompt.border_title = ""

    # --- the draft

    def changed(self) -> None:
        """Another text is in the input: it is saved as soon as the typing pauses."""
        if self._timer is not None:
            self._timer.stop()
        self._timer = self._screen.set_timer(DRAFT_DELAY_S, self.save_draft)

    def save_draft(self) -> None:
        """Restores the draft at the next start, however this one ends."""
        text = self.prompt.text
        if text != self._saved_draft and self.editing is None:
            self._saved_draft, name = text, self._records.draft_name
            self._records.post(lambda store: store.set_state(name, text), lambda error: None)

    # --- what goes with a question

    def _attach(self, call: Invocation) -> None:
        def take(attachment: Attachment | None) -> None:
            if attachment is not None:
                self.prompt.set_attachments([*self.prompt.attachments, attachment])
            self.to_input()

        path = str(Path(call.argument).expanduser()) if call.argument else ""
        self._screen.app.push_screen(AttachScreen(self._model.link, self._room(), path), take)

    def _edit_outside(self, call: Invocation) -> None:
        """The input's text in the user's editor, which has the terminal meanwhile."""
        editor = shlex.split(os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi")
        with tempfile.TemporaryDirectory(prefix="localrun-") as folder:
            path = Path(folder) / "message.md"
            path.write_text(self.prompt.text, encoding="utf-8")
            try:
                with self._screen.app.suspend():
                    code = subprocess.run([*editor, str(path)], check=False).returncode
            except SuspendNotSupported:
                raise UsageError("no terminal to run an editor in") from None
            except OSError as error:
                raise UsageError(f"{editor[0]}: {error.strerror}", hint="set EDITOR to a text editor") from None
            if code:
                raise UsageError(f"{editor[0]} ended with exit code {code}", hint="the input is unchanged")
            self.prompt.set_text(path.read_text(encoding="utf-8", errors="replace").rstrip("\n"))
        self.to_input()

    def _think(self, call: Invocation) -> None:
        facts, options = self._model.facts, self._current.options
        modes = facts.think_modes if facts is not None else ("off", "high", "max")
        if call.argument and call.argument not in modes:
            raise UsageError(f"unknown think mode '{call.argument}'", hint="one of " + ", ".join(modes))
        following = modes[(modes.index(options.think) + 1) % len(modes)] if options.think in modes else modes[0]
        chosen = call.argument or following
        self._current.set_options(replace(options, think=chosen))
        self._notices.note(f"Thinking: {chosen}", timeout_s=3)

    def _system(self, call: Invocation) -> None:
        if call.argument:
            self._current.set_options(replace(self._current.options, system=call.argument))
            self._notices.note("System prompt set for this conversation.")
        else:
            self._open_settings()

    def _sampling(self, call: Invocation) -> None:
        name, _, value = call.argument.replace("=", " ").partition(" ")
        if not name:
            raise UsageError("no value given", hint="for example /set temperature 0.6")
        options = with_value(self._current.options, name, value.strip())
        if (facts := self._model.facts) is not None:
            check_answer(options.max_tokens, facts.n_ctx)
        self._current.set_options(options)
        self._notices.note(f"{name} is set: {value.strip() or 'default'}")
