"""Reads of experts as what asks for them sees them: the promise of a store, tickets, and the readers' queue of pieces.

Knows nothing about files.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from localrun.alignment import PAGE_BYTES, align_up
from localrun.errors import StoreError
from localrun.offload.cache.early import ALL_MATRICES, N_MATRICES, Arrival, EarlyReads
from localrun.offload.cache.expert_files import ReadPlan
from localrun.offload.cache.slots import Slot
from localrun.pages import anonymous
from localrun.quant.model.source import Projection

Bytes = npt.NDArray[np.uint8]


class AbandonedError(StoreError):
    """A read that was cancelled because the expert is not needed."""


class ReadBuffer:
    """Page-aligned memory of one expert read in flight."""

    def __init__(self, memory: Bytes, number: int = 0) -> None:
        self.array = memory
        self.view = memory.data
        self.number = number


def read_buffers(count: int, size_bytes: int) -> list[ReadBuffer]:
    """Buffers one after the other in one mapping, in huge pages where the kernel supports them.

    [m] A read past the page cache pins what it fills, page by page: in small pages that is most of its CPU time, 53 to 73 ms per GB
    against 5 to 19 in huge ones (reads of 1 to 8 MiB, Zen 4).
    """
    size = align_up(size_bytes, PAGE_BYTES)
    memory = np.frombuffer(anonymous(count * size, forked=False), np.uint8)
    return [ReadBuffer(memory[number * size : (number + 1) * size], number) for number in range(count)]


@dataclass(slots=True)
class ReadPiece:
    """One read of a file."""

    ticket: Ticket
    file: int
    offset: int
    target: memoryview
    need: int  # bytes that must arrive; the rest of an aligned read may be past the end of the file
    matrices: int = ALL_MATRICES  # those that have bytes in it, a bit each
    is_ahead: bool = False  # nobody waited for it when its read began


@dataclass(slots=True)
class ReadMatrices:
    """Matrices of a ticket, a bit each, all of whose bytes are there."""

    ticket: Ticket
    matrices: int


MOST_AHEAD_BYTES: Final = 4 << 20
"""In flight that nobody waits for, in at least two reads: enough to keep a drive busy, and what is awaited next queues behind it.
[m] Whole Flash with 2-bit experts, two Emerald Rapids cores, a drive of 1.3 to 1.5 GB/s: with 16 MiB, as four reads of 4 MiB, a
token takes 1.18 to 1.21 times its slower resource, with 4 MiB, as two reads or four, 1.15 to 1.17; with one read of 2 MiB 1.21,
because fewer guesses are there in time."""


def most_ahead(piece_bytes: int) -> int:
    """Reads in flight that nobody waits for, if the largest has so many bytes."""
    return max(2, MOST_AHEAD_BYTES // piece_bytes)


ALL: Final = 1 << 30
"""More readers than there are."""


class ReadPieces:
    """The readers' queue: what compiled code asks for, awaited pieces in order, then the others.

    Args:
        most_ahead: pieces in flight that nobody waits for.
        early: through which compiled code asks; None: it does not.
    """

    def __init__(self, most_ahead: int, early: EarlyReads | None = None) -> None:
        self._most_ahead = most_ahead
        self._early = early
        self._changed = threading.Condition()
        self._complete: deque[ReadMatrices] = deque()
        self._wanted: deque[ReadPiece] = deque()
        self._ahead: deque[ReadPiece] = deque()
        self._n_ahead = 0
        self._closed = False

    def put(self, pieces: Iterable[ReadPiece]) -> None:
        """Adds one ticket's pieces."""
        n_wanted = n_ahead = 0
        with self._changed:
            for piece in pieces:
                if piece.ticket.ahead and not piece.ticket.hurried:
                    self._ahead.append(piece)
                    n_ahead += 1
                else:
                    self._wanted.append(piece)
                    n_wanted += 1
            n_ahead = min(n_ahead, self._most_ahead - self._n_ahead)
        self._wake(n_wanted + n_ahead)

    def put_matrices(self, ticket: Ticket, matrices: int) -> None:
        """Adds matrices (a bit each) of a ticket that are there."""
        each = [ReadMatrices(ticket, 1 << which) for which in range(N_MATRICES) if matrices >> which & 1]
        with self._changed:
            self._complete.extend(each)
        self._wake(len(each))

    def get(self) -> ReadPiece | ReadMatrices | Arrival | None:
        """The next piece or complete matrix, waiting for it, or what this reader has completed for compiled code meanwhile; None
        when there will be none."""
        if self._early is None:
            with self._changed:
                while (found := self._next()) is None and not self._closed:
                    self._changed.wait()
                return found
        while True:
            asked = self._early.asked
            if (arrival := self._early.next(asked, sleeps=False)) is not None:
                return arrival
            with self._changed:
                if (found := self._next()) is not None or self._closed:
                    return found
            if (arrival := self._early.next(asked)) is not None:
                return arrival

    def _next(self) -> ReadPiece | ReadMatrices | None:
        queue_: deque[ReadMatrices] | deque[ReadPiece] = self._complete or self._wanted
        if queue_:
            return queue_.popleft()
        if not self._ahead or self._n_ahead >= self._most_ahead:
            return None
        self._n_ahead += 1
        piece = self._ahead.popleft()
        piece.is_ahead = True
        return piece

    def end_ahead(self, *, last: bool) -> None:
        """A piece that `get` has given out as read ahead has been read. `last`: the reader does something else next."""
        with self._changed:
            self._n_ahead -= 1
            wakes = last and bool(self._ahead)
        if wakes:
            self._wake(1)

    def _wake(self, count: int) -> None:
        """Wakes as many readers as find something to do; each looks for more before it sleeps again."""
        if self._early is not None:
            self._early.ask(count)
        else:
            with self._changed:
                self._changed.notify_all()

    def hurry(self, slot: Slot) -> None:
        """A call waits for this slot now."""
        with self._changed:
            moving = [piece for piece in self._ahead if piece.ticket.slot is slot]
            if moving:
                self._ahead = deque(piece for piece in self._ahead if piece.ticket.slot is not slot)
                self._wanted.extend(moving)
        if moving:
            self._wake(len(moving))  # readers may have left them because enough was read ahead

    def close(self) -> None:
        """Readers end when everything has been read."""
        with self._changed:
            self._closed = True
        self._wake(ALL)


@dataclass(slots=True, eq=False)
class Ticket:
    """One expert's pending read. `error` is set before the ticket appears in `completions`.

    Attributes:
        slot: the slot to fill.
        projections: where the bytes are.
        ahead: read-ahead: not awaited when submitted.
        hurried: awaited since then.
        receiver: gets the ticket instead of `completions`, and plain ggml rows instead of the kernel's layout.
        arrived: called on a reader's thread as soon as the slot is filled, before the ticket appears in `completions`; must not
            fail or wait.
        error: why it failed.
    """

    slot: Slot
    projections: tuple[Projection, ...]
    ahead: bool = False
    receiver: Receiver | None = None
    arrived: Callable[[], None] | None = None
    error: Exception | None = None
    hurried: bool = False
    _buffer: ReadBuffer | None = None
    _plan: ReadPlan = field(default_factory=ReadPlan)
    _is_early: bool = False  # compiled code began it
    _copies: set[int] = field(default_factory=set)  # of the model, that bytes came from
    _damage: Exception | None = None  # found in what was read, where another copy may be whole
    _left: list[int] = field(default_factory=list)  # of each matrix, pieces that are not there
    _unwritten: int = ALL_MATRICES  # matrices that are not in the slot, a bit each
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def _begin(self, pieces: Sequence[ReadPiece]) -> None:
        """These are read, all of it."""
        self._left = [sum(piece.matrices >> which & 1 for piece in pieces) for which in range(N_MATRICES)]

    def _note_read(self, piece: ReadPiece) -> int:
        """A piece is there, or has failed; the matrices that are complete thereby, a bit each."""
        complete = 0
        with self._lock:
            for which in range(N_MATRICES):
                if piece.matrices >> which & 1:
                    self._left[which] -= 1
                    complete |= (self._left[which] == 0) << which
        return complete

    def _note_written(self, matrices: int) -> bool:
        """These are in the slot, or have failed; whether they are the last."""
        with self._lock:
            self._unwritten &= ~matrices
            return self._unwritten == 0

    @property
    def read_bytes(self) -> int:
        """Payload bytes in the files."""
        return sum(extent.n_bytes for projection in self.projections for extent in projection.extents)


Receiver = Callable[[Ticket], None]
"""Called on a reader's thread when a read has ended; must not fail or wait."""


def nothing_follows() -> None:
    """Default of `Store.ahead_arrived`."""


class Store(Protocol):
    """Fills slots with experts in the background. Thread-safe, but the caller must synchronize slots and `completions`.

    Attributes:
        depth: concurrent reads; more are queued.
        staging_bytes: RAM of reads in flight, and of what is remembered of experts' places.
        completions: tickets of finished reads, successful or not; none is lost, and none appears before its slot is filled.
        early: through which compiled code may begin reads; None: it can't.
        ahead_arrived: called on a reader's thread when the ticket of a read that nobody waits for, and that has succeeded, is in
            `completions`; must not fail or wait.
    """

    depth: int
    staging_bytes: int
    completions: queue.SimpleQueue[Ticket]
    early: EarlyReads | None
    ahead_arrived: Callable[[], None]

    @property
    def direct(self) -> bool:
        """All files are read past the page cache."""
        ...

    @property
    def reading_s(self) -> float:
        """Seconds so far with at least one read under way; any thread."""
        ...

    def submit(
        self,
        slot: Slot,
        *,
        ahead: bool = False,
        receiver: Receiver | None = None,
        arrived: Callable[[], None] | None = None,
    ) -> Ticket:
        """Starts filling a LOADING slot; the ticket comes back through `completions`, failed or not.

        Args:
            ahead: read-ahead: all awaited experts go first.
            arrived: see `Ticket`.
            receiver: gets the ticket; for memory outside the slot table, destined for a device that only knows ggml's layout.

        If it raises, there will be no ticket and nothing writes to the slot.
        """
        ...

    def know(self, layer: int, expert: int, variant: int) -> None:
        """From now on compiled code may begin to read this copy, see `early`; what is said first counts.

        Raises:
            LocalrunError: nobody can say where it is.
        """
        ...

    def hurry(self, slot: Slot, arrived: Callable[[], None] | None = None) -> bool:
        """This slot is awaited now: its remaining pieces go before all read-ahead.

        Args:
            arrived: see `Ticket`.

        Returns:
            `arrived` will be called if the read succeeds; False: it was given too late.
        """
        ...

    def abandon(self, slot: Slot) -> None:
        """No call will wait for this slot: if its read is not over, it ends soon, with `AbandonedError`."""
        ...

    def drop_early(self) -> None:
        """No slot will be submitted for the early reads that are left."""
        ...

    def close(self) -> None:
        """Ends the reads under way; those that have not started never end."""
        ...
