"""Commands about asking and about single messages: send, regenerate, edit, branch, copy, attach, think."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from localrun.engine.conversations import Attachment
from localrun.errors import UsageError
from localrun.tui.chat_state import ChatState
from localrun.tui.options import with_value
from localrun.tui.screens.attach import AttachScreen
from localrun.tui.widgets.message_view import MessageView, code_blocks


class MessageCommands(ChatState):
    """Part of `ChatScreen`."""

    # --- asking

    async def ask(self, text: str) -> None:
        """Sends the input: a new question, or the edited version of an earlier one."""
        if self.answering.running:
            raise UsageError("an answer is being written", hint="Esc stops it")
        attachments = tuple(self.prompt.attachments)
        conversation = self.ensure_conversation(text or attachments[0].name)
        if self.editing is not None:
            parent_id = self.editing.parent_id
        else:
            branch = self.branch()
            parent_id = branch[-1].id if branch else None
        question = self.store.add(conversation.id, parent_id, "user", text, attachments=attachments)
        edited, self.editing = self.editing is not None, None
        self.prompt.border_title = ""
        self.prompt.clear()
        self.store.set_state("draft", "")
        if edited or (self.chat.entries and self.chat.entries[-1].message.id != parent_id):
            await self.show_branch()
        else:
            await self.chat.append(next(e for e in self.entries() if e.message.id == question.id))
            self.show_header()
        await self.answer_to(question.id)

    def do_attach(self, argument: str) -> None:
        room = max(0, self.facts.n_ctx - self.context_used()) if self.facts is not None else 0

        def take(attachment: Attachment | None) -> None:
            if attachment is not None:
                self.prompt.set_attachments([*self.prompt.attachments, attachment])
            self.prompt.area.focus()

        self.app.push_screen(AttachScreen(self.link, room, str(Path(argument).expanduser()) if argument else ""), take)

    def context_used(self) -> int:
        if self.answering.answer is not None and self.answering.answer.context_used:
            return self.answering.answer.context_used
        return self.last_stats.context_used if self.last_stats is not None else 0

    def do_think(self, argument: str) -> None:
        modes = self.facts.think_modes if self.facts is not None else ("off", "high", "max")
        if argument and argument not in modes:
            raise UsageError(f"there is no think mode '{argument}'", hint="one of " + ", ".join(modes))
        current = self.options.think
        following = modes[(modes.index(current) + 1) % len(modes)] if current in modes else modes[0]
        self.set_options(replace(self.options, think=argument or following))
        self.app.notify(f"Thinking: {self.options.think}", timeout=3)

    def do_system(self, argument: str) -> None:
        if argument:
            self.set_system(argument)
            self.app.notify("The system prompt is set for this conversation.", timeout=4)
        else:
            self.open_settings()

    def do_sampling(self, argument: str) -> None:
        name, _, value = argument.replace("=", " ").partition(" ")
        if not name:
            raise UsageError("name a value", hint="for example /set temperature 0.6")
        self.set_options(with_value(self.options, name, value.strip()))
        self.app.notify(f"{name} is set: {value.strip() or 'default'}", markup=False, timeout=4)

    # --- versions of messages

    async def do_regenerate(self, argument: str) -> None:
        message = self.find_message(lambda m: True)
        if message is None:
            raise UsageError("there is nothing to answer yet")
        if self.answering.running:
            raise UsageError("an answer is being written", hint="Esc stops it")
        parent_id = message.id if message.role == "user" else message.parent_id
        assert parent_id is not None
        self.store.rewind(message.conversation_id, parent_id)
        await self.show_branch()
        await self.answer_to(parent_id)

    def do_edit(self, argument: str) -> None:
        message = self.find_message(lambda m: m.role == "user")
        if message is not None and message.role != "user":
            message = next((e.message for e in self.chat.entries if e.message.id == message.parent_id), None)
        if message is None:
            raise UsageError("there is no message of yours to edit")
        self.editing = message
        self.prompt.border_title = "editing: Enter sends a new version, Esc cancels"
        self.prompt.set_text(message.content)
        self.prompt.set_attachments(list(message.attachments))
        self.prompt.area.focus()

    async def do_fork(self, argument: str) -> None:
        message = self.find_message(lambda m: m.role == "assistant")
        if message is None:
            raise UsageError("there is nothing to branch from yet")
        if self.answering.running:
            raise UsageError("an answer is being written", hint="Esc stops it")
        if message.role == "user":
            await self.do_regenerate(argument)
            return
        self.store.rewind(message.conversation_id, message.id)
        await self.show_branch()
        self.app.notify("What you send now begins a new branch here.", timeout=4)
        self.prompt.area.focus()

    async def do_previous_branch(self, argument: str) -> None:
        await self._switch(-1)

    async def do_next_branch(self, argument: str) -> None:
        await self._switch(1)

    async def _switch(self, step: int) -> None:
        if self.answering.running:
            raise UsageError("an answer is being written", hint="Esc stops it")
        versions = {entry.message.id: entry.n_versions for entry in self.chat.entries}
        message = self.find_message(lambda m: versions.get(m.id, 1) > 1)
        if message is None or self.conversation is None:
            raise UsageError("no message has another version")
        siblings = self.store.children(self.conversation.id)[message.parent_id]
        other = siblings[(siblings.index(message.id) + step) % len(siblings)]
        if other == message.id:
            raise UsageError("this message has no other version")
        had_focus = self.chat.focused_message is not None
        self.store.show(self.conversation.id, other)
        await self.show_branch(at=other)
        if had_focus and (view := self.chat.view(other)) is not None:
            view.focus(scroll_visible=False)

    async def do_undo(self, argument: str) -> None:
        if self.answering.running:
            raise UsageError("an answer is being written", hint="Esc stops it")
        question = next((e.message for e in reversed(self.chat.entries) if e.message.role == "user"), None)
        if question is None:
            raise UsageError("there is nothing to take back")
        self.store.rewind(question.conversation_id, question.parent_id)
        self.prompt.set_text(question.content)
        self.prompt.set_attachments(list(question.attachments))
        await self.show_branch()
        self.prompt.area.focus()

    # --- copying and looking

    def do_copy(self, argument: str) -> None:
        message = self.find_message(lambda m: m.role == "assistant" and bool(m.content))
        if message is None:
            raise UsageError("there is nothing to copy yet")
        self.app.copy_to_clipboard(message.content)
        self.app.notify(f"{len(message.content):,} characters copied", timeout=3)

    def do_copy_code(self, argument: str) -> None:
        message = self.find_message(lambda m: m.role == "assistant" and bool(code_blocks(m.content)))
        blocks = code_blocks(message.content) if message is not None else []
        if not blocks:
            raise UsageError("there is no code block")
        if argument and not (argument.isdecimal() and 1 <= int(argument) <= len(blocks)):
            raise UsageError(f"there is no code block {argument}", hint=f"1 to {len(blocks)}")
        block = blocks[int(argument) - 1 if argument else -1]
        self.app.copy_to_clipboard(block)
        self.app.notify(f"Code block copied: {block.count(chr(10)) + 1} lines", timeout=3)

    def do_toggle_thinking(self, argument: str) -> None:
        message = self.find_message(lambda m: bool(m.reasoning))
        view = self.chat.view(message.id) if message is not None else None
        if view is not None:
            view.toggle_thinking()

    async def do_to_messages(self, argument: str) -> None:
        if isinstance(self.focused, MessageView):
            self.prompt.area.focus()
        else:
            await self.chat.focus_message(len(self.chat.entries) - 1)
