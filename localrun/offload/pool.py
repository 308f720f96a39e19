"""The experts of a loaded model behind our device: answers layer calls.

`ExpertPool` combines three parts and delegates to them: `Residency` (where experts are), `ReadAhead` (reading ahead of demand)
and `Handover` (the interface with compiled code). `layer_call.py` runs a call.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from localrun.errors import DecodeError
from localrun.offload.cache.slots import TAIL_TOKENS, Slot
from localrun.offload.cache.telemetry import Counter, Telemetry
from localrun.offload.cache.tickets import Store
from localrun.offload.cache.trace import TraceRecorder
from localrun.offload.device.device import Weight
from localrun.offload.device.routing import Routing
from localrun.offload.device.view import F32, I32, View, ids_at, rows_at
from localrun.offload.gpu.tier import GpuCall, GpuTier
from localrun.offload.handover import Handover
from localrun.offload.kernels import FfnKernel, futex
from localrun.offload.layer_call import Compute, LayerCall
from localrun.offload.misses import Misses
from localrun.offload.readahead import ReadAhead
from localrun.offload.residency import Residency
from localrun.offload.routers import Routers
from localrun.quant.model.activation import swiglu
from localrun.quant.model.source import PROJECTIONS, MoeLayer


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
    """The experts of one model. Implements `device.Owner`; owns its parts, `close` frees them.

    Layer calls come from one thread at a time; so do `record`, `collect` and `use_gpu`, between decodes. Methods that other
    threads may call say so.

    Attributes:
        residency, ahead, handover: the parts.
        telemetry: counters of all of them.

    Args:
        layers: shapes by block number.
        kernels: by block number one kernel for each of the layer's variants; its `slot_bytes` is an expert's size in RAM.
        wanted: by block number the variant that each expert is read in.
        store: reads experts.
        budget_bytes: RAM for slots (staging not included).
        n_used: experts per token.
        hash_tables: (n_vocab, K) expert ids by layer whose experts follow from the token id.
        adaptive: serve what is missing from the base's copy, see `upgrades.py`.
        routers: predict what the next layers will need.
    """

    def __init__(
        self,
        layers: Mapping[int, MoeLayer],
        kernels: Mapping[int, Sequence[FfnKernel]],
        wanted: Mapping[int, I32],
        store: Store,
        budget_bytes: int,
        n_used: int,
        *,
        hash_tables: Mapping[int, npt.NDArray[np.int32]] | None = None,
        adaptive: bool = False,
        routers: Routers | None = None,
    ) -> None:
        self.telemetry = Telemetry(max(layers) + 1)
        self.residency = Residency(
            layers, kernels, wanted, store, budget_bytes, n_used, self.telemetry, adaptive=adaptive
        )
        self.ahead = ReadAhead(self.residency, n_used, depth=store.depth, hash_tables=hash_tables, routers=routers)
        self.handover = Handover(layers, kernels, self.residency.table, self.telemetry)
        self._misses = (
            Misses(self.residency, self.ahead, self.handover, self.telemetry) if futex.is_supported() else None
        )
        self._routers, self._hash_routed = routers, frozenset(hash_tables or ())
        self._recorder: TraceRecorder | None = None
        self._collector: Collector | None = None
        self._is_idle = False

    # -- device.Owner --------------------------------------------------------------------------------------------------

    def weight(self, tensor: int) -> Weight | None:
        """See `device.Owner`."""
        return self.handover.weight(tensor)

    def check_stop(self) -> None:
        """See `device.Owner`."""
        self.handover.check_stop()

    def failed(self, error: BaseException) -> None:
        """See `device.Owner`."""
        self.handover.failed(error)

    def ffn(self, layer: int, x: View, ids: View, out: View, limit: float, total: View | None) -> None:
        """See `device.Owner`.

        Raises:
            DecodeError: the graph's clamp limit is not the metadata's.
            StoreError: an expert can't be read, or its checksum is wrong.
            BudgetError: there is no room for an expert.
            StoppedError: a stop was requested.
        """
        expected = self.residency.kernels(layer)[0].spec.limit
        if not math.isclose(expected, limit, rel_tol=1e-6) and not math.isinf(expected + limit):
            raise DecodeError(f"blk.{layer}: clamp limit {limit} differs from the metadata's {expected}")
        x_rows, out_rows = rows_at(x, np.float32), rows_at(out, np.float32)
        if self._is_idle:
            (out_rows if total is None else rows_at(total, np.float32))[:] = 0.0
            return

        def compute(kernel: FfnKernel, slots: Sequence[Slot], routing: Routing) -> None:
            addresses = np.array([slot.address for slot in slots], np.uint64)
            if self._collector is not None:
                _run_and_collect(self._collector, kernel, layer, addresses, routing, x_rows, out_rows)
            else:
                kernel.run(addresses, routing.starts, routing.x_rows, routing.out_rows, x_rows, out_rows)

        choices, tier, gpu = ids_at(ids), self.residency.gpu if self._collector is None else None, None
        n_tokens, n_used = choices.shape
        weights = self.handover.weights(n_tokens, n_used) if total is not None else None
        if tier is not None:
            gpu = tier.call(layer, x_rows, out_rows, weights if n_tokens == 1 else None)
        self._call(layer, choices, compute, gpu, x_rows)
        if total is not None:
            summed, sums = (gpu.summed, gpu.sums) if gpu is not None else ([], [])
            self.handover.add_up(n_tokens, n_used, out_rows, rows_at(total, np.float32), summed)
            for row in sums:
                rows_at(total, np.float32)[:] += row

    def project(self, weight: Weight, x: View, ids: View, out: View) -> None:
        """See `device.Owner`."""
        choices = ids_at(ids)
        x_rows, out_rows = rows_at(x, np.float32), rows_at(out, np.float32)
        if self._is_idle:
            out_rows[:] = 0.0
            return
        per_choice = x.ne[1] > 1  # x has one row per (token, choice): the activation of an earlier projection

        def compute(kernel: FfnKernel, slots: Sequence[Slot], routing: Routing) -> None:
            addresses = np.array([slot.address for slot in slots], np.uint64)
            source_rows = routing.out_rows if per_choice else routing.x_rows
            if self._collector is not None and PROJECTIONS[weight.projection] != "up":
                self._collector.collect(weight, routing.experts, routing.starts, source_rows, x_rows)
            kernel.project(
                weight.projection, addresses, routing.starts, source_rows, routing.out_rows, x_rows, out_rows
            )

        self._call(weight.layer, choices, compute)

    # -- who looks on --------------------------------------------------------------------------------------------------

    def record(self, recorder: TraceRecorder | None) -> None:
        """Records every layer call's routing from now on (None: stop); all calls then go through Python."""
        self._recorder = recorder
        self.handover.need_python("a trace is recorded", recorder is not None)

    def collect(self, collector: Collector | None) -> None:
        """Passes every layer call's inputs to `collector` from now on (None: stop); all calls then go through Python, which is
        slower."""
        self._collector = collector
        self.handover.need_python("inputs are collected", collector is not None)

    @contextlib.contextmanager
    def idle(self) -> Iterator[None]:
        """Meanwhile layer calls answer with zeros and touch no expert: for batches that only make llama.cpp take its memory."""
        self._is_idle = True
        self.handover.need_python("experts are idle", True)
        try:
            yield
        finally:
            self._is_idle = False
            self.handover.need_python("experts are idle", False)

    def read_from_python(self) -> None:
        """From now on no read begins in compiled code: for who replaces `reading.preadv`."""
        if self._misses is not None:
            self._misses.record.use_early(0)

    def use_gpu(self, tier: GpuTier, *, n_unpackers: int = 1) -> None:
        """From now on experts may live on GPUs, or pass through them; the pool closes the tier."""
        self.residency.use_gpu(tier, n_unpackers=n_unpackers)
        self.handover.use_gpu(tier.layers)

    def close(self) -> None:
        """Ends reads and frees the slots. The model must be freed before."""
        self.ahead.close()
        if self._misses is not None:
            self._misses.close()
        self.handover.use_gpu(None)
        self.residency.close()

    # -- one call ------------------------------------------------------------------------------------------------------

    def _call(
        self, layer: int, ids: I32, compute: Compute, gpu: GpuCall | None = None, x_rows: F32 | None = None
    ) -> None:
        started = time.perf_counter_ns()
        where = self.residency
        with where.lock:
            where.settle()
            if self._recorder is not None:
                self._recorder.record(layer, ids, self._scores(layer, x_rows))

            def foresee() -> None:
                if x_rows is not None and len(x_rows) == 1:
                    self.ahead.foresight.look(layer, x_rows[0])
                else:
                    share_used = call.n_distinct / where.layers[layer].n_experts
                    self.ahead.follow(layer, ids.shape[0], share_used, x_rows)

            call = LayerCall(where, self.ahead, layer, ids, compute, gpu, check_stop=self.check_stop, foresee=foresee)
            evictions = where.table.n_evictions
            try:
                call.run()
            finally:
                call.release()
            self.ahead.note_call()
            self._count(call, layer, ids, evictions=where.table.n_evictions - evictions, started_ns=started)

    def _scores(self, layer: int, x: F32 | None) -> F32 | None:
        """By what the experts were chosen, of the last tokens; None if unknown."""
        if self._routers is None or x is None or layer in self._hash_routed:
            return None
        return self._routers.scores(layer, x[-TAIL_TOKENS:])

    def _count(self, call: LayerCall, layer: int, ids: I32, *, evictions: int, started_ns: int) -> None:
        row = self.telemetry.values[layer]
        row[Counter.CALLS] += 1
        row[Counter.TOKENS] += ids.shape[0]
        row[Counter.REQUESTS] += ids.size
        row[Counter.HITS] += call.n_hits
        row[Counter.GPU_HITS] += call.n_gpu
        row[Counter.STREAMED] += call.n_streamed
        row[Counter.MISSES] += call.n_misses
        row[Counter.BYTES_READ] += call.bytes_read
        row[Counter.EVICTIONS] += evictions
        row[Counter.WAIT_NS] += call.wait_ns
        row[Counter.COMPUTE_NS] += call.compute_ns
        row[Counter.TOTAL_NS] += time.perf_counter_ns() - started_ns


def _run_and_collect(
    collector: Collector,
    kernel: FfnKernel,
    layer: int,
    slots: npt.NDArray[np.uint64],
    routing: Routing,
    x: F32,
    out: F32,
) -> None:
    """What `kernel.run` does, projection by projection, so that down's input can be seen."""
    pairs = np.arange(routing.x_rows.size, dtype=np.int32)
    gate, up = (np.empty((pairs.size, kernel.spec.n_ff), np.float32) for _ in range(2))
    kernel.project(0, slots, routing.starts, routing.x_rows, pairs, x, gate)
    kernel.project(1, slots, routing.starts, routing.x_rows, pairs, x, up)
    activated = swiglu(gate, up, kernel.spec.limit)
    kernel.project(2, slots, routing.starts, pairs, routing.out_rows, activated, out)
    collector.collect(Weight(layer, 0), routing.experts, routing.starts, routing.x_rows, x)
    collector.collect(Weight(layer, 2), routing.experts, routing.starts, pairs, activated)
