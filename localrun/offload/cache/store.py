"""Reads experts from files into slots: positional reads, O_DIRECT where supported, several in flight.

One expert is three projections in one extent each (two for FP4 and FP8: weights, scales). A read is split into pieces of a few
MiB, which I/O threads ("readers") fetch in parallel, because a single read in flight leaves about a third of an NVMe drive idle.
The thread that finishes an expert's last piece decodes it (official formats to ggml rows), verifies the checksum, and packs the
rows into the slot in the kernel's layout. No mmap: the operating system's read-ahead knows nothing about experts.

`completions` are for the decoding thread; readers touch only staging buffers and slots in state LOADING.
"""

from __future__ import annotations

import ctypes as C
import errno
import logging
import mmap
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xxhash

from localrun.alignment import PAGE_BYTES, align_up
from localrun.errors import ChecksumError, FormatError, StoreError
from localrun.offload.cache.drive_probe import DEFAULT_PIECE_BYTES, DEFAULT_READS
from localrun.offload.cache.early import EarlyReads, even_pieces
from localrun.offload.cache.slots import Slot
from localrun.offload.cache.staging import N_BUFFERS, buffers, places_bytes
from localrun.offload.cache.tickets import (
    AbandonedError,
    Bytes,
    ReadBuffer,
    ReadPiece,
    ReadPieces,
    Receiver,
    Ticket,
    nothing_follows,
    read_buffers,
)
from localrun.offload.kernels import futex
from localrun.pages import share_heaps
from localrun.quant.formats.transcode import decode_projection
from localrun.quant.model.source import PROJECTIONS, Encoding, ModelSource, Projection
from localrun.quant.zeros import LostWeights
from localrun.reading import read_fully

log = logging.getLogger(__name__)


class Packer(Protocol):
    """What the store needs of a kernel: the slot's layout."""

    slot_bytes: int
    raw_is_packed: bool

    def pack(self, raw: Bytes, slot: int) -> None:
        """raw: gate|up|down ggml rows, contiguous; slot: address."""
        ...


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
        self._packers = packers
        self._verify = verify
        self._known: dict[tuple[int, int, bool], tuple[Projection, Projection, Projection]] = {}
        self._piece_bytes = piece_bytes
        self.completions: queue.SimpleQueue[Ticket] = queue.SimpleQueue()
        self.ahead_arrived: Callable[[], None] = nothing_follows
        self._lock = threading.Lock()
        self._waiting: deque[Ticket] = deque()
        self._waiting_ahead: deque[Ticket] = deque()
        self._reading: list[Ticket] = []  # those that have a buffer
        copies = [source] if mirror is None else [source, mirror]
        self._lost = [LostWeights(copy) for copy in copies]
        self._files = [[_open(copy.files[i]) for copy in copies] for i in range(len(source.files))]
        self._under_way = [0] * len(copies)  # bytes asked of each copy and not yet there
        self._n_reading, self._reading_s, self._reading_since, self._reading_until = 0, 0.0, 0.0, 0.0
        buffer_bytes, halves = buffers(source)
        self.staging_bytes = n_buffers * buffer_bytes * halves + places_bytes(source)
        self.depth = n_buffers
        self._most_ahead = max(
            1, n_buffers // 2
        )  # reads that nobody waits for leave buffers to those that somebody waits for
        self._buffers = read_buffers(n_buffers, buffer_bytes)
        self._free = list(self._buffers)  # without early reads
        self.early = self._make_early(n_reads) if mirror is None and futex.is_supported() else None
        self._pieces = ReadPieces(self.early)
        self._adopted: dict[int, Ticket] = {}  # early reads under way, by buffer
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
        return all(handle.direct for copies in self._files for handle in copies)

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
            ticket.projections = self._projections(slot)
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

    def _projections(self, slot: Slot) -> tuple[Projection, Projection, Projection]:
        """Where the slot's copy is. Kept: working it out takes a third of `submit`."""
        copy = slot.layer, slot.expert, slot.variant > 0
        if (known := self._known.get(copy)) is None:
            recipe = self._source.expert if slot.variant else self._source.base_expert
            known = self._known[copy] = recipe(slot.layer, slot.expert)
        return known

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
            for handle in copies:
                os.close(handle.fd)
        self._files = []

    # -- early reads ----------------------------------------------------------------------------------------------------

    def _adopt(self, ticket: Ticket) -> bool:
        """Takes over the early read of the ticket's expert, if there is one; from now on there may be."""
        if self.early is None:
            return False
        slot, spans, payloads = ticket.slot, *self._plan(ticket.projections)
        with self._lock:
            taken = self._adopted.keys() | self._dropped
            found = [i for i, *whose in self.early.holding() if whose == [slot.layer, slot.expert] and i not in taken]
            if found:
                ticket._buffer, ticket._payloads = self._buffers[found[0]], payloads
                ticket._copies.add(0)
                self._reading.append(ticket)
                ended_at = self._complete.pop(found[0], None)
                self._note_begin(self.early.began_s(found[0]))
                if ended_at is not None:
                    self._note_end(ended_at)
                else:
                    self._adopted[found[0]] = ticket
        if not found:
            fds = [copies[0].fd for copies in self._files]
            self.early.know(
                slot.layer, slot.expert, [(fds[file], start, end, last) for file, start, end, last, _ in spans]
            )
            return False
        if ended_at is not None:
            self._pieces.put_complete(ticket)
        return True

    def _complete_early(self, number: int) -> None:
        """All pieces of an early read are there, or some have failed."""
        with self._lock:
            ticket = self._adopted.pop(number, None)
            dropped = number in self._dropped
            self._dropped.discard(number)
            if ticket is not None:
                self._note_end(time.perf_counter())
            elif not dropped:
                self._complete[number] = time.perf_counter()
        if ticket is not None:
            self._finish_early(ticket)
            return
        if dropped:
            self._give_back(self._buffers[number])
        self._start_waiting()

    def _finish_early(self, ticket: Ticket) -> None:
        buffer = ticket._buffer
        assert buffer is not None
        assert self.early is not None
        if not self.early.has_failed(buffer.number):
            self._finish(ticket)
            return
        ticket._payloads, ticket._buffer = [], None  # read again, which says what is wrong
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
                del self._complete[number]
            self._dropped.update(set(left) - set(complete))
        for number in complete:
            self._give_back(self._buffers[number])
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
            self.early.free(buffer.number)

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
            ticket._left = len(pieces)
            self._pieces.put(pieces)

    def _plan(
        self, projections: Sequence[Projection]
    ) -> tuple[list[tuple[int, int, int, int, int]], list[tuple[int, int]]]:
        """How an expert is read into a buffer: (file, begin and end of the aligned read, end of what must be there, position in the
        buffer) of each run of extents that follow each other in a file, as a converted expert's do, and where each extent's payload
        is then (position, bytes)."""
        spans: list[tuple[int, int, int, int, int]] = []
        payloads, position = [], 0
        for projection in projections:
            for extent in projection.extents:
                grain = PAGE_BYTES if any(handle.direct for handle in self._files[extent.file]) else 1
                start, last = extent.offset // grain * grain, extent.offset + extent.n_bytes
                end = align_up(last, grain)
                file, begin, until, _, at = spans[-1] if spans else (-1, 0, 0, 0, 0)
                if file == extent.file and until == start == begin + position - at:
                    spans[-1] = file, begin, end, last, at
                else:
                    spans.append((extent.file, start, end, last, position))
                payloads.append((position + extent.offset - start, extent.n_bytes))
                position += align_up(end - start, PAGE_BYTES)
        return spans, payloads

    def _cut(self, ticket: Ticket, buffer: ReadBuffer) -> list[ReadPiece]:
        spans, ticket._payloads = self._plan(ticket.projections)
        pieces = []
        for file, start, end, last, position in spans:
            most = even_pieces(end - start, self._piece_bytes)
            for at in range(start, end, most):
                size = min(most, end - at)
                target = buffer.view[position + at - start : position + at - start + size]
                pieces.append(ReadPiece(ticket, file, at, target, min(size, last - at)))
        return pieces

    def _read_pieces(self) -> None:
        while (work := self._pieces.get()) is not None:
            if isinstance(work, int):
                self._complete_early(work)
            elif isinstance(work, Ticket):
                self._finish_early(work)
            else:
                self._read_piece(work)

    def _read_piece(self, piece: ReadPiece) -> None:
        ticket = piece.ticket
        if ticket.error is None:
            try:
                self._read(piece)
            except Exception as error:  # any error is reported by the decoding thread
                ticket.error = error
        with ticket._lock:
            ticket._left -= 1
            last = ticket._left == 0
        if piece.is_ahead:
            self._pieces.end_ahead(last=last)
        if last:
            self._finish(ticket)

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

    def _finish(self, ticket: Ticket) -> None:
        buffer = ticket._buffer
        assert buffer is not None
        try:
            if ticket.error is None:
                self._fill(ticket, buffer)
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

    def _fill(self, ticket: Ticket, buffer: ReadBuffer) -> None:
        slot, packer = ticket.slot, self._packers[ticket.slot.layer][ticket.slot.variant]
        try:
            rows = self._rows(ticket, buffer, max(ticket._copies))
        except (ChecksumError, FormatError) as error:
            if len(self._lost) == 1:
                raise
            rows = self._rows_of_one_copy(ticket, buffer, error)
        if packer.raw_is_packed or ticket.receiver is not None:
            memory: Any = (C.c_uint8 * slot.size_bytes).from_address(slot.address)
            target = np.frombuffer(memory, np.uint8)
            at = 0
            for row in rows:
                target[at : at + row.size] = row
                at += row.size
        else:
            packer.pack(_contiguous(rows, ticket._payloads, buffer), slot.address)

    def _rows(self, ticket: Ticket, buffer: ReadBuffer, copy: int) -> list[Bytes]:
        """The matrices' ggml rows from what has been read.

        Args:
            copy: of the model, named if something is wrong.

        Raises:
            ChecksumError, FormatError: bytes are damaged.
        """
        payloads = [buffer.array[at : at + n] for at, n in ticket._payloads]
        raw = [[payloads.pop(0) for _ in projection.extents] for projection in ticket.projections]
        if self._verify:
            self._lost[copy].refuse(ticket.slot.layer, ticket.slot.expert, ticket.projections, raw)
        rows = [
            pieces[0] if projection.encoding is Encoding.GGML else decode_projection(projection, pieces[0], pieces[1])
            for projection, pieces in zip(ticket.projections, raw, strict=True)
        ]
        if self._verify:
            self._check(ticket, rows, copy)
        return rows

    def _rows_of_one_copy(self, ticket: Ticket, buffer: ReadBuffer, error: Exception) -> list[Bytes]:
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
                rows = self._rows(ticket, buffer, copy)
            except (ChecksumError, FormatError, StoreError) as other:
                error = other
            else:
                log.warning("%s; the other copy was read", error)
                return rows
        raise error

    def _check(self, ticket: Ticket, rows: list[Bytes], copy: int) -> None:
        for name, projection, row in zip(PROJECTIONS, ticket.projections, rows, strict=True):
            if projection.checksum is not None and xxhash.xxh3_64_hexdigest(row.data) != projection.checksum:
                extent = projection.extents[0]
                raise ChecksumError(
                    f"{self._files[extent.file][copy].path}: blk.{ticket.slot.layer}.ffn_{name}_exps.weight: expert "
                    f"{ticket.slot.expert} does not match its checksum",
                    hint="the file is damaged; run `localrun verify` for the extent, then copy or convert it again",
                )


@dataclass(frozen=True, slots=True)
class _Handle:
    fd: int
    direct: bool
    path: Path


def _read_from(handle: _Handle, piece: ReadPiece) -> None:
    hint = "check the drive (dmesg) and run `localrun verify` on the model"
    read_fully(handle.fd, handle.path, piece.offset, piece.target, need=piece.need, hint=hint)


def _open(path: Path) -> _Handle:
    """Opens for reading with O_DIRECT if a real read through it works (tmpfs and some network file systems refuse)."""
    direct_flag = getattr(os, "O_DIRECT", 0)
    if direct_flag:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | direct_flag)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP):
                raise _open_error(path, error) from error
        else:
            try:
                os.preadv(fd, [memoryview(mmap.mmap(-1, PAGE_BYTES))], 0)
                return _Handle(fd, True, path)
            except OSError:
                os.close(fd)
    try:
        return _Handle(os.open(path, os.O_RDONLY | os.O_CLOEXEC), False, path)
    except OSError as error:
        raise _open_error(path, error) from error


def _open_error(path: Path, error: OSError) -> StoreError:
    return StoreError(f"{path}: {error.strerror}", hint="check the path and its permissions")


def _contiguous(rows: list[Bytes], payloads: list[tuple[int, int]], buffer: ReadBuffer) -> Bytes:
    """gate|up|down as one array: a view if the reads are contiguous, a copy otherwise."""
    if len(payloads) == 3 and all(payloads[i][0] + payloads[i][1] == payloads[i + 1][0] for i in range(2)):
        return buffer.array[payloads[0][0] : payloads[2][0] + payloads[2][1]]
    return np.concatenate(rows)
