"""Experts in F32: weights of any ggml type are dequantized by ggml itself, a block of rows at a time, and multiplied in F32.

The reference that the quantized kernels are measured against, the arithmetic of `math="f32"`, and the way for types without a
kernel of their own. Slots hold ggml rows as they lie. Scratch is bounded: a block of rows per thread and the hidden values of
at most `_MAX_PAIRS` pairs, however many tokens come.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numba as nb
import numpy as np
import numpy.typing as npt

from localrun.offload.kernels.compiled import FAST
from localrun.offload.kernels.ggml_types import block_type
from localrun.offload.kernels.lowlevel import atomic_add, call_to_float, load_i32, load_i64, pointer, store_i64
from localrun.offload.kernels.spec import FfnSpec
from localrun.offload.kernels.workspace import workspace

_ROWS = 16  # rows dequantized at a time: 256 KiB at 4096 columns, inside a core's L2
_MAX_PAIRS = 256  # hidden values kept at once: 2 MiB at F = 2048


@nb.njit(fastmath=FAST, inline="always")
def _row(address: int, n: int) -> Any:
    return nb.carray(pointer(address), n, np.float32)


@nb.njit(fastmath=FAST)
def _dot(w: Any, x: Any, n: int) -> Any:
    total = np.float32(0)
    for i in range(n):
        total += w[i] * x[i]
    return total


@nb.njit(fastmath=FAST)
def _dequantize(to_float: int, source: int, row_bytes: int, n_rows: int, n_in: int, target: int) -> int:
    """Address of `n_rows` F32 rows: `target`, or the source itself where it is F32 already."""
    if to_float == 0:
        return source
    for r in range(n_rows):
        call_to_float(to_float, source + r * row_bytes, target + r * n_in * 4, n_in)
    return target


@nb.njit(fastmath=FAST)
def _gate_up_rows(w: Any, to_float: Any, row_bytes: Any, rows: Any, n_in: int, n_ff: int, scratch: int, p0: int, n_pairs: int,
                  x_rows: int, x: int, x_stride: int, hidden: int, limit: Any) -> None:  # fmt: skip
    r0, n_rows = rows
    gate = _dequantize(to_float[0], w[0] + r0 * row_bytes[0], row_bytes[0], n_rows, n_in, scratch)
    up = _dequantize(to_float[1], w[1] + r0 * row_bytes[1], row_bytes[1], n_rows, n_in, scratch + _ROWS * n_in * 4)
    for p in range(n_pairs):
        xv = _row(x + load_i32(x_rows + (p0 + p) * 4) * x_stride, n_in)
        h = _row(hidden + (p * n_ff + r0) * 4, n_rows)
        for r in range(n_rows):
            g = min(_dot(_row(gate + r * n_in * 4, n_in), xv, n_in), limit)
            u = max(-limit, min(_dot(_row(up + r * n_in * 4, n_in), xv, n_in), limit))
            h[r] = g / (np.float32(1) + np.exp(-g)) * u


@nb.njit(fastmath=FAST)
def _matrix_rows(w: int, to_float: int, row_bytes: int, rows: Any, n_in: int, scratch: int, p0: int, n_pairs: int,
                 x_rows: int, x: int, x_stride: int, out_rows: int, out: int, out_stride: int) -> None:  # fmt: skip
    """Rows of one matrix times pairs; `x_rows` 0 means that pair p reads row p."""
    r0, n_rows = rows
    matrix = _dequantize(to_float, w + r0 * row_bytes, row_bytes, n_rows, n_in, scratch)
    for p in range(n_pairs):
        x_row = load_i32(x_rows + (p0 + p) * 4) if x_rows else p
        xv = _row(x + x_row * x_stride, n_in)
        y = _row(out + load_i32(out_rows + (p0 + p) * 4) * out_stride + r0 * 4, n_rows)
        for r in range(n_rows):
            y[r] = _dot(_row(matrix + r * n_in * 4, n_in), xv, n_in)


@nb.njit(parallel=True, nogil=True, cache=True, fastmath=FAST)
def _run_ffn(n_threads: int, n_experts: int, slots: int, starts: int, x_rows: int, out_rows: int, x: int, x_stride: int,
             out: int, out_stride: int, to_float: Any, row_bytes: Any, n_embd: int, n_ff: int, limit: Any, hidden: int,
             scratch: int, scratch_stride: int, ticket: int) -> None:  # fmt: skip
    for e in range(n_experts):
        slot, end = load_i64(slots + e * 8), load_i32(starts + e * 4 + 4)
        w = (slot, slot + n_ff * row_bytes[0], slot + n_ff * (row_bytes[0] + row_bytes[1]))
        for p0 in range(load_i32(starts + e * 4), end, _MAX_PAIRS):
            n_pairs = min(_MAX_PAIRS, end - p0)
            store_i64(ticket, 0)
            for t in nb.prange(n_threads):
                r0 = atomic_add(ticket, _ROWS)
                while r0 < n_ff:
                    _gate_up_rows(w, to_float, row_bytes, (r0, min(_ROWS, n_ff - r0)), n_embd, n_ff, scratch + t * scratch_stride,
                                  p0, n_pairs, x_rows, x, x_stride, hidden, limit)  # fmt: skip
                    r0 = atomic_add(ticket, _ROWS)
            store_i64(ticket, 0)
            for t in nb.prange(n_threads):
                r0 = atomic_add(ticket, _ROWS)
                while r0 < n_embd:
                    _matrix_rows(w[2], to_float[2], row_bytes[2], (r0, min(_ROWS, n_embd - r0)), n_ff, scratch + t * scratch_stride,
                                 p0, n_pairs, 0, hidden, n_ff * 4, out_rows, out, out_stride)  # fmt: skip
                    r0 = atomic_add(ticket, _ROWS)


@nb.njit(parallel=True, nogil=True, cache=True, fastmath=FAST)
def _run_matrix(n_threads: int, n_experts: int, slots: int, starts: int, x_rows: int, out_rows: int, x: int, x_stride: int,
                out: int, out_stride: int, to_float: int, offset: int, row_bytes: int, n_in: int, n_out: int,
                scratch: int, scratch_stride: int, ticket: int) -> None:  # fmt: skip
    for e in range(n_experts):
        w, p0 = load_i64(slots + e * 8) + offset, load_i32(starts + e * 4)
        n_pairs = load_i32(starts + e * 4 + 4) - p0
        store_i64(ticket, 0)
        for t in nb.prange(n_threads):
            r0 = atomic_add(ticket, _ROWS)
            while r0 < n_out:
                _matrix_rows(w, to_float, row_bytes, (r0, min(_ROWS, n_out - r0)), n_in, scratch + t * scratch_stride,
                             p0, n_pairs, x_rows, x, x_stride, out_rows, out, out_stride)  # fmt: skip
                r0 = atomic_add(ticket, _ROWS)


class ExactKernel:
    """`FfnKernel` in F32 for every ggml type; see `spec.FfnKernel` for the contract."""

    raw_is_packed = True

    def __init__(self, spec: FfnSpec, *, n_threads: int) -> None:
        self.spec = spec
        self.n_threads = n_threads
        self.name = "exact-f32"
        blocks = tuple(block_type(t) for t in spec.types)
        self._to_float = tuple(b.to_float for b in blocks)
        self._row_bytes = tuple(
            b.row_bytes(n) for b, n in zip(blocks, (spec.n_embd, spec.n_embd, spec.n_ff), strict=True)
        )
        gate, up, down = self._row_bytes
        self._offsets = (0, spec.n_ff * gate, spec.n_ff * (gate + up))
        self.raw_bytes = spec.n_ff * (gate + up) + spec.n_embd * down
        self.slot_bytes = -(-self.raw_bytes // 64) * 64
        self._hidden_bytes = _MAX_PAIRS * spec.n_ff * 4
        self._block_bytes = 2 * _ROWS * max(spec.n_embd, spec.n_ff) * 4

    def pack(self, raw: npt.NDArray[np.uint8], slot: int) -> None:
        assert raw.size == self.raw_bytes
        ctypes.memmove(slot, raw.ctypes.data, raw.size)

    def run(
        self,
        slots: npt.NDArray[np.uint64],
        starts: npt.NDArray[np.int32],
        x_rows: npt.NDArray[np.int32],
        out_rows: npt.NDArray[np.int32],
        x: npt.NDArray[np.float32],
        out: npt.NDArray[np.float32],
    ) -> None:
        nb.set_num_threads(self.n_threads)
        spec, scratch = self.spec, workspace(64 + self._hidden_bytes + self.n_threads * self._block_bytes)
        _run_ffn(
            self.n_threads, slots.size, slots.ctypes.data, starts.ctypes.data, x_rows.ctypes.data, out_rows.ctypes.data,
            x.ctypes.data, x.strides[0], out.ctypes.data, out.strides[0], self._to_float, self._row_bytes, spec.n_embd, spec.n_ff,
            np.float32(spec.limit), scratch + 64, scratch + 64 + self._hidden_bytes, self._block_bytes, scratch,
        )  # fmt: skip

    def project(
        self,
        which: int,
        slots: npt.NDArray[np.uint64],
        starts: npt.NDArray[np.int32],
        x_rows: npt.NDArray[np.int32],
        out_rows: npt.NDArray[np.int32],
        x: npt.NDArray[np.float32],
        out: npt.NDArray[np.float32],
    ) -> None:
        nb.set_num_threads(self.n_threads)
        spec, scratch = self.spec, workspace(64 + self.n_threads * self._block_bytes)
        n_out, n_in = (spec.n_embd, spec.n_ff) if which == 2 else (spec.n_ff, spec.n_embd)
        _run_matrix(
            self.n_threads, slots.size, slots.ctypes.data, starts.ctypes.data, x_rows.ctypes.data, out_rows.ctypes.data,
            x.ctypes.data, x.strides[0], out.ctypes.data, out.strides[0], self._to_float[which], self._offsets[which],
            self._row_bytes[which], n_in, n_out, scratch + 64, self._block_bytes, scratch,
        )  # fmt: skip
