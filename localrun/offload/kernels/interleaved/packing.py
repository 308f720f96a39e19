"""Packing: ggml rows into interleaved groups, one pass over bytes that were just read."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numba as nb
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from localrun.kernel_cache import cached_cfunc
from localrun.offload.kernels.interleaved.formats import FORMATS
from localrun.offload.kernels.interleaved.layout import COPY, FLIP, ODD_SIGNS, SIGNS
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
from localrun.offload.kernels.simd import I32, I64, Simd


def _spread_signs(s: Simd, word: Any) -> Any:
    """Four times seven sign bits below four scale bits -> four bytes of seven sign bits below one scale bit."""
    result = s.mask(word, -0x80000000)
    for i in range(4):
        result = s.b.or_(result, s.shift_left(s.mask(word, 0x7F << 7 * i), i))
        if i < 3:
            result = s.b.or_(result, s.mask(s.shift_right(word, 21 - 7 * i), 0x80 << 8 * i))
    return result


@intrinsic
def _pack_quads(_typing: Any, change: Any, source: Any, row_bytes: Any, n_quads: Any, stride: Any, target: Any) -> Any:
    """16 whole rows: `n_quads` times four dwords, `stride` bytes apart, become vectors of one dword per row. `change` is a
    constant."""
    if not isinstance(change, types.IntegerLiteral):
        return None

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        s = Simd(builder)
        source, row_bytes, n_quads, stride, target = args[1:]
        source, target = s.pointer(source), s.pointer(target)
        rows = [builder.gep(source, [builder.mul(row_bytes, I64(r))]) for r in range(16)]

        def quad(i: Any, _carried: list[Any]) -> list[Any]:
            offset = builder.mul(i, stride)
            parts = [s.load(builder.gep(row, [offset]), 0, ir.VectorType(I32, 4)) for row in rows]
            while len(parts) > 4:
                parts = [
                    shuffle(s, a, b, range(2 * a.type.count)) for a, b in zip(parts[::2], parts[1::2], strict=True)
                ]
            for item in range(4):
                places = [4 * row + item for row in range(8)]
                vector = shuffle(
                    s, shuffle(s, parts[0], parts[1], places), shuffle(s, parts[2], parts[3], places), range(16)
                )
                if change.literal_value == FLIP:
                    vector = builder.xor(vector, s.ints(-0x7F7F7F80))
                elif change.literal_value == SIGNS or (change.literal_value == ODD_SIGNS and item % 2):
                    vector = _spread_signs(s, vector)
                s.store(vector, s.at(target, i, 256, 64 * item))
            return []

        s.loop(n_quads, [], quad)
        return context.get_dummy_value()

    return types.void(change, *[types.intp] * 5), codegen


def shuffle(s: Simd, a: Any, b: Any, lanes: Any) -> Any:
    """Dwords of `a` and `b`, numbered through, in another order."""
    indices = list(lanes)
    return s.b.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(indices)), indices))


@nb.njit
def _changed(word: Any, change: int, item: int) -> Any:
    if change == FLIP:
        return word ^ np.uint32(0x80808080)
    if change == SIGNS or (change == ODD_SIGNS and item % 2):
        result = word & np.uint32(0x80000000)
        for i in range(4):
            result |= (word & np.uint32(0x7F << (7 * i))) << np.uint32(i)
        for i in range(3):
            result |= (word >> np.uint32(21 - 7 * i)) & np.uint32(0x80 << (8 * i))
        return result
    return word


@nb.njit
def _pack_items(source: int, row_bytes: int, n_rows: int, width: int, count: int, target: int, change: int) -> None:
    """`count` items of 16 rows, one by one; rows beyond `n_rows` become zeros."""
    for i in range(count):
        item, place = source + i * width, target + i * width * 16
        if width == 4:
            for r in range(n_rows):
                store_u32(place + r * 4, _changed(load_u32(item + r * row_bytes), change, i))
            for r in range(n_rows, 16):
                store_u32(place + r * 4, np.uint32(0))
        elif width == 2:
            for r in range(16):
                store_u16(place + r * 2, load_u16(item + r * row_bytes) if r < n_rows else np.uint16(0))
        else:
            for r in range(16):
                store_u8(place + r, load_u8(item + r * row_bytes) if r < n_rows else np.uint8(0))


@nb.njit
def _quads(source: int, row_bytes: int, n_quads: int, stride: int, target: int, change: int) -> None:
    if change == COPY:
        _pack_quads(COPY, source, row_bytes, n_quads, stride, target)
    elif change == FLIP:
        _pack_quads(FLIP, source, row_bytes, n_quads, stride, target)
    elif change == SIGNS:
        _pack_quads(SIGNS, source, row_bytes, n_quads, stride, target)
    else:
        _pack_quads(ODD_SIGNS, source, row_bytes, n_quads, stride, target)


@nb.njit
def _pack_small_blocks(layout: int, raw: int, row_bytes: int, n_units: int, metas: int, bodies: int) -> bool:
    """16 whole rows of a format whose blocks are four dwords and some bytes (MXFP4, Q4_0): field by field instead of block by
    block, which would be a call for every 17 bytes. False for another format."""
    block_bytes, meta_bytes, body_bytes = load_i64(layout), load_i64(layout + 8), load_i64(layout + 16)
    n_fields = load_i64(layout + 24)
    if body_bytes != 256 or row_bytes != n_units * block_bytes:
        return False
    for f in range(n_fields):
        field = layout + 32 + f * 48
        width, count = load_i64(field + 8), load_i64(field + 16)
        if (load_i64(field + 32) and (width > 2 or count != 1)) or (
            not load_i64(field + 32) and (width != 4 or count != 4)
        ):
            return False
    for f in range(n_fields):
        field = layout + 32 + f * 48
        source, width, place = raw + load_i64(field), load_i64(field + 8), load_i64(field + 24)
        if not load_i64(field + 32):
            _quads(source, row_bytes, n_units, block_bytes, bodies + place, load_i64(field + 40))
        elif width == 1:
            for r in range(16):
                for unit in range(n_units):
                    store_u8(
                        metas + place + unit * meta_bytes + r, load_u8(source + r * row_bytes + unit * block_bytes)
                    )
        else:
            for r in range(16):
                for unit in range(n_units):
                    store_u16(
                        metas + place + unit * meta_bytes + r * 2, load_u16(source + r * row_bytes + unit * block_bytes)
                    )
    return True


@nb.njit
def _pack_field(source: int, row_bytes: int, n_rows: int, width: int, count: int, target: int, change: int) -> None:
    if n_rows < 16 or width != 4 or count < 4:
        _pack_items(source, row_bytes, n_rows, width, count, target, change)
        return
    _quads(source, row_bytes, count // 4, 16, target, change)
    done = count // 4 * 4
    _pack_items(source + done * 4, row_bytes, n_rows, width, count - done, target + done * 64, change)


@cached_cfunc("void(intp, intp, intp, intp, intp)")
def _pack_matrix(layout: int, raw: int, row_bytes: int, n_out: int, target: int) -> None:
    """ggml rows -> interleaved groups. layout: int64 block, meta and body bytes, number of fields, then 6 numbers per field."""
    block_bytes, meta_bytes, body_bytes = load_i64(layout), load_i64(layout + 8), load_i64(layout + 16)
    n_fields = load_i64(layout + 24)
    n_units = blocks_of(row_bytes, block_bytes)
    metas = rounded_up(n_units * meta_bytes, 64)
    for row in range(0, n_out, 16):
        group = target + row // 16 * (metas + n_units * body_bytes)
        if row + 16 <= n_out and _pack_small_blocks(
            layout, raw + row * row_bytes, row_bytes, n_units, group, group + metas
        ):
            continue
        for unit in range(n_units):
            block = raw + row * row_bytes + unit * block_bytes
            left = row_bytes - unit * block_bytes  # less than a block at the end of a float row
            for f in range(n_fields):
                field = layout + 32 + f * 48
                source, width, count = load_i64(field), load_i64(field + 8), load_i64(field + 16)
                place = group + load_i64(field + 24)
                place += unit * meta_bytes if load_i64(field + 32) else metas + unit * body_bytes
                held = min(count, (left - source) // width)
                _pack_field(block + source, row_bytes, min(16, n_out - row), width, held, place, load_i64(field + 40))
                for i in range(held * width * 16, count * width * 16):
                    store_u8(place + i, np.uint8(0))


@functools.cache
def pack_function() -> Any:
    """The compiled function; compiles it or finds it compiled."""
    return ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 5)(_pack_matrix.address)


@functools.cache
def layout_numbers(type_: GGMLQuantizationType) -> npt.NDArray[np.int64]:
    """A format's layout for compiled code, see `_pack_matrix`."""
    f = FORMATS[type_]
    numbers = [f.block_bytes, f.meta_bytes, f.body_bytes, len(f.fields)]
    for field in f.fields:
        numbers += field.numbers()
    return np.array(numbers, np.int64)


def pack_matrix(type_: GGMLQuantizationType, raw: int, row_bytes: int, n_out: int, target: int) -> None:
    """Interleaves `n_out` ggml rows at address `raw` into `target`; releases the interpreter lock."""
    pack_function()(layout_numbers(type_).ctypes.data, raw, row_bytes, n_out, target)
