"""Stores for tests: small experts with known bytes, on real files and in memory, that can be held up and made to fail."""

from __future__ import annotations

import ctypes
import errno
import math
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt
import pytest
import xxhash
from gguf import GGMLQuantizationType as QT

from localrun import reading
from localrun.errors import ChecksumError, StoreError
from localrun.offload.cache.early import EARLY
from localrun.offload.cache.slots import Slot
from localrun.offload.cache.store import ExpertStore
from localrun.offload.cache.tickets import AbandonedError, Receiver, Store, Ticket, nothing_follows
from localrun.offload.kernels import FfnKernel
from localrun.quant.model.source import PROJECTIONS, Encoding, Extent, ModelSource, MoeLayer, Projection

Bytes = npt.NDArray[np.uint8]

N_EMBD, N_FF, N_EXPERTS, N_LAYERS = 32, 48, 12, 3
MATRIX_BYTES = N_EMBD * N_FF * 4
EXPERT_BYTES = 3 * MATRIX_BYTES
_TYPES = (QT.F32, QT.F32, QT.F32)
LAYERS: Mapping[int, MoeLayer] = {
    layer: MoeLayer(layer, N_EXPERTS, N_EMBD, N_FF, _TYPES, EXPERT_BYTES) for layer in range(N_LAYERS)
}
_APART = 16 << 10
_FIRST_BYTE = 100  # matrices start and end in the middle of pages, and no two of them share one


def rows_of(layer: int, expert: int) -> Bytes:
    """The ggml rows of an expert, all its own."""
    return np.random.default_rng((layer, expert)).integers(0, 256, EXPERT_BYTES, np.uint8)


def packed(rows: Bytes) -> Bytes:
    """What a slot holds of them: told apart from rows at every byte."""
    return rows ^ np.uint8(0xFF)


def memory_of(slot: Slot) -> Bytes:
    """The slot's bytes, a view."""
    memory: Any = (ctypes.c_uint8 * slot.size_bytes).from_address(slot.address)
    return np.frombuffer(memory, np.uint8)


def _begin(layer: int, expert: int, matrix: int) -> int:
    return ((layer * N_EXPERTS + expert) * 3 + matrix) * _APART + _FIRST_BYTE


def expert_at(offset: int) -> tuple[int, int]:
    """Whose matrix lies at this place of the file, (layer, expert)."""
    return divmod(offset // _APART // 3, N_EXPERTS)


class Packer:
    """A kernel's layout without its mathematics."""

    slot_bytes, raw_is_packed = EXPERT_BYTES, False

    def pack_matrix(self, which: int, raw: Bytes, slot: int) -> None:
        data = packed(raw)  # kept until it is copied
        ctypes.memmove(slot + which * raw.size, data.ctypes.data, raw.size)  # all three have the same size


KERNELS = cast("Mapping[int, Sequence[FfnKernel]]", {layer: [Packer()] for layer in LAYERS})


class ExpertsInAFile:
    """The part of a `ModelSource` that a store uses: all experts, one after another, in one real file."""

    def __init__(self, folder: Path) -> None:
        path = folder / "experts"
        with path.open("wb") as file:
            for layer in LAYERS:
                for expert in range(N_EXPERTS):
                    for i, rows in enumerate(np.split(rows_of(layer, expert), 3)):
                        file.seek(_begin(layer, expert, i))
                        file.write(rows.tobytes())
        self.path, self.files, self.moe_layers = path, [path], LAYERS

    def base_expert(self, layer: int, expert: int) -> tuple[Projection, Projection, Projection]:
        extents = [Extent(0, _begin(layer, expert, i), MATRIX_BYTES) for i in range(3)]
        sums = [xxhash.xxh3_64_hexdigest(rows) for rows in np.split(rows_of(layer, expert), 3)]
        gate, up, down = (
            Projection(QT.F32, N_FF, N_EMBD, Encoding.GGML, (extent,), MATRIX_BYTES, checksum)
            for extent, checksum in zip(extents, sums, strict=True)
        )
        return gate, up, down

    expert = base_expert


class Harness(Protocol):
    """A store and the hands on it.

    Attributes:
        layers: what it has experts of.
        checksums: the source has some.
        files: that it reads.
        asked_bytes: that the system gave so far.
        begun: whose reads have begun so far, (layer, expert) in order, repetitions left out; an expert has `reads_per_expert`.
    """

    store: Store
    layers: Mapping[int, MoeLayer]
    checksums: bool
    files: Sequence[Path]
    asked_bytes: int
    begun: list[tuple[int, int]]
    reads_per_expert: int

    def best(self, layer: int, expert: int) -> int:
        """The variant of the best copy of this expert."""

    def rows(self, layer: int, expert: int, variant: int) -> Bytes:
        """The ggml rows of a copy, by another way than the store's."""

    def file_bytes(self, layer: int, expert: int, variant: int) -> int:
        """What a copy takes in its files."""

    def hold(self) -> None:
        """From now on no read goes on."""

    def hold_one(self, layer: int, expert: int) -> None:
        """The last read of this expert's best copy does not go on."""

    def wait_until_held(self) -> None:
        """While reads are held: waits until each reader that has something to read has begun, so that none has a read in hand
        which it will begin later."""

    def step(self) -> None:
        """While reads are held: lets the first of those that have begun go on, and waits until another one has begun."""

    def release(self) -> None:
        """Reads go on."""

    def fail(self, layer: int, expert: int) -> None:
        """Reads of this expert's best copy end with EIO."""

    def end_early(self, layer: int, expert: int) -> None:
        """The file ends in the middle of this expert's best copy."""

    def damage(self, layer: int, expert: int) -> None:
        """Some bits of the second matrix of this expert's best copy come from the drive as others."""


PATIENCE_S = 300.0
"""Far more than anything here takes; only a hang reaches it."""

N_READS, N_BUFFERS = 2, 2
"""Reads at once, and experts."""

Spot = tuple[int, int]
"""A byte of a file: (inode, offset)."""


class OnFiles:
    """The real store on real files; whoever makes it closes it.

    A read is noted as it begins. While reads are held they go on one at a time, in the order in which they came, so the order of
    `begun` is the store's own and not the threads'.

    Args:
        source: whose experts.
        rows: of one copy, given layer, expert, variant.
        file_bytes: the same for what it takes; None: as many as its rows.
        short: the system gives half of what is asked for.
        delay_s: before each read.
        mirror: a second copy.
    """

    reads_per_expert = len(PROJECTIONS)

    def __init__(
        self,
        source: ModelSource,
        patch: pytest.MonkeyPatch,
        *,
        rows: Callable[[int, int, int], Bytes],
        file_bytes: Callable[[int, int, int], int] | None = None,
        short: bool = False,
        delay_s: float = 0.0,
        mirror: ModelSource | None = None,
    ) -> None:
        self._short, self._delay_s = short, delay_s
        self._one_goes = threading.Event()
        self._changed = threading.Condition()  # guards what follows
        self._n_come = self._n_waiting = 0  # reads since the start, and those that are held
        self._n_may_go: float = math.inf  # this many since the start
        self.begun: list[tuple[int, int]] = []
        self._began: set[tuple[int, int, int]] = set()  # layer, expert, which of its reads
        self._held: list[Spot] = []
        self._failing: set[Spot] = set()
        self._ending: set[Spot] = set()
        self._damaged: set[Spot] = set()
        self._source, self._copies, self.rows = source, [source, *([mirror] if mirror else [])], rows
        self.layers, self.asked_bytes = source.moe_layers, 0
        self.files: Sequence[Path] = [file for copy in self._copies for file in copy.files]
        self.checksums = source.expert(0, 0)[0].checksum is not None
        kernels = {n: [Packer()] * len(layer.variants) for n, layer in self.layers.items()}
        self._file_bytes = file_bytes
        self._owners = {
            spot: (layer, expert, i % self.reads_per_expert)
            for layer, moe in self.layers.items()
            for expert in range(moe.n_experts)
            for i, spot in enumerate(self._spots(layer, expert))
        }
        patch.setattr(reading, "preadv", self._preadv)
        self.store: Store = ExpertStore(source, kernels, mirror=mirror, n_reads=N_READS, n_buffers=N_BUFFERS)

    def best(self, layer: int, expert: int) -> int:
        types = tuple(projection.type for projection in self._source.expert(layer, expert))
        return self.layers[layer].variants.index(cast("Any", types))

    def file_bytes(self, layer: int, expert: int, variant: int) -> int:
        return (
            self._file_bytes(layer, expert, variant)
            if self._file_bytes
            else int(self.rows(layer, expert, variant).size)
        )

    def _preadv(self, fd: int, buffers: list[Any], offset: int) -> int:
        (out,), inode = buffers, os.fstat(fd).st_ino

        def touches(spots: Iterable[Spot]) -> bool:
            return any(inode == file and offset <= at < offset + len(out) for file, at in spots)

        with self._changed:
            for (file, at), read in self._owners.items():
                if inode == file and offset <= at < offset + len(out) and read not in self._began:
                    self._began.add(read)
                    self.begun.append(read[:2])
            number = self._n_come
            self._n_come += 1
            self._n_waiting += 1
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: number < self._n_may_go, PATIENCE_S)
            self._n_waiting -= 1
        if touches(self._held):
            assert self._one_goes.wait(PATIENCE_S)
        time.sleep(self._delay_s)
        if touches(self._failing):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if touches(self._ending):
            return 0
        if self._short:
            out = out[: max(4096, len(out) // 2 // 4096 * 4096)]
        n = os.preadv(fd, [out], offset)
        for file, at in self._damaged:
            if inode == file and offset <= at < offset + n:
                out[at - offset] ^= 0x11
        with self._changed:
            self.asked_bytes += n
        return n

    def hold(self) -> None:
        with self._changed:
            self._n_may_go = self._n_come

    def wait_until_held(self) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self._n_waiting == N_READS, PATIENCE_S)

    def step(self) -> None:
        self.wait_until_held()
        with self._changed:
            self._n_may_go += 1
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._n_come == self._n_may_go + N_READS, PATIENCE_S)

    def hold_one(self, layer: int, expert: int) -> None:
        self._one_goes.clear()
        self._held = self._spots(layer, expert)[len(PROJECTIONS) - 1 :: len(PROJECTIONS)]

    def release(self) -> None:
        with self._changed:
            self._n_may_go = math.inf
            self._changed.notify_all()
        self._one_goes.set()

    def fail(self, layer: int, expert: int) -> None:
        self._failing.update(self._spots(layer, expert))

    def end_early(self, layer: int, expert: int) -> None:
        self._ending.update(self._spots(layer, expert))

    def damage(self, layer: int, expert: int) -> None:
        self._damaged.update(self._spots(layer, expert)[1 :: len(PROJECTIONS)])

    def _spots(self, layer: int, expert: int) -> list[Spot]:
        """The middle of each of its pieces, which reads of others don't touch, though they begin and end at whole pages."""
        return [
            (copy.files[extent.file].stat().st_ino, extent.offset + extent.n_bytes // 2)
            for copy in self._copies
            for projection in copy.expert(layer, expert)
            for extent in projection.extents[:1]
        ]


def on_files(
    folder: Path, patch: pytest.MonkeyPatch, *, short: bool = False, delay_s: float = 0.0, mirrored: bool = False
) -> OnFiles:
    """`ExpertsInAFile`, once or twice."""
    copies = [folder / "a", folder / "b"][: 1 + mirrored]
    for copy in copies:
        copy.mkdir()
    source, *mirror = [cast("ModelSource", ExpertsInAFile(copy)) for copy in copies]
    return OnFiles(
        source,
        patch,
        rows=lambda layer, expert, variant: rows_of(layer, expert),
        short=short,
        delay_s=delay_s,
        mirror=mirror[0] if mirror else None,
    )


class MemoryStore:
    """A store without threads and files: a read that is not held ends at once, before `submit` returns."""

    depth, staging_bytes, reads_per_expert = 2, 0, 1
    reading_s = 0.0
    direct = True
    early = None
    layers, checksums = LAYERS, True
    files: Sequence[Path] = (Path("experts"),)

    def __init__(self) -> None:
        self.completions: queue.SimpleQueue[Ticket] = queue.SimpleQueue()
        self.ahead_arrived: Callable[[], None] = nothing_follows
        self.store: Store = self
        self.submitted: list[tuple[int, int]] = []
        self.begun: list[tuple[int, int]] = []
        self.refused: set[tuple[int, int]] = set()  # `submit` itself raises
        self._wanted: deque[Ticket] = deque()
        self._ahead: deque[Ticket] = deque()
        self.asked_bytes = 0
        self._errors: dict[tuple[int, int], StoreError] = {}
        self._held = self._closed = False
        self._held_one: tuple[int, int] | None = None
        self._source = ExpertsInAFile.base_expert

    def submit(
        self,
        slot: Slot,
        *,
        ahead: bool = False,
        receiver: Receiver | None = None,
        arrived: Callable[[], None] | None = None,
    ) -> Ticket:
        if (slot.layer, slot.expert) in self.refused:
            raise StoreError("experts: refused")
        ticket = Ticket(slot, self._source(cast("Any", None), slot.layer, slot.expert), ahead, receiver, arrived)
        self.submitted.append((slot.layer, slot.expert))
        (self._ahead if ahead else self._wanted).append(ticket)
        self._go_on()
        return ticket

    def hurry(self, slot: Slot, arrived: Callable[[], None] | None = None) -> bool:
        hurried = [ticket for ticket in self._ahead if ticket.slot is slot]
        for ticket in hurried:
            self._ahead.remove(ticket)
            self._wanted.appendleft(ticket)
            ticket.hurried, ticket.arrived = True, arrived
        return bool(hurried)

    def abandon(self, slot: Slot) -> None:
        for ticket in [ticket for ticket in self._ahead if ticket.slot is slot]:
            self._ahead.remove(ticket)
            ticket.error = AbandonedError("this expert is not needed")
            self.completions.put(ticket)

    def know(self, layer: int, expert: int, variant: int) -> None:
        """For nobody."""

    def drop_early(self) -> None:
        """There are none."""

    def close(self) -> None:
        self._closed = True

    def hold(self) -> None:
        self._held = True

    def hold_one(self, layer: int, expert: int) -> None:
        self._held_one = layer, expert

    def release(self) -> None:
        self._held, self._held_one = False, None
        self._go_on()

    def wait_until_held(self) -> None:
        """There are no readers."""

    def step(self) -> None:
        if ticket := self._next():
            self._read(ticket)

    def best(self, layer: int, expert: int) -> int:
        return 0

    def rows(self, layer: int, expert: int, variant: int) -> Bytes:
        return rows_of(layer, expert)

    def file_bytes(self, layer: int, expert: int, variant: int) -> int:
        return EXPERT_BYTES

    def fail(self, layer: int, expert: int) -> None:
        self._errors[layer, expert] = StoreError("experts: Input/output error", hint="check the drive")

    def end_early(self, layer: int, expert: int) -> None:
        self._errors[layer, expert] = StoreError("experts: the file ended at byte 5", hint="check the drive")

    def damage(self, layer: int, expert: int) -> None:
        message = f"experts: blk.{layer}.ffn_up_exps.weight: expert {expert} does not match its checksum"
        self._errors[layer, expert] = ChecksumError(message, hint="run `localrun verify`")

    def _go_on(self) -> None:
        while not self._held and not self._closed and (ticket := self._next()):
            self._read(ticket)

    def _read(self, ticket: Ticket) -> None:
        slot = ticket.slot
        self.begun.append((slot.layer, slot.expert))
        ticket.error = self._errors.get((slot.layer, slot.expert))
        if ticket.error is None:
            rows = rows_of(slot.layer, slot.expert)
            memory_of(slot)[: rows.size] = rows if ticket.receiver else packed(rows)
            self.asked_bytes += rows.size
            if ticket.arrived is not None:
                ticket.arrived()
        (ticket.receiver or self.completions.put)(ticket)
        if ticket.ahead and not ticket.hurried and not ticket.receiver and ticket.error is None:
            self.ahead_arrived()

    def _next(self) -> Ticket | None:
        for tickets in (self._wanted, self._ahead):
            for ticket in tickets:
                if (ticket.slot.layer, ticket.slot.expert) != self._held_one:
                    tickets.remove(ticket)
                    return ticket
        return None


_Pread = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * 4)


@_Pread
def _pread(fd: int, address: int, size: int, offset: int) -> int:
    memory: Any = (ctypes.c_uint8 * size).from_address(address)
    try:
        return int(vars(reading)["preadv"](fd, [memoryview(memory).cast("B")], offset))
    except OSError:
        return -1


def early_reads_through_python(store: Store) -> None:
    """From now on what replaces `reading.preadv` sees the reads that compiled code begins, too."""
    if store.early is not None:
        store.early.fields[EARLY.pread] = ctypes.cast(_pread, ctypes.c_void_p).value or 0


KINDS = ("on files", "on two copies", "short reads", "slow reads", "in memory")


def make_harness(kind: str, folder: Path, patch: pytest.MonkeyPatch) -> Harness:
    """A store of one of `KINDS`; whoever makes it closes it."""
    if kind == "in memory":
        return MemoryStore()
    return on_files(
        folder,
        patch,
        short=kind == "short reads",
        delay_s=0.002 if kind == "slow reads" else 0.0,
        mirrored=kind == "on two copies",
    )
