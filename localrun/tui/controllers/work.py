"""Commands, and the queue that runs those that take time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Invocation:
    """One invocation of a command.

    Attributes:
        argument: what followed the slash command.
        message_id: the message for a command of scope `message`; None: the last suitable one.
    """

    argument: str = ""
    message_id: int | None = None


Handler = Callable[[Invocation], Coroutine[Any, Any, None] | None]
"""Runs a command: immediately, or, if it is a coroutine, in the work queue."""


class WorkQueue:
    """Runs coroutines in order, one at a time, so that none sees another half done.

    Keys and painting don't wait for it: with a slow conversations file the user can still scroll, stop and quit. Belongs to one
    event loop.

    Args:
        guard: awaits a piece of work and shows its errors to the user.
    """

    def __init__(self, guard: Callable[[Awaitable[None]], Awaitable[None]]) -> None:
        self._guard = guard
        self._queue: asyncio.Queue[Coroutine[Any, Any, None]] = asyncio.Queue()
        self._busy = False

    @property
    def idle(self) -> bool:
        """Nothing is being done and nothing waits."""
        return not self._busy and self._queue.empty()

    def add(self, work: Coroutine[Any, Any, None]) -> None:
        """To be done after all that was added before."""
        self._queue.put_nowait(work)

    async def run(self) -> None:
        """Works until it is cancelled."""
        try:
            while True:
                work = await self._queue.get()
                self._busy = True
                try:
                    await self._guard(work)
                finally:
                    self._busy = False
        finally:
            while not self._queue.empty():
                self._queue.get_nowait().close()
