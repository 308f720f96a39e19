"""Queues lines for a pipe: a thread writes them, so senders never wait for the other process to read.

Both ends of the engine's pipes send through one of these. Knows only bytes.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable

_Line = tuple[bytes, Callable[[], bool]]


def _always() -> bool:
    return True


class Outbox:
    """The writing end of a pipe, its thread, and the queued lines.

    `put` never blocks: it may be called with any lock held. Owns the file descriptor; the thread closes it and ends after `close`,
    or when the other side is gone (lines are then discarded).

    Lock: `_changed` guards everything below it. Held briefly, never while writing or calling other code; no other lock is taken
    inside it.

    Args:
        fd: blocking; owned by this object from now on.
        name: of the thread.
        room_bytes: queue size from which `has_room` is False.
        on_broken: called once, from the thread, when the other side is gone.
    """

    def __init__(
        self, fd: int, *, name: str, room_bytes: int = 8 << 20, on_broken: Callable[[], None] | None = None
    ) -> None:
        self._fd = fd
        self._room_bytes = room_bytes
        self._on_broken = on_broken
        self._changed = threading.Condition()
        self._lines: deque[_Line] = deque()
        self._n_bytes = 0  # of the lines that wait and the one that is being written
        self._closed = False
        self._broken = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        try:
            self._thread.start()
        except BaseException:
            os.close(fd)
            raise

    def has_room(self) -> bool:
        """Less waits than should."""
        return self._n_bytes < self._room_bytes

    def put(self, line: bytes, wanted: Callable[[], bool] = _always) -> None:
        """Queues `line`; it is dropped if `wanted` returns False when its turn comes. Does nothing after `close`."""
        with self._changed:
            if self._closed or self._broken:
                return
            self._lines.append((line, wanted))
            self._n_bytes += len(line)
            self._changed.notify_all()

    def wait_for_room(self) -> None:
        """Blocks while more waits than should; not once `close` was called or the other side has gone."""
        with self._changed:
            self._changed.wait_for(lambda: self.has_room() or self._closed or self._broken)

    def close(self, *, timeout_s: float = 0.0) -> bool:
        """Takes no more lines; closes the pipe after those that wait. Returns whether that was done within the time."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if timeout_s > 0:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # --- the thread

    def _run(self) -> None:
        try:
            while (next_line := self._next()) is not None:
                line, wanted = next_line
                if wanted():
                    self._write(line)
                with self._changed:
                    self._n_bytes -= len(line)
                    self._changed.notify_all()
        except OSError:
            with self._changed:
                self._broken = True
                self._lines.clear()
                self._n_bytes = 0
                self._changed.notify_all()
            if self._on_broken is not None:
                self._on_broken()
        finally:
            os.close(self._fd)

    def _next(self) -> _Line | None:
        with self._changed:
            self._changed.wait_for(lambda: self._lines or self._closed)
            return self._lines.popleft() if self._lines else None

    def _write(self, line: bytes) -> None:
        rest = memoryview(line)
        while rest:
            rest = rest[os.write(self._fd, rest) :]
