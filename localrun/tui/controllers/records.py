"""The store for the event loop: reads and writes are awaited; the work happens on the store's thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from localrun.engine.conversations import ConversationError, ConversationStore, SearchHit, StoreThread
from localrun.errors import LocalrunError
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


class Records:
    """Work on the store, in the order of the calls.

    Args:
        thread: owns the store.
        slow: called when a caller has waited for the file for `SLOW_S`.
    """

    def __init__(self, thread: StoreThread, slow: Callable[[], None] = lambda: None) -> None:
        self._thread = thread
        self.slow = slow

    async def open(self) -> Path:
        """See `StoreThread.open`."""
        return await asyncio.wrap_future(self._thread.open())

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
        return self._thread.close(timeout_s)
