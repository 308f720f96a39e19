"""The store for the event loop: reads and writes are awaited; the work happens on the store's thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from localrun.engine.conversations import (
    Claims,
    Conversation,
    ConversationError,
    ConversationStore,
    SearchHit,
    StoreThread,
)
from localrun.errors import LocalrunError, UsageError
from localrun.textsafe import visible_line
from localrun.tui.faults import as_ours

R = TypeVar("R")

SLOW_S = 1.0
"""After this delay the user is told that the file is locked."""


class GoneError(ConversationError):
    """A conversation or message no longer exists."""

    def __init__(self) -> None:
        super().__init__(
            "this conversation or message no longer exists", hint="it was deleted, perhaps by another localrun"
        )


class ElsewhereError(UsageError):
    """A conversation is open in another window."""

    def __init__(self, title: str) -> None:
        super().__init__(
            f"“{visible_line(title, max_chars=60)}” is open in another window",
            hint="close it there, or begin a new one with Ctrl+N",
        )


class Records:
    """Work on the store, in the order of the calls.

    Args:
        thread: owns the store.
        slow: called when a caller has waited for the file for `SLOW_S`.

    Attributes:
        claims: what this window has open.
    """

    def __init__(self, thread: StoreThread, slow: Callable[[], None] = lambda: None) -> None:
        self._thread = thread
        self.slow = slow
        self.claims = Claims(None)

    async def open(self) -> Path:
        """See `StoreThread.open`."""
        path = await asyncio.wrap_future(self._thread.open())
        self.claims = Claims(path if path.is_absolute() else None)  # else it is in memory
        return path

    @property
    def draft_name(self) -> str:
        """The state that keeps this window's unsent text."""
        return "draft" if self.claims.window == 1 else f"draft-{self.claims.window}"

    def check_free(self, conversation: Conversation) -> None:
        """Raises ElsewhereError if another window has it open."""
        if not self.claims.is_free(conversation.id):
            raise ElsewhereError(conversation.title)

    async def delete(self, conversation_id: int) -> None:
        """Removes a conversation, which no other window can open meanwhile. Raises ElsewhereError if one has it open."""
        conversation = await self(lambda store: store.conversation(conversation_id))
        with self.claims.held(conversation_id) as is_ours:
            if not is_ours:
                raise ElsewhereError(conversation.title)
            await self(lambda store: store.delete(conversation_id))

    async def __call__(self, work: Callable[[ConversationStore], R]) -> R:
        """The result of `work`. When this returns, its changes are in the file.

        Raises:
            ConversationError: the file can't be read or written.
            GoneError: a conversation or message that `work` uses is gone.
        """
        told = asyncio.get_running_loop().call_later(SLOW_S, self.slow)
        try:
            return await asyncio.wrap_future(self._thread.submit(work))
        except KeyError as error:
            raise GoneError from error
        finally:
            told.cancel()

    def post(self, work: Callable[[ConversationStore], Any], failed: Callable[[LocalrunError], None]) -> None:
        """Runs it in the background. `failed` is called on the event loop; missing records are ignored."""
        loop = asyncio.get_running_loop()

        def done(future: Future[Any]) -> None:
            error = future.exception()
            if isinstance(error, Exception) and not isinstance(error, KeyError) and not loop.is_closed():
                loop.call_soon_threadsafe(failed, as_ours(error))

        self._thread.submit(work).add_done_callback(done)

    def search(self, words: str) -> list[SearchHit]:
        """Blocks; use in a separate thread. See `ConversationStore.search`."""
        return self._thread.submit(lambda store: store).result().search(words)

    def close(self, timeout_s: float) -> bool:
        """Blocks. See `StoreThread.close`."""
        closed = self._thread.close(timeout_s)
        self.claims.close()
        return closed
