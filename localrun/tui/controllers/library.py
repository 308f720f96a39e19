"""All conversations: the list of them, opening, renaming, deleting, exporting and searching."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from textual.screen import Screen

from localrun.engine.conversations import Conversation, ConversationStore, SearchHit
from localrun.engine.conversations.export import ExportFormat, write_export
from localrun.engine.conversations.importing import import_conversations, read_conversations
from localrun.errors import UsageError
from localrun.textsafe import visible_line
from localrun.tui.controllers.conversation import OpenConversation
from localrun.tui.controllers.notices import Notices
from localrun.tui.controllers.panels import Panels
from localrun.tui.controllers.records import Records
from localrun.tui.controllers.work import Handler, Invocation, WorkQueue
from localrun.tui.screens.dialog import ChoiceDialog, TextDialog
from localrun.tui.screens.search import SearchScreen
from localrun.tui.widgets.conversation_list import ConversationList


class ConversationActions:
    """Commands for whole conversations. Connects the list, the store and the open conversation; owns no state.

    Args:
        check_free: raises UsageError during an answer, when the open conversation can't be left.
        leaving: called before switching to another conversation.
        to_input: gives the focus to the input.
    """

    def __init__(
        self,
        screen: Screen[Any],
        records: Records,
        queue: WorkQueue,
        notices: Notices,
        panels: Panels,
        current: OpenConversation,
        *,
        check_free: Callable[[], None],
        leaving: Callable[[], None],
        to_input: Callable[[], Any],
    ) -> None:
        self._screen, self._records, self._queue = screen, records, queue
        self._notices, self._panels, self._current = notices, panels, current
        self._check_free, self._leaving, self._to_input = check_free, leaving, to_input

    def commands(self) -> dict[str, Handler]:
        return {
            "new": self.new,
            "rename": self._rename_current,
            "delete": self._delete_current,
            "export": self._export,
            "import_file": self._import,
            "search": self._search,
        }

    # --- which one

    async def open(self, conversation_id: int, message_id: int | None = None) -> None:
        """Puts a conversation on view, at the branch that holds `message_id`."""
        if conversation_id != self._current.id or message_id is not None:
            self._check_free()
            await self._current.claim(conversation_id)
            self._leaving()
            await self._current.open(conversation_id, message_id)
            self.refresh()
        if self._panels.narrow:
            self._panels.set(conversations=False)
        self._to_input()

    async def new(self, call: Invocation) -> None:
        self._check_free()
        self._leaving()
        await self._current.begin_new()
        self.refresh()
        self._to_input()

    def refresh(self) -> None:
        """Fills the list if it is on view."""
        if self._panels.conversations:
            self._queue.add(self._fill())

    async def _fill(self) -> None:
        conversations = await self._records(ConversationStore.conversations)
        self._screen.query_one(ConversationList).show(conversations, self._current.id)

    def act(self, conversation_id: int, command: str) -> None:
        """`rename` or `delete`, asked for in the list."""
        self._queue.add(self._ask_name(conversation_id) if command == "rename" else self._ask_delete(conversation_id))

    # --- name, end, copy

    async def _rename_current(self, call: Invocation) -> None:
        conversation = self._current.needed()
        if call.argument:
            await self._rename(conversation.id, call.argument)
        else:
            await self._ask_name(conversation.id)

    async def _ask_name(self, conversation_id: int) -> None:
        title = (await self._records(lambda store: store.conversation(conversation_id))).title

        def named(name: str | None) -> None:
            if name and name.strip():
                self._queue.add(self._rename(conversation_id, name))

        self._screen.app.push_screen(TextDialog("Rename the conversation", title), named)

    async def _rename(self, conversation_id: int, name: str) -> None:
        await self._current.rename(conversation_id, name)
        self.refresh()

    async def _delete_current(self, call: Invocation) -> None:
        await self._ask_delete(self._current.needed().id)

    async def _ask_delete(self, conversation_id: int) -> None:
        if conversation_id == self._current.id:
            self._check_free()

        def look(store: ConversationStore) -> tuple[Conversation, int]:
            return store.conversation(conversation_id), sum(map(len, store.children(conversation_id).values()))

        conversation, n_messages = await self._records(look)
        self._records.check_free(conversation)
        text = f"“{visible_line(conversation.title, max_chars=100)}” with {n_messages} messages will be permanently deleted."

        def decided(choice: str | None) -> None:
            if choice == "delete":
                self._queue.add(self._delete(conversation_id))

        self._screen.app.push_screen(
            ChoiceDialog("Delete the conversation?", text, {"keep": "Keep it", "delete": "Delete it"}), decided
        )

    async def _delete(self, conversation_id: int) -> None:
        is_current = conversation_id == self._current.id
        if is_current:
            self._check_free()
        await self._records.delete(conversation_id)
        if is_current:
            await self.new(Invocation())
        self.refresh()

    async def _export(self, call: Invocation) -> None:
        conversation = self._current.needed()
        kind, _, target = call.argument.partition(" ")
        kind = {"": "md", "markdown": "md"}.get(kind, kind)
        if kind not in ("md", "json"):
            raise UsageError(
                f"unknown export format '{kind}'", hint="/export md or /export json, then a path if you like"
            )
        place = Path(target.strip()) if target.strip() else None
        path = await self._records(lambda store: write_export(store, conversation.id, cast(ExportFormat, kind), place))
        self._notices.note(str(path.absolute()), title="Exported", timeout_s=8)

    async def _import(self, call: Invocation) -> None:
        """The newest one comes on view."""
        if not call.argument:
            raise UsageError("no file given", hint="/import conversations.json")
        self._check_free()
        path = Path(call.argument)
        ids = await self._records(lambda store: import_conversations(store, read_conversations(path)))
        what = "1 conversation" if len(ids) == 1 else f"{len(ids)} conversations"
        self._notices.note(f"{what}: F2 lists them", title="Imported", timeout_s=8)
        await self.open(ids[-1])

    # --- finding

    def _search(self, call: Invocation) -> None:
        def chosen(hit: SearchHit | None) -> None:
            if hit is not None:
                self._queue.add(self.open(hit.conversation_id, hit.message_id))

        self._screen.app.push_screen(SearchScreen(self._records.search, call.argument), chosen)
