"""Reads experts from files into slots: positional reads, O_DIRECT where supported, several in flight.

One expert is three projections in one extent each (two for FP4 and FP8: weights, scales). A read is split into pieces of a few
MiB, which I/O threads ("readers") fetch in parallel, because a single read in flight leaves about a third of an NVMe drive idle.
The thread that finishes a matrix' last piece puts it into the slot (`matrices.py`), while others read the next one. No mmap: the
operating system's read-ahead knows nothing about experts.

`completions` are for the decoding thread; readers touch only staging buffers and slots in state LOADING.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from localrun.errors import ChecksumError, FormatError, StoreError
from localrun.offload.cache.drive_probe import DEFAULT_PIECE_BYTES, DEFAULT_READS
from localrun.offload.cache.early import ALL_MATRICES, N_MATRICES, Arrival, EarlyReads, even_pieces
from localrun.offload.cache.expert_files import ExpertFile, plan_read
from localrun.offload.cache.matrices import MatrixWriter, Packer
from localrun.offload.cache.slots import Slot
from localrun.offload.cache.staging import N_BUFFERS, buffers, places_bytes
from localrun.offload.cache.tickets import (
    AbandonedError,
    ReadBuffer,
    ReadMatrices,
    ReadPiece,
    ReadPieces,
    Receiver,
    Ticket,
    most_ahead,
    nothing_follows,
    read_buffers,
)
from localrun.offload.kernels import futex
from localrun.pages import share_heaps
from localrun.quant.model.source import ModelSource, Projection

log = logging.getLogger(__name__)


class ExpertStore:
    """Reads experts from a model's files.

    Owns file descriptors, readers and staging buffers, and remembers where experts are; `staging_bytes` counts towards the RAM
    budget.

    Args:
        source: the experts' locations.
        packers: by layer, one kernel per variant.
        n_reads: reads in flight.
        piece_bytes: maximum size of a single read.
        n_buffers: experts in flight; each has a staging buffer of the largest expert's size.
        verify: check checksums on every read, if the source has them, because any read may fail. Hashing is many
            times as fast as a drive (docs/benchmarks.md, "Checksums"). Without checksums, look for lost weights
            (`localrun.quant.zeros`).
        mirror: a second copy of the same model, ideally on another drive: pieces go to the copy with fewer pending reads, and
            to the other one if a read fails or what was read is damaged.
    """

    def __init__(
        self,
        source: ModelSource,
        packers: Mapping[int, Sequence[Packer]],
        *,
        mirror: ModelSource | None = None,
        n_reads: int = DEFAULT_READS,
        piece_bytes: int = DEFAULT_PIECE_BYTES,
        n_buffers: int = N_BUFFERS,
        verify: bool = True,
    ) -> None:
        self._source = source
        self._known: dict[tuple[int, int, bool], tuple[Projection, Projection, Projection]] = {}
        self._piece_bytes = piece_bytes
        self.completions: queue.SimpleQueue[Ticket] = queue.SimpleQueue()
        self.ahead_arrived: Callable[[], None] = nothing_follows
        self._lock = threading.Lock()
        self._waiting: deque[Ticket] = deque()
        self._waiting_ahead: deque[Ticket] = deque()
        self._reading: list[Ticket] = []  # those that have a buffer
        copies = [source] if mirror is None else [source, mirror]
        self._matrices = MatrixWriter(copies, packers, verify=verify)
        self._files = [[ExpertFile.open(copy.files[i]) for copy in copies] for i in range(len(source.files))]
        self._is_direct = [any(file.direct for file in copies) for copies in self._files]
        self._under_way = [0] * len(copies)  # bytes asked of each copy and not yet there
        self._n_reading, self._reading_s, self._reading_since, self._reading_until = 0, 0.0, 0.0, 0.0
        buffer_bytes, decoded_bytes = buffers(source)
        self.staging_bytes = n_buffers * (buffer_bytes + decoded_bytes) + places_bytes(source)
        self.depth = n_buffers
        self._most_ahead = max(
            1, n_buffers // 2
        )  # reads that nobody waits for leave buffers to those that somebody waits for
        self._buffers = read_buffers(n_buffers, buffer_bytes)
        self._free = list(self._buffers)  # without early reads
        self.early = self._make_early(n_reads) if mirror is None and futex.is_supported() else None
        self._pieces = ReadPieces(most_ahead(piece_bytes), self.early)
        self._adopted: dict[int, Ticket] = {}  # by buffer of an early read, until it is given back
        self._there: dict[int, int] = {}  # matrices that are there of early reads under way, by buffer, a bit each
        self._complete: dict[int, float] = {}  # buffers of early reads that no ticket has asked for yet, and since when
        self._dropped: set[int] = set()  # those that none will ask for
        share_heaps()
        self._readers = [
            threading.Thread(target=self._read_pieces, name=f"localrun-io-{i}", daemon=True) for i in range(n_reads)
        ]
        for reader in self._readers:
            reader.start()

    @property
    def direct(self) -> bool:
        """See `Store`."""
        return all(file.direct for copies in self._files for file in copies)

    @property
    def reading_s(self) -> float:
        """See `Store`."""
        with self._lock:
            return self._reading_s + (time.perf_counter() - self._reading_since if self._n_reading else 0.0)

    def _note_begin(self, at_s: float) -> None:
        """A read began, possibly some time ago; the caller holds the lock, as of the next one."""
        if self._n_reading == 0:
            self._reading_since = max(at_s, self._reading_until)
        self._n_reading += 1

    def _note_end(self, at_s: float) -> None:
        self._n_reading -= 1
        if self._n_reading == 0:
            self._reading_s += max(0.0, at_s - self._reading_since)
            self._reading_until = max(self._reading_until, at_s)

    def _make_early(self, n_reads: int) -> EarlyReads:
        layers = self._source.moe_layers
        shape = max(layers) + 1, max(moe.n_experts for moe in layers.values())
        addresses = [int(buffer.array.ctypes.data) for buffer in self._buffers]
        return EarlyReads(addresses, shape, n_reads, self._piece_bytes)

    def submit(
        self,
        slot: Slot,
        *,
        ahead: bool = False,
        receiver: Receiver | None = None,
        arrived: Callable[[], None] | None = None,
    ) -> Ticket:
        """See `Store`."""
        ticket = Ticket(slot, (), ahead, receiver, arrived)
        try:
            ticket.projections = self._projections(slot.layer, slot.expert, slot.variant)
        except Exception as error:  # waiters must get this ticket
            ticket.error = error
            self._hand_over(ticket)
            return ticket
        if not ahead and receiver is None and self._adopt(ticket):
            return ticket
        with self._lock:
            (self._waiting_ahead if ahead else self._waiting).append(ticket)
        self._start_waiting()
        return ticket

    def _projections(self, layer: int, expert: int, variant: int) -> tuple[Projection, Projection, Projection]:
        """Where a copy is. Kept: working it out takes a third of `submit`."""
        copy = layer, expert, variant > 0
        if (known := self._known.get(copy)) is None:
            recipe = self._source.expert if variant else self._source.base_expert
            known = self._known[copy] = recipe(layer, expert)
        return known

    def know(self, layer: int, expert: int, variant: int) -> None:
        """See `Store`."""
        if self.early is not None:
            plan = plan_read(self._projections(layer, expert, variant), self._is_direct)
            fds = [copies[0].fd for copies in self._files]
            extents = [(fds[file], start, end, last) for file, start, end, last, _ in plan.spans]
            self.early.know(layer, expert, extents, plan.matrices)

    def hurry(self, slot: Slot, arrived: Callable[[], None] | None = None) -> bool:
        """See `Store`."""
        with self._lock:
            hurried = [ticket for ticket in (*self._waiting_ahead, *self._reading) if ticket.slot is slot]
            for ticket in hurried:
                ticket.hurried, ticket.arrived = True, arrived
                if ticket in self._waiting_ahead:
                    self._waiting_ahead.remove(ticket)
                    self._waiting.appendleft(ticket)
        self._start_waiting()
        self._pieces.hurry(slot)
        return bool(hurried)

    def abandon(self, slot: Slot) -> None:
        """See `Store`."""
        error = AbandonedError("this expert is not needed")
        with self._lock:
            waiting = [ticket for ticket in self._waiting_ahead if ticket.slot is slot]
            for ticket in waiting:
                self._waiting_ahead.remove(ticket)
            for ticket in self._reading:
                if ticket.slot is slot and ticket.error is None:
                    ticket.error = error  # readers drop the pieces that are left
        for ticket in waiting:
            ticket.error = error
            self._hand_over(ticket)
        self._pieces.hurry(slot)  # frees its buffer immediately

    def close(self) -> None:
        """Ends the readers after the reads under way and closes the files."""
        with self._lock:
            self._waiting.clear()
            self._waiting_ahead.clear()
        self._pieces.close()
        for reader in self._readers:
            reader.join()
        for copies in self._files:
            for file in copies:
                os.close(file.fd)
        self._files = []

    # -- early reads ----------------------------------------------------------------------------------------------------

    def _adopt(self, ticket: Ticket) -> bool:
        """Takes over the early read of the ticket's expert, if there is one; from now on there may be."""
        if self.early is None:
            return False
        slot = ticket.slot
        with self._lock:
            taken = self._adopted.keys() | self._dropped
            found = [i for i, *whose in self.early.holding() if whose == [slot.layer, slot.expert] and i not in taken]
            if found:
                there = self._take_over(ticket, found[0])
        if not found:
            self.know(slot.layer, slot.expert, slot.variant)
            return False
        if there:
            self._pieces.put_matrices(ticket, there)
        return True

    def _take_over(self, ticket: Ticket, number: int) -> int:
        """The ticket's bytes come from an early read; which matrices are there. The caller holds the lock."""
        assert self.early is not None
        ticket._buffer, ticket._plan = self._buffers[number], plan_read(ticket.projections, self._is_direct)
        ticket._is_early = True
        ticket._copies.add(0)
        self._reading.append(ticket)
        self._adopted[number] = ticket
        self._note_begin(self.early.began_s(number))
        if (ended_at := self._complete.pop(number, None)) is not None:
            self._note_end(ended_at)
            return ALL_MATRICES
        return self._there.get(number, 0)

    def _arrived_early(self, arrival: Arrival) -> None:
        """Some matrices of an early read are there, or have failed."""
        number = arrival.buffer
        with self._lock:
            ticket, dropped = self._adopted.get(number), number in self._dropped
            there = self._there[number] = self._there.get(number, 0) | arrival.matrices
            if there == ALL_MATRICES:
                del self._there[number]
                if ticket is not None:
                    self._note_end(time.perf_counter())
                elif dropped:
                    self._free_early(number)
                else:
                    self._complete[number] = time.perf_counter()
        if ticket is not None:
            self._write(ticket, arrival.matrices)
        elif there == ALL_MATRICES:
            self._start_waiting()

    def _read_again(self, ticket: Ticket, buffer: ReadBuffer) -> None:
        """After an early read that failed, which did not say what is wrong."""
        ticket._buffer, ticket._is_early, ticket._unwritten = None, False, ALL_MATRICES
        ticket._copies.clear()
        with self._lock:
            self._reading.remove(ticket)
            self._waiting.appendleft(ticket)
        self._give_back(buffer)
        self._start_waiting()

    def drop_early(self) -> None:
        """See `Store`."""
        if self.early is None:
            return
        with self._lock:
            left = [number for number, _, _ in self.early.holding() if number not in self._adopted]
            complete = [number for number in left if number in self._complete]
            for number in complete:
                self._free_early(number)
            self._dropped.update(set(left) - set(complete))
        if complete:
            self._start_waiting()

    # -- readers --------------------------------------------------------------------------------------------------------

    def _take_buffer(self) -> ReadBuffer | None:
        """A free one; the caller holds the lock.

        What somebody waits for gets one even if early reads have all of them: those can be for experts that get a slot only
        after this one is computed. The last to complete is given up then, and read again later.
        """
        if self.early is None:
            return self._free.pop() if self._free else None
        number = self.early.take()
        if number is None and self._waiting and self._complete:
            number, _ = self._complete.popitem()
            self.early.give_up(number)
        return None if number is None else self._buffers[number]

    def _give_back(self, buffer: ReadBuffer) -> None:
        if self.early is None:
            self._free.append(buffer)
        else:
            with self._lock:
                self._free_early(buffer.number)

    def _free_early(self, number: int) -> None:
        """Nothing is known of the buffer any more, and compiled code may take it; the caller holds the lock."""
        assert self.early is not None
        self._adopted.pop(number, None)
        self._complete.pop(number, None)
        self._dropped.discard(number)
        self.early.free(number)

    def _start_waiting(self) -> None:
        """Moves waiting tickets to free buffers and their pieces to the readers."""
        while True:
            with self._lock:
                n_ahead = sum(ticket.ahead and not ticket.hurried for ticket in self._reading)
                may_start = self._waiting or (self._waiting_ahead and n_ahead < self._most_ahead)
                buffer = self._take_buffer() if may_start else None
                if buffer is None:
                    return
                ticket = (self._waiting or self._waiting_ahead).popleft()
                self._reading.append(ticket)
            ticket._buffer = buffer
            try:
                pieces = self._cut(ticket, buffer)
            except Exception as error:
                ticket.error = error
                self._finish(ticket)
                continue
            ticket._begin(pieces)
            self._pieces.put(pieces)

    def _cut(self, ticket: Ticket, buffer: ReadBuffer) -> list[ReadPiece]:
        plan = ticket._plan = plan_read(ticket.projections, self._is_direct)
        pieces = []
        for file, start, end, last, position in plan.spans:
            most = even_pieces(end - start, self._piece_bytes)
            for offset in range(start, end, most):
                size, at = min(most, end - offset), position + offset - start
                need, matrices = min(size, last - offset), plan.matrices_in(at, at + size)
                pieces.append(ReadPiece(ticket, file, offset, buffer.view[at : at + size], need, matrices))
        return pieces

    def _read_pieces(self) -> None:
        while (work := self._pieces.get()) is not None:
            if isinstance(work, Arrival):
                self._arrived_early(work)
            elif isinstance(work, ReadMatrices):
                self._write(work.ticket, work.matrices)
            else:
                self._read_piece(work)

    def _read_piece(self, piece: ReadPiece) -> None:
        ticket = piece.ticket
        if ticket.error is None:
            try:
                self._read(piece)
            except Exception as error:  # any error is reported by the decoding thread
                ticket.error = error
        complete = ticket._note_read(piece)
        if piece.is_ahead:
            self._pieces.end_ahead(last=complete != 0)
        if complete:
            self._write(ticket, complete)

    def _read(self, piece: ReadPiece) -> None:
        """Reads a piece from the less busy copy, from the other one if that fails."""
        copies = self._files[piece.file]
        with self._lock:
            first = min(range(len(copies)), key=self._under_way.__getitem__)
            self._under_way[first] += piece.need
            self._note_begin(time.perf_counter())
        copy = first
        try:
            _read_from(copies[first], piece)
        except StoreError as error:
            if len(copies) == 1:
                raise
            log.warning("%s; reading the other copy", error)
            copy = 1 - first
            _read_from(copies[copy], piece)
        finally:
            with self._lock:
                self._under_way[first] -= piece.need
                self._note_end(time.perf_counter())
        with piece.ticket._lock:
            piece.ticket._copies.add(copy)

    def _write(self, ticket: Ticket, matrices: int) -> None:
        """Puts matrices whose bytes are there into the slot; whoever writes the last one finishes the ticket."""
        for which in range(N_MATRICES):
            if (
                matrices >> which & 1
                and ticket.error is None
                and ticket._damage is None
                and not self._has_failed(ticket)
            ):
                self._write_one(ticket, which)
        if ticket._note_written(matrices):
            self._finish(ticket)

    def _write_one(self, ticket: Ticket, which: int) -> None:
        with ticket._lock:
            copy = max(ticket._copies)
        try:
            self._fill(ticket, which, copy)
        except (ChecksumError, FormatError) as error:
            if len(self._under_way) == 1:
                ticket.error = error
            else:
                ticket._damage = error
        except Exception as error:
            ticket.error = error

    def _has_failed(self, ticket: Ticket) -> bool:
        """Compiled code began the ticket's read, and could not read all of it."""
        if not ticket._is_early:
            return False
        assert self.early is not None
        assert ticket._buffer is not None
        return self.early.has_failed(ticket._buffer.number)

    def _finish(self, ticket: Ticket) -> None:
        buffer = ticket._buffer
        assert buffer is not None
        if ticket.error is None and self._has_failed(ticket):
            self._read_again(ticket, buffer)
            return
        if ticket.error is None and ticket._damage is not None:
            try:
                self._fill_from_one_copy(ticket, buffer, ticket._damage)
            except Exception as error:
                ticket.error = error
        with self._lock:
            self._reading.remove(ticket)  # `hurry` is too late from now on
        if ticket.error is None and ticket.arrived is not None:
            ticket.arrived()
        ticket._buffer = None
        self._give_back(buffer)
        self._hand_over(ticket)
        self._start_waiting()

    def _hand_over(self, ticket: Ticket) -> None:
        if ticket.receiver is None:
            self.completions.put(ticket)
            if ticket.ahead and not ticket.hurried and ticket.error is None:
                self.ahead_arrived()
        else:
            ticket.receiver(ticket)

    def _fill(self, ticket: Ticket, which: int, copy: int) -> None:
        """Puts one matrix from the buffer into the slot; errors name the copy of the model."""
        assert ticket._buffer is not None
        pieces = [ticket._buffer.array[at : at + n] for at, n in ticket._plan.payloads[which]]
        as_rows = ticket.receiver is not None
        self._matrices.write(ticket.slot, ticket.projections, which, pieces, copy=copy, as_rows=as_rows)

    def _fill_from_one_copy(self, ticket: Ticket, buffer: ReadBuffer, error: Exception) -> None:
        """Reads all of a damaged expert again, from the copy that it did not come from; from each alone, if it came from both.

        Args:
            error: of the last copy that it came from.

        Raises:
            ChecksumError, FormatError, StoreError: the last copy that was tried is damaged, too.
        """
        for copy in (0, 1) if len(ticket._copies) > 1 else (1 - max(ticket._copies),):
            try:
                for piece in self._cut(ticket, buffer):
                    _read_from(self._files[piece.file][copy], piece)
                for which in range(N_MATRICES):
                    self._fill(ticket, which, copy)
            except (ChecksumError, FormatError, StoreError) as other:
                error = other
            else:
                log.warning("%s; the other copy was read", error)
                return
        raise error


def _read_from(file: ExpertFile, piece: ReadPiece) -> None:
    file.read(piece.offset, piece.target, piece.need)
