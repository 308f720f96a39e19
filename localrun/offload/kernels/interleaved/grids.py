"""IQ2_XXS and IQ3_XXS: groups of weights are entries of a 256-entry grid, with signs beside (ggml-common.h: block_iq2_xxs).

A grid entry is looked up as packed codes, two or three bits per element; a second lookup turns the code into the weight. With VBMI
(byte permutes over registers) and GFNI (the eighth sign of each group is the parity of the other seven) tables lie in registers;
without them, IQ2_XXS gathers codes from memory.
"""

from __future__ import annotations

import functools
from typing import Any, Final

import gguf.quants
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType
from llvmlite import ir

from localrun.offload.kernels.cpu import features
from localrun.offload.kernels.interleaved.layout import (
    FEW,
    ODD_SIGNS,
    SIGNS,
    Field,
    Format,
    Tile,
    add_block,
    nibbles,
)
from localrun.offload.kernels.panels import BLOCK32, GRID32, Panel
from localrun.offload.kernels.simd import BYTES, I32, I64, INTS, Avx512, Simd

_LEVELS_2: Final = (8, 25, 43)
_LEVELS_3: Final = (4, 12, 20, 28, 36, 44, 52, 62)


@functools.cache
def _codes(type_: GGMLQuantizationType, levels: tuple[int, ...], width: int) -> npt.NDArray[np.int64]:
    """(256, width) positions in `levels` of the grid's elements."""
    table = {GGMLQuantizationType.IQ2_XXS: gguf.quants.IQ2_XXS, GGMLQuantizationType.IQ3_XXS: gguf.quants.IQ3_XXS}[
        type_
    ]
    table.init_grid()
    return np.searchsorted(np.array(levels, np.float32), np.asarray(table.grid, np.float32).reshape(256, width))


def _plane(codes: npt.NDArray[np.int64], bit: int, n_bits: int) -> list[int]:
    """Per entry one byte: bits `bit` to `bit + n_bits` of each element's code, element after element."""
    part = codes >> bit & ((1 << n_bits) - 1)
    return [int(sum(int(code) << (n_bits * i) for i, code in enumerate(row))) for row in part]


def _lookup256(s: Simd, entries: list[int], indices: Any) -> Any:
    tables = [s.bytes(entries[i : i + 64]) for i in range(0, 256, 64)]
    low, high = s.lookup128(tables[0], indices, tables[1]), s.lookup128(tables[2], indices, tables[3])
    return s.b.select(s.b.icmp_signed("<", indices, s.bytes([0])), high, low)


def has_grid_permutes() -> bool:
    """Whether this processor looks up 256 entries in registers."""
    return features() >= {"avx512vbmi", "gfni"}


def _nibbles(s: Simd, vector: Any) -> list[Any]:
    """Low and high halves of all bytes."""
    low, high = nibbles(s, [s.as_ints(vector)])
    return [*low, *high]


def _bit_offsets(s: Simd, first: int, step: int) -> Any:
    """For `Simd.bits_at`: byte i of each row takes the bits from `first + step * i` of its row on; a 64-bit lane holds two rows."""
    return s.bytes([(first + step * i + 32 * row) % 64 for row in range(2) for i in range(4)])


def _signs_and_scale(s: Simd, packed: Any) -> tuple[Any, Any]:
    """All 32 signs of a row as its dword's bits, and the 4-bit scale as 2 * scale + 1 in F32."""
    parity_into_top = s.bytes([0x7F, 0x40, 0x20, 0x10, 0x08, 0x04, 0x02, 0x01])  # row i of the bit matrix is byte 7 - i
    signs = s.affine(packed, parity_into_top)
    bits = s.shift_right(s.mask(s.as_ints(packed), -0x7F7F7F80), 7)
    scale = s.shift_right(s.b.mul(bits, s.ints(0x01020408)), 24)
    return signs, s.fma(s.to_float(s.mask(scale, 15)), s.floats(2.0), s.floats(1.0))


_IQ2_PLANES: Final = ((4, 5, 0, 1), (6, 7, 2, 3))
"""Elements of a group whose codes are one byte of a plane, two bits each, from the lowest on. The signs of the first plane's then
are where they are needed in the file's own bytes, the other's are two bits higher."""


def _iq2_signs() -> list[int]:
    """Bit matrix from seven signs to those of the second plane at bits 0, 1, 4 and 5; row i of the result is byte 7 - i."""
    rows = [0] * 8
    for element in _IQ2_PLANES[1]:
        rows[7 - (element - 2)] = 0x7F if element == 7 else 1 << element
    return rows


def _iq2_table(code: int, sign: int) -> list[int]:
    """Weights + 43 by six bits, of which two at `code` are the level and the one at `sign` says whether it is negative."""
    levels = (*_LEVELS_2, 0)
    return [43 + (-1 if i >> sign & 1 else 1) * levels[i >> code & 3] for i in range(64)]


def _iq2_xxs(s: Simd, meta: Any, body: Any, tile: Tile, totals: list[Any]) -> list[Any]:
    """A byte of a plane has the codes of half a group, and dwords four groups of a row: so activations of four groups are side by
    side (GRID32), and bits that are looked up need not move to other bytes."""
    codes = _codes(GGMLQuantizationType.IQ2_XXS, _LEVELS_2, 8)
    planes = [_plane(codes[:, plane], 0, 2) for plane in _IQ2_PLANES]
    weights_of = _iq2_permuted if isinstance(s, Avx512) and has_grid_permutes() else _iq2_loaded

    def block(i: Any, sums: list[Any]) -> list[Any]:
        source, record = s.at(body, i, 128), tile.next(i)
        indices, packed = (s.load_in_order(source, 64 * k, BYTES) for k in range(2))
        weights = weights_of(s, planes, source, indices, packed)
        # The top bits of the four bytes are the scale: 64 * (2 * scale + 1).
        bits = s.as_bytes(s.and_or(s.as_ints(packed), s.ints(-0x7F7F7F80), s.ints(64)))
        scale = s.dot(s.ints(0), bits, s.bytes([1, 2, 4, 8]), small=False)
        results = []
        for t, total in enumerate(sums):
            dot = record.start(t)
            for quad, weight in enumerate(weights):
                dot = s.dot(dot, weight, record.quad(t, quad))
            results.append(s.fma(s.to_float(s.b.mul(dot, scale)), record.scale(t), total))  # below 2**29
        return results

    sums = s.loop(I64(8), [s.floats(0.0)] * len(totals), block)
    d = s.mul(s.halves(meta, 0), s.floats(0.125 / 64))
    return [s.fma(d, part, total) for part, total in zip(sums, totals, strict=True)]


def _iq2_permuted(s: Simd, planes: list[list[int]], _source: Any, indices: Any, packed: Any) -> list[Any]:
    """Eight vectors of weights + 43. A lookup sees six bits, which are two elements' codes and signs."""
    weights: list[Any] = [None] * 8
    for elements, plane, signs in zip(
        _IQ2_PLANES, planes, (packed, s.affine(packed, s.bytes(_iq2_signs()))), strict=True
    ):
        low = _lookup256(s, plane, indices)
        high = s.as_bytes(s.shift_right(s.as_ints(low), 2))
        low, high = s.choose(0x0F, low, signs), s.choose(0x3C, high, signs)
        for element, vector, code, sign in zip(
            elements, (low, low, high, high), (0, 2, 2, 4), (4, 5, 0, 1), strict=True
        ):
            weights[element] = s.lookup64(s.bytes(_iq2_table(code, sign)), vector)
    return weights


def _planes_from_memory(s: Simd, planes: list[list[int]], source: Any) -> list[Any]:
    """Both planes of 16 rows: each row's four pairs of bytes, looked up where they belong, are one 64-bit number. [m] Twice the
    speed of gathers on Zen 4."""
    tables = [
        s.constants([low << 8 * group | high << 32 + 8 * group for low, high in zip(*planes, strict=True)])
        for group in range(4)
    ]
    quads = []
    for first in range(0, 16, 4):
        quad = ir.Constant(ir.VectorType(I64, 4), ir.Undefined)
        for row in range(4):
            numbers, value = s.b.zext(s.load(source, 4 * (first + row), I32), I64), I64(0)
            for group, table in enumerate(tables):
                number = s.b.and_(s.b.lshr(numbers, I64(8 * group)), I64(255))
                value = s.b.or_(value, s.load(s.at(table, number, 8), 0, I64))
            quad = s.b.insert_element(quad, value, I32(row))
        quads.append(s.b.bitcast(quad, ir.VectorType(I32, 8)))
    parts = []
    for plane in range(2):
        lanes = ir.Constant(ir.VectorType(I32, 8), [2 * row + plane for row in range(8)])
        low, high = (s.b.shuffle_vector(quads[i], quads[i + 1], lanes) for i in (0, 2))
        parts.append(s.b.shuffle_vector(low, high, ir.Constant(INTS, list(range(16)))))
    return parts


def _iq2_loaded(s: Simd, planes: list[list[int]], source: Any, _indices: Any, packed: Any) -> list[Any]:
    """The same with codes from memory; a nibble of a plane is two codes, of which each lookup uses one."""
    both = _planes_from_memory(s, planes, source)
    parity = [128 * (number.bit_count() % 2) for number in range(16)]
    odd = s.b.xor(*(s.lookup16(s.bytes(parity), v) for v in _nibbles(s, s.b.and_(packed, s.bytes([0x7F])))))
    signs, weights = s.as_ints(s.b.or_(s.b.and_(packed, s.bytes([0x7F])), odd)), [None] * 8
    levels = (*_LEVELS_2, 0)
    tables = [s.bytes([levels[number >> 2 * i & 3] for number in range(16)]) for i in range(2)]
    for elements, plane in zip(_IQ2_PLANES, both, strict=True):
        for i, nibble in enumerate(_nibbles(s, s.as_bytes(plane))):
            for element, values in zip(elements[2 * i : 2 * i + 2], tables, strict=True):
                sign = s.as_bytes(s.shift_left(signs, 7 - element))
                weights[element] = s.b.add(s.negated(s.lookup16(values, nibble), sign), s.bytes([43]))
    return weights


def _iq3_xxs(s: Simd, meta: Any, body: Any, tile: Tile, totals: list[Any]) -> list[Any]:
    codes = _codes(GGMLQuantizationType.IQ3_XXS, _LEVELS_3, 4)
    low_plane, high_plane = _plane(codes, 0, 2), _plane(codes, 2, 1)
    signed = [62 + (-1 if code & 8 else 1) * _LEVELS_3[code & 7] for code in range(16)]
    d = s.mul(s.halves(meta, 0), s.floats(0.25))

    def block(i: Any, totals: list[Any]) -> list[Any]:
        source, weights = s.at(body, i, 128), []
        signs, scale = _signs_and_scale(s, s.load(s.at(body, i, 64, 1024), 0, BYTES))
        for half in range(2):
            indices = s.load(source, 64 * half, BYTES)
            low, high = _lookup256(s, low_plane, indices), _lookup256(s, high_plane, indices)
            for quad in range(4):
                code = s.bits_at(_bit_offsets(s, quad * 8, 2), low)
                top = s.bits_at(_bit_offsets(s, quad * 8 - 2, 1), high)
                sign = s.bits_at(_bit_offsets(s, half * 16 + quad * 4 - 3, 1), signs)
                weights.append(s.lookup64(s.bytes(signed), s.choose(7, s.choose(3, code, top), sign)))
        return add_block(s, weights, s.mul(d, scale), tile.next(i), totals)

    return s.loop(I64(8), totals, block)


FORMATS: Final = (
    Format(GGMLQuantizationType.IQ2_XXS, 256, 66, 32, 1024, Panel(GRID32, 43), (
        Field(0, 2, 1, 0, in_meta=True),
        Field(2, 4, 16, 0, change=ODD_SIGNS),
    ), _iq2_xxs, FEW),
    Format(GGMLQuantizationType.IQ3_XXS, 256, 98, 32, 1536, Panel(BLOCK32, 62), (
        Field(0, 2, 1, 0, in_meta=True), Field(2, 4, 16, 0), Field(66, 4, 8, 1024, change=SIGNS),
    ), _iq3_xxs),
)  # fmt: skip
