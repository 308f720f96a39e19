"""Unpacking: interleaved groups back into ggml rows, for devices that know ggml's layouts only. The exact inverse of packing."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numba as nb
import numpy as np
from gguf import GGMLQuantizationType
from numba import types
from numba.extending import intrinsic

from localrun.kernel_cache import cached_cfunc
from localrun.offload.kernels.interleaved.layout import COPY, FLIP, ODD_SIGNS, SIGNS
from localrun.offload.kernels.interleaved.packing import layout_numbers, shuffle
from localrun.offload.kernels.lowlevel import (
    blocks_of,
    load_i64,
    load_u8,
    load_u16,
    load_u32,
    rounded_up,
    store_u8,
    store_u16,
    store_u32,
)
from localrun.offload.kernels.simd import I64, INTS, Simd


def _gather_signs(s: Simd, word: Any) -> Any:
    """Four bytes of seven sign bits below one scale bit -> four times seven sign bits below four scale bits."""
    result = s.mask(word, -0x80000000)
    for i in range(4):
        result = s.b.or_(result, s.shift_right(s.mask(word, 0x7F << 8 * i), i))
        if i < 3:
            result = s.b.or_(result, s.shift_left(s.mask(word, 0x80 << 8 * i), 21 - 7 * i))
    return result


@intrinsic
def _unpack_quads(
    _typing: Any, change: Any, source: Any, n_quads: Any, target: Any, row_bytes: Any, stride: Any
) -> Any:
    """`n_quads` times four vectors of one dword per row become four dwords of each of 16 rows, `stride` bytes apart. `change` is
    a constant."""
    if not isinstance(change, types.IntegerLiteral):
        return None

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        s = Simd(builder)
        source, n_quads, target, row_bytes, stride = args[1:]
        source, target = s.pointer(source), s.pointer(target)
        rows = [builder.gep(target, [builder.mul(row_bytes, I64(r))]) for r in range(16)]

        def quad(i: Any, _carried: list[Any]) -> list[Any]:
            items = []
            for item in range(4):
                vector = s.load(s.at(source, i, 256), 64 * item, INTS)
                if change.literal_value == FLIP:
                    vector = builder.xor(vector, s.ints(-0x7F7F7F80))
                elif change.literal_value == SIGNS or (change.literal_value == ODD_SIGNS and item % 2):
                    vector = _gather_signs(s, vector)
                items.append(vector)
            pairs = [shuffle(s, a, b, [r // 2 + 16 * (r % 2) for r in range(32)]) for a, b in (items[:2], items[2:])]
            offset = builder.mul(i, stride)
            for r, row in enumerate(rows):
                places = [2 * r, 2 * r + 1, 32 + 2 * r, 33 + 2 * r]
                s.store(shuffle(s, pairs[0], pairs[1], places), builder.gep(row, [offset]))
            return []

        s.loop(n_quads, [], quad)
        return context.get_dummy_value()

    return types.void(change, *[types.intp] * 5), codegen


@nb.njit
def _restored(word: Any, change: int, item: int) -> Any:
    if change == FLIP:
        return word ^ np.uint32(0x80808080)
    if change == SIGNS or (change == ODD_SIGNS and item % 2):
        result = word & np.uint32(0x80000000)
        for i in range(4):
            result |= (word & np.uint32(0x7F << (8 * i))) >> np.uint32(i)
        for i in range(3):
            result |= (word & np.uint32(0x80 << (8 * i))) << np.uint32(21 - 7 * i)
        return result
    return word


@nb.njit
def _quads(source: int, n_quads: int, target: int, row_bytes: int, stride: int, change: int) -> None:
    if change == COPY:
        _unpack_quads(COPY, source, n_quads, target, row_bytes, stride)
    elif change == FLIP:
        _unpack_quads(FLIP, source, n_quads, target, row_bytes, stride)
    elif change == SIGNS:
        _unpack_quads(SIGNS, source, n_quads, target, row_bytes, stride)
    else:
        _unpack_quads(ODD_SIGNS, source, n_quads, target, row_bytes, stride)


@nb.njit
def _column(source: int, step: int, n_units: int, width: int, target: int, row_bytes: int, block_bytes: int) -> None:
    """One item of one or two bytes of every block of 16 whole rows, row after row: MXFP4's scales."""
    for r in range(16):
        item, place = source + r * width, target + r * row_bytes
        if width == 1:
            for unit in range(n_units):
                store_u8(place + unit * block_bytes, load_u8(item + unit * step))
        else:
            for unit in range(n_units):
                store_u16(place + unit * block_bytes, load_u16(item + unit * step))


@nb.njit
def _items(
    source: int, first: int, count: int, width: int, target: int, row_bytes: int, n_rows: int, change: int
) -> None:
    """Items `first` to `count` of `n_rows` rows, one by one."""
    for r in range(n_rows):
        for i in range(first, count):
            item, place = source + (i * 16 + r) * width, target + r * row_bytes + i * width
            if width == 4:
                store_u32(place, _restored(load_u32(item), change, i))
            elif width == 2:
                store_u16(place, load_u16(item))
            else:
                store_u8(place, load_u8(item))


@cached_cfunc("void(intp, intp, intp, intp, intp)")
def _unpack_matrix(layout: int, packed: int, row_bytes: int, n_out: int, raw: int) -> None:
    """Interleaved groups -> ggml rows; `layout` as the packer's."""
    block_bytes, meta_bytes, body_bytes = load_i64(layout), load_i64(layout + 8), load_i64(layout + 16)
    n_fields = load_i64(layout + 24)
    n_units = blocks_of(row_bytes, block_bytes)
    metas = rounded_up(n_units * meta_bytes, 64)
    for row in range(0, n_out, 16):
        group, n_rows = packed + row // 16 * (metas + n_units * body_bytes), min(16, n_out - row)
        rows = raw + row * row_bytes
        for f in range(n_fields):
            field = layout + 32 + f * 48
            offset, width, count = load_i64(field), load_i64(field + 8), load_i64(field + 16)
            in_meta, change = load_i64(field + 32), load_i64(field + 40)
            place, step = group + load_i64(field + 24), meta_bytes
            if not in_meta:
                place, step = place + metas, body_bytes
            whole = n_rows == 16 and row_bytes == n_units * block_bytes
            if whole and width == 4 and count == 4 and step == 256:
                _quads(place, n_units, rows + offset, row_bytes, block_bytes, change)  # one call for all blocks
                continue
            if whole and width <= 2 and count == 1:
                _column(place, step, n_units, width, rows + offset, row_bytes, block_bytes)
                continue
            for unit in range(n_units):
                target = rows + unit * block_bytes + offset
                left = row_bytes - unit * block_bytes - offset  # less than a block at the end of a float row
                held, done = min(count, left // width), 0
                if n_rows == 16 and width == 4 and held >= 4:
                    done = held // 4 * 4
                    _quads(place + unit * step, held // 4, target, row_bytes, 16, change)
                _items(place + unit * step, done, held, width, target, row_bytes, n_rows, change)


@functools.cache
def unpack_function() -> Any:
    """The compiled function; compiles it or finds it compiled."""
    return ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 5)(_unpack_matrix.address)


def unpack_matrix(type_: GGMLQuantizationType, packed: int, row_bytes: int, n_out: int, raw: int) -> None:
    """Writes `n_out` ggml rows to address `raw` from their interleaved form at `packed`; releases the interpreter lock."""
    unpack_function()(layout_numbers(type_).ctypes.data, packed, row_bytes, n_out, raw)
