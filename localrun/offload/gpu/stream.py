"""Long prompts on GPUs: a thread for each GPU, and experts that are streamed through.

A batch of hundreds of tokens uses nearly all experts, most of which are not on a GPU. Computing an expert on the CPU takes time
proportional to its tokens, while streaming it through a GPU takes a constant upload time. So in each call the experts with the
most tokens are streamed, in file order, while the CPU computes the others. Their number is chosen so that both sides finish
together (`choose`), using times measured at load (`stream_probe.py`); if streaming gains nothing, none are.

Experts in RAM are unpacked to ggml rows (`FfnKernel.unpack`), others are read in that form; RAM contents don't change. They are
uploaded to a double buffer: the GPU multiplies with one half while the other is filled.

Calls of few tokens never use this: the decoding thread drives the GPU itself. Only one of the two drives a `GpuSlots` at a time.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from localrun.alignment import PAGE_BYTES, align_up
from localrun.errors import LocalrunError, StoppedError
from localrun.ggml.devices import GpuDevice, HostMemory
from localrun.offload.cache.slots import Slot
from localrun.offload.cache.tickets import Store, Ticket
from localrun.offload.device.view import F32, I32
from localrun.offload.gpu.graphs import MAX_PAIRS, slot_bytes
from localrun.offload.gpu.slots import BankKey, GpuSlots
from localrun.offload.kernels import FfnKernel, FfnSpec

log = logging.getLogger(__name__)

LONG_TOKENS = 64
"""Calls of so many tokens are a prompt's: they go to the GPU's thread, and may stream."""

HALF = 4
"""Experts of one graph at most."""

RING_SLOTS = 2 * HALF
"""Slots through which experts pass, two halves of them, for each format."""

N_STAGING = 4
"""Experts on their way in RAM: being read, being unpacked, being uploaded."""

LEAST_GAIN = 1.1
"""Streaming must make a call at least so much faster."""

MEASURED_PAIRS = (8, 64)
"""Pairs of an expert that are measured; in between and beyond, a straight line."""

F64 = npt.NDArray[np.float64]


def ring_key(index: int) -> BankKey:
    """Bank of the ring for the model's `index`-th streamed format; no layer has such a number."""
    return (-1, index)


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds that one expert takes: for itself, and for each of its (token, expert) pairs."""

    expert_s: float
    pair_s: float

    def of(self, n_pairs: I32 | np.int32) -> F64:
        """(n,) seconds of experts with so many pairs."""
        return np.asarray(self.expert_s + self.pair_s * n_pairs, np.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamCosts:
    """Times of one format's experts.

    Attributes:
        cpu: an expert in RAM, on the CPU with all threads.
        gpu: the same expert, through the GPU: unpacked, uploaded, multiplied, results fetched.
        unpack_s: the part of that which experts read as ggml rows save.
        slowdown: how much longer both take concurrently than alone; 2 if the "GPU" shares our cores.
    """

    cpu: Cost
    gpu: Cost
    unpack_s: float = 0.0
    slowdown: float = 1.0

    @property
    def expert_s(self) -> float:
        """Seconds that the GPU takes for an expert with many pairs."""
        return float(self.gpu.of(np.int32(MEASURED_PAIRS[-1])))


def choose(cpu_s: F64, gpu_s: F64, *, others_s: float = 0.0, busy_s: float = 0.0, slowdown: float = 1.0) -> I32:
    """Chooses the experts of a call to stream, to minimize its time.

    Args:
        cpu_s, gpu_s: (n,) seconds of each candidate, on either side.
        others_s: the CPU's other work.
        busy_s: the GPU's other work.
        slowdown: see `StreamCosts`.

    Returns:
        Indices, ascending; empty if the call would not be `LEAST_GAIN` times faster.
    """
    order = np.argsort(gpu_s / cpu_s, kind="stable")
    on_gpu, on_cpu = busy_s + np.cumsum(gpu_s[order]), others_s + cpu_s.sum() - np.cumsum(cpu_s[order])
    ends = np.maximum(on_gpu, on_cpu)
    best = int(ends.argmin()) if ends.size else 0
    if not ends.size or ends[best] * slowdown * LEAST_GAIN > max(others_s + float(cpu_s.sum()), busy_s):
        return np.zeros(0, np.int32)
    chosen: I32 = np.sort(order[: best + 1]).astype(np.int32)
    return chosen


@dataclass(frozen=True, slots=True)
class Rings:
    """What is streamed through which GPU.

    Attributes:
        gpu: number of the GPU.
        kernels, costs: by ring, one for each streamed format.
    """

    gpu: int
    kernels: Sequence[FfnKernel]
    costs: Sequence[StreamCosts]

    @property
    def specs(self) -> dict[BankKey, FfnSpec]:
        """Shape and types by bank."""
        return {ring_key(i): kernel.spec for i, kernel in enumerate(self.kernels)}

    def bytes_on(self, device: GpuDevice) -> int:
        """GPU memory of the rings."""
        return sum(slot_bytes(spec, RING_SLOTS, device) for spec in self.specs.values())


@dataclass(frozen=True, slots=True)
class Pairs:
    """(token, expert) pairs of one bank.

    Attributes:
        key: the bank.
        slots: (n,) slot of each pair.
        x_rows, out_rows: (n,) rows of the call's inputs and outputs.
    """

    key: BankKey
    slots: I32
    x_rows: I32
    out_rows: I32


@dataclass(frozen=True, slots=True)
class Passing:
    """One expert to stream.

    Attributes:
        ring: number of its format's ring.
        layer, expert, variant: which copy.
        address: of its slot in RAM, which the caller keeps pinned; 0: to be read.
        x_rows, out_rows: (n,) rows of the call's inputs and outputs.
    """

    ring: int
    layer: int
    expert: int
    variant: int
    address: int
    x_rows: I32
    out_rows: I32


@dataclass(slots=True)
class StreamJob:
    """One GPU's part of a long call. `done` is set once nothing uses the call's memory.

    Attributes:
        x, out: the call's inputs and outputs.
        resident: pairs of experts that live on the GPU.
        passing: experts to stream, in file order.
        bytes_read: payload of the reads started.
        error: why it failed; outputs are then incomplete.
    """

    x: F32
    out: F32
    resident: Sequence[Pairs] = ()
    passing: Sequence[Passing] = ()
    bytes_read: int = 0
    error: BaseException | None = None
    cancelled: bool = False
    done: threading.Event = field(default_factory=threading.Event)


_Arrival = tuple[Passing, npt.NDArray[np.uint8], BaseException | None]


class GpuThread:
    """The thread that drives one GPU through long calls. `close` before the GPU's slots and the store are closed.

    Args:
        slots: the GPU's, with a ring for each of `kernels`.
        kernels: of the formats streamed here, by ring; may be empty.
        store: reads experts that are not in RAM; None if all are.
        n_unpackers: threads that unpack experts in RAM to ggml rows.
    """

    def __init__(
        self, slots: GpuSlots, kernels: Sequence[FfnKernel], store: Store | None, *, n_unpackers: int = 1
    ) -> None:
        self.slots = slots
        self._kernels = kernels
        self._store = store
        size = staging_bytes(kernels) // N_STAGING
        self._memory = HostMemory(slots.device, N_STAGING * size) if kernels else None
        whole = self._memory.array if self._memory else np.zeros(0, np.uint8)
        self._staging = [whole[i * size : (i + 1) * size] for i in range(N_STAGING)] if kernels else []
        self._unpackers = ThreadPoolExecutor(n_unpackers, "localrun-unpack") if kernels else None
        self._jobs: queue.SimpleQueue[StreamJob | None] = queue.SimpleQueue()
        self._running: tuple[F32, I32] | None = None
        self._is_loaded = False  # the job's inputs are on the device
        self._thread = threading.Thread(target=self._work, name=f"localrun-{slots.device.name}", daemon=True)
        self._thread.start()

    def submit(self, job: StreamJob) -> None:
        """Starts a job; one at a time."""
        self._jobs.put(job)

    def close(self) -> None:
        """Ends the thread after its job."""
        self._jobs.put(None)
        self._thread.join()
        if self._unpackers is not None:
            self._unpackers.shutdown()
        self._staging = []
        if self._memory is not None:
            self._memory.close()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                self._is_loaded = self.slots.load(job.x)
                for pairs in job.resident:
                    self._multiply(job, pairs)
                if job.passing:
                    self._stream(job)
                self._take(job)
            except BaseException as error:  # any error is reported by the decoding thread
                job.error = error
                self._abandon()
            finally:
                job.done.set()

    def _abandon(self) -> None:
        """After an error: waits for the device to finish; the result is discarded."""
        if self._running is not None:
            self._running = None
            try:
                self.slots.finish()
            except LocalrunError as error:
                log.debug("%s: %s", self.slots.device.name, error)

    def _multiply(self, job: StreamJob, pairs: Pairs) -> None:
        """Starts some pairs; at the end at most one graph runs."""
        for at in range(0, pairs.slots.size, MAX_PAIRS):
            part = slice(at, at + MAX_PAIRS)
            self._take(job)
            if self._is_loaded:
                result = self.slots.start_gathered(pairs.key, pairs.slots[part], pairs.x_rows[part], job.x.shape[1])
            else:
                result = self.slots.start(pairs.key, pairs.slots[part], job.x[pairs.x_rows[part]])
            self._running = result, pairs.out_rows[part]

    def _take(self, job: StreamJob) -> None:
        """Waits for the graph that runs and writes its results."""
        if self._running is not None:
            (result, out_rows), self._running = self._running, None
            self.slots.finish()
            job.out[out_rows] = result

    # -- passing through -----------------------------------------------------------------------------------------------

    def _stream(self, job: StreamJob) -> None:
        arrived: queue.SimpleQueue[_Arrival] = queue.SimpleQueue()
        waiting, free, under_way = deque(job.passing), list(self._staging), 0
        filled: list[Passing] = []
        half, first = 0, 0
        try:
            while waiting or under_way:
                while waiting and free:
                    if job.cancelled:
                        raise StoppedError("stopped")
                    self._fetch(job, waiting.popleft(), free.pop(), arrived)
                    under_way += 1
                item, memory, error = arrived.get()
                under_way -= 1
                if error is not None:
                    raise error
                n_pairs = sum(other.x_rows.size for other in filled)
                if filled and (
                    len(filled) == HALF or filled[0].ring != item.ring or n_pairs + item.x_rows.size > MAX_PAIRS
                ):
                    self._multiply_ring(job, filled, first)
                    filled, half = [], 1 - half
                    first = half * HALF
                self._upload(item, memory, first + len(filled))
                filled.append(item)
                free.append(memory)
            self._multiply_ring(job, filled, first)
        finally:
            for _ in range(under_way):  # they write into our memory
                arrived.get()

    def _fetch(
        self, job: StreamJob, item: Passing, memory: npt.NDArray[np.uint8], arrived: queue.SimpleQueue[_Arrival]
    ) -> None:
        """Starts to bring an expert's ggml rows into `memory`; it appears in `arrived`, failed or not."""
        kernel = self._kernels[item.ring]
        size = sum(kernel.raw_bytes)
        if not item.address:
            assert self._store is not None

            def receive(ticket: Ticket) -> None:
                arrived.put((item, memory, ticket.error))

            slot = Slot(item.layer, item.expert, int(memory.ctypes.data), size, item.variant)
            job.bytes_read += self._store.submit(slot, receiver=receive).read_bytes
            return

        def unpack() -> None:
            try:
                kernel.unpack(item.address, memory[:size])
            except BaseException as error:  # belongs to the decoding thread
                arrived.put((item, memory, error))
            else:
                arrived.put((item, memory, None))

        assert self._unpackers is not None
        self._unpackers.submit(unpack)

    def _upload(self, item: Passing, memory: npt.NDArray[np.uint8], slot: int) -> None:
        ends = np.cumsum((0, *self._kernels[item.ring].raw_bytes))
        self.slots.upload(ring_key(item.ring), slot, [memory[ends[i] : ends[i + 1]] for i in range(3)])

    def _multiply_ring(self, job: StreamJob, filled: Sequence[Passing], first: int) -> None:
        """Afterwards the other half's graph has ended, and it may be filled."""
        slots = np.repeat(np.arange(first, first + len(filled), dtype=np.int32), [item.x_rows.size for item in filled])
        x_rows, out_rows = (np.concatenate([getattr(item, name) for item in filled]) for name in ("x_rows", "out_rows"))
        self._multiply(job, Pairs(ring_key(filled[0].ring), slots, x_rows, out_rows))


def staging_bytes(kernels: Sequence[FfnKernel]) -> int:
    """RAM of experts on their way through a GPU."""
    return N_STAGING * max((align_up(sum(kernel.raw_bytes), PAGE_BYTES) for kernel in kernels), default=0)
