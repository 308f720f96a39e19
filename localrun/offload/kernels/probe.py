"""Measures our kernels on this processor: with experts and dense matrices in the formats of the model to plan.

Takes half a second. The kernels run on memory filled with one byte, because times depend only on formats and shapes. Weights are
taken from all over a buffer larger than most caches, as in a real run.

A rate is what a fifth of the rounds exceed. The fastest round is an accident: what it reads may still be in a cache ([m] two
Zen 4 cores, 8-bit matrices: 61 GB/s once, 36 in the median, 31 inside tokens). The slow ones were interrupted by another program:
beside one busy process per core the median is a fifth of this, and what four fifths exceed a tenth.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Final

import numpy as np
from gguf import GGMLQuantizationType

from localrun.alignment import PAGE_BYTES, align_up
from localrun.offload.kernels.dense import DenseKernel
from localrun.offload.kernels.kernel import make_kernel
from localrun.offload.kernels.rates import FEW, MANY, CpuRates, ExpertRates
from localrun.offload.kernels.spec import FfnSpec
from localrun.pages import anonymous

_BUFFER_BYTES: Final = 256 << 20
_EXPERTS: Final = 6
"""Experts per call, as for a DeepSeek-V4 token."""

_ROUND_S: Final = 0.08
_SLOW_S: Final = 0.1
"""A call that takes longer tells enough."""

_UNDISTURBED: Final = 0.2
"""Share of rounds that count as undisturbed."""

_DENSE_SIZE: Final = 4096
_FILL: Final = 0x77


def probe_cpu(
    specs: Iterable[FfnSpec], *, n_threads: int, dense: GGMLQuantizationType = GGMLQuantizationType.Q8_0
) -> CpuRates:
    """Measures experts of these shapes and formats, and dense matrices in this format."""
    with anonymous(_BUFFER_BYTES) as memory:
        values = np.frombuffer(memory, np.uint8)
        values.fill(_FILL)
        base = values.ctypes.data
        del values
        n_bytes, row_s, batch_s = _dense(dense, base, n_threads)
        experts = {spec.types: _experts(spec, base, n_threads) for spec in dict.fromkeys(specs)}
    return CpuRates(
        dense_bytes_per_s=n_bytes / row_s,
        dense_macs_per_s=MANY * _DENSE_SIZE * _DENSE_SIZE / batch_s,
        experts=experts,
    )


def _dense(kind: GGMLQuantizationType, base: int, n_threads: int) -> tuple[int, float, float]:
    """Bytes of one matrix, its seconds with one row, and with a batch."""
    kernel = DenseKernel(kind, _DENSE_SIZE, _DENSE_SIZE, n_threads=n_threads)
    x = np.ones((MANY, _DENSE_SIZE), np.float32)
    out = np.empty_like(x)
    addresses = _addresses(base, kernel.packed_bytes)
    one = _seconds(lambda turn: kernel.run(addresses[turn % len(addresses)], x[:1], out[:1]))
    return kernel.raw_bytes, one, _seconds(lambda turn: kernel.run(addresses[turn % len(addresses)], x, out))


def _experts(spec: FfnSpec, base: int, n_threads: int) -> ExpertRates:
    kernel = make_kernel(spec, n_threads=n_threads)
    addresses = np.array(_addresses(base, kernel.slot_bytes), np.uint64)
    x = np.ones((MANY, spec.n_embd), np.float32)
    out = np.empty((_EXPERTS * MANY, spec.n_embd), np.float32)

    def call(turn: int, n_tokens: int) -> None:
        slots = addresses[(np.arange(_EXPERTS) + turn * _EXPERTS) % addresses.size]
        starts = np.arange(_EXPERTS + 1, dtype=np.int32) * np.int32(n_tokens)
        x_rows = np.tile(np.arange(n_tokens, dtype=np.int32), _EXPERTS)
        kernel.run(slots, starts, x_rows, np.arange(x_rows.size, dtype=np.int32), x, out)

    decode_s = _seconds(lambda turn: call(turn, 1)) / _EXPERTS
    if decode_s * _EXPERTS > _SLOW_S:  # bound by computing: a batch costs as much per token
        return ExpertRates(decode_s=decode_s, few_s=FEW * decode_s, many_s=MANY * decode_s)
    few_s = _seconds(lambda turn: call(turn, FEW)) / _EXPERTS
    many_s = few_s * MANY / FEW if few_s * _EXPERTS > _SLOW_S else _seconds(lambda turn: call(turn, MANY)) / _EXPERTS
    return ExpertRates(decode_s=decode_s, few_s=few_s, many_s=many_s)


def _addresses(base: int, size: int) -> list[int]:
    """Addresses of as many things of that size as the buffer holds."""
    stride = align_up(size, PAGE_BYTES)
    return [base + number * stride for number in range(max(1, _BUFFER_BYTES // stride))]


def _seconds(work: Callable[[int], object]) -> float:
    """Of an undisturbed round after the first, which may compile."""
    work(0)
    rounds: list[float] = []
    end, turn = time.perf_counter() + _ROUND_S, 0
    while turn == 0 or time.perf_counter() < end:
        turn += 1
        started = time.perf_counter()
        work(turn)
        rounds.append(time.perf_counter() - started)
    return float(np.quantile(rounds, _UNDISTURBED))
