"""Measures at load, with the model's formats, whether streaming a prompt's experts through a GPU pays off.

Runs a synthetic expert on the CPU, through the GPU's ring and thread, and on both at once, as `stream.py` will.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable

import numpy as np

from localrun.alignment import LINE_BYTES, align_up
from localrun.errors import GpuMemoryError, LocalrunError
from localrun.ggml.devices import GpuDevice
from localrun.offload.gpu.slots import GpuSlots
from localrun.offload.gpu.stream import (
    LEAST_GAIN,
    MEASURED_PAIRS,
    RING_SLOTS,
    Cost,
    GpuThread,
    Passing,
    StreamCosts,
    StreamJob,
    choose,
    ring_key,
)
from localrun.offload.kernels import FfnKernel

log = logging.getLogger(__name__)

_FILL = 0x11
"""Fill byte for synthetic weights: no NaN and, unlike random scales, no denormals, which are slow on a CPU-backed device."""


def unpackers(n_threads: int) -> int:
    """Threads that unpack: one makes 4 to 7 GB/s of ggml rows [m: one AVX-512 core], a PCIe link takes up to 25."""
    return max(1, min(4, n_threads // 4))


def measure(device: GpuDevice, kernel: FfnKernel, n_unpackers: int) -> StreamCosts | None:
    """Times of one format's experts on this CPU and through this GPU's ring: takes a few tenths of a second for real sizes.

    Returns:
        None if streaming does not make a synthetic call of many experts and tokens `LEAST_GAIN` times as fast, with both sides
        working; also, with a warning, if the device can't be measured.
    """
    thread: GpuThread | None = None
    slots: GpuSlots | None = None
    key = ring_key(0)
    try:
        slots = GpuSlots(device, {key: RING_SLOTS}, {key: kernel.spec}, 1 << 62)
        if not slots.banks:
            raise GpuMemoryError("out of memory")
        thread = GpuThread(slots, [kernel], None, n_unpackers=n_unpackers)
        return _costs(_Bench(kernel, thread))
    except LocalrunError as error:
        log.warning("%s: streaming was not measured: %s", device.name, error)
        return None
    finally:
        if thread is not None:
            thread.close()
        if slots is not None:
            slots.close()


def _costs(bench: _Bench) -> StreamCosts | None:
    """The times of `measure`, or None."""
    few, many = MEASURED_PAIRS
    cpu = _line(few, bench.cpu(RING_SLOTS, few) / RING_SLOTS, many, bench.cpu(RING_SLOTS, many) / RING_SLOTS)
    bench.gpu(1, 1)  # makes graphs
    # Where the GPU takes r times as long for an expert as the CPU, sharing them out gains 1/r: a slow device is not asked for more.
    if bench.gpu(1, many) > (cpu.expert_s + cpu.pair_s * many) / (LEAST_GAIN - 1):
        return None
    gpu = _line(few, bench.gpu(RING_SLOTS, few) / RING_SLOTS, many, bench.gpu(RING_SLOTS, many) / RING_SLOTS)
    n = 2 * RING_SLOTS
    cpu_s, gpu_s = (cost.of(np.full(n, many, np.int32)) for cost in (cpu, gpu))
    n_gpu = choose(cpu_s, gpu_s).size
    if n_gpu == 0:
        return None
    planned_s = max(float(gpu_s[:n_gpu].sum()), float(cpu_s[n_gpu:].sum()))
    slowdown = max(1.0, bench.both(n - n_gpu, n_gpu, many) / planned_s)
    if choose(cpu_s, gpu_s, slowdown=slowdown).size == 0:
        return None
    return StreamCosts(cpu=cpu, gpu=gpu, unpack_s=bench.unpack(), slowdown=slowdown)


def _line(x0: int, y0: float, x1: int, y1: float) -> Cost:
    """Through two measurements, `x` pairs and `y` seconds; neither part is negative."""
    pair_s = max(0.0, (y1 - y0) / (x1 - x0))
    return Cost(max(0.0, y1 - pair_s * x1), pair_s)


class _Bench:
    """Made-up calls: one expert whose bytes are all alike, used again and again. Its methods give seconds."""

    def __init__(self, kernel: FfnKernel, thread: GpuThread) -> None:
        self._kernel, self._thread = kernel, thread
        raw_bytes = sum(kernel.raw_bytes)
        rng = np.random.default_rng(0)
        self._packed = np.zeros(kernel.slot_bytes + 64, np.uint8)
        self._address = align_up(self._packed.ctypes.data, LINE_BYTES)
        kernel.pack(np.full(raw_bytes, _FILL, np.uint8), self._address)
        self._raw = np.zeros(raw_bytes, np.uint8)
        n = 2 * RING_SLOTS * MEASURED_PAIRS[-1]
        self._x = rng.standard_normal((n, kernel.spec.n_embd), np.float32)
        self._out = np.zeros_like(self._x)

    def cpu(self, n_experts: int, n_pairs: int) -> float:
        return _best(lambda: self._run_cpu(n_experts, n_pairs))

    def gpu(self, n_experts: int, n_pairs: int) -> float:
        return _best(lambda: self._start_gpu(n_experts, n_pairs)())

    def both(self, n_cpu: int, n_gpu: int, n_pairs: int) -> float:
        def run() -> None:
            wait = self._start_gpu(n_gpu, n_pairs)
            self._run_cpu(n_cpu, n_pairs, first=n_gpu * n_pairs)
            wait()

        return _best(run)

    def unpack(self) -> float:
        return _best(lambda: self._kernel.unpack(self._address, self._raw))

    def _run_cpu(self, n_experts: int, n_pairs: int, first: int = 0) -> None:
        if n_experts:
            rows = np.arange(first, first + n_experts * n_pairs, dtype=np.int32)
            starts = np.arange(n_experts + 1, dtype=np.int32) * np.int32(n_pairs)
            addresses = np.full(n_experts, self._address, np.uint64)
            self._kernel.run(addresses, starts, rows, rows, self._x, self._out)

    def _start_gpu(self, n_experts: int, n_pairs: int) -> Callable[[], None]:
        rows = np.arange(n_experts * n_pairs, dtype=np.int32).reshape(n_experts, n_pairs)
        passing = [Passing(0, 0, i, 0, self._address, rows[i], rows[i]) for i in range(n_experts)]
        job = StreamJob(self._x, self._out, passing=passing)
        self._thread.submit(job)

        def wait() -> None:
            job.done.wait()
            if job.error is not None:
                raise job.error

        return wait


def _best(run: Callable[[], None]) -> float:
    """Seconds of the fastest of up to three runs within a tenth of a second; the first one may include setup."""
    best, end = math.inf, time.perf_counter() + 0.1
    for _ in range(3):
        started = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - started)
        if time.perf_counter() > end:
            break
    return best
