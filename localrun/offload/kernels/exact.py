"""Row kernel in F32 for every ggml type: weights are dequantized by ggml itself and multiplied in F32.

The reference for the quantized kernels, the arithmetic of `math="f32"`, and the fallback for types without a dedicated kernel.
Matrices are plain ggml rows. Works on any processor: the vector code is plain LLVM.
"""

from __future__ import annotations

import functools
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType
from numba import types
from numba.extending import intrinsic

from localrun.ggml.types import block_type
from localrun.kernel_cache import cached_cfunc
from localrun.offload.kernels.lowlevel import ROWS, blocks_of, call_3, load_f32, load_i64, rounded_up, stack, store_f32
from localrun.offload.kernels.simd import FLOATS, HALF_WORDS, INTS, Simd

BF16_UNIT: Final = 32
"""Rows of BF16 in whole units of so many elements are multiplied where they are."""


@intrinsic
def dot(_typing: Any, weights: Any, record: Any, record_bytes: Any, n_units: Any) -> Any:
    """Sum of products of 32 * n_units F32 weights with one token's FLOAT32 records."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        s = Simd(builder)
        weights, record, record_bytes, n_units = args
        weights, record = s.pointer(weights), s.pointer(record)

        def unit(i: Any, totals: list[Any]) -> list[Any]:
            w, x = s.at(weights, i, 128), builder.gep(record, [builder.mul(i, record_bytes)])
            return [
                s.fma(s.load(w, 64 * k, FLOATS), s.load(x, 64 * k, FLOATS), total) for k, total in enumerate(totals)
            ]

        low, high = s.loop(n_units, [s.floats(0.0)] * 2, unit)
        return s.sum_floats(builder.fadd(low, high))

    return types.float32(*[types.intp] * 4), codegen


@cached_cfunc(ROWS)
def _exact_rows(
    matrix: int, extra: int, row0: int, n_rows: int, n_in: int, panel: int, nt: int, out: int, out_stride: int
) -> None:
    """extra: int64 to_float, block elements, block bytes."""
    to_float, block_elements, block_bytes = load_i64(extra), load_i64(extra + 8), load_i64(extra + 16)
    weights = stack(2048)
    for r in range(n_rows):
        row = matrix + (row0 + r) * (n_in // block_elements * block_bytes)
        for t in range(nt):
            store_f32(out + t * out_stride + r * 4, np.float32(0))
        for first in range(0, n_in, 512):
            n = min(512, n_in - first)
            source = row + first // block_elements * block_bytes
            if to_float:
                call_3(to_float, source, weights, n)
            else:
                for i in range(n):
                    store_f32(weights + i * 4, load_f32(source + i * 4))
            for i in range(n, rounded_up(n, 32)):
                store_f32(weights + i * 4, np.float32(0))
            for t in range(nt):
                target = out + t * out_stride + r * 4
                record = panel + (first // 32 * nt + t) * 128
                store_f32(target, load_f32(target) + dot(weights, record, nt * 128, blocks_of(n, 32)))


@intrinsic
def dot_bf16(_typing: Any, weights: Any, record: Any, record_bytes: Any, n_units: Any) -> Any:
    """Sum of products of 32 * n_units BF16 weights with one token's FLOAT32 records, in F32."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        s = Simd(builder)
        weights, record, record_bytes, n_units = args
        weights, record = s.pointer(weights), s.pointer(record)

        def floats(pointer: Any, offset: int) -> Any:
            """16 BF16 values: the upper halves of F32 ones."""
            words = builder.zext(s.load(pointer, offset, HALF_WORDS), INTS)
            return builder.bitcast(s.shift_left(words, 16), FLOATS)

        def unit(i: Any, totals: list[Any]) -> list[Any]:
            w, x = s.at(weights, i, 64), builder.gep(record, [builder.mul(i, record_bytes)])
            return [s.fma(floats(w, 32 * k), s.load(x, 64 * k, FLOATS), total) for k, total in enumerate(totals)]

        low, high = s.loop(n_units, [s.floats(0.0)] * 2, unit)
        return s.sum_floats(builder.fadd(low, high))

    return types.float32(*[types.intp] * 4), codegen


@cached_cfunc(ROWS)
def _bf16_rows(
    matrix: int, _extra: int, row0: int, n_rows: int, n_in: int, panel: int, nt: int, out: int, out_stride: int
) -> None:
    """As `_exact_rows`, reading the weights once and in place; n_in is a multiple of 32."""
    for r in range(n_rows):
        row = matrix + (row0 + r) * n_in * 2
        for t in range(nt):
            store_f32(out + t * out_stride + r * 4, dot_bf16(row, panel + t * 128, nt * 128, n_in // 32))


@functools.cache
def _description(type_: GGMLQuantizationType) -> npt.NDArray[np.int64]:
    block = block_type(type_)
    return np.array([block.to_float, block.block_elements, block.block_bytes], np.int64)


def exact_rows(type_: GGMLQuantizationType, n_in: int) -> tuple[int, int]:
    """Addresses of the row kernel and of its `extra` for rows of `n_in` elements of a type."""
    if type_ == GGMLQuantizationType.BF16 and n_in % BF16_UNIT == 0:
        return int(_bf16_rows.address), 0
    return int(_exact_rows.address), int(_description(type_).ctypes.data)
