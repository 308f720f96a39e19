"""Commands about whole conversations: new, list, find, search, rename, delete, export, reopen."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from textual import on

from localrun.engine.conversations import SearchHit
from localrun.engine.conversations.export import ExportFormat, write_export
from localrun.errors import UsageError
from localrun.textsafe import visible, visible_line
from localrun.tui.chat_state import ChatState
from localrun.tui.screens.dialog import ChoiceDialog, TextDialog
from localrun.tui.screens.search import SearchScreen
from localrun.tui.widgets.conversation_list import ConversationOptions
from localrun.tui.widgets.find_bar import FindBar


class ConversationCommands(ChatState):
    """Part of `ChatScreen`."""

    async def reopen_last(self) -> None:
        """The conversation of the last time, unless another model was asked for by name."""
        last = None if self.launch.fresh else self.store.get_state("last_conversation")
        try:
            if last is not None:
                await self.open_conversation(int(last))
                return
        except KeyError:
            pass
        await self.show_branch()

    async def open_conversation(self, conversation_id: int, message_id: int | None = None) -> None:
        """Puts a conversation on view, at the branch that holds `message_id`."""
        if self.answering.running:
            if self.conversation is not None and self.conversation.id == conversation_id and message_id is None:
                return
            raise UsageError("an answer is being written", hint="Esc stops it")
        self.cancel_editing()
        self.pending_parent = None
        if message_id is not None:
            branch_ids = {message.id for message in self.store.branch(conversation_id)}
            if message_id not in branch_ids:
                self.store.show(conversation_id, message_id)
        self.conversation = self.store.conversation(conversation_id)
        self.store.set_state("last_conversation", conversation_id)
        self.reload_options()
        self.clear_errors()
        await self.show_branch(at=message_id)
        self.show_conversations()

    async def do_new(self, argument: str) -> None:
        if self.answering.running:
            raise UsageError("an answer is being written", hint="Esc stops it")
        self.cancel_editing()
        self.pending_parent = None
        self.conversation = None
        self.store.set_state("last_conversation", None)
        self.reload_options()
        self.clear_errors()
        await self.show_branch()
        self.show_conversations()
        self.prompt.area.focus()

    def do_conversations(self, argument: str) -> None:
        self.set_panels(conversations=not self.panel_conversations)
        if self.panel_conversations:
            self.query_one(ConversationOptions).focus()
        else:
            self.prompt.area.focus()

    async def act_on_conversation(self, conversation_id: int, command: str) -> None:
        """Rename or delete from the list."""
        if command == "rename":
            self._ask_name(conversation_id)
        else:
            self._ask_delete(conversation_id)

    # --- name, end, copy

    def do_rename(self, argument: str) -> None:
        if self.conversation is None:
            raise UsageError("nothing was written in this conversation yet")
        if argument:
            self._rename(self.conversation.id, argument)
        else:
            self._ask_name(self.conversation.id)

    def _ask_name(self, conversation_id: int) -> None:
        title = self.store.conversation(conversation_id).title
        self.app.push_screen(
            TextDialog("Rename the conversation", title), lambda name: self._rename(conversation_id, name)
        )

    def _rename(self, conversation_id: int, name: str | None) -> None:
        if not name or not name.strip():
            return
        self.store.rename(conversation_id, name)
        if self.conversation is not None and self.conversation.id == conversation_id:
            self.conversation = self.store.conversation(conversation_id)
        self.show_header()
        self.show_conversations()

    def do_delete(self, argument: str) -> None:
        if self.conversation is None:
            raise UsageError("nothing was written in this conversation yet")
        self._ask_delete(self.conversation.id)

    def _ask_delete(self, conversation_id: int) -> None:
        is_current = self.conversation is not None and self.conversation.id == conversation_id
        if is_current and self.answering.running:
            raise UsageError("an answer is being written", hint="Esc stops it")
        conversation = self.store.conversation(conversation_id)
        n_messages = sum(map(len, self.store.children(conversation_id).values()))
        text = f"“{visible_line(conversation.title, max_chars=100)}” with {n_messages} messages is deleted for good."

        async def decided(choice: str | None) -> None:
            if choice == "delete":
                self.store.delete(conversation_id)
                if is_current:
                    await self.do_new("")
                self.show_conversations()

        self.app.push_screen(
            ChoiceDialog("Delete the conversation?", text, {"keep": "Keep it", "delete": "Delete it"}), decided
        )

    def do_export(self, argument: str) -> None:
        if self.conversation is None:
            raise UsageError("nothing was written in this conversation yet")
        kind, _, target = argument.partition(" ")
        kind = {"": "md", "markdown": "md"}.get(kind, kind)
        if kind not in ("md", "json"):
            raise UsageError(f"no export as '{kind}'", hint="/export md or /export json, then a path if you like")
        path = write_export(
            self.store, self.conversation.id, cast(ExportFormat, kind), Path(target.strip()) if target.strip() else None
        )
        self.app.notify(visible(str(path.absolute())), title="Exported", markup=False, timeout=8)

    # --- finding

    def do_find(self, argument: str) -> None:
        bar = self.query_one(FindBar)
        if bar.display and not argument:
            bar.action_step(-1)
        else:
            bar.open(argument)

    @on(FindBar.Changed)
    def find_words(self) -> None:
        self.query_one(FindBar).search([entry.message for entry in self.chat.entries])

    @on(FindBar.Goto)
    async def go_to_found(self, event: FindBar.Goto) -> None:
        for view in self.chat.query(".found"):
            view.remove_class("found")
        await self.chat.scroll_to_message(event.message_id)
        if (view_found := self.chat.view(event.message_id)) is not None:
            view_found.add_class("found")

    def do_search(self, argument: str) -> None:
        async def chosen(hit: SearchHit | None) -> None:
            if hit is not None:
                await self.run_guarded(self.open_conversation(hit.conversation_id, hit.message_id))

        self.app.push_screen(SearchScreen(self.store.search, argument), chosen)
