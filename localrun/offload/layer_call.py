"""One layer call: finds experts, starts reads, and orders the work.

Reads of missing experts start first; experts in RAM are computed immediately, the others as they arrive. Experts of the running
call are pinned. If RAM can't hold all of them (a long prompt touches every expert), the call proceeds in waves: computed
experts are released and their memory is reused for the next ones. Each expert is read at most once per call, in file order. In
a long prompt experts may be streamed through a GPU instead (`gpu/stream.py`), whether or not they are in RAM.
"""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from localrun.errors import BudgetError
from localrun.offload.cache.slots import TAIL_TOKENS, Slot, SlotState
from localrun.offload.cache.tickets import Ticket
from localrun.offload.device.routing import Routing, route
from localrun.offload.device.view import I32
from localrun.offload.gpu.stream import LONG_TOKENS, Passing
from localrun.offload.gpu.tier import GpuCall
from localrun.offload.kernels import FfnKernel
from localrun.offload.readahead import ReadAhead
from localrun.offload.residency import Residency

Compute = Callable[[FfnKernel, Sequence[Slot], Routing], None]
"""Multiplies some experts, all in one format, with their tokens."""

_LOOK_S: Final = 0.02
"""After so long without a read that ends, memory is looked at (`memory_watch.py`)."""


def tail_tokens(n_slots: int, n_layers: int, n_used: int) -> int:
    """Of a batch, how many tokens at its end count as used (see TAIL_TOKENS): no more than there are slots for in all layers,
    or the last layers' experts would displace those of the first, which the next token needs first."""
    return max(1, min(TAIL_TOKENS, n_slots // max(1, n_layers * n_used)))


class LayerCall:
    """One call's state. For the decoding thread, which holds residency's lock from `run` to the end of `release`.

    Attributes:
        most_at_once: experts to compute before looking at reads again.
        n_hits, n_misses: distinct experts that were in RAM or on a GPU, and the others.
        n_gpu: those on a GPU.
        n_streamed: those streamed through a GPU.
        bytes_read: of reads that this call started.
        wait_ns, compute_ns: time waiting with nothing to compute, and time in kernels.

    Args:
        residency: finds, reserves and reads experts.
        ahead: knows which of them were guessed.
        layer: block number.
        ids: (T, K) expert of each token's k-th choice.
        compute: multiplies.
        gpu: this call's work on GPUs; None: it may not use them.
        check_stop: raises StoppedError if the call should end.
        foresee: called once everything that this call needs has been requested, to start low-priority reads; in a call of many
            experts as soon as its first reads are.
    """

    most_at_once = 16

    def __init__(
        self,
        residency: Residency,
        ahead: ReadAhead,
        layer: int,
        ids: I32,
        compute: Compute,
        gpu: GpuCall | None = None,
        *,
        check_stop: Callable[[], None],
        foresee: Callable[[], None] = lambda: None,
    ) -> None:
        self._residency, self._ahead, self._layer = residency, ahead, layer
        self._compute, self._gpu, self._check_stop = compute, gpu, check_stop
        self._foresee = foresee
        self._has_gpu = gpu is not None
        self._is_long = len(ids) >= LONG_TOKENS
        self._streamed: set[int] = set()  # indices whose slots in RAM are being unpacked
        self._routing = route(ids, residency.layers[layer].n_experts)
        # Of a prompt only its last tokens' experts count as used.
        n_tail = tail_tokens(residency.n_slots, len(residency.layers), ids.shape[1])
        self._tail = frozenset(ids[-n_tail:].flat) if len(ids) > n_tail else None
        self._pinned: dict[int, Slot] = {}  # index into routing.experts -> slot
        self._awaited: dict[Slot, int] = {}
        self._todo: deque[int] = deque()
        self.n_gpu = self.n_hits = self.n_misses = self.n_streamed = 0
        self.bytes_read = self.wait_ns = self.compute_ns = 0

    @property
    def n_distinct(self) -> int:
        """Distinct experts."""
        return len(self._routing.experts)

    def run(self) -> None:
        """1. Find available experts. 2. Start reads and GPUs. 3. Compute available experts. 4. Compute the rest as they arrive.
        5. Collect the GPUs' results."""
        ready, on_gpu = [], []
        table = self._residency.table
        self._count_uses()
        for i, expert in enumerate(self._routing.experts):
            if self._has_gpu and self._residency.on_gpu(self._layer, int(expert)):
                on_gpu.append(i)
                continue
            slot = table.peek(self._layer, int(expert))
            if slot is None:
                self._todo.append(i)
                continue
            self._pin(i, slot)
            if self._in_tail(expert):
                self._touch(slot)
            elif self._ahead.is_guess(slot):
                table.chill(slot)
            if slot.state is SlotState.READY:
                ready.append(i)
            else:
                self._hurry(slot)
                self._awaited[slot] = i
        self.n_gpu, self.n_hits = len(on_gpu), len(ready) + len(on_gpu)
        self.n_misses = len(self._todo) + len(self._awaited)
        self._ahead.foresight.begin(self._layer, self._routing.experts)
        self._ahead.reached(self._layer)
        if not self._is_long:
            self._start_reads()  # before the GPU: starting it takes some of the time that a read takes
        if self._gpu is not None and (on_gpu or self._is_long):
            started = time.perf_counter_ns()
            ready = self._start_gpu(self._gpu, on_gpu, ready)
            self.compute_ns += time.perf_counter_ns() - started
        self._start_reads()
        is_large = self.n_distinct > self.most_at_once
        if is_large:
            self._foresee()
        while len(ready) > self.most_at_once:  # between, reads go on and memory is looked at
            self._run_kernel(ready[: self.most_at_once])
            ready = ready[self.most_at_once :] + self._arrived()
            self._start_reads()
            self._check_stop()
            self._residency.look()
        self._run_kernel(ready)
        if not is_large:
            self._foresee()
        while self._awaited or self._todo:
            self._start_reads()
            self._run_kernel(self._collect())
            self._check_stop()
            self._residency.look()  # what this call needs is pinned, and not evicted
        self._wait_for_gpu()
        self._residency.look()
        self._ahead.judge(self._layer, self._routing.experts)

    def _count_uses(self) -> None:
        self._residency.table.uses[self._layer, self._routing.experts] += np.diff(self._routing.starts)

    def _touch(self, slot: Slot) -> None:
        self._residency.table.touch(slot)

    def _start_gpu(self, gpu: GpuCall, on_gpu: list[int], ready: list[int]) -> list[int]:
        """Starts what lives on GPUs and, in a long call, what passes through one; returns what is left of `ready`."""
        on_gpus = self._subset(on_gpu) if on_gpu else None
        if not self._is_long:
            gpu.start(on_gpus)
            return ready
        passing = self._choose_passing(gpu, on_gpu, ready)
        gpu.start_long(on_gpus, [self._passing(i, ring) for i, ring in passing.items()])
        self.n_streamed = len(passing)
        self._streamed = {i for i in passing if i in self._pinned}
        self._todo = deque(i for i in self._todo if i not in passing)
        return [i for i in ready if i not in passing]

    def _choose_passing(self, gpu: GpuCall, on_gpu: list[int], ready: list[int]) -> dict[int, int]:
        """Index -> ring of the experts to stream, in file order."""
        # What is not there and will be needed after the prompt has to come into RAM; while there is room, others may, too.
        missing = [i for i in self._todo if not self._in_tail(self._routing.experts[i])]
        missing = missing[max(0, self._residency.room(self._layer) - (len(self._todo) - len(missing))) :]
        indices = np.array(sorted([*ready, *missing]), np.int32)
        if indices.size == 0:
            return {}
        counts = np.diff(self._routing.starts)
        resident = int(counts[on_gpu].sum())
        variants = np.array([self._variant(int(i)) for i in indices], np.int32)
        in_ram = np.array([int(i) in self._pinned for i in indices])
        others = int(counts.sum()) - resident - int(counts[indices].sum())
        chosen = gpu.choose(counts[indices], variants, in_ram, others, resident)
        rings = {int(indices[c]): gpu.ring_of(int(variants[c])) for c in chosen}
        return {i: ring for i, ring in rings.items() if ring is not None}

    def _variant(self, i: int) -> int:
        """The copy of an expert that this call uses."""
        slot = self._pinned.get(i)
        return slot.variant if slot else self._residency.variant_to_read(self._layer, int(self._routing.experts[i]))

    def _passing(self, i: int, ring: int) -> Passing:
        slot, routing = self._pinned.get(i), self._routing
        pairs = slice(routing.starts[i], routing.starts[i + 1])
        expert, address = int(routing.experts[i]), slot.address if slot else 0
        return Passing(
            ring, self._layer, expert, self._variant(i), address, routing.x_rows[pairs], routing.out_rows[pairs]
        )

    def _wait_for_gpu(self) -> None:
        gpu, self._gpu = self._gpu, None
        if gpu is None:
            return
        started = time.perf_counter_ns()
        try:
            self.bytes_read += gpu.wait(self._check_stop)
        finally:
            gpu.abandon()
        self.compute_ns += time.perf_counter_ns() - started
        streamed, self._streamed = self._streamed, set()
        for i in streamed:
            self._unpin(i)

    def release(self) -> None:
        """Unpins, and waits for this call's pending reads (after an error), so that no slot stays half filled."""
        if self._gpu is not None:  # after an error; it writes into the caller's memory
            self._gpu.abandon()
        while self._awaited:
            self._take(self._residency.store.completions.get(), raising=False)
        for i in list(self._pinned):
            self._unpin(i)

    def _pin(self, i: int, slot: Slot) -> None:
        self._residency.table.pin(slot)
        self._pinned[i] = slot

    def _in_tail(self, expert: int) -> bool:
        return self._tail is None or expert in self._tail

    def _unpin(self, i: int) -> None:
        self._residency.table.unpin(self._pinned.pop(i))

    def _start_reads(self) -> None:
        store = self._residency.store
        # More reservations than staging buffers would evict experts long before their memory is needed.
        while self._todo and len(self._awaited) < 2 * store.depth:
            slot = self._residency.reserve(self._layer, int(self._routing.experts[self._todo[0]]))
            if slot is None:
                break
            self.bytes_read += self._read(slot)
            i = self._todo.popleft()
            self._pin(i, slot)
            self._awaited[slot] = i
        if self._todo and not self._awaited and self._streamed and len(self._pinned) == len(self._streamed):
            self._wait_for_gpu()  # the last slots are its
            self._start_reads()
            return
        if self._todo and not self._awaited and not self._pinned:
            if self._residency.wait_for_read_ahead():
                self._start_reads()  # memory that guesses were being read into can be taken now
                return
            raise BudgetError(f"blk.{self._layer}: no room for an expert", hint="raise --ram")

    def _read(self, slot: Slot) -> int:
        return self._residency.read(slot)

    def _hurry(self, slot: Slot) -> None:
        self._residency.store.hurry(slot)

    def _collect(self) -> list[int]:
        """Waits for at least one read, takes all that are there."""
        if not self._awaited:
            return []
        started = time.perf_counter_ns()
        arrived = [self._take(self._next_completion())]
        self.wait_ns += time.perf_counter_ns() - started
        return [i for i in arrived if i is not None] + self._arrived()

    def _next_completion(self) -> Ticket:
        while True:
            try:
                return self._residency.store.completions.get(timeout=_LOOK_S)
            except queue.Empty:
                self._residency.look()

    def _arrived(self) -> list[int]:
        """Takes all reads that are there."""
        arrived = []
        while not self._residency.store.completions.empty():
            arrived.append(self._take(self._residency.store.completions.get()))
        return [i for i in arrived if i is not None]

    def _take(self, ticket: Ticket, *, raising: bool = True) -> int | None:
        """Settles a finished read; returns its index if it belongs to this call."""
        i = self._awaited.pop(ticket.slot, None)
        if i is not None and ticket.error is not None:
            self._unpin(i)
        self._residency.finish(ticket)
        if i is not None and ticket.error is not None and ticket.ahead and raising:
            self._todo.append(i)  # a guess that failed or was given up: read like any other
            return None
        if i is not None and ticket.error is None and not self._in_tail(ticket.slot.expert):
            self._residency.table.chill(ticket.slot)
        if i is not None and ticket.error is not None and raising:
            raise ticket.error
        return i if ticket.error is None else None

    def _run_kernel(self, indices: list[int]) -> None:
        """Computes some of the call's experts and lets go of them."""
        if not indices:
            return
        started = time.perf_counter_ns()
        indices.sort()
        for variant, kernel in enumerate(self._residency.kernels(self._layer)):
            same = [i for i in indices if self._pinned[i].variant == variant]
            if same:
                self._compute(kernel, [self._pinned[i] for i in same], self._subset(same))
        for i in indices:
            self._unpin(i)
        self.compute_ns += time.perf_counter_ns() - started

    def _subset(self, indices: list[int]) -> Routing:
        whole = self._routing
        if len(indices) == len(whole.experts):
            return whole
        pieces = [np.arange(whole.starts[i], whole.starts[i + 1], dtype=np.int32) for i in indices]
        pairs = np.concatenate(pieces)
        starts = np.zeros(len(indices) + 1, np.int32)
        np.cumsum([piece.size for piece in pieces], out=starts[1:])
        return Routing(whole.experts[indices], starts, whole.x_rows[pairs], whole.out_rows[pairs])
