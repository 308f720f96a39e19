"""Tracks where experts are: slots in RAM and their formats, the reads that fill them, and moves between RAM and GPUs.

Knows nothing about tokens and routing: `layer_call.py` knows what a call needs, `readahead.py` what the next ones may need, and
both request slots here.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from localrun.alignment import PAGE_BYTES, align_up
from localrun.errors import BudgetError
from localrun.offload.cache.slots import Slot, SlotState, SlotTable
from localrun.offload.cache.telemetry import Counter, Telemetry
from localrun.offload.cache.tickets import AbandonedError, Receiver, Store, Ticket
from localrun.offload.device.view import I32
from localrun.offload.gpu.tier import GpuTier, Heat
from localrun.offload.kernels import FfnKernel
from localrun.offload.upgrades import Upgrades
from localrun.quant.model.source import MoeLayer
from localrun.units import format_size

log = logging.getLogger(__name__)


class Residency:
    """Where one model's experts are.

    Owns the slot table, the store and the GPU tier; `close` frees them. `lock` covers the slots: the decoding thread holds it for
    a whole layer call and between two decodes, others (read-ahead, the GPU tier's filling thread) for moments. The store's readers
    never take it: they only fill slots in state LOADING. It is taken before the store's lock, never after it. Methods that need it
    taken say so; the others take it themselves. What evicts is for the decoding thread only, or for the fetching
    thread in its place (`misses.py`), because compiled code looks experts up without the lock; `SlotTable.withhold` is for any
    thread, because it keeps out of that code's way.

    Attributes:
        layers: shapes by block number.
        wanted: by block number the variant that each expert is read in.
        store: reads experts.
        table: slots.
        telemetry: counters of reads.
        floor_bytes: minimum budget to compute a token.
        gpu: experts on GPUs, if there are any.
        look: called with the lock taken when slots may be evicted, see `memory_watch.py`.

    Args:
        kernels: by block number one kernel for each of the layer's variants; its `slot_bytes` is an expert's size in RAM.
        budget_bytes: RAM for slots (staging not included).
        n_used: experts per token.
        adaptive: serve what is missing from the base's copy, see `upgrades.py`.

    Raises:
        BudgetError: `budget_bytes` is below `floor_bytes`.
    """

    def __init__(
        self,
        layers: Mapping[int, MoeLayer],
        kernels: Mapping[int, Sequence[FfnKernel]],
        wanted: Mapping[int, I32],
        store: Store,
        budget_bytes: int,
        n_used: int,
        telemetry: Telemetry,
        *,
        adaptive: bool = False,
    ) -> None:
        self.layers = layers
        self.wanted = wanted
        self.store = store
        self.telemetry = telemetry
        self._kernels = kernels
        self._largest_slot = largest_slot(kernels)
        self.floor_bytes = floor_bytes(kernels, n_used)
        if budget_bytes < self.floor_bytes:
            raise BudgetError(
                f"{format_size(budget_bytes)} of RAM for experts is less than the {n_used} experts of one layer "
                f"({format_size(self.floor_bytes)}) that every token needs",
                hint=f"set --ram to at least {format_size(self.floor_bytes + store.staging_bytes)}",
            )
        self.lock = threading.RLock()
        self.table = SlotTable(budget_bytes, max(layers) + 1, max(moe.n_experts for moe in layers.values()))
        self.gpu: GpuTier | None = None
        self._upgrades = Upgrades(self.table, wanted) if adaptive else None
        self.look: Callable[[], None] = _nothing
        self._n_ahead = 0
        self._rows_read: queue.SimpleQueue[Ticket] = queue.SimpleQueue()

    # -- where experts are ---------------------------------------------------------------------------------------------

    def kernels(self, layer: int) -> Sequence[FfnKernel]:
        """The layer's arithmetic by variant."""
        return self._kernels[layer]

    @property
    def n_slots(self) -> int:
        """Experts that fit into RAM, without what was given back, if all have the largest size; the caller holds the lock."""
        return (self.table.arena.size_bytes - self.table.withheld_bytes) // self._largest_slot

    def on_gpu(self, layer: int, expert: int) -> bool:
        """The expert lives on a GPU."""
        return self.gpu is not None and bool(self.gpu.where[layer, expert] >= 0)

    def is_here(self, layer: int, expert: int) -> bool:
        """The expert is on a GPU, in RAM or being read into RAM; the caller holds the lock."""
        return self.table.peek(layer, expert) is not None or self.on_gpu(layer, expert)

    def variants_of(self, layer: int) -> I32:
        """(n_experts,) in which of the layer's variants each expert is in RAM, or would be read in; any thread."""
        n_experts = self.layers[layer].n_experts
        there = self.table.resident[layer, :n_experts] != 0
        return np.where(there, self.table.variants[layer, :n_experts], self.wanted[layer])

    # -- slots ---------------------------------------------------------------------------------------------------------

    def reserve(self, layer: int, expert: int, *, evict: bool = True, retake: bool = True) -> Slot | None:
        """A slot for reading this expert, None if there is no room; the caller holds the lock.

        Args:
            evict: for an expert that a call waits for, or certainly will: others may be evicted for it, and in adaptive mode the
                base's copy is read. False: only free memory is used, and the copy is the one chosen for this expert.
            retake: see `SlotTable.reserve`.
        """
        variant = self.variant_to_read(layer, expert) if evict else int(self.wanted[layer][expert])
        size_bytes = self._kernels[layer][variant].slot_bytes
        return self.table.reserve(layer, expert, size_bytes, variant=variant, evict=evict, retake=retake)

    def variant_to_read(self, layer: int, expert: int) -> int:
        """Which copy of an expert is read while a call waits for it."""
        wanted, kernels = int(self.wanted[layer][expert]), self._kernels[layer]
        base_is_smaller = kernels[0].slot_bytes < kernels[wanted].slot_bytes
        return 0 if self._upgrades is not None and base_is_smaller else wanted

    def room(self, layer: int) -> int:
        """How many more of a layer's experts there is free memory for."""
        with self.lock:
            return self.table.arena.free_bytes // max(kernel.slot_bytes for kernel in self._kernels[layer])

    def has_room(self, layer: int, expert: int) -> bool:
        """There is free memory for this expert."""
        with self.lock:
            size_bytes = self._kernels[layer][int(self.wanted[layer][expert])].slot_bytes
            return self.table.arena.largest_hole >= size_bytes

    # -- reads ---------------------------------------------------------------------------------------------------------

    @property
    def n_ahead(self) -> int:
        """Number of pending read-ahead reads; the caller holds the lock."""
        return self._n_ahead

    def read(self, slot: Slot, arrived: Callable[[], None] | None = None) -> int:
        """Starts filling a reserved slot that a call waits for; returns the bytes to read. The caller holds the lock.

        Args:
            arrived: see `Ticket`.

        If the store rejects the slot, it is freed and nothing is counted; likewise for `read_ahead`.
        """
        return self._submit(slot, arrived=arrived)

    def read_ahead(self, slot: Slot) -> None:
        """Starts filling a reserved slot as read-ahead; the caller holds the lock."""
        self.table.note_ahead(slot, self._submit(slot, ahead=True))
        self._n_ahead += 1
        self.telemetry.values[slot.layer, Counter.PREFETCHED] += 1

    def _submit(self, slot: Slot, *, ahead: bool = False, arrived: Callable[[], None] | None = None) -> int:
        try:
            return self.store.submit(slot, ahead=ahead, arrived=arrived).read_bytes
        except BaseException:
            if slot.replaces is not None:
                self.table.end_upgrade(slot, complete=False)
            else:
                self.table.discard(slot)
            raise

    def finish(self, ticket: Ticket) -> None:
        """After a read: the slot is READY, or gone if the read failed. The caller holds the lock."""
        self._n_ahead -= ticket.ahead
        if ticket.ahead:
            self._count(ticket)
        if ticket.slot.replaces is not None:
            assert self._upgrades is not None
            self._upgrades.arrived(ticket)
        elif ticket.error is None:
            self.table.ready(ticket.slot)
        else:
            self.table.discard(ticket.slot)
            if ticket.ahead and not isinstance(ticket.error, AbandonedError):
                log.warning("reading ahead failed: %s", ticket.error)

    def _count(self, ticket: Ticket) -> None:
        """Adds the bytes of a read ahead that has ended; the caller holds the lock."""
        if ticket.error is None:
            self.telemetry.values[ticket.slot.layer, Counter.BYTES_READ] += ticket.read_bytes

    def _count_rows(self) -> None:
        while not self._rows_read.empty():
            self._count(self._rows_read.get())

    def settle(self) -> int:
        """Processes finished reads; returns the number of pending read-ahead reads."""
        with self.lock:
            while not self.store.completions.empty():
                self.finish(self.store.completions.get())
            self._count_rows()
            return self._n_ahead

    def wait_for_read_ahead(self) -> bool:
        """Waits for one read ahead to end; False if none is under way. The caller holds the lock."""
        if self._n_ahead == 0:
            return False
        self.store.drop_early()  # it may be waiting for their buffers
        self.finish(self.store.completions.get())
        return True

    # -- between two decodes, on the decoding thread -------------------------------------------------------------------

    def begin_batch(self, n_tokens: int) -> None:
        """A batch of so many tokens begins."""
        with self.lock:
            self.table.begin_batch(n_tokens)

    def upgrade(self) -> None:
        """Puts better copies that have arrived into place and starts to read the next one."""
        if self._upgrades is None:
            return
        with self.lock:
            self.settle()
            old = self._upgrades.step()
            if old is None or self._n_ahead:
                return
            variant = int(self.wanted[old.layer][old.expert])
            slot = self.table.begin_upgrade(old, self._kernels[old.layer][variant].slot_bytes, variant)
            if slot is not None:
                self.read_ahead(slot)
                self._upgrades.started()

    def use_gpu(self, tier: GpuTier, *, n_unpackers: int = 1) -> None:
        """From now on experts may live on GPUs, or pass through them; `close` closes the tier."""
        self.gpu = tier
        tier.begin(self, n_unpackers=n_unpackers)

    def step_gpu(self, heat: Heat) -> None:
        """Activates uploaded experts, and exchanges experts between RAM and GPUs."""
        if self.gpu is not None:
            with self.lock:
                self._count_rows()
                self.gpu.step(self, heat)

    # -- for the GPU tier (`gpu.tier.RamCopies`) -----------------------------------------------------------------------

    def drop_copies(self, elsewhere: npt.NDArray[np.bool_]) -> None:
        """Frees the RAM copies of experts that live elsewhere now, (n_layers, n_experts); the caller holds the lock."""
        for layer, expert in np.argwhere(elsewhere & (self.table.resident != 0)).tolist():
            slot = self.table.peek(layer, expert)
            if slot is not None and slot.pins == 0 and slot.state is SlotState.READY:
                self.table.discard(slot)

    def read_rows(self, slot: Slot, receiver: Receiver) -> None:
        """Starts reading ggml rows into memory outside the table, after what others wait for."""

        def received(ticket: Ticket) -> None:
            self._rows_read.put(ticket)  # counted later: this thread must not wait for the lock
            receiver(ticket)

        self.store.submit(slot, ahead=True, receiver=received)

    def copy_rows(self, layer: int, expert: int, variant: int, rows: npt.NDArray[np.uint8]) -> bool:
        """Writes an expert's ggml rows from its copy in RAM; False if there is none in this variant."""
        with self.lock:
            slot = self.table.peek(layer, expert)
            if slot is None or slot.state is not SlotState.READY or slot.variant != variant:
                return False
            # A pinned slot in the middle of little memory could leave no hole for what a token needs.
            if self.table.arena.size_bytes < 2 * self.floor_bytes:
                return False
            self.table.pin(slot)
        try:
            self._kernels[layer][variant].unpack(slot.address, rows)
        finally:
            with self.lock:
                self.table.unpin(slot)
        return True

    def check(self) -> None:
        """Asserts what `SlotTable.check` does, between two changes that other threads make; any thread."""
        with self.lock:
            self.table.check()

    def close(self) -> None:
        """Ends reads and frees slots and GPU memory; no compiled call may be running."""
        if self.gpu is not None:
            self.gpu.close()
        self.store.close()
        self.table.close()


def _nothing() -> None:
    """Looks at nothing."""


def largest_slot(kernels: Mapping[int, Sequence[FfnKernel]]) -> int:
    """Bytes of the largest expert in RAM, page rounding included."""
    return max(align_up(kernel.slot_bytes, PAGE_BYTES) for variants in kernels.values() for kernel in variants)


def floor_bytes(kernels: Mapping[int, Sequence[FfnKernel]], n_used: int) -> int:
    """RAM below which no token can be computed with its experts protected: `n_used` of the largest slots."""
    return n_used * largest_slot(kernels)
