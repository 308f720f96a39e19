"""One layer call: which experts are wanted, where they are, what must be read, and the mathematics.

`ExpertPool` is the owner (see `device.Owner`) behind a loaded model. A call's experts are split into those in RAM, computed at
once, and those on disk, whose reads start first and which are computed as they arrive. Experts of the running call are pinned;
when RAM can't hold all of them (a long prompt touches every expert), the call proceeds in waves: computed experts are released
and their memory takes the next ones. Each expert is read at most once per call, in file order.

A layer call runs on the decoding thread and holds the pool's lock; read-ahead (`readahead.py`) takes it for moments from its own
thread. The store's lanes never take it: they only fill slots in state LOADING.
"""

from __future__ import annotations

import ctypes as C
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numba as nb
import numpy as np
import numpy.typing as npt

from localrun.errors import BudgetError, DecodeError, StoppedError
from localrun.offload.device import View, Weight, expert_device
from localrun.offload.kernels import FfnKernel
from localrun.offload.native import LayerRecord, expert_record
from localrun.offload.policy import TAIL_TOKENS
from localrun.offload.slots import Slot, SlotState, SlotTable
from localrun.offload.store import ExpertStore, Ticket
from localrun.offload.telemetry import Counter, Telemetry
from localrun.offload.trace import TraceRecorder
from localrun.quant.source import PROJECTIONS, MoeLayer
from localrun.units import format_size

log = logging.getLogger(__name__)

I32 = npt.NDArray[np.int32]
F32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Routing:
    """Who goes where in one call, sorted by expert.

    Attributes:
        experts: distinct expert ids, ascending (which is file order).
        starts: (n_experts_used + 1,) pairs of `experts[i]` are `starts[i]:starts[i+1]`.
        x_rows, out_rows: (n_pairs,) token row and output row (token * K + k) of each pair.
    """

    experts: I32
    starts: I32
    x_rows: I32
    out_rows: I32


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


@nb.njit(cache=True, nogil=True)
def _route(ids: I32, n_experts: int, experts: I32, starts: I32, x_rows: I32, out_rows: I32) -> int:
    """Counting sort of (T, K) expert ids; returns how many distinct experts there are, or -1 for an id out of range."""
    n_tokens, k_used = ids.shape
    counts = np.zeros(n_experts + 1, np.int32)
    for t in range(n_tokens):
        for k in range(k_used):
            if ids[t, k] < 0 or ids[t, k] >= n_experts:
                return -1
            counts[ids[t, k] + 1] += 1
    used = 0
    for e in range(n_experts):
        if counts[e + 1]:
            experts[used] = e
            starts[used] = counts[e]
            used += 1
        counts[e + 1] += counts[e]
    starts[used] = n_tokens * k_used
    for t in range(n_tokens):
        for k in range(k_used):
            at = counts[ids[t, k]]
            counts[ids[t, k]] += 1
            x_rows[at], out_rows[at] = t, t * k_used + k
    return used


def route(ids: I32, n_experts: int) -> Routing:
    """Groups the (token, expert) pairs of one call by expert.

    Args:
        ids: (T, K) expert of each token's k-th choice; rows may be strided.

    Raises:
        DecodeError: an id outside 0..n_experts-1 (damaged routing table).
    """
    n_pairs = ids.size
    experts, starts = np.empty(min(n_pairs, n_experts), np.int32), np.empty(min(n_pairs, n_experts) + 1, np.int32)
    x_rows, out_rows = np.empty(n_pairs, np.int32), np.empty(n_pairs, np.int32)
    used = _route(ids, n_experts, experts, starts, x_rows, out_rows)
    if used < 0:
        raise DecodeError(
            f"the router chose an expert outside 0..{n_experts - 1}", hint="run `localrun verify` on the model"
        )
    return Routing(experts[:used], starts[: used + 1], x_rows, out_rows)


def rows_at(place: View, dtype: type[Any]) -> npt.NDArray[Any]:
    """A ggml tensor's memory as (ne2 * ne1, ne0) or, for ne2 == 1, (ne1, ne0): rows with a single stride.

    Raises:
        DecodeError: rows that don't have one common stride.
    """
    ne0, ne1, ne2 = place.ne
    nb0, nb1, nb2 = place.nb
    itemsize = np.dtype(dtype).itemsize
    if nb0 != itemsize or (ne1 > 1 and ne2 > 1 and nb2 != nb1 * ne1):
        raise DecodeError(f"unexpected strides {place.nb} of a tensor of shape {place.ne}")
    rows, stride = ne1 * ne2, nb1 if ne1 > 1 else nb2
    if rows == 1:
        stride = ne0 * itemsize
    memory: Any = (C.c_char * ((rows - 1) * stride + ne0 * itemsize)).from_address(place.address)
    return np.ndarray((rows, ne0), dtype, memory, 0, (stride, itemsize))


def swiglu(gate: View, up: View, out: View, limit: float) -> None:
    """out = silu(min(gate, limit)) * clip(up, -limit, limit), all f32 of the same shape."""
    rows_at(out, np.float32)[...] = gated(rows_at(gate, np.float32), rows_at(up, np.float32), limit)


def gated(gate: F32, up: F32, limit: float) -> F32:
    """silu(min(gate, limit)) * clip(up, -limit, limit)."""
    gate = np.minimum(gate, np.float32(limit))
    with np.errstate(over="ignore"):  # exp(-gate) may be infinite: the quotient is then the right 0
        result: F32 = gate / (1 + np.exp(-gate)) * np.clip(up, np.float32(-limit), np.float32(limit))
    return result


class ExpertPool:
    """The experts of one model: residency, reads and mathematics. Implements `device.Owner`.

    Owns the slot table and the store; `close` frees both. Layer calls come from one thread at a time; what other threads may call
    says so.

    Args:
        layers: shapes by block number.
        kernels: by block number one kernel for each of the layer's variants; its `slot_bytes` is an expert's size in RAM.
        wanted: by block number the variant that each expert is read in.
        store: reads experts.
        budget_bytes: RAM for slots (staging not included).
        n_used: experts per token.
    """

    def __init__(
        self,
        layers: Mapping[int, MoeLayer],
        kernels: Mapping[int, Sequence[FfnKernel]],
        wanted: Mapping[int, I32],
        store: ExpertStore,
        budget_bytes: int,
        n_used: int,
    ) -> None:
        self._layers = layers
        self._kernels = kernels
        self._wanted = wanted
        self._store = store
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
        self._path_lock = threading.Lock()
        self._python_only: npt.NDArray[np.int64] = np.zeros(1, np.int64)
        self._weights: dict[int, Weight] = {}
        self._records = {layer: self._record(layer) for layer in layers}
        self._error: BaseException | None = None
        self._stop = threading.Event()
        self._n_ahead = 0
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
            self._python_only,
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

        self._call(layer, _ids(ids), compute)

    def project(self, weight: Weight, x: View, ids: View, out: View) -> None:
        """See `device.Owner`."""
        choices = _ids(ids)
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
        return self._store.depth

    @property
    def staging_bytes(self) -> int:
        """RAM of reads in flight."""
        return self._store.staging_bytes

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
        """The compiled path can't stop, record or collect; the flag is set before anyone looks at the reasons again."""
        with self._path_lock:
            self._python_only[0] = self._stop.is_set() or self._recorder is not None or self._collector is not None

    def close(self) -> None:
        """Ends reads and frees the slots. The model must be freed before."""
        self._store.close()
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
                if present is not None:
                    continue
                slot = self._reserve(layer, int(expert), evict=evict)
                if slot is None:
                    break
                self._n_ahead += 1
                row = self.telemetry.values[layer]
                row[Counter.PREFETCHED] += 1
                row[Counter.BYTES_READ] += self._store.submit(slot, ahead=True).read_bytes
                started += 1
            return started

    def _reserve(self, layer: int, expert: int, *, evict: bool = True) -> Slot | None:
        """A slot for the copy that this expert is read in."""
        variant = int(self._wanted[layer][expert])
        size_bytes = self._kernels[layer][variant].slot_bytes
        return self.table.reserve(layer, expert, size_bytes, variant=variant, evict=evict)

    def settle(self) -> int:
        """Takes finished read-ahead into account; returns how many reads of it are still under way. Any thread."""
        with self._lock:
            self._settle()
            return self._n_ahead

    def _settle(self) -> None:
        while not self._store.completions.empty():
            self.finished(self._store.completions.get())

    def wait_for_read_ahead(self) -> bool:
        """Waits for one read ahead to end; False if none is under way. The caller holds the lock."""
        if self._n_ahead == 0:
            return False
        self.finished(self._store.completions.get())
        return True

    def finished(self, ticket: Ticket) -> None:
        """Residency after a read: READY, or gone if it failed. The caller holds the lock."""
        self._n_ahead -= ticket.ahead
        if ticket.error is None:
            self.table.ready(ticket.slot)
            return
        self.table.discard(ticket.slot)
        if ticket.ahead:
            log.warning("reading ahead failed: %s", ticket.error)

    # -- one call ------------------------------------------------------------------------------------------------------

    def _call(self, layer: int, ids: I32, compute: Any) -> None:
        started = time.perf_counter_ns()
        with self._lock:
            self._settle()
            if self._recorder is not None:
                self._recorder.record(layer, ids)
            call = _Call(self, layer, ids, compute)
            evictions = self.table.n_evictions
            try:
                call.run()
            finally:
                call.release()
            self.last_call = time.monotonic()
            row = self.telemetry.values[layer]
            row[Counter.CALLS] += 1
            row[Counter.TOKENS] += ids.shape[0]
            row[Counter.REQUESTS] += ids.size
            row[Counter.HITS] += call.n_hits
            row[Counter.MISSES] += call.n_misses
            row[Counter.BYTES_READ] += call.bytes_read
            row[Counter.EVICTIONS] += self.table.n_evictions - evictions
            row[Counter.WAIT_NS] += call.wait_ns
            row[Counter.COMPUTE_NS] += call.compute_ns
            row[Counter.TOTAL_NS] += time.perf_counter_ns() - started


class _Call:
    """State of one layer call; see the module docstring for the order of events."""

    def __init__(self, pool: ExpertPool, layer: int, ids: I32, compute: Any) -> None:
        self._pool, self._layer, self._compute = pool, layer, compute
        self._routing = route(ids, pool.layers[layer].n_experts)
        # Of a long prompt only its last tokens' experts count as used (see TAIL_TOKENS).
        self._tail = frozenset(ids[-TAIL_TOKENS:].flat) if len(ids) > TAIL_TOKENS else None
        self._pinned: dict[int, Slot] = {}  # index into routing.experts -> slot
        self._awaited: dict[Slot, int] = {}
        self._todo: deque[int] = deque()
        self.n_hits = self.n_misses = self.bytes_read = self.wait_ns = self.compute_ns = 0

    def run(self) -> None:
        """1. Find what is there. 2. Start reads. 3. Compute what is there. 4. Compute the rest as it arrives."""
        ready = []
        np.add.at(self._pool.table.uses[self._layer], self._routing.experts, np.diff(self._routing.starts))
        for i, expert in enumerate(self._routing.experts):
            slot = self._pool.table.peek(self._layer, int(expert))
            if slot is None:
                self._todo.append(i)
                continue
            self._pin(i, slot)
            if self._in_tail(expert):
                self._pool.table.touch(slot)
            if slot.state is SlotState.READY:
                ready.append(i)
            else:
                self._pool._store.hurry(slot)
                self._awaited[slot] = i
        self.n_hits = len(ready)
        self.n_misses = len(self._todo) + len(self._awaited)
        self._start_reads()
        self._run_kernel(ready)
        while self._awaited or self._todo:
            self._start_reads()
            self._run_kernel(self._collect())
            self._pool.check_stop()

    def release(self) -> None:
        """Unpins, and waits for reads of this call that are still under way (after an error), so that no slot stays half filled."""
        while self._awaited:
            self._take(self._pool._store.completions.get(), raising=False)
        for i in list(self._pinned):
            self._unpin(i)

    def _pin(self, i: int, slot: Slot) -> None:
        self._pool.table.pin(slot)
        self._pinned[i] = slot

    def _in_tail(self, expert: int) -> bool:
        return self._tail is None or expert in self._tail

    def _unpin(self, i: int) -> None:
        self._pool.table.unpin(self._pinned.pop(i))

    def _start_reads(self) -> None:
        store = self._pool._store
        # More reservations than staging buffers would evict experts long before their memory is needed.
        while self._todo and len(self._awaited) < 2 * store.depth:
            slot = self._pool._reserve(self._layer, int(self._routing.experts[self._todo[0]]))
            if slot is None:
                break
            i = self._todo.popleft()
            self._pin(i, slot)
            self._awaited[slot] = i
            self.bytes_read += store.submit(slot).read_bytes
        if self._todo and not self._awaited and not self._pinned:
            if self._pool.wait_for_read_ahead():
                self._start_reads()  # memory that guesses were being read into can be taken now
                return
            raise BudgetError(f"blk.{self._layer}: no room for an expert", hint="give more --ram")

    def _collect(self) -> list[int]:
        """Waits for at least one read, takes all that are there."""
        if not self._awaited:
            return []
        started = time.perf_counter_ns()
        arrived = [self._take(self._pool._store.completions.get())]
        self.wait_ns += time.perf_counter_ns() - started
        while not self._pool._store.completions.empty():
            arrived.append(self._take(self._pool._store.completions.get()))
        return [i for i in arrived if i is not None]

    def _take(self, ticket: Ticket, *, raising: bool = True) -> int | None:
        """Settles a finished read; returns its index if it belongs to this call."""
        i = self._awaited.pop(ticket.slot, None)
        if i is not None and ticket.error is not None:
            self._unpin(i)
        self._pool.finished(ticket)
        if i is not None and ticket.error is None and not self._in_tail(ticket.slot.expert):
            self._pool.table.chill(ticket.slot)
        if i is not None and ticket.error is not None and raising:
            raise ticket.error
        return i if ticket.error is None else None

    def _run_kernel(self, indices: list[int]) -> None:
        """Computes some of the call's experts and lets go of them."""
        if not indices:
            return
        started = time.perf_counter_ns()
        indices.sort()
        for variant, kernel in enumerate(self._pool._kernels[self._layer]):
            same = [i for i in indices if self._pinned[i].variant == variant]
            if same:
                self._compute(kernel, [self._pinned[i] for i in same], self._part(same))
        for i in indices:
            self._unpin(i)
        self.compute_ns += time.perf_counter_ns() - started

    def _part(self, indices: list[int]) -> Routing:
        whole = self._routing
        if len(indices) == len(whole.experts):
            return whole
        pieces = [np.arange(whole.starts[i], whole.starts[i + 1], dtype=np.int32) for i in indices]
        pairs = np.concatenate(pieces)
        starts = np.zeros(len(indices) + 1, np.int32)
        np.cumsum([piece.size for piece in pieces], out=starts[1:])
        return Routing(whole.experts[indices], starts, whole.x_rows[pairs], whole.out_rows[pairs])


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
    return max(-(-kernel.slot_bytes // 4096) * 4096 for variants in kernels.values() for kernel in variants)


def floor_bytes(kernels: Mapping[int, Sequence[FfnKernel]], n_used: int) -> int:
    """RAM below which no token can be computed with its experts protected: `n_used` of the largest slots."""
    return n_used * largest_slot(kernels)


def _ids(ids: View) -> I32:
    """(T, K) view of a ggml tensor of shape (K, T)."""
    k_used, n_tokens, _ = ids.ne
    memory: Any = (C.c_char * ((n_tokens - 1) * ids.nb[1] + k_used * 4)).from_address(ids.address)
    return np.ndarray((n_tokens, k_used), np.int32, memory, 0, (ids.nb[1], 4))
