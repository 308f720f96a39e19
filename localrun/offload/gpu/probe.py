"""Measures everything a plan needs to know about a GPU: calls, experts, dense matrices, small operations.

It measures under real conditions: experts go through the expert path's slots and graphs, for one token (memory-bound) and a
batch (compute-bound), including link and hand-over. The dense model is represented by a chain of quantized matrices, and
launch-bound operations by a chain of normalizations. A device on another machine (RPC) is measured the same way, and a "GPU"
that shares our memory or cores is detected by running both at once.

Nothing is cached: the probe takes less time than loading a model onto the device, and a device named by an address may be a
different one tomorrow.
"""

from __future__ import annotations

import logging
import math
import os
import statistics
import threading
import time
from collections.abc import Callable
from typing import Final

import numpy as np
from gguf import GGMLQuantizationType

from localrun.errors import GpuMemoryError, LocalrunError
from localrun.ggml import structures as ggml
from localrun.ggml.devices import GpuDevice
from localrun.ggml.library import library
from localrun.offload.cache.drive_probe import read_memory
from localrun.offload.gpu.graphs import MAX_PAIRS
from localrun.offload.gpu.rates import GpuRates
from localrun.offload.gpu.slots import GpuSlots, scratch_bytes
from localrun.offload.kernels import FfnSpec

log = logging.getLogger(__name__)

_T: Final = GGMLQuantizationType.MXFP4
_SPEC: Final = FfnSpec((_T, _T, _T), 4096, 2048, math.inf)
_SLOTS: Final = 8
_SMALL: Final = FfnSpec((_T, _T, _T), 256, 256, math.inf)
"""A minimal expert, to measure the overhead of a call."""

_DENSE_TYPE: Final = GGMLQuantizationType.Q8_0
_DENSE_MATRICES: Final = 8
DENSE_ROWS: Final = 512
"""Rows of the largest dense batch."""

_NORMS: Final = 64
_BATCH_NORMS: Final = 4
_ROUND_S: Final = 0.06
"""As many rounds as fit into this make a figure; a slow device gets one or two."""

_FILL: Final = 0x77
"""Fill byte for weights: gives normal numbers and products in all quantized formats. Memory that was never written may not be
backed at all."""


def probe_gpu(device: GpuDevice, spec: FfnSpec = _SPEC) -> GpuRates | None:
    """Measures a device, using 350 MB of its memory and up to about a second; None, with a warning, if that fails.

    Args:
        spec: shape and formats of the experts; the dense matrices have the same width.
    """
    try:
        with _Experts(device, spec) as experts, _Dense(device, spec.n_embd) as dense:
            latency_s = _seconds(lambda: experts.call(1, small=True))
            decode_s = _seconds(lambda: experts.call(_SLOTS))
            n_pairs, batch_s = _largest(experts.call, MAX_PAIRS)
            n_rows, rows_s = _largest(dense.batch, DENSE_ROWS)
            call_bytes = _SLOTS * experts.expert_bytes
            return GpuRates(
                latency_s=latency_s,
                decode_bytes_per_s=call_bytes / _less(decode_s, latency_s),
                batch_macs_per_s=n_pairs * 3 * spec.n_embd * spec.n_ff / _less(batch_s, latency_s),
                dense_bytes_per_s=dense.n_bytes / _less(_seconds(dense.row), latency_s),
                dense_macs_per_s=n_rows * spec.n_embd**2 / _less(rows_s, latency_s),
                node_s=_less(_seconds(dense.norms), latency_s) / _NORMS,
                value_s=_less(_seconds(dense.batch_norms), latency_s) / (_BATCH_NORMS * DENSE_ROWS * spec.n_embd),
                overlap=_overlap(lambda: experts.call(_SLOTS), decode_s),
            )
    except LocalrunError as error:
        log.warning("%s: not measured: %s", device.name, error)
        return None


def _seconds(work: Callable[[], object]) -> float:
    """Of a usual round: the median of the later half of them. The first ones compile, allocate and find the device asleep."""
    times: list[float] = []
    end = time.perf_counter() + _ROUND_S
    while not times or time.perf_counter() < end:
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times[len(times) // 2 :])


def _largest(work: Callable[[int], object], most: int) -> tuple[int, float]:
    """Items of the largest batch that a slow device does in time, an eighth of `most` or all, and its seconds."""
    few, few_s = most // 8, _seconds(lambda: work(most // 8))
    return (few, few_s) if few_s > _ROUND_S / 4 else (most, _seconds(lambda: work(most)))


def _less(total_s: float, latency_s: float) -> float:
    """Time of the work alone; where the call is nearly everything, a fifth of it is taken for work."""
    return max(total_s - latency_s, 0.2 * total_s)


def _overlap(call: Callable[[], object], call_s: float) -> float:
    """How much of the shorter of two equal works, the device's and the CPU's reading of RAM, disappears when both run."""
    n_calls = max(1, round(0.03 / call_s))
    n_threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    values = np.ones((64 << 20) // 8, np.int64)
    slices = np.array_split(values, n_threads)
    rounds = 1

    def cpu() -> list[threading.Thread]:
        threads = [threading.Thread(target=read_memory, args=(part, rounds)) for part in slices]
        for thread in threads:
            thread.start()
        return threads

    def seconds(*, device: bool, reading: bool) -> float:
        started = time.perf_counter()
        threads = cpu() if reading else []
        for _ in range(n_calls if device else 0):
            call()
        for thread in threads:
            thread.join()
        return time.perf_counter() - started

    seconds(device=False, reading=True)
    rounds = max(1, round(n_calls * call_s / seconds(device=False, reading=True)))
    # Alternating, so a busy moment of the machine spoils one of each.
    runs = [
        [seconds(device=True, reading=False), seconds(device=False, reading=True), seconds(device=True, reading=True)]
        for _ in range(3)
    ]
    alone, reading, together = (statistics.median(times) for times in zip(*runs, strict=True))
    return float(min(1.0, max(0.0, (alone + reading - together) / min(alone, reading))))


class _Experts:
    """A few experts in slots on the device, and calls of the expert path with them. A context manager."""

    def __init__(self, device: GpuDevice, spec: FfnSpec) -> None:
        specs = {(0, 0): spec, (1, 0): _SMALL}
        self._spec = spec
        self._slots = GpuSlots(device, {(0, 0): _SLOTS, (1, 0): 1}, specs, (1 << 30) + scratch_bytes(spec))
        if len(self._slots.banks) < len(specs):
            self._slots.close()
            raise GpuMemoryError(f"{device.name}: no memory to measure with")
        lib = library()
        for bank in self._slots.banks.values():
            lib.ggml_backend_buffer_clear(ggml.Tensor.from_address(bank.tensors[0]).buffer, _FILL)
        self._row_bytes = self._slots.banks[0, 0].row_bytes
        self.expert_bytes = sum(self._row_bytes)
        self._x = {size: np.ones((MAX_PAIRS, size), np.float32) for size in (spec.n_embd, _SMALL.n_embd)}

    def call(self, n_pairs: int, *, small: bool = False) -> None:
        """As many (token, expert) pairs, evenly over the slots, there and back."""
        spec = _SMALL if small else self._spec
        slots = np.arange(n_pairs, dtype=np.int32) % (1 if small else _SLOTS)
        self._slots.start((1, 0) if small else (0, 0), slots, self._x[spec.n_embd][:n_pairs])
        self._slots.finish()

    def __enter__(self) -> _Experts:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._slots.close()


class _Dense:
    """Graphs like those of a dense model. Owns a backend, a context and a buffer; a context manager.

    Raises:
        LocalrunError: out of memory there, or an unsupported operation.
    """

    def __init__(self, device: GpuDevice, n: int) -> None:
        self._device, self._lib = device, library()
        lib, f32 = self._lib, 0
        n_tensors = 2 * _DENSE_MATRICES + _NORMS + _BATCH_NORMS + 8
        size = n_tensors * lib.ggml_tensor_overhead() + 5 * lib.ggml_graph_overhead_custom(n_tensors, False)
        self._buffer = 0
        self._backend = lib.ggml_backend_dev_init(device.address, None)
        self._context = int(lib.ggml_init(ggml.InitParams(size + 4096, None, True)))
        try:
            context = self._context
            matrices = [lib.ggml_new_tensor_2d(context, int(_DENSE_TYPE), n, n) for _ in range(_DENSE_MATRICES)]
            row = lib.ggml_new_tensor_2d(context, f32, n, 1)
            batches = {
                count: lib.ggml_mul_mat(context, matrices[0], lib.ggml_new_tensor_2d(context, f32, n, count))
                for count in (DENSE_ROWS // 8, DENSE_ROWS)
            }
            products = [lib.ggml_mul_mat(context, matrix, row) for matrix in matrices]
            norm = row
            for _ in range(_NORMS):
                norm = lib.ggml_rms_norm(context, norm, 1e-6)
            many = lib.ggml_new_tensor_2d(context, f32, n, DENSE_ROWS)
            for _ in range(_BATCH_NORMS):
                many = lib.ggml_rms_norm(context, many, 1e-6)
            self._row, self._norms, self._batch_norms = (self._graph(ends) for ends in (products, [norm], [many]))
            self._batches = {count: self._graph([product]) for count, product in batches.items()}
            self._ends = {self._row: products[-1], self._norms: norm, self._batch_norms: many}
            self._ends.update((self._batches[count], product) for count, product in batches.items())
            self._result = np.empty(1024, np.float32)
            self.n_bytes = _DENSE_MATRICES * int(lib.ggml_nbytes(matrices[0]))
            self._fetched = min(4096, 4 * n)
            kind = lib.ggml_backend_dev_buffer_type(device.address)
            self._buffer = lib.ggml_backend_alloc_ctx_tensors_from_buft(context, kind)
            if not self._backend or not self._buffer:
                raise LocalrunError(f"{device.name}: no memory for a measurement")
            lib.ggml_backend_buffer_clear(self._buffer, _FILL)
        except BaseException:
            self.__exit__()
            raise

    def row(self) -> None:
        """All matrices with one row."""
        self._run(self._row)

    def batch(self, n_rows: int) -> None:
        """One matrix with a batch."""
        self._run(self._batches[n_rows])

    def norms(self) -> None:
        """A chain of small operations."""
        self._run(self._norms)

    def batch_norms(self) -> None:
        """The same with a batch of rows, fewer of them."""
        self._run(self._batch_norms)

    def _graph(self, ends: list[int]) -> int:
        lib = self._lib
        graph = int(lib.ggml_new_graph_custom(self._context, _DENSE_MATRICES + _NORMS + 4, False))
        for end in ends:
            lib.ggml_build_forward_expand(graph, end)
        for index in range(lib.ggml_graph_n_nodes(graph)):
            if not lib.ggml_backend_dev_supports_op(self._device.address, lib.ggml_graph_node(graph, index)):
                raise LocalrunError(f"{self._device.name} can't multiply {_DENSE_TYPE.name} matrices")
        return graph

    def _run(self, graph: int) -> None:
        if self._lib.ggml_backend_graph_compute_async(self._backend, graph) != 0:
            raise LocalrunError(f"{self._device.name}: computing failed")
        self._lib.ggml_backend_synchronize(self._backend)
        # Some backends only promise to have computed; fetching a row makes sure, and belongs to a call.
        self._lib.ggml_backend_tensor_get(self._ends[graph], self._result.ctypes.data, 0, self._fetched)

    def __enter__(self) -> _Dense:
        return self

    def __exit__(self, *exc_info: object) -> None:
        lib = self._lib
        if self._buffer:
            lib.ggml_backend_buffer_free(self._buffer)
        lib.ggml_free(self._context)
        if self._backend:
            lib.ggml_backend_free(self._backend)
        self._backend = self._buffer = 0
