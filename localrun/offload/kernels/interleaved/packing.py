"""Packing: ggml rows into interleaved groups, one pass over bytes that were just read."""

from __future__ import annotations

import ctypes
import functools
from typing import Any, Final

import numba as nb
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from localrun.alignment import LINE_BYTES
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
from localrun.offload.kernels.reading import Reading, reading
from localrun.offload.kernels.simd import I32, I64, Simd

_SMALL_BLOCK_BYTES: Final = 66
"""Of IQ2_XXS. Larger blocks have more fields, and their rows are gone through once for each: they are read in order before."""


def _spread_signs(s: Simd, word: Any) -> Any:
    """Four times seven sign bits below four scale bits -> four bytes of seven sign bits below one scale bit."""
    result = s.mask(word, -0x80000000)
    for i in range(4):
        result = s.b.or_(result, s.shift_left(s.mask(word, 0x7F << 7 * i), i))
        if i < 3:
            result = s.b.or_(result, s.mask(s.shift_right(word, 21 - 7 * i), 0x80 << 8 * i))
    return result


@intrinsic
def _read_rows(_typing: Any, address: Any, n_bytes: Any, block_bytes: Any) -> Any:
    """Reads cache lines in order where that is faster, at least one: a processor's own prefetching follows these, but not 16 rows
    at a time. Depends on the processor, which is part of the key of compiled code."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        pages = reading() is Reading.PAGES
        s = Simd(builder, in_order=True, pages=pages)
        base, n_lines = s.pointer(args[0]), builder.udiv(builder.add(args[1], I64(LINE_BYTES - 1)), I64(LINE_BYTES))

        def line(i: Any, _carried: list[Any]) -> list[Any]:
            s.load_in_order(s.at(base, i, LINE_BYTES), 0, I64)
            return []

        if pages:
            s.loop(n_lines, [], line)
        else:
            with builder.if_then(builder.icmp_signed(">", args[2], I64(_SMALL_BLOCK_BYTES))):
                s.loop(n_lines, [], line)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), codegen


@intrinsic
def _finish_streaming(_typing: Any) -> Any:
    """What was written past the caches is visible to whoever is told of it from now on."""

    def codegen(context: Any, builder: Any, _signature: Any, _args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _pack_quads(
    _typing: Any,
    change: Any,
    source: Any,
    row_bytes: Any,
    n_units: Any,
    block_bytes: Any,
    n_quads: Any,
    stride: Any,
    target: Any,
    step: Any,
) -> Any:
    """16 whole rows: of `n_units` blocks, `block_bytes` apart, `n_quads` times four dwords, `stride` bytes apart, become vectors of
    one dword per row. A block's are `step` bytes from the one before. Whole cache lines are written past the caches: an expert is
    larger than they are. `change` is a constant."""
    if not isinstance(change, types.IntegerLiteral):
        return None

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        s = Simd(builder)
        source, row_bytes, n_units, block_bytes, n_quads, stride, target, step = args[1:]
        rest = builder.urem(builder.or_(target, step), I64(LINE_BYTES))
        source, target = s.pointer(source), s.pointer(target)
        offsets = [builder.mul(row_bytes, I64(r)) for r in range(16)]

        def quad(block: Any, place: Any, i: Any, streams: bool) -> list[Any]:
            four = builder.gep(block, [builder.mul(i, stride)])
            rows = [s.load(builder.gep(four, [offset]), 0, ir.VectorType(I32, 4)) for offset in offsets]
            for item, vector in enumerate(_transposed(s, rows)):
                if change.literal_value == FLIP:
                    vector = builder.xor(vector, s.ints(-0x7F7F7F80))
                elif change.literal_value == SIGNS or (change.literal_value == ODD_SIGNS and item % 2):
                    vector = _spread_signs(s, vector)
                s.store(vector, s.at(place, i, 256, 64 * item), streams=streams)
            return []

        def unit(i: Any, streams: bool) -> list[Any]:
            block = builder.gep(source, [builder.mul(i, block_bytes)])
            place = builder.gep(target, [builder.mul(i, step)])
            s.loop(n_quads, [], lambda q, _: quad(block, place, q, streams))
            return []

        with builder.if_else(builder.icmp_unsigned("==", rest, I64(0))) as (aligned, otherwise):
            with aligned:
                s.loop(n_units, [], lambda i, _: unit(i, True))
            with otherwise:
                s.loop(n_units, [], lambda i, _: unit(i, False))
        return context.get_dummy_value()

    return types.void(change, *[types.intp] * 8), codegen


def _transposed(s: Simd, rows: list[Any]) -> list[Any]:
    """16 vectors of four dwords -> four vectors of 16. The quarters of a vector are transposed where they are, which takes one
    simple instruction per result and step."""
    quarters = []  # the j-th has rows j, 4 + j, 8 + j and 12 + j
    for j in range(4):
        halves = [shuffle(s, rows[k + j], rows[k + 4 + j], range(8)) for k in (0, 8)]
        quarters.append(shuffle(s, halves[0], halves[1], range(16)))
    low, high = [0, 16, 1, 17], [2, 18, 3, 19]
    pairs = [_in_quarters(s, quarters[k], quarters[k + 1], lanes) for lanes in (low, high) for k in (0, 2)]
    low, high = [0, 1, 16, 17], [2, 3, 18, 19]
    return [_in_quarters(s, pairs[k], pairs[k + 1], lanes) for k in (0, 2) for lanes in (low, high)]


def _in_quarters(s: Simd, a: Any, b: Any, lanes: list[int]) -> Any:
    return shuffle(s, a, b, [4 * quarter + lane for quarter in range(4) for lane in lanes])


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
def _quads(
    source: int,
    row_bytes: int,
    n_units: int,
    block_bytes: int,
    n_quads: int,
    stride: int,
    target: int,
    step: int,
    change: int,
) -> None:
    if change == COPY:
        _pack_quads(COPY, source, row_bytes, n_units, block_bytes, n_quads, stride, target, step)
    elif change == FLIP:
        _pack_quads(FLIP, source, row_bytes, n_units, block_bytes, n_quads, stride, target, step)
    elif change == SIGNS:
        _pack_quads(SIGNS, source, row_bytes, n_units, block_bytes, n_quads, stride, target, step)
    else:
        _pack_quads(ODD_SIGNS, source, row_bytes, n_units, block_bytes, n_quads, stride, target, step)


@nb.njit
def _columns(
    source: int, row_bytes: int, n_units: int, block_bytes: int, width: int, count: int, target: int, step: int
) -> None:
    """`count` items of one or two bytes of every block of 16 whole rows, row after row."""
    for i in range(count):
        for r in range(16):
            item, place = source + r * row_bytes + i * width, target + (i * 16 + r) * width
            if width == 1:
                for unit in range(n_units):
                    store_u8(place + unit * step, load_u8(item + unit * block_bytes))
            else:
                for unit in range(n_units):
                    store_u16(place + unit * step, load_u16(item + unit * block_bytes))


@nb.njit
def _pack_group(layout: int, raw: int, row_bytes: int, n_units: int, metas: int, bodies: int) -> None:
    """16 whole rows of whole blocks, field by field: block by block would be a call for every 17 bytes of MXFP4.

    [m] One Zen 4 core, matrices of 4096 x 4096 from RAM to RAM: Q2_K 12 GB/s, Q4_K 8. Without reading in order first, and with
    writes through the caches, Q2_K has 5. Beside others, rows of 2048 values, in order and not: Q2_K 6.6 and 5.9, Q6_K 9.7 and
    4.7, but MXFP4 7.1 and 10.7, Q8_0 10.1 and 11.3, IQ2_XXS 6.9 and 8.6.
    One Emerald Rapids core, whose `memcpy` does 6 GB/s, relative to that: in order with requests 0.91 to 1.13, without requests
    0.76 to 0.97, with writes through the caches 0.6 to 0.9.
    """
    block_bytes, meta_bytes, body_bytes = load_i64(layout), load_i64(layout + 8), load_i64(layout + 16)
    _read_rows(raw, 16 * row_bytes, block_bytes)
    for f in range(load_i64(layout + 24)):
        field = layout + 32 + f * 48
        source, width, count = raw + load_i64(field), load_i64(field + 8), load_i64(field + 16)
        target, change, step = load_i64(field + 24), load_i64(field + 40), body_bytes
        if load_i64(field + 32):
            target, step = target + metas, meta_bytes
        else:
            target += bodies
        if width < 4 and load_i64(field + 32):
            _columns(source, row_bytes, n_units, block_bytes, width, count, target, step)
            continue
        done = count // 4 * 4 if width == 4 else 0
        if step == 256 and count == 4:  # the blocks' vectors lie one after the other
            _quads(source, row_bytes, 1, block_bytes, n_units, block_bytes, target, step, change)
        elif done > 0:
            _quads(source, row_bytes, n_units, block_bytes, done // 4, 16, target, step, change)
        for unit in range(n_units if done < count else 0):
            item, place = source + unit * block_bytes + done * 4, target + unit * step + done * 64
            _pack_items(item, row_bytes, 16, width, count - done, place, change)


@cached_cfunc("void(intp, intp, intp, intp, intp)")
def _pack_matrix(layout: int, raw: int, row_bytes: int, n_out: int, target: int) -> None:
    """ggml rows -> interleaved groups. layout: int64 block, meta and body bytes, number of fields, then 6 numbers per field."""
    block_bytes, meta_bytes, body_bytes = load_i64(layout), load_i64(layout + 8), load_i64(layout + 16)
    n_fields = load_i64(layout + 24)
    n_units = blocks_of(row_bytes, block_bytes)
    metas = rounded_up(n_units * meta_bytes, 64)
    for row in range(0, n_out, 16):
        group = target + row // 16 * (metas + n_units * body_bytes)
        if row + 16 <= n_out and row_bytes == n_units * block_bytes:
            _pack_group(layout, raw + row * row_bytes, row_bytes, n_units, group, group + metas)
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
                _pack_items(block + source, row_bytes, min(16, n_out - row), width, held, place, load_i64(field + 40))
                for i in range(held * width * 16, count * width * 16):
                    store_u8(place + i, np.uint8(0))
    _finish_streaming()


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
