"""Matrix rows times token tiles on interleaved slots, and packing into them: the AVX-512 kernels as C functions.

A *row kernel* is a C function that multiplies some rows of one matrix with one tile of tokens (signature `ROWS`); the driver
in `tasks` calls it by address, so that any combination of types works without compiling anything for it.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any, Final

import numba as nb
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType
from numba import types
from numba.extending import intrinsic

from localrun.offload.kernels import compiled as _compiled  # noqa: F401  sets the cache folder
from localrun.offload.kernels.formats import FORMATS, SIGNS, XOR, Tile
from localrun.offload.kernels.lowlevel import load_i64, load_u8, load_u16, load_u32, store_u8, store_u16, store_u32
from localrun.offload.kernels.simd import I64, Simd

ROWS: Final = "void(intp, intp, intp, intp, intp, intp, intp, intp, intp)"
"""matrix, extra, first row, rows, row length, panel, tokens of the tile, out, out's bytes per token; first row is a multiple of 16.

`out` receives rows up to the next multiple of 16."""

_AHEAD: Final = 4096
"""Bytes from the unit in work to the one prefetched. [m] One core reads MXFP4 at 0.70 of plain reading without, 0.98 with."""

TILE_SIZES: Final = (1, 2, 4, 8, 12, 16)


@intrinsic
def _group_times_tile(_typing: Any, type_name: Any, n_tokens: Any, meta: Any, body: Any, n_units: Any, panel: Any, out: Any,
                      out_stride: Any) -> Any:  # fmt: skip
    """16 rows times a tile; `type_name` and `n_tokens` are compile-time constants, n_units at least 1."""
    if not isinstance(type_name, types.StringLiteral) or not isinstance(n_tokens, types.IntegerLiteral):
        return None
    format_ = FORMATS[GGMLQuantizationType[type_name.literal_value]]
    nt, kind = n_tokens.literal_value, format_.panel.kind

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        s = Simd(builder)
        meta, body, n_units, panel, out, out_stride = args[2:]
        meta, body, panel = s.pointer(meta), s.pointer(body), s.pointer(panel)
        records_per_unit = format_.unit // format_.panel.unit

        def unit(i: Any, totals: list[Any]) -> list[Any]:
            for line in range(0, format_.body_bytes, 64):
                s.prefetch(s.at(body, i, format_.body_bytes), _AHEAD + line)
            tile = Tile(s, panel, nt, kind).next(builder.mul(i, I64(records_per_unit)), kind)
            return format_.step(s, s.at(meta, i, format_.meta_bytes), s.at(body, i, format_.body_bytes), tile, totals)

        totals = s.loop(n_units, [s.floats(0.0)] * nt, unit)
        for t, total in enumerate(totals):
            s.store(total, s.pointer(out, builder.mul(out_stride, I64(t))))
        return context.get_dummy_value()

    return types.void(type_name, n_tokens, *[types.intp] * 6), codegen


@functools.cache
def rows_function(type_: GGMLQuantizationType) -> Any:
    """The row kernel for interleaved matrices of this type, compiled on first use."""
    format_ = FORMATS[type_]
    name, unit, meta_bytes, body_bytes = type_.name, format_.unit, format_.meta_bytes, format_.body_bytes

    def rows(
        matrix: int, extra: int, row0: int, n_rows: int, n_in: int, panel: int, nt: int, out: int, out_stride: int
    ) -> None:
        n_units = (n_in + unit - 1) // unit
        metas = (n_units * meta_bytes + 63) // 64 * 64
        group_bytes = metas + n_units * body_bytes
        for r in range(0, n_rows, 16):
            meta = matrix + (row0 + r) // 16 * group_bytes
            body, target = meta + metas, out + r * 4
            if nt == 1:
                _group_times_tile(name, 1, meta, body, n_units, panel, target, out_stride)
            elif nt == 2:
                _group_times_tile(name, 2, meta, body, n_units, panel, target, out_stride)
            elif nt == 4:
                _group_times_tile(name, 4, meta, body, n_units, panel, target, out_stride)
            elif nt == 8:
                _group_times_tile(name, 8, meta, body, n_units, panel, target, out_stride)
            elif nt == 12:
                _group_times_tile(name, 12, meta, body, n_units, panel, target, out_stride)
            else:
                _group_times_tile(name, 16, meta, body, n_units, panel, target, out_stride)

    return nb.cfunc(ROWS, cache=True)(rows)


@nb.njit
def _changed(word: Any, change: int) -> Any:
    if change == XOR:
        return word ^ np.uint32(0x80808080)
    if change == SIGNS:
        return (
            (word & np.uint32(0x7F)) | (word & np.uint32(0x3F80)) << np.uint32(1) | (word & np.uint32(0x1FC000)) << np.uint32(2)
            | (word & np.uint32(0xFE00000)) << np.uint32(3) | (word >> np.uint32(21)) & np.uint32(0x80)
            | (word >> np.uint32(14)) & np.uint32(0x8000) | (word >> np.uint32(7)) & np.uint32(0x800000)
            | word & np.uint32(0x80000000)
        )  # fmt: skip
    return word


@nb.njit
def _pack_items(source: int, row_bytes: int, n_rows: int, width: int, count: int, target: int, change: int) -> None:
    """`count` items of 16 rows; rows beyond `n_rows` become zeros."""
    for i in range(count):
        item, place = source + i * width, target + i * width * 16
        if width == 4:
            for r in range(n_rows):
                store_u32(place + r * 4, _changed(load_u32(item + r * row_bytes), change))
            for r in range(n_rows, 16):
                store_u32(place + r * 4, np.uint32(0))
        elif width == 2:
            for r in range(16):
                store_u16(place + r * 2, load_u16(item + r * row_bytes) if r < n_rows else np.uint16(0))
        else:
            for r in range(16):
                store_u8(place + r, load_u8(item + r * row_bytes) if r < n_rows else np.uint8(0))


@nb.cfunc("void(intp, intp, intp, intp, intp)", cache=True)
def _pack_matrix(layout: int, raw: int, row_bytes: int, n_out: int, target: int) -> None:
    """ggml rows -> interleaved groups. layout: int64 block, meta and body bytes, number of fields, then 6 numbers per field."""
    block_bytes, meta_bytes, body_bytes = load_i64(layout), load_i64(layout + 8), load_i64(layout + 16)
    n_fields = load_i64(layout + 24)
    n_units = (row_bytes + block_bytes - 1) // block_bytes
    metas = (n_units * meta_bytes + 63) // 64 * 64
    for row in range(0, n_out, 16):
        group = target + row // 16 * (metas + n_units * body_bytes)
        for unit in range(n_units):
            block = raw + row * row_bytes + unit * block_bytes
            for f in range(n_fields):
                field = layout + 32 + f * 48
                source, width, count = load_i64(field), load_i64(field + 8), load_i64(field + 16)
                place = group + load_i64(field + 24)
                place += unit * meta_bytes if load_i64(field + 32) else metas + unit * body_bytes
                held = min(
                    count, (row_bytes - unit * block_bytes - source) // width
                )  # the last unit of a float row may be short
                _pack_items(block + source, row_bytes, min(16, n_out - row), width, held, place, load_i64(field + 40))
                for i in range(held * width * 16, count * width * 16):
                    store_u8(place + i, np.uint8(0))


_call_pack = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 5)(_pack_matrix.address)


@functools.cache
def _layout(type_: GGMLQuantizationType) -> npt.NDArray[np.int64]:
    f = FORMATS[type_]
    numbers = [f.block_bytes, f.meta_bytes, f.body_bytes, len(f.fields)]
    for field in f.fields:
        numbers += [field.source, field.width, field.count, field.target, int(field.in_meta), field.change]
    return np.array(numbers, np.int64)


def pack_matrix(type_: GGMLQuantizationType, raw: int, row_bytes: int, n_out: int, target: int) -> None:
    """Interleaves `n_out` ggml rows at address `raw` into `target`; releases the interpreter lock."""
    _call_pack(_layout(type_).ctypes.data, raw, row_bytes, n_out, target)
