"""Reads of experts as what asks for them sees them: the promise of a store, tickets, and the readers' queue of pieces.

Knows nothing about files.
"""

from __future__ import annotations

import mmap
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from localrun.alignment import PAGE_BYTES, align_up
from localrun.errors import StoreError
from localrun.offload.cache.slots import Slot
from localrun.quant.model.source import Projection

Bytes = npt.NDArray[np.uint8]


class AbandonedError(StoreError):
    """A read that was cancelled because the expert is no longer needed."""


class ReadBuffer:
    """Page-aligned memory of one expert read in flight."""

    def __init__(self, size_bytes: int) -> None:
        self._map = mmap.mmap(-1, align_up(size_bytes, PAGE_BYTES))
        self.view = memoryview(self._map)
        self.array: Bytes = np.frombuffer(self._map, np.uint8)


@dataclass(slots=True)
class ReadPiece:
    """One read of a file."""

    ticket: Ticket
    file: int
    offset: int
    target: memoryview
    need: int  # bytes that must arrive; the rest of an aligned read may be past the end of the file


class ReadPieces:
    """The readers' queue: awaited pieces in order, then the others."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._wanted: deque[ReadPiece] = deque()
        self._ahead: deque[ReadPiece] = deque()
        self._closed = False

    def put(self, pieces: Iterable[ReadPiece]) -> None:
        """Adds one ticket's pieces."""
        with self._changed:
            for piece in pieces:
                (self._ahead if piece.ticket.ahead and not piece.ticket.hurried else self._wanted).append(piece)
            self._changed.notify_all()

    def get(self) -> ReadPiece | None:
        """The next one, waiting for it; None when there will be none."""
        with self._changed:
            while not self._wanted and not self._ahead and not self._closed:
                self._changed.wait()
            pieces = self._wanted or self._ahead
            return pieces.popleft() if pieces else None

    def hurry(self, slot: Slot) -> None:
        """A call waits for this slot now."""
        with self._changed:
            moving = [piece for piece in self._ahead if piece.ticket.slot is slot]
            if moving:
                self._ahead = deque(piece for piece in self._ahead if piece.ticket.slot is not slot)
                self._wanted.extend(moving)

    def close(self) -> None:
        """Readers end when everything has been read."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


@dataclass(slots=True, eq=False)
class Ticket:
    """One expert's pending read. `error` is set before the ticket appears in `completions`.

    Attributes:
        slot: the slot to fill.
        projections: where the bytes are.
        ahead: read-ahead: not awaited when submitted.
        hurried: awaited since then.
        receiver: gets the ticket instead of `completions`, and plain ggml rows instead of the kernel's layout.
        error: why it failed.
    """

    slot: Slot
    projections: tuple[Projection, ...]
    ahead: bool = False
    receiver: Receiver | None = None
    error: Exception | None = None
    hurried: bool = False
    _left: int = 0
    _buffer: ReadBuffer | None = None
    _copies: set[int] = field(default_factory=set)  # of the model, that bytes came from
    _payloads: list[tuple[int, int]] = field(default_factory=list)  # (position in buffer, bytes) per extent
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def read_bytes(self) -> int:
        """Payload bytes in the files."""
        return sum(extent.n_bytes for projection in self.projections for extent in projection.extents)


Receiver = Callable[[Ticket], None]
"""Called on a reader's thread when a read has ended; must not fail or wait."""


class Store(Protocol):
    """Fills slots with experts in the background. Thread-safe, but the caller must synchronize slots and `completions`.

    Attributes:
        depth: concurrent reads; more are queued.
        staging_bytes: RAM of reads in flight.
        completions: tickets of finished reads, successful or not; none is lost, and none appears before its slot is filled.
    """

    depth: int
    staging_bytes: int
    completions: queue.SimpleQueue[Ticket]

    @property
    def reading_s(self) -> float:
        """Seconds so far with at least one read under way; any thread."""
        ...

    def submit(self, slot: Slot, *, ahead: bool = False, receiver: Receiver | None = None) -> Ticket:
        """Starts filling a LOADING slot; the ticket comes back through `completions`, failed or not.

        Args:
            ahead: read-ahead: all awaited experts go first.
            receiver: gets the ticket; for memory outside the slot table, destined for a device that only knows ggml's layout.

        If it raises, there will be no ticket and nothing writes to the slot.
        """
        ...

    def hurry(self, slot: Slot) -> None:
        """This slot is awaited now: its remaining pieces go before all read-ahead."""
        ...

    def abandon(self, slot: Slot) -> None:
        """No call will wait for this slot: if its read is not over, it ends soon, with `AbandonedError`."""
        ...

    def close(self) -> None:
        """Ends the reads under way; those that have not started never end."""
        ...
