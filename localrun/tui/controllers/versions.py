"""Commands for single messages: answer again, edit, branch, switch versions, copy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from textual.screen import Screen

from localrun.engine.conversations import Message
from localrun.errors import UsageError
from localrun.tui.controllers.asking import Asking
from localrun.tui.controllers.composer import Composer
from localrun.tui.controllers.conversation import OpenConversation
from localrun.tui.controllers.notices import Notices
from localrun.tui.controllers.work import Handler, Invocation
from localrun.tui.widgets.chat_view import ChatView
from localrun.tui.widgets.message_view import MessageView, code_blocks


class Versions:
    """Operations on visible messages. Stateless: the store knows the versions, the chat what is visible."""

    def __init__(
        self, screen: Screen[Any], notices: Notices, current: OpenConversation, asking: Asking, composer: Composer
    ) -> None:
        self._screen, self._notices = screen, notices
        self._current, self._asking, self._composer = current, asking, composer

    def commands(self) -> dict[str, Handler]:
        return {
            "regenerate": self._regenerate,
            "edit": self._edit,
            "fork": self._fork,
            "previous_branch": lambda call: self._switch(call, -1),
            "next_branch": lambda call: self._switch(call, 1),
            "undo": self._undo,
            "copy": self._copy,
            "copy_code": self._copy_code,
            "toggle_thinking": self._toggle_thinking,
            "to_messages": self._to_messages,
        }

    @property
    def _chat(self) -> ChatView:
        return self._screen.query_one(ChatView)

    def _meant(self, call: Invocation, accept: Callable[[Message], bool]) -> Message | None:
        """The message that a command means: the one it names, or the last that is acceptable."""
        for entry in self._chat.entries:
            if entry.message.id == call.message_id:
                return entry.message
        return next((entry.message for entry in reversed(self._chat.entries) if accept(entry.message)), None)

    # --- versions

    async def _regenerate(self, call: Invocation) -> None:
        message = self._meant(call, lambda m: True)
        if message is None:
            raise UsageError("there is nothing to answer yet")
        self._asking.check_free()
        parent_id = message.id if message.role == "user" else message.parent_id
        assert parent_id is not None
        await self._current.rewind(parent_id)
        await self._asking.answer_to(parent_id)

    def _edit(self, call: Invocation) -> None:
        message = self._meant(call, lambda m: m.role == "user")
        if message is not None and message.role != "user":
            message = next((e.message for e in self._chat.entries if e.message.id == message.parent_id), None)
        if message is None:
            raise UsageError("you have no message to edit yet")
        self._composer.edit(message)

    async def _fork(self, call: Invocation) -> None:
        message = self._meant(call, lambda m: m.role == "assistant")
        if message is None:
            raise UsageError("there is nothing to branch from yet")
        self._asking.check_free()
        if message.role == "user":
            await self._regenerate(Invocation(message_id=message.id))
            return
        await self._current.rewind(message.id)
        self._notices.note("Your next message starts a new branch here.")
        self._composer.to_input()

    async def _switch(self, call: Invocation, step: int) -> None:
        self._asking.check_free()
        versions = {entry.message.id: entry.n_versions for entry in self._chat.entries}
        message = self._meant(call, lambda m: versions.get(m.id, 1) > 1)
        if message is None:
            raise UsageError("no message has another version")
        had_focus = self._chat.focused_message is not None
        other = await self._current.switch(message, step)
        if other is None:
            raise UsageError("this message has no other version")
        if had_focus and (view := self._chat.view(other)) is not None:
            view.focus(scroll_visible=False)

    async def _undo(self, call: Invocation) -> None:
        self._asking.check_free()
        question = next((e.message for e in reversed(self._chat.entries) if e.message.role == "user"), None)
        if question is None:
            raise UsageError("there is nothing to take back")
        await self._current.rewind(question.parent_id)
        self._composer.put_into_input(question)

    # --- copying and looking

    def _copy(self, call: Invocation) -> None:
        message = self._meant(call, lambda m: m.role == "assistant" and bool(m.content))
        if message is None:
            raise UsageError("there is nothing to copy yet")
        self._screen.app.copy_to_clipboard(message.content)
        self._notices.note(f"{len(message.content):,} characters copied", timeout_s=3)

    def _copy_code(self, call: Invocation) -> None:
        message = self._meant(call, lambda m: m.role == "assistant" and bool(code_blocks(m.content)))
        blocks = code_blocks(message.content) if message is not None else []
        number = call.argument
        if not blocks:
            raise UsageError("there is no code block")
        if number and not (number.isdecimal() and 1 <= int(number) <= len(blocks)):
            raise UsageError(f"there is no code block {number}", hint=f"1 to {len(blocks)}")
        block = blocks[int(number) - 1 if number else -1]
        self._screen.app.copy_to_clipboard(block)
        self._notices.note(f"Code block copied: {block.count(chr(10)) + 1} lines", timeout_s=3)

    def _toggle_thinking(self, call: Invocation) -> None:
        message = self._meant(call, lambda m: bool(m.reasoning))
        view = self._chat.view(message.id) if message is not None else None
        if view is not None:
            view.toggle_thinking()

    async def _to_messages(self, call: Invocation) -> None:
        if isinstance(self._screen.focused, MessageView):
            self._composer.to_input()
        else:
            await self._chat.focus_message(len(self._chat.entries) - 1)
