"""Row kernels in plain numba for processors without the instructions of `interleaved`: AVX2, ARM and others.

Matrices are ggml rows as they lie. Of each row a block is unpacked to int8 and multiplied with all tokens of the tile; the loops
are written so that LLVM's vectorizer finds them. Activations are quantized as for the other kernels, so results agree with them
but for the order of sums. Block layouts are those of ggml-common.h, ggml 0.25.
"""

from __future__ import annotations

import functools
from typing import Any, Final

import gguf.quants
import numba as nb
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from localrun.offload.kernels.compiled import FAST, ROWS
from localrun.offload.kernels.lowlevel import (
    float_of_bits,
    load_f32,
    load_i8,
    load_i16,
    load_u8,
    load_u16,
    load_u32,
    load_u64,
    stack,
    store_f32,
    store_i8,
    store_u64,
)
from localrun.offload.kernels.panels import BLOCK32, SUM, SUPER256, Panel

_HALF_TO_FLOAT = np.float32(2.0**112)  # difference of the exponents' biases


@nb.njit(inline="always")
def float_of_half(bits: Any) -> Any:
    """F32 of an F16's bits, subnormals included; not for infinities. Processors without a conversion exist."""
    magnitude = float_of_bits(np.int32(bits & np.uint16(0x7FFF)) << np.int32(13)) * _HALF_TO_FLOAT
    return -magnitude if bits & np.uint16(0x8000) else magnitude


# -- dot products with the tokens of a tile ---------------------------------------------------------------------------


@nb.njit(fastmath=FAST, inline="always")
def _dot32(w: int, x: int) -> Any:
    total = np.int32(0)
    for i in range(32):
        total += np.int32(load_i8(w + i)) * np.int32(load_i8(x + i))
    return total


@nb.njit(fastmath=FAST, inline="always")
def _dot16(w: int, x: int) -> Any:
    total = np.int32(0)
    for i in range(16):
        total += np.int32(load_i8(w + i)) * np.int32(load_i8(x + i))
    return total


@nb.njit(fastmath=FAST)
def _add_block32(w: int, scale: Any, minimum: Any, record: int, nt: int, totals: int) -> None:
    """totals[t] += scale * w . x - minimum * sum(x), for one block of 32 of a BLOCK32 panel."""
    for t in range(nt):
        value = scale * load_f32(record + nt * 32 + t * 4) * np.float32(_dot32(w, record + t * 32))
        if minimum != np.float32(0):
            value -= minimum * load_f32(record + nt * 36 + t * 4)
        store_f32(totals + t * 4, load_f32(totals + t * 4) + value)


@nb.njit(fastmath=FAST)
def _add_super(w: int, scales: int, d: Any, minima: int, dmin: Any, record: int, nt: int, totals: int) -> None:
    """As above for 256 values with an int8 scale per 16 at `scales`, and int8 minima where dmin is not 0."""
    for t in range(nt):
        total, least = np.int32(0), np.int32(0)
        for part in range(16):
            total += np.int32(load_i8(scales + part)) * _dot16(w + part * 16, record + t * 256 + part * 16)
        value = d * np.float32(total)
        if dmin != np.float32(0):
            for part in range(16):
                place = (part & ~3) | (part & 1) << 1 | (part & 2) >> 1  # order of the panel's sums
                least += np.int32(load_i8(minima + part)) * np.int32(load_i16(record + nt * 264 + t * 32 + place * 2))
            value -= dmin * np.float32(least)
        store_f32(totals + t * 4, load_f32(totals + t * 4) + value * load_f32(record + nt * 256 + t * 4))


# -- one unit of one row per format: (block, record, tokens, totals, scratch of 320 bytes, table) ------------------------


@nb.njit(fastmath=FAST)
def _mxfp4(block: int, record: int, nt: int, totals: int, w: int, _table: int) -> None:
    for i in range(16):
        byte = load_u8(block + 1 + i)
        for half in range(2):
            code = np.int8(byte >> np.uint8(4)) if half else np.int8(byte & np.uint8(15))
            size = code & np.int8(7)  # 0 1 2 3 4 5 6 7 -> 0 1 2 3 4 6 8 12
            size += np.int8(size > np.int8(4)) + np.int8(size > np.int8(5)) + np.int8(3) * np.int8(size > np.int8(6))
            store_i8(w + half * 16 + i, -size if code > np.int8(7) else size)
    scale = float_of_bits(np.int32(load_u8(block)) << np.int32(23)) * np.float32(0.5)
    _add_block32(w, scale, np.float32(0), record, nt, totals)


@nb.njit(fastmath=FAST)
def _q8_0(block: int, record: int, nt: int, totals: int, _w: int, _table: int) -> None:
    _add_block32(block + 2, float_of_half(load_u16(block)), np.float32(0), record, nt, totals)


@nb.njit(fastmath=FAST)
def _six_bits(packed: int, block: int) -> tuple[Any, Any]:
    """Scale and minimum of block 0..7 from Q4_K's 12 bytes."""
    if block < 4:
        return load_u8(packed + block) & np.uint8(63), load_u8(packed + block + 4) & np.uint8(63)
    both, first, second = load_u8(packed + block + 4), load_u8(packed + block - 4), load_u8(packed + block)
    return (both & np.uint8(15)) | (first >> np.uint8(6)) << np.uint8(4), (both >> np.uint8(4)) | (
        second >> np.uint8(6)
    ) << np.uint8(4)


@nb.njit(fastmath=FAST)
def _q4_k(block: int, record: int, nt: int, totals: int, w: int, _table: int) -> None:
    d, dmin = float_of_half(load_u16(block)), float_of_half(load_u16(block + 2))
    for part in range(8):
        source, shift = block + 16 + part // 2 * 32, np.uint8(part % 2 * 4)
        for i in range(32):
            store_i8(w + i, np.int8(load_u8(source + i) >> shift & np.uint8(15)))
        scale, minimum = _six_bits(block + 4, part)
        _add_block32(w, d * np.float32(scale), dmin * np.float32(minimum), record + part * nt * 40, nt, totals)


@nb.njit(fastmath=FAST)
def _q5_k(block: int, record: int, nt: int, totals: int, w: int, _table: int) -> None:
    d, dmin = float_of_half(load_u16(block)), float_of_half(load_u16(block + 2))
    for part in range(8):
        source, shift, bit = block + 48 + part // 2 * 32, np.uint8(part % 2 * 4), np.uint8(part)
        for i in range(32):
            high = (load_u8(block + 16 + i) >> bit & np.uint8(1)) << np.uint8(4)
            store_i8(w + i, np.int8(load_u8(source + i) >> shift & np.uint8(15) | high))
        scale, minimum = _six_bits(block + 4, part)
        _add_block32(w, d * np.float32(scale), dmin * np.float32(minimum), record + part * nt * 40, nt, totals)


@nb.njit(fastmath=FAST)
def _q2_k(block: int, record: int, nt: int, totals: int, w: int, _table: int) -> None:
    for group in range(8):
        source, shift = block + 16 + group // 4 * 32, np.uint8(group % 4 * 2)
        for i in range(32):
            store_i8(w + group * 32 + i, np.int8(load_u8(source + i) >> shift & np.uint8(3)))
    for part in range(16):
        both = load_u8(block + part)
        store_i8(w + 256 + part, np.int8(both & np.uint8(15)))
        store_i8(w + 272 + part, np.int8(both >> np.uint8(4)))
    d, dmin = float_of_half(load_u16(block + 80)), float_of_half(load_u16(block + 82))
    _add_super(w, w + 256, d, w + 272, dmin, record, nt, totals)


@nb.njit(fastmath=FAST)
def _q3_k(block: int, record: int, nt: int, totals: int, w: int, _table: int) -> None:
    for group in range(8):
        source, shift, bit = block + 32 + group // 4 * 32, np.uint8(group % 4 * 2), np.uint8(group)
        for i in range(32):
            low = load_u8(source + i) >> shift & np.uint8(3)
            high = (load_u8(block + i) >> bit & np.uint8(1)) << np.uint8(2)
            store_i8(w + group * 32 + i, np.int8(low | high) - np.int8(4))
    for part in range(16):
        low = load_u8(block + 96 + part % 8) >> np.uint8(part // 8 * 4) & np.uint8(15)
        high = load_u8(block + 104 + part % 4) >> np.uint8(part // 4 * 2) & np.uint8(3)
        store_i8(w + 256 + part, np.int8(low | high << np.uint8(4)) - np.int8(32))
    _add_super(w, w + 256, float_of_half(load_u16(block + 108)), w, np.float32(0), record, nt, totals)


@nb.njit(fastmath=FAST)
def _q6_k(block: int, record: int, nt: int, totals: int, w: int, _table: int) -> None:
    for group in range(8):
        half, quarter = group // 4, group % 4
        low, shift = block + half * 64 + quarter % 2 * 32, np.uint8(quarter // 2 * 4)
        high, up = block + 128 + half * 32, np.uint8(quarter * 2)
        for i in range(32):
            value = load_u8(low + i) >> shift & np.uint8(15) | (load_u8(high + i) >> up & np.uint8(3)) << np.uint8(4)
            store_i8(w + group * 32 + i, np.int8(value) - np.int8(32))
    _add_super(w, block + 192, float_of_half(load_u16(block + 208)), w, np.float32(0), record, nt, totals)


@nb.njit(fastmath=FAST)
def _signed(grid: Any, sign_bits: Any, table: int) -> Any:
    """Eight bytes of a grid entry with the signs of a 7-bit index; no byte is 0, so that negation never carries."""
    mask = load_u64(table + sign_bits * 8)
    return (grid ^ mask) + (mask & np.uint64(0x0101010101010101))


@nb.njit(fastmath=FAST)
def _iq2_xxs(block: int, record: int, nt: int, totals: int, w: int, table: int) -> None:
    d = float_of_half(load_u16(block)) * np.float32(0.125)
    for part in range(8):
        source = block + 2 + part * 8
        signs = load_u32(source + 4)
        for i in range(4):
            grid = load_u64(table + 1024 + np.int64(load_u8(source + i)) * 8)
            store_u64(w + i * 8, _signed(grid, np.int64(signs >> np.uint32(7 * i) & np.uint32(127)), table))
        scale = d * np.float32(2 * np.int32(signs >> np.uint32(28)) + 1)
        _add_block32(w, scale, np.float32(0), record + part * nt * 40, nt, totals)


@nb.njit(fastmath=FAST)
def _iq3_xxs(block: int, record: int, nt: int, totals: int, w: int, table: int) -> None:
    d = float_of_half(load_u16(block)) * np.float32(0.25)
    for part in range(8):
        signs = load_u32(block + 66 + part * 4)
        for i in range(4):
            source = block + 2 + part * 8 + i * 2
            low = load_u32(table + 1024 + np.int64(load_u8(source)) * 4)
            high = load_u32(table + 1024 + np.int64(load_u8(source + 1)) * 4)
            grid = np.uint64(low) | np.uint64(high) << np.uint64(32)
            store_u64(w + i * 8, _signed(grid, np.int64(signs >> np.uint32(7 * i) & np.uint32(127)), table))
        scale = d * np.float32(2 * np.int32(signs >> np.uint32(28)) + 1)
        _add_block32(w, scale, np.float32(0), record + part * nt * 40, nt, totals)


_T = GGMLQuantizationType
MXFP4, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ2_XXS = (
    int(t) for t in (_T.MXFP4, _T.Q8_0, _T.Q2_K, _T.Q3_K, _T.Q4_K, _T.Q5_K, _T.Q6_K, _T.IQ2_XXS)
)
_UNITS: Final[dict[GGMLQuantizationType, tuple[int, int, Panel]]] = {
    _T.MXFP4: (32, 17, Panel(BLOCK32)),
    _T.Q8_0: (32, 34, Panel(BLOCK32)),
    _T.Q2_K: (256, 84, Panel(SUPER256)),
    _T.Q3_K: (256, 110, Panel(SUPER256)),
    _T.Q4_K: (256, 144, Panel(BLOCK32, SUM)),
    _T.Q5_K: (256, 176, Panel(BLOCK32, SUM)),
    _T.Q6_K: (256, 210, Panel(SUPER256)),
    _T.IQ2_XXS: (256, 66, Panel(BLOCK32)),
    _T.IQ3_XXS: (256, 98, Panel(BLOCK32)),
}
"""Elements and bytes of a block, and the activations that the type takes."""


@functools.cache
def _table(type_: GGMLQuantizationType) -> npt.NDArray[np.uint8]:
    """Masks of the 128 sign patterns (8 bytes each), then the grid."""
    grids = {_T.IQ2_XXS: gguf.quants.IQ2_XXS, _T.IQ3_XXS: gguf.quants.IQ3_XXS}
    if type_ not in grids:
        return np.zeros(1, np.uint8)
    grids[type_].init_grid()
    patterns = np.frombuffer(gguf.quants.IQ2_XXS.ksigns, np.uint8)
    masks = np.unpackbits(patterns[:, None], axis=1, bitorder="little") * np.uint8(255)
    return np.concatenate([masks.reshape(-1), np.asarray(grids[type_].grid).astype(np.uint8).reshape(-1)])


def supports(type_: GGMLQuantizationType) -> bool:
    return type_ in _UNITS


def generic_panel(type_: GGMLQuantizationType) -> Panel:
    return _UNITS[type_][2]


@functools.cache
def _rows_function(type_: GGMLQuantizationType) -> Any:
    kind, (elements, block_bytes, takes) = int(type_), _UNITS[type_]
    record_bytes = takes.unit_bytes * elements // takes.unit  # of a block, per token

    def rows(
        matrix: int, extra: int, row0: int, n_rows: int, n_in: int, panel: int, nt: int, out: int, out_stride: int
    ) -> None:
        w, totals = stack(320), stack(64)
        for r in range(n_rows):
            row = matrix + (row0 + r) * (n_in // elements) * block_bytes
            for t in range(nt):
                store_f32(totals + t * 4, np.float32(0))
            for i in range(n_in // elements):
                block, record = row + i * block_bytes, panel + i * nt * record_bytes
                # The branches on a constant: numba drops all but one, and compiled code stays in its cache, which it
                # would not if the function to call were a variable.
                if kind == MXFP4:
                    _mxfp4(block, record, nt, totals, w, extra)
                elif kind == Q8_0:
                    _q8_0(block, record, nt, totals, w, extra)
                elif kind == Q2_K:
                    _q2_k(block, record, nt, totals, w, extra)
                elif kind == Q3_K:
                    _q3_k(block, record, nt, totals, w, extra)
                elif kind == Q4_K:
                    _q4_k(block, record, nt, totals, w, extra)
                elif kind == Q5_K:
                    _q5_k(block, record, nt, totals, w, extra)
                elif kind == Q6_K:
                    _q6_k(block, record, nt, totals, w, extra)
                elif kind == IQ2_XXS:
                    _iq2_xxs(block, record, nt, totals, w, extra)
                else:
                    _iq3_xxs(block, record, nt, totals, w, extra)
            for t in range(nt):
                store_f32(out + t * out_stride + r * 4, load_f32(totals + t * 4))

    return nb.cfunc(ROWS, cache=True)(rows)


@functools.cache
def generic_rows(type_: GGMLQuantizationType) -> tuple[int, int]:
    """Addresses of the row kernel for ggml rows of this type, compiled on first use, and of its `extra`."""
    return int(_rows_function(type_).address), int(_table(type_).ctypes.data)
