"""The open conversation: its id, settings, and the branch shown in the chat."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from localrun.engine.conversations import (
    Attachment,
    Conversation,
    ConversationStore,
    Message,
)
from localrun.errors import LocalrunError, UsageError
from localrun.textsafe import visible_line
from localrun.tui.controllers.records import ElsewhereError, GoneError, Records
from localrun.tui.options import ChatOptions, from_json, to_json
from localrun.tui.widgets.chat_view import ChatView
from localrun.tui.widgets.message_view import Entry

TITLE_CHARS = 60
NO_TITLE = "New conversation"


class OpenConversation:
    """Owns the open conversation and its settings; writes to it and shows it in the chat.

    Run its coroutines in the work queue.

    Args:
        defaults: settings of new conversations.
        live: id of the message being written; None if there is none.
        changed: called when the open conversation's title or content has changed.
        failed: called with the error of a write that is not awaited.

    Attributes:
        conversation: None: a new, empty one.
        options: settings of the open conversation.
    """

    def __init__(
        self,
        records: Records,
        chat: Callable[[], ChatView],
        defaults: ChatOptions,
        *,
        live: Callable[[], int | None],
        changed: Callable[[], None],
        failed: Callable[[LocalrunError], None],
    ) -> None:
        self._records, self._chat, self._defaults = records, chat, defaults
        self._live, self._changed, self._failed = live, changed, failed
        self.conversation: Conversation | None = None
        self.options = defaults

    @property
    def id(self) -> int | None:
        return None if self.conversation is None else self.conversation.id

    @property
    def title(self) -> str:
        if self.conversation is None:
            return NO_TITLE
        return visible_line(self.conversation.title, max_chars=TITLE_CHARS) or NO_TITLE

    def needed(self) -> Conversation:
        """The conversation on view.

        Raises:
            UsageError: it is a new one.
        """
        if self.conversation is None:
            raise UsageError("this conversation is still empty")
        return self.conversation

    # --- which one

    async def open_last(self) -> None:
        """The one of the last time; a new one if that is gone, or open in another window."""
        last = await self._records(lambda store: store.get_state("last_conversation"))
        try:
            if isinstance(last, int):
                await self.open(last)
                return
        except GoneError:
            pass
        except ElsewhereError as error:
            self._failed(UsageError(f"{error}; this is a new conversation"))
        await self.show()

    async def open(self, conversation_id: int, message_id: int | None = None) -> None:
        """Puts a conversation on view, at the branch that holds `message_id`. Raises as `claim`."""
        await self.claim(conversation_id)

        def work(store: ConversationStore) -> Conversation:
            found = store.conversation(conversation_id)
            if message_id is not None and message_id not in {m.id for m in store.branch(conversation_id)}:
                store.show(conversation_id, message_id)
            store.set_state("last_conversation", conversation_id)
            return found

        self.conversation = await self._records(work)
        self.options = from_json(self.conversation.settings, self._defaults)
        await self.show(at=message_id)

    async def claim(self, conversation_id: int) -> None:
        """Keeps other windows from opening a conversation, in place of the one before.

        Raises:
            GoneError: it does not exist.
            ElsewhereError: another window has it open.
        """
        conversation = await self._records(lambda store: store.conversation(conversation_id))
        if not self._records.claims.take(conversation_id):
            raise ElsewhereError(conversation.title)

    async def begin_new(self) -> None:
        """Starts an empty one; the current one is kept."""
        await self._records(lambda store: store.set_state("last_conversation", None))
        self._records.claims.leave()
        self.conversation, self.options = None, self._defaults
        await self.show()

    async def rename(self, conversation_id: int, title: str) -> None:
        """Renames any conversation."""

        def work(store: ConversationStore) -> Conversation:
            store.rename(conversation_id, title)
            return store.conversation(conversation_id)

        renamed = await self._records(work)
        if self.id == conversation_id:
            self.conversation = renamed
        self._changed()

    def set_options(self, options: ChatOptions) -> None:
        """New settings for the conversation on view, saved in the background."""
        self.options = options
        if (conversation_id := self.id) is not None:
            self._records.post(lambda store: store.save_settings(conversation_id, to_json(options)), self._failed)

    # --- what is in it

    async def branch(self) -> list[Message]:
        """The messages on view, as they are in the file."""
        conversation_id = self.id
        return [] if conversation_id is None else await self._records(lambda store: store.branch(conversation_id))

    async def show(self, *, at: int | None = None) -> None:
        """Fills the chat with the branch on view; `at`: the message to scroll to, None: the end."""
        conversation_id, live = self.id, self._live()
        entries = [] if conversation_id is None else await self._records(lambda s: _entries(s, conversation_id, live))
        await self._chat().show(entries, at=at)
        self._changed()

    async def add_question(
        self, text: str, attachments: Sequence[Attachment], *, instead_of: Message | None = None
    ) -> Message:
        """Writes a question at the end of the visible branch, or as another version of `instead_of`; creates the conversation
        if necessary, named after the question. The draft is deleted with it.

        Raises:
            ElsewhereError: the conversation is new, and another window has opened it first.
        """
        title = visible_line((text or attachments[0].name).strip().split("\n")[0], max_chars=TITLE_CHARS)
        conversation, settings = self.conversation, to_json(self.options)
        draft = self._records.draft_name

        def work(store: ConversationStore) -> tuple[Conversation, Message, Entry]:
            opened = conversation or store.create(title, settings)
            parent_id = instead_of.parent_id if instead_of is not None else store.conversation(opened.id).head
            question = store.add(opened.id, parent_id, "user", text, attachments=attachments)
            store.set_state("last_conversation", opened.id)
            store.set_state(draft, "")
            return opened, question, _entries(store, opened.id, None)[-1]

        opened, question, entry = await self._records(work)
        if not self._records.claims.take(opened.id):  # it is new, and another window was quicker to open it
            raise ElsewhereError(opened.title)
        self.conversation = opened
        entries = self._chat().entries
        if instead_of is not None or (entries and entries[-1].message.id != question.parent_id):
            await self.show()
        else:
            await self._chat().append(entry)
            self._changed()
        return question

    async def add_answer(self, parent_id: int, details: dict[str, Any]) -> Entry:
        """An empty answer to a question, to be filled. The chat does not show it yet."""
        conversation_id = self.needed().id

        def work(store: ConversationStore) -> Entry:
            message = store.add(conversation_id, parent_id, "assistant", "", state="writing", details=details)
            n_versions = len(store.children(conversation_id)[parent_id])
            return Entry(message, n_versions, n_versions, live=True)

        return await self._records(work)

    async def discard_empty(self, message: Message) -> None:
        """Takes away an answer that never began."""
        await self._records(lambda store: store.discard_empty(message))
        await self.show()

    async def rewind(self, message_id: int | None) -> None:
        """Makes a message the end of the visible branch; what followed stays as a branch."""
        conversation_id = self.needed().id
        await self._records(lambda store: store.rewind(conversation_id, message_id))
        await self.show()

    async def switch(self, message: Message, step: int) -> int | None:
        """Puts the version of `message` that is `step` further on view; gives its id, None if there is only one."""

        def work(store: ConversationStore) -> int | None:
            siblings = store.children(message.conversation_id)[message.parent_id]
            other = siblings[(siblings.index(message.id) + step) % len(siblings)]
            if other == message.id:
                return None
            store.show(message.conversation_id, other)
            return other

        other = await self._records(work)
        if other is not None:
            await self.show(at=other)
        return other

    async def begin_again_with(self, messages: Sequence[Message]) -> int | None:
        """Copies messages to a new root; returns the id of the last one."""
        conversation_id = self.needed().id

        def work(store: ConversationStore) -> int | None:
            parent_id: int | None = None
            for message in messages:
                parent_id = store.add(
                    conversation_id,
                    parent_id,
                    message.role,
                    message.content,
                    reasoning=message.reasoning,
                    state=message.state,
                    attachments=message.attachments,
                    details=message.details,
                ).id
            return parent_id

        last = await self._records(work)
        await self.show()
        return last


def _entries(store: ConversationStore, conversation_id: int, live: int | None) -> list[Entry]:
    """The branch on view with each message's place among its versions."""
    children = store.children(conversation_id)
    result = []
    for message in store.branch(conversation_id):
        versions = children[message.parent_id]
        result.append(Entry(message, versions.index(message.id) + 1, len(versions), live=message.id == live))
    return result
