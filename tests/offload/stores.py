"""Stores for tests: small experts with known bytes, on real files and in memory, that can be held up and made to fail."""

from __future__ import annotations

import ctypes
import errno
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGMLQuantizationType as QT

from localrun import reading
from localrun.errors import StoreError
from localrun.offload.cache.slots import Slot
from localrun.offload.cache.store import AbandonedError, ExpertStore, Receiver, Store, Ticket
from localrun.offload.kernels import FfnKernel
from localrun.quant.model.source import Encoding, Extent, ModelSource, MoeLayer, Projection

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

    def pack(self, raw: Bytes, slot: int) -> None:
        data = packed(raw)  # kept until it is copied
        ctypes.memmove(slot, data.ctypes.data, raw.size)


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
        gate, up, down = (
            Projection(QT.F32, N_FF, N_EMBD, Encoding.GGML, (extent,), MATRIX_BYTES) for extent in extents
        )
        return gate, up, down

    expert = base_expert


class Harness(Protocol):
    """A store and the hands on it."""

    store: Store

    def hold(self) -> None:
        """From now on no read goes on."""

    def release(self) -> None:
        """Reads go on."""

    def fail(self, layer: int, expert: int) -> None:
        """Reads of this expert end with EIO."""


class OnFiles:
    """The real store on real files. `close` closes it.

    Args:
        short: the system gives half of what is asked for.
        delay_s: before each read.
        mirrored: there are two copies.
    """

    def __init__(
        self,
        folder: Path,
        patch: pytest.MonkeyPatch,
        *,
        short: bool = False,
        delay_s: float = 0.0,
        mirrored: bool = False,
    ) -> None:
        self._short, self._delay_s = short, delay_s
        self._going = threading.Event()
        self._going.set()
        self._failing: set[int] = set()  # by the room that a matrix has
        patch.setattr(reading, "preadv", self._preadv)
        copies = [folder / "a", folder / "b"][: 1 + mirrored]
        for copy in copies:
            copy.mkdir()
        source, *mirror = [cast("ModelSource", ExpertsInAFile(copy)) for copy in copies]
        self._source = source
        self.store: Store = ExpertStore(
            source, KERNELS, mirror=mirror[0] if mirror else None, n_lanes=2, n_buffers=2, verify=False
        )

    def _preadv(self, fd: int, buffers: list[Any], offset: int) -> int:
        assert self._going.wait(30)
        time.sleep(self._delay_s)
        if offset // _APART in self._failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if self._short:
            size = max(4096, len(buffers[0]) // 2 // 4096 * 4096)
            return os.preadv(fd, [buffers[0][:size]], offset)
        return os.preadv(fd, buffers, offset)

    def hold(self) -> None:
        self._going.clear()

    def release(self) -> None:
        self._going.set()

    def fail(self, layer: int, expert: int) -> None:
        for projection in self._source.base_expert(layer, expert):
            self._failing.update(extent.offset // _APART for extent in projection.extents)


class MemoryStore:
    """A store without threads and files: a read that is not held ends at once, before `submit` returns."""

    depth, staging_bytes = 2, 0

    def __init__(self) -> None:
        self.completions: queue.SimpleQueue[Ticket] = queue.SimpleQueue()
        self.store: Store = self
        self.submitted: list[tuple[int, int]] = []
        self.refused: set[tuple[int, int]] = set()  # `submit` itself raises
        self._wanted: deque[Ticket] = deque()
        self._ahead: deque[Ticket] = deque()
        self._failing: set[tuple[int, int]] = set()
        self._held = self._closed = False
        self._source = ExpertsInAFile.base_expert

    def submit(self, slot: Slot, *, ahead: bool = False, receiver: Receiver | None = None) -> Ticket:
        if (slot.layer, slot.expert) in self.refused:
            raise StoreError("experts: refused")
        ticket = Ticket(slot, self._source(cast("Any", None), slot.layer, slot.expert), ahead, receiver)
        self.submitted.append((slot.layer, slot.expert))
        (self._ahead if ahead else self._wanted).append(ticket)
        self._go_on()
        return ticket

    def hurry(self, slot: Slot) -> None:
        for ticket in [ticket for ticket in self._ahead if ticket.slot is slot]:
            self._ahead.remove(ticket)
            self._wanted.appendleft(ticket)

    def abandon(self, slot: Slot) -> None:
        for ticket in [ticket for ticket in self._ahead if ticket.slot is slot]:
            self._ahead.remove(ticket)
            ticket.error = AbandonedError("nobody wants this expert")
            self.completions.put(ticket)

    def close(self) -> None:
        self._closed = True

    def hold(self) -> None:
        self._held = True

    def release(self) -> None:
        self._held = False
        self._go_on()

    def fail(self, layer: int, expert: int) -> None:
        self._failing.add((layer, expert))

    def _go_on(self) -> None:
        while (self._wanted or self._ahead) and not self._held and not self._closed:
            ticket = (self._wanted or self._ahead).popleft()
            slot = ticket.slot
            if (slot.layer, slot.expert) in self._failing:
                ticket.error = StoreError("experts: Input/output error", hint="check the drive")
            else:
                rows = rows_of(slot.layer, slot.expert)
                memory_of(slot)[: rows.size] = rows if ticket.receiver else packed(rows)
            (ticket.receiver or self.completions.put)(ticket)


KINDS = ("on files", "on two copies", "short reads", "slow reads", "in memory")


def make_harness(kind: str, folder: Path, patch: pytest.MonkeyPatch) -> Harness:
    """A store of one of `KINDS`; whoever makes it closes it."""
    if kind == "in memory":
        return MemoryStore()
    return OnFiles(
        folder,
        patch,
        short=kind == "short reads",
        delay_s=0.002 if kind == "slow reads" else 0.0,
        mirrored=kind == "on two copies",
    )
