"""IQ2_XXS and IQ3_XXS: groups of weights are entries of a 256-entry grid, with signs beside (ggml-common.h: block_iq2_xxs).

A grid entry is looked up as packed codes, two or three bits per element, in tables that lie in registers; a second lookup turns
code and sign into the weight. That needs VBMI (byte permutes over registers) and GFNI (the eighth sign of each group is the
parity of the other seven).
"""

from __future__ import annotations

import functools
from typing import Any, Final

import gguf.quants
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from localrun.offload.kernels.interleaved.layout import ODD_SIGNS, SIGNS, Field, Format, Tile, add_block
from localrun.offload.kernels.panels import BLOCK32, GRID32, Panel
from localrun.offload.kernels.simd import BYTES, I64, Simd

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


_IQ2_PLACES: Final = ((0, 2), (2, 4), (4, 0), (4, 1))
"""Of elements 0 to 3 of half a group: where the code's two bits are (the last one's after a shift by two) and its sign goes."""


def _iq2_signs(half: int) -> list[int]:
    """Bit matrix from seven signs to those of half a group, in their places; row i of the result is byte 7 - i."""
    rows = [0] * 8
    for i, (_code, sign) in enumerate(_IQ2_PLACES):
        element = 4 * half + i
        rows[7 - sign] = 0x7F if element == 7 else 1 << element
    return rows


def _iq2_table(code: int, sign: int) -> list[int]:
    """Weights + 43 by six bits, of which two at `code` are the level and the one at `sign` says whether it is negative."""
    levels = (*_LEVELS_2, 0)
    return [43 + (-1 if i >> sign & 1 else 1) * levels[i >> code & 3] for i in range(64)]


def _iq2_xxs(s: Simd, meta: Any, body: Any, tile: Tile, totals: list[Any]) -> list[Any]:
    """A byte of a plane has the codes of half a group, and dwords four groups of a row: so activations of four groups are side by
    side (GRID32), and a lookup by six bits, of which three count, needs nothing unpacked."""
    codes = _codes(GGMLQuantizationType.IQ2_XXS, _LEVELS_2, 8)
    planes = [_plane(codes[:, 4 * half : 4 * half + 4], 0, 2) for half in range(2)]
    d = s.mul(s.halves(meta, 0), s.floats(0.125))
    step = s.mul(d, s.floats(2 / 128))

    def block(i: Any, totals: list[Any]) -> list[Any]:
        source, weights = s.at(body, i, 128), []
        indices, packed = s.load(source, 0, BYTES), s.load(source, 64, BYTES)
        for half, plane in enumerate(planes):
            low, signs = _lookup256(s, plane, indices), s.affine(packed, s.bytes(_iq2_signs(half)))
            high = s.as_bytes(s.shift_right(s.as_ints(low), 2))
            for vector, (code, sign) in zip((low, low, low, high), _IQ2_PLACES, strict=True):
                weights.append(s.lookup64(s.bytes(_iq2_table(code, sign)), s.choose(1 << sign, signs, vector)))
        # The top bits of the four bytes are the scale.
        scale = s.dot(s.ints(0), s.b.and_(packed, s.bytes([128])), s.bytes([1, 2, 4, 8]), small=False)
        return add_block(s, weights, s.fma(s.to_float(scale), step, d), tile.next(i), totals)

    return s.loop(I64(8), totals, block)


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
    ), _iq2_xxs),
    Format(GGMLQuantizationType.IQ3_XXS, 256, 98, 32, 1536, Panel(BLOCK32, 62), (
        Field(0, 2, 1, 0, in_meta=True), Field(2, 4, 16, 0), Field(66, 4, 8, 1024, change=SIGNS),
    ), _iq3_xxs),
)  # fmt: skip
