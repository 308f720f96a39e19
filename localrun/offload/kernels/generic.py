"""Row kernels for processors without the instructions of `interleaved`, and for the grid formats where only those lack.

Matrices are plain ggml rows. Each block of a row is unpacked to int8 and multiplied with all tokens of the tile.
Activations are quantized as for the other kernels, so results agree with them but for the order of sums. Block layouts are those
of ggml-common.h, ggml 0.25.
"""

from __future__ import annotations

import functools
from typing import Any, Final

import gguf.quants
import numba as nb
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from localrun.kernel_cache import cached_cfunc
from localrun.offload.kernels.lowlevel import (
    ROWS,
    float_of_bits,
    load_i64,
    load_u8,
    load_u16,
    load_u32,
    stack,
    store_f32,
    store_i8,
)
from localrun.offload.kernels.panels import BLOCK32, SUM, SUPER256, Panel
from localrun.offload.kernels.portable import (
    add_bits,
    add_e2m1,
    add_grid,
    add_int8,
    add_super256,
    clear_totals,
    sum_of,
    unpack_bits,
)

_HALF_TO_FLOAT = np.float32(2.0**112)  # difference of the exponents' biases
_NONE = np.float32(0)


@nb.njit(inline="always")
def _half(address: int) -> Any:
    """F32 of the F16 at `address`, subnormals included, infinities not: processors without a conversion exist."""
    bits = load_u16(address)
    magnitude = float_of_bits(np.int32(bits & np.uint16(0x7FFF)) << np.int32(13)) * _HALF_TO_FLOAT
    return -magnitude if bits & np.uint16(0x8000) else magnitude


# One block of one row per format: (block, panel record, tokens of the tile, totals, scratch of 288 bytes, table).


@nb.njit
def _mxfp4(block: int, record: int, nt: int, totals: int, w: int, _table: int) -> None:
    scale = float_of_bits(np.int32(load_u8(block)) << np.int32(23)) * np.float32(0.5)
    add_e2m1(block + 1, scale, record, nt, totals)


@nb.njit
def _q8_0(block: int, record: int, nt: int, totals: int, _w: int, _table: int) -> None:
    add_int8(block + 2, _half(block), record, nt, totals)


@nb.njit
def _six_bits(packed: int, block: int) -> tuple[Any, Any]:
    """Scale and minimum of block 0..7 from Q4_K's 12 bytes."""
    if block < 4:
        return load_u8(packed + block) & np.uint8(63), load_u8(packed + block + 4) & np.uint8(63)
    both, first, second = load_u8(packed + block + 4), load_u8(packed + block - 4), load_u8(packed + block)
    return (both & np.uint8(15)) | (first >> np.uint8(6)) << np.uint8(4), (both >> np.uint8(4)) | (
        second >> np.uint8(6)
    ) << np.uint8(4)


@nb.njit
def _q4_k(block: int, record: int, nt: int, totals: int, w: int, _table: int) -> None:
    d, dmin = _half(block), _half(block + 2)
    for part in range(8):
        source = block + 16 + part // 2 * 32
        scale, minimum = _six_bits(block + 4, part)
        scale, minimum = d * np.float32(scale), dmin * np.float32(minimum)
        add_bits(source, part % 2 * 4, 15, source, 0, 0, 0, scale, minimum, record + part * nt * 40, nt, totals)


@nb.njit
def _q5_k(block: int, record: int, nt: int, totals: int, w: int, _table: int) -> None:
    d, dmin = _half(block), _half(block + 2)
    for part in range(8):
        source, high = block + 48 + part // 2 * 32, block + 16
        scale, minimum = _six_bits(block + 4, part)
        scale, minimum = d * np.float32(scale), dmin * np.float32(minimum)
        add_bits(source, part % 2 * 4, 15, high, part, 1, 4, scale, minimum, record + part * nt * 40, nt, totals)


@nb.njit
def _q2_k(block: int, record: int, nt: int, totals: int, w: int, _table: int) -> None:
    for group in range(8):
        source = block + 16 + group // 4 * 32
        unpack_bits(source, group % 4 * 2, 3, source, 0, 0, 0, 0, w + group * 32)
    for part in range(16):
        both, place = load_u8(block + part), (part & ~3) | (part & 1) << 1 | (part & 2) >> 1
        store_i8(w + 256 + part, np.int8(both & np.uint8(15)))
        store_i8(w + 272 + place, np.int8(both >> np.uint8(4)))
    add_super256(w, w + 256, _half(block + 80), w + 272, _half(block + 82), record, nt, totals)


@nb.njit
def _q3_k(block: int, record: int, nt: int, totals: int, w: int, _table: int) -> None:
    for group in range(8):
        unpack_bits(block + 32 + group // 4 * 32, group % 4 * 2, 3, block, group, 1, 2, 4, w + group * 32)
    for part in range(16):
        low = load_u8(block + 96 + part % 8) >> np.uint8(part // 8 * 4) & np.uint8(15)
        high = load_u8(block + 104 + part % 4) >> np.uint8(part // 4 * 2) & np.uint8(3)
        store_i8(w + 256 + part, np.int8(low | high << np.uint8(4)) - np.int8(32))
    add_super256(w, w + 256, _half(block + 108), w + 256, _NONE, record, nt, totals)


@nb.njit
def _q6_k(block: int, record: int, nt: int, totals: int, w: int, _table: int) -> None:
    for group in range(8):
        half, quarter = group // 4, group % 4
        low, high = block + half * 64 + quarter % 2 * 32, block + 128 + half * 32
        unpack_bits(low, quarter // 2 * 4, 15, high, quarter * 2, 3, 4, 32, w + group * 32)
    add_super256(w, block + 192, _half(block + 208), block + 192, _NONE, record, nt, totals)


@nb.njit
def _iq2_xxs(block: int, record: int, nt: int, totals: int, _w: int, table: int) -> None:
    d = _half(block) * np.float32(0.125)
    for part in range(8):
        source = block + 2 + part * 8
        signs = np.int64(load_u32(source + 4))
        add_grid(8, source, signs, table, d * np.float32(2 * (signs >> 28) + 1), record + part * nt * 40, nt, totals)


@nb.njit
def _iq3_xxs(block: int, record: int, nt: int, totals: int, _w: int, table: int) -> None:
    d = _half(block) * np.float32(0.25)
    for part in range(8):
        signs = np.int64(load_u32(block + 66 + part * 4))
        scale = d * np.float32(2 * (signs >> 28) + 1)
        add_grid(4, block + 2 + part * 8, signs, table, scale, record + part * nt * 40, nt, totals)


_T = GGMLQuantizationType
_FORMATS: Final[dict[GGMLQuantizationType, tuple[int, int, int, Panel]]] = {
    _T.MXFP4: (0, 32, 17, Panel(BLOCK32, SUM)),
    _T.Q8_0: (1, 32, 34, Panel(BLOCK32, SUM)),
    _T.Q2_K: (2, 256, 84, Panel(SUPER256)),
    _T.Q3_K: (3, 256, 110, Panel(SUPER256)),
    _T.Q4_K: (4, 256, 144, Panel(BLOCK32, SUM)),
    _T.Q5_K: (5, 256, 176, Panel(BLOCK32, SUM)),
    _T.Q6_K: (6, 256, 210, Panel(SUPER256)),
    _T.IQ2_XXS: (7, 256, 66, Panel(BLOCK32, SUM)),
    _T.IQ3_XXS: (8, 256, 98, Panel(BLOCK32, SUM)),
}
"""Number for `_add_block`, elements and bytes of a block, and the activations that the type takes."""


@nb.njit
def _add_block(kind: int, block: int, record: int, nt: int, totals: int, w: int, table: int) -> None:
    if kind == 0:
        _mxfp4(block, record, nt, totals, w, table)
    elif kind == 1:
        _q8_0(block, record, nt, totals, w, table)
    elif kind == 2:
        _q2_k(block, record, nt, totals, w, table)
    elif kind == 3:
        _q3_k(block, record, nt, totals, w, table)
    elif kind == 4:
        _q4_k(block, record, nt, totals, w, table)
    elif kind == 5:
        _q5_k(block, record, nt, totals, w, table)
    elif kind == 6:
        _q6_k(block, record, nt, totals, w, table)
    elif kind == 7:
        _iq2_xxs(block, record, nt, totals, w, table)
    else:
        _iq3_xxs(block, record, nt, totals, w, table)


@functools.cache
def _rows_function() -> Any:
    """One function for all types; compiled on first use."""

    def rows(
        matrix: int, extra: int, row0: int, n_rows: int, n_in: int, panel: int, nt: int, out: int, out_stride: int
    ) -> None:
        # extra: int64 number of the format, elements and bytes of a block, bytes of its panel records per token, table
        kind, elements, block_bytes, record_bytes = (
            load_i64(extra),
            load_i64(extra + 8),
            load_i64(extra + 16),
            load_i64(extra + 24),
        )
        w, totals = stack(320), stack(1024)
        for r in range(n_rows):
            row = matrix + (row0 + r) * (n_in // elements) * block_bytes
            clear_totals(totals, nt)
            for i in range(n_in // elements):
                _add_block(
                    kind, row + i * block_bytes, panel + i * nt * record_bytes, nt, totals, w, load_i64(extra + 32)
                )
            for t in range(nt):
                store_f32(out + t * out_stride + r * 4, sum_of(totals + t * 64))

    return cached_cfunc(ROWS)(rows)


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


@functools.cache
def _extra(type_: GGMLQuantizationType) -> npt.NDArray[np.int64]:
    kind, elements, block_bytes, panel = _FORMATS[type_]
    table = int(_table(type_).ctypes.data)  # kept alive by the cache
    return np.array([kind, elements, block_bytes, panel.unit_bytes * elements // panel.unit, table], np.int64)


def supports(type_: GGMLQuantizationType) -> bool:
    """Whether there is a generic 8-bit row kernel for this type."""
    return type_ in _FORMATS


def generic_panel(type_: GGMLQuantizationType) -> Panel:
    """The activations that its row kernel takes."""
    return _FORMATS[type_][3]


def generic_rows(type_: GGMLQuantizationType) -> tuple[int, int]:
    """Addresses of the row kernel for ggml rows and of its `extra` for this type."""
    return int(_rows_function().address), int(_extra(type_).ctypes.data)
