"""The experts of a loaded model: residency, reads and mathematics behind our device.

`ExpertPool` is the owner (see `device.Owner`); what happens in one layer call is `layer_call.py`'s work. A layer call runs on the
decoding thread and holds the pool's lock; read-ahead (`readahead.py`) takes it for moments from its own thread. The store's lanes
never take it: they only fill slots in state LOADING.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from localrun.alignment import PAGE_BYTES, align_up
from localrun.errors import BudgetError, DecodeError, StoppedError
from localrun.offload.cache.slots import Slot, SlotState, SlotTable
from localrun.offload.cache.store import ExpertStore, Receiver, Ticket
from localrun.offload.cache.telemetry import Counter, Telemetry
from localrun.offload.cache.trace import TraceRecorder
from localrun.offload.device.compiled import LayerRecord, expert_record
from localrun.offload.device.device import Weight, expert_device
from localrun.offload.device.routing import Routing, gated
from localrun.offload.device.view import F32, I32, View, ids_at, rows_at
from localrun.offload.gpu.stream import LONG_TOKENS
from localrun.offload.gpu.tier import GpuCall, GpuTier, Heat
from localrun.offload.kernels import FfnKernel
from localrun.offload.layer_call import Compute, LayerCall
from localrun.offload.upgrades import Upgrades
from localrun.quant.model.source import PROJECTIONS, MoeLayer
from localrun.units import format_size

log = logging.getLogger(__name__)

PROMPT_TOKENS = 64
"""Batches of so many tokens read ahead for the next layer; and so many tokens tell which experts a layer uses."""
_ANY_TOKENS = 1 << 60
"""More than any call has: nothing but a read sends it to Python."""
CERTAIN = 0.9
"""Least probability with which an expert must be needed to be read ahead."""
PROMPT_SHARE = 1 / 3
"""Of the slots. [m] Three Flash layers under 5 GB, 512 tokens that use every expert: the expert calls of a prefill took 4.7 s with
it and 5.7 to 5.9 s without, the whole prefill 8.4 s and 8.6 to 9.0 s: attention slows down while reads are packed beside it."""


class Collector(Protocol):
    """Sees the inputs of routed experts while a text runs; for calibration."""

    def collect(self, weight: Weight, experts: I32, starts: I32, rows: I32, x: F32) -> None:
        """Rows that one call multiplies with a projection; gate stands for up too. On the decoding thread.

        Args:
            experts: (n,) distinct expert ids.
            starts: (n + 1,) pairs of `experts[i]` are `starts[i]:starts[i+1]`.
            rows: (n_pairs,) row of `x` of each pair.
            x: (any, n_in) inputs; valid during the call only.
        """
        ...


class ExpertPool:
    """The experts of one model: residency, reads and mathematics. Implements `device.Owner`.

    Owns the slot table and the store; `close` frees both. Layer calls come from one thread at a time; what other threads may call
    says so.

    Args:
        layers: shapes by block number.
        kernels: by block number one kernel for each of the layer's variants; its `slot_bytes` is an expert's size in RAM.
        wanted: by block number the variant that each expert is read in.
        store: reads experts; read-only.
        budget_bytes: RAM for slots (staging not included).
        n_used: experts per token.
        adaptive: serve what is missing from the base's copy, see `upgrades.py`.
    """

    def __init__(
        self,
        layers: Mapping[int, MoeLayer],
        kernels: Mapping[int, Sequence[FfnKernel]],
        wanted: Mapping[int, I32],
        store: ExpertStore,
        budget_bytes: int,
        n_used: int,
        *,
        adaptive: bool = False,
    ) -> None:
        self._layers = layers
        self._kernels = kernels
        self._wanted = wanted
        self._n_used = n_used
        self.store = store
        floor = floor_bytes(kernels, n_used)
        if budget_bytes < floor:
            raise BudgetError(
                f"{format_size(budget_bytes)} of RAM for experts is less than the {n_used} experts of one layer "
                f"({format_size(floor)}) that every token needs",
                hint=f"give --ram at least {format_size(floor + store.staging_bytes)}",
            )
        self.floor_bytes = floor
        n_layers, n_experts = max(layers) + 1, max(moe.n_experts for moe in layers.values())
        self.table = SlotTable(budget_bytes, n_layers, n_experts)
        self.telemetry = Telemetry(n_layers)
        self._gpu: GpuTier | None = None
        self._upgrades: Upgrades | None = None
        if adaptive:
            all_wanted = np.zeros((n_layers, n_experts), np.int32)
            for layer, variants in wanted.items():
                all_wanted[layer, : variants.size] = variants
            self._upgrades = Upgrades(self.table, all_wanted)
        self._path_lock = threading.Lock()
        self._compiled_below: npt.NDArray[np.int64] = np.full(1, _ANY_TOKENS, np.int64)
        self._weights: dict[int, Weight] = {}
        self._records = {layer: self._record(layer) for layer in layers}
        self._error: BaseException | None = None
        self._stop = threading.Event()
        self._n_ahead = 0
        self.guessed: dict[Slot, int] = {}  # read for the next layer's call -> recency at arrival, -1 before
        self._recorder: TraceRecorder | None = None
        self._collector: Collector | None = None
        self._lock = threading.RLock()  # residency; held for a whole layer call, and for moments by read-ahead
        self.last_call = 0.0  # time.monotonic() of the last layer call that came to Python, or of `busy`'s end
        self.busy = False  # the decoding thread is in llama_decode: read-ahead keeps away

    def _record(self, layer: int) -> LayerRecord:
        table = self.table
        return LayerRecord(
            self._layers[layer].n_experts,
            table.resident[layer],
            table.variants[layer],
            table.stamps[layer],
            table.uses[layer],
            table.tick,
            self.telemetry.values[layer],
            self._compiled_below,
            [kernel.call for kernel in self._kernels[layer]],
        )

    # -- device.Owner --------------------------------------------------------------------------------------------------

    def weight(self, tensor: int) -> Weight | None:
        """See `device.Owner`."""
        return self._weights.get(tensor)

    def adopt(self, tensor: int, weight: Weight) -> None:
        """Called at load for each stacked expert tensor that llama.cpp created."""
        self._weights[tensor] = weight
        expert_device().attach(tensor, expert_record(weight.projection, self._records[weight.layer]))

    def ffn(self, layer: int, x: View, ids: View, out: View, limit: float) -> None:
        """See `device.Owner`."""
        expected = self._kernels[layer][0].spec.limit
        if not math.isclose(expected, limit, rel_tol=1e-6) and not math.isinf(expected + limit):
            raise DecodeError(f"blk.{layer}: clamp limit {limit} differs from the metadata's {expected}")
        x_rows, out_rows = rows_at(x, np.float32), rows_at(out, np.float32)

        def compute(kernel: FfnKernel, slots: Sequence[Slot], part: Routing) -> None:
            addresses = np.array([slot.address for slot in slots], np.uint64)
            if self._collector is not None:
                _run_and_collect(self._collector, kernel, layer, addresses, part, x_rows, out_rows)
            else:
                kernel.run(addresses, part.starts, part.x_rows, part.out_rows, x_rows, out_rows)

        gpu = self._gpu if self._collector is None else None
        self._call(layer, ids_at(ids), compute, gpu.call(layer, x_rows, out_rows) if gpu is not None else None)

    def project(self, weight: Weight, x: View, ids: View, out: View) -> None:
        """See `device.Owner`."""
        choices = ids_at(ids)
        x_rows, out_rows = rows_at(x, np.float32), rows_at(out, np.float32)
        per_choice = x.ne[1] > 1  # x has one row per (token, choice): the activation of an earlier projection

        def compute(kernel: FfnKernel, slots: Sequence[Slot], part: Routing) -> None:
            addresses = np.array([slot.address for slot in slots], np.uint64)
            source_rows = part.out_rows if per_choice else part.x_rows
            if self._collector is not None and PROJECTIONS[weight.projection] != "up":
                self._collector.collect(weight, part.experts, part.starts, source_rows, x_rows)
            kernel.project(weight.projection, addresses, part.starts, source_rows, part.out_rows, x_rows, out_rows)

        self._call(weight.layer, choices, compute)

    def check_stop(self) -> None:
        """See `device.Owner`."""
        if self._stop.is_set():
            raise StoppedError("stopped")

    def failed(self, error: BaseException) -> None:
        """See `device.Owner`; the first cause is kept."""
        if self._error is None:
            self._error = error

    def kernels(self, layer: int) -> Sequence[FfnKernel]:
        """The layer's arithmetic by variant."""
        return self._kernels[layer]

    @property
    def wanted(self) -> Mapping[int, I32]:
        """By layer the variant that each expert is read in."""
        return self._wanted

    def variants_of(self, layer: int) -> I32:
        """(n_experts,) in which of the layer's variants each expert is in RAM, or would be read in."""
        n_experts = self._layers[layer].n_experts
        there = self.table.resident[layer, :n_experts] != 0
        return np.where(there, self.table.variants[layer, :n_experts], self._wanted[layer])

    @property
    def layers(self) -> Mapping[int, MoeLayer]:
        """Shapes by block number."""
        return self._layers

    @property
    def n_slots(self) -> int:
        """Experts that fit into RAM if all have the largest size."""
        return self.table.arena.size_bytes // largest_slot(self._kernels)

    def record(self, recorder: TraceRecorder | None) -> None:
        """Notes every layer call's routing from now on (None: no more); all calls then go through Python."""
        self._recorder = recorder
        self._choose_path()

    def collect(self, collector: Collector | None) -> None:
        """Shows every layer call's inputs to `collector` from now on (None: no more); all calls then go through Python, slower."""
        self._collector = collector
        self._choose_path()

    @property
    def read_depth(self) -> int:
        """Expert reads that the store has under way at once."""
        return self.store.depth

    @property
    def staging_bytes(self) -> int:
        """RAM of reads in flight."""
        return self.store.staging_bytes

    # -- for the engine ------------------------------------------------------------------------------------------------

    def take_error(self) -> BaseException | None:
        """The cause of the last failed decode, once."""
        error, self._error = self._error, None
        return error

    def request_stop(self) -> None:
        """Makes the running (or next) decode fail with `StoppedError` at the next layer. Any thread, also signal handlers."""
        self._stop.set()
        self._choose_path()

    def clear_stop(self) -> None:
        """Forgets an earlier stop request; before a new answer."""
        self._stop.clear()
        self._choose_path()

    def _choose_path(self) -> None:
        """The compiled path can't stop, record, collect or stream; the number is set before anyone looks at the reasons again."""
        with self._path_lock:
            if self._stop.is_set() or self._recorder is not None or self._collector is not None:
                self._compiled_below[0] = 0
            else:
                self._compiled_below[0] = _ANY_TOKENS if self._gpu is None else LONG_TOKENS

    def close(self) -> None:
        """Ends reads and frees the slots. The model must be freed before."""
        if self._gpu is not None:
            for record in self._records.values():
                record.use_gpu(None)
            self._gpu.close()
        self.store.close()
        self.table.close()

    # -- read-ahead ----------------------------------------------------------------------------------------------------

    def read_ahead(self, layer: int, experts: Sequence[int], *, evict: bool, limit: int) -> int:
        """Starts reading experts that are not there, without waiting; any thread unless `evict`.

        Args:
            evict: may displace the coldest experts (for what is certain to be needed); else only free memory is used. Only on the
                decoding thread: compiled code reads residency without the lock.
            limit: most reads to have under way.

        Returns:
            Number of reads started; 0 also when the memory or the limit is exhausted.
        """
        with self._lock:
            self._settle()
            started = 0
            for expert in experts:
                if self._n_ahead >= limit:
                    break
                # What is certain to be asked for counts as used, so that its neighbours' reads don't displace it.
                present = self.table.find(layer, int(expert)) if evict else self.table.peek(layer, int(expert))
                if present is not None or self.on_gpu(layer, int(expert)):
                    continue
                slot = self.reserve(layer, int(expert), evict=evict)
                if slot is None:
                    break
                self._n_ahead += 1
                row = self.telemetry.values[layer]
                row[Counter.PREFETCHED] += 1
                row[Counter.BYTES_READ] += self.store.submit(slot, ahead=True).read_bytes
                started += 1
            return started

    def reserve(self, layer: int, expert: int, *, evict: bool = True) -> Slot | None:
        """A slot for the copy that this expert is read in; when somebody waits (`evict`) in adaptive mode, the base's."""
        variant = self.variant_to_read(layer, expert) if evict else int(self._wanted[layer][expert])
        size_bytes = self._kernels[layer][variant].slot_bytes
        return self.table.reserve(layer, expert, size_bytes, variant=variant, evict=evict)

    def variant_to_read(self, layer: int, expert: int) -> int:
        """The copy in which an expert is read that somebody waits for."""
        return 0 if self._upgrades is not None else int(self._wanted[layer][expert])

    def read_ahead_for_prompt(self, layer: int, n_tokens: int, share_used: float) -> None:
        """After a long batch's call of `layer`: starts reading what the next layer will almost certainly ask for, so that the drive
        works while llama.cpp computes attention. On the decoding thread.

        Up to `PROMPT_SHARE` of the slots serve this, layer after layer: a slot that is filled again for each layer hides one read
        per layer, one that keeps its expert saves one read per batch.

        Args:
            n_tokens: of the batch.
            share_used: of the layer's experts, by this batch: where it was nearly all, the next layer's will be.
        """
        following = self._layers.get(layer + 1)
        if following is None or n_tokens < PROMPT_TOKENS:
            return
        # Where long prompts stream, what is missing passes through a GPU and displaces nothing.
        evict = self._gpu is None or self._gpu.rings is None
        missing = [e for e in self._certain(layer + 1, n_tokens, share_used) if not self._is_here(layer + 1, e)]
        if not missing:
            return
        there = [slot for slot in self.table if slot.layer == layer + 1]
        for present in there:  # they will be asked for as certainly
            self.table.pin(present)
        try:
            for expert in missing[: int(self.n_slots * PROMPT_SHARE)]:
                slot = self.reserve(layer + 1, expert, evict=evict)
                if slot is None:
                    break
                self._n_ahead += 1
                self.guessed[slot] = -1
                row = self.telemetry.values[layer + 1]
                row[Counter.PREFETCHED] += 1
                row[Counter.BYTES_READ] += self.store.submit(slot, ahead=True).read_bytes
        finally:
            for present in there:
                self.table.unpin(present)

    def _certain(self, layer: int, n_tokens: int, share_used: float) -> list[int]:
        """Experts that a batch of so many tokens will almost certainly use, in file order."""
        uses = self.table.uses[layer, : self._layers[layer].n_experts]
        seen = int(uses.sum()) // self._n_used
        if share_used >= CERTAIN:
            return list(range(uses.size))
        if seen < PROMPT_TOKENS:
            return []
        return [int(e) for e in np.flatnonzero(1 - (1 - np.minimum(uses / seen, 1.0)) ** n_tokens >= CERTAIN)]

    def _is_here(self, layer: int, expert: int) -> bool:
        return self.table.peek(layer, expert) is not None or self.on_gpu(layer, expert)

    def upgrade(self) -> None:
        """Between two decodes, on the decoding thread: puts better copies that have arrived into place and starts the next read."""
        if self._upgrades is None:
            return
        with self._lock:
            self._settle()
            old = self._upgrades.step()
            if old is None or self._n_ahead:
                return
            variant = int(self._wanted[old.layer][old.expert])
            slot = self.table.begin_upgrade(old, self._kernels[old.layer][variant].slot_bytes, variant)
            if slot is not None:
                self._upgrades.started()
                self._n_ahead += 1
                row = self.telemetry.values[old.layer]
                row[Counter.PREFETCHED] += 1
                row[Counter.BYTES_READ] += self.store.submit(slot, ahead=True).read_bytes

    def room(self, layer: int) -> int:
        """How many more of a layer's experts there is free memory for; any thread."""
        with self._lock:
            return self.table.arena.free_bytes // max(kernel.slot_bytes for kernel in self._kernels[layer])

    def has_room(self, layer: int, expert: int) -> bool:
        """There is free memory for this expert; any thread."""
        with self._lock:
            size_bytes = self._kernels[layer][int(self._wanted[layer][expert])].slot_bytes
            return self.table.arena.largest_hole >= size_bytes

    # -- experts on GPUs -----------------------------------------------------------------------------------------------

    def use_gpu(self, tier: GpuTier, *, n_unpackers: int = 1) -> None:
        """From now on experts may live on GPUs, or pass through them; the pool closes the tier."""
        self._gpu = tier
        for layer, record in self._records.items():
            record.use_gpu(tier.layers[layer])
        tier.begin(self, n_unpackers=n_unpackers)
        self._choose_path()

    @property
    def gpu(self) -> GpuTier | None:
        """The experts on GPUs, if there are any."""
        return self._gpu

    def on_gpu(self, layer: int, expert: int) -> bool:
        """The expert lives on a GPU."""
        return self._gpu is not None and bool(self._gpu.where[layer, expert] >= 0)

    def step_gpu(self, heat: Heat) -> None:
        """Between two decodes, on the decoding thread: puts to use what was uploaded, and lets experts change places."""
        if self._gpu is not None:
            with self._lock:
                self._gpu.step(self, heat)

    def read_rows(self, slot: Slot, receiver: Receiver) -> None:
        """Starts reading ggml rows into memory outside the table, after what others wait for; any thread."""
        with self._lock:
            row = self.telemetry.values[slot.layer]
            row[Counter.BYTES_READ] += self.store.submit(slot, ahead=True, receiver=receiver).read_bytes

    def copy_rows(self, layer: int, expert: int, variant: int, rows: npt.NDArray[np.uint8]) -> bool:
        """Writes an expert's ggml rows from its copy in RAM; False if there is none in this variant. Any thread."""
        with self._lock:
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
            with self._lock:
                self.table.unpin(slot)
        return True

    def drop(self, slot: Slot) -> None:
        """Frees the RAM copy of an expert that lives elsewhere now; between two decodes, with the pool's lock."""
        if slot.state is SlotState.READY:
            self.table.discard(slot)

    def settle(self) -> int:
        """Takes finished read-ahead into account; returns how many reads of it are still under way. Any thread."""
        with self._lock:
            self._settle()
            return self._n_ahead

    def _settle(self) -> None:
        while not self.store.completions.empty():
            self.finished(self.store.completions.get())

    def wait_for_read_ahead(self) -> bool:
        """Waits for one read ahead to end; False if none is under way. The caller holds the lock."""
        if self._n_ahead == 0:
            return False
        self.finished(self.store.completions.get())
        return True

    def finished(self, ticket: Ticket) -> None:
        """Residency after a read: READY, or gone if it failed. The caller holds the lock."""
        self._n_ahead -= ticket.ahead
        if ticket.slot.replaces is not None:
            assert self._upgrades is not None
            self._upgrades.arrived(ticket)
            return
        if ticket.error is None:
            self.table.ready(ticket.slot)
            if ticket.slot in self.guessed:
                self.guessed[ticket.slot] = int(self.table.tick[0])
            return
        self.table.discard(ticket.slot)
        self.guessed.pop(ticket.slot, None)
        if ticket.ahead:
            log.warning("reading ahead failed: %s", ticket.error)

    # -- one call ------------------------------------------------------------------------------------------------------

    def _call(self, layer: int, ids: I32, compute: Compute, gpu: GpuCall | None = None) -> None:
        started = time.perf_counter_ns()
        with self._lock:
            self._settle()
            if self._recorder is not None:
                self._recorder.record(layer, ids)
            call = LayerCall(self, layer, ids, compute, gpu)
            evictions = self.table.n_evictions
            try:
                call.run()
            finally:
                call.release()
            self.read_ahead_for_prompt(layer, ids.shape[0], call.n_distinct / self._layers[layer].n_experts)
            self.last_call = time.monotonic()
            row = self.telemetry.values[layer]
            row[Counter.CALLS] += 1
            row[Counter.TOKENS] += ids.shape[0]
            row[Counter.REQUESTS] += ids.size
            row[Counter.HITS] += call.n_hits
            row[Counter.GPU_HITS] += call.n_gpu
            row[Counter.STREAMED] += call.n_streamed
            row[Counter.MISSES] += call.n_misses
            row[Counter.BYTES_READ] += call.bytes_read
            row[Counter.EVICTIONS] += self.table.n_evictions - evictions
            row[Counter.WAIT_NS] += call.wait_ns
            row[Counter.COMPUTE_NS] += call.compute_ns
            row[Counter.TOTAL_NS] += time.perf_counter_ns() - started


def _run_and_collect(
    collector: Collector, kernel: FfnKernel, layer: int, slots: npt.NDArray[np.uint64], part: Routing, x: F32, out: F32
) -> None:
    """What `kernel.run` does, projection by projection, so that down's input can be seen."""
    pairs = np.arange(part.x_rows.size, dtype=np.int32)
    gate, up = (np.empty((pairs.size, kernel.spec.n_ff), np.float32) for _ in range(2))
    kernel.project(0, slots, part.starts, part.x_rows, pairs, x, gate)
    kernel.project(1, slots, part.starts, part.x_rows, pairs, x, up)
    activated = gated(gate, up, kernel.spec.limit)
    kernel.project(2, slots, part.starts, pairs, part.out_rows, activated, out)
    collector.collect(Weight(layer, 0), part.experts, part.starts, part.x_rows, x)
    collector.collect(Weight(layer, 2), part.experts, part.starts, pairs, activated)


def largest_slot(kernels: Mapping[int, Sequence[FfnKernel]]) -> int:
    """Bytes of the largest expert in RAM, page rounding included."""
    return max(align_up(kernel.slot_bytes, PAGE_BYTES) for variants in kernels.values() for kernel in variants)


def floor_bytes(kernels: Mapping[int, Sequence[FfnKernel]], n_used: int) -> int:
    """RAM below which no token can be computed with its experts protected: `n_used` of the largest slots."""
    return n_used * largest_slot(kernels)
