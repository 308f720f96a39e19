"""Runs the store on its own thread: callers that must not block (an event loop) submit work and get a future.

One thread does all work in submission order, so reads see all earlier writes, and once a future is done, the change is in the
file.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from pathlib import Path
from typing import Any, TypeVar

from localrun.engine.conversations.database import ConversationError
from localrun.engine.conversations.store import ConversationStore

R = TypeVar("R")


class StoreThread:
    """Owns a `ConversationStore`: opens it, uses it and closes it on its thread.

    All methods may be called from any thread. The thread is a daemon, so a hanging file system does not block exit.
    """

    def __init__(self, open_store: Callable[[], ConversationStore] = ConversationStore.open) -> None:
        self._open_store = open_store
        self._jobs: queue.SimpleQueue[Callable[[], bool]] = queue.SimpleQueue()
        self._store: ConversationStore | None = None
        self._thread = threading.Thread(target=self._work, name="conversations", daemon=True)
        self._thread.start()

    def open(self) -> Future[Path]:
        """Opens the file, the first time or again after a failure; gives its path. Fails as `ConversationStore.open`."""

        def job() -> Path:
            if self._store is None:
                self._store = self._open_store()
            return self._store.path

        return self._submit(job)

    def submit(self, work: Callable[[ConversationStore], R]) -> Future[R]:
        """Runs `work` after everything submitted before. The future fails like `work`, or with ConversationError if there is no
        store."""

        def job() -> R:
            if self._store is None:
                raise ConversationError("the conversations are not open")
            return work(self._store)

        return self._submit(job)

    def close(self, timeout_s: float) -> bool:
        """Finishes submitted work, then closes the file; returns whether that was done in time."""

        def job() -> bool:
            store, self._store = self._store, None
            if store is not None:
                with contextlib.suppress(ConversationError):
                    store.close()
            return False

        self._jobs.put(job)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _submit(self, job: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()

        def run() -> bool:
            # The change is made even if its caller has stopped waiting.
            try:
                result, error = job(), None
            except BaseException as failure:
                result, error = None, failure
            with contextlib.suppress(InvalidStateError):
                future.set_exception(error) if error is not None else future.set_result(result)
            return True

        self._jobs.put(run)
        return future

    def _work(self) -> None:
        while self._jobs.get()():
            pass
