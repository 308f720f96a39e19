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
from localrun.offload.kernels.panels import BLOCK32, Panel
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


def _iq2_xxs(s: Simd, meta: Any, body: Any, tile: Tile, totals: list[Any]) -> list[Any]:
    codes = _codes(GGMLQuantizationType.IQ2_XXS, _LEVELS_2, 8)
    planes = [_plane(codes[:, 4 * half : 4 * half + 4], 0, 2) for half in range(2)]
    signed = [43 + (-1 if code & 4 else 1) * (*_LEVELS_2, 0)[code & 3] for code in range(8)]
    d = s.mul(s.halves(meta, 0), s.floats(0.125))

    def block(i: Any, totals: list[Any]) -> list[Any]:
        source = s.at(body, i, 128)
        indices = s.load(source, 0, BYTES)
        signs, scale = _signs_and_scale(s, s.load(source, 64, BYTES))
        halves, weights = [_lookup256(s, plane, indices) for plane in planes], []
        for quad in range(8):
            code = s.bits_at(_bit_offsets(s, quad // 2 * 8, 2), halves[quad % 2])
            sign = s.bits_at(_bit_offsets(s, quad * 4 - 2, 1), signs)  # into bit 2
            weights.append(s.lookup64(s.bytes(signed), s.choose(3, code, sign)))
        return add_block(s, weights, s.mul(d, scale), tile.next(i), totals)

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
    Format(GGMLQuantizationType.IQ2_XXS, 256, 66, 32, 1024, Panel(BLOCK32, 43), (
        Field(0, 2, 1, 0, in_meta=True),
        Field(2, 4, 16, 0, change=ODD_SIGNS),
    ), _iq2_xxs),
    Format(GGMLQuantizationType.IQ3_XXS, 256, 98, 32, 1536, Panel(BLOCK32, 62), (
        Field(0, 2, 1, 0, in_meta=True), Field(2, 4, 16, 0), Field(66, 4, 8, 1024, change=SIGNS),
    ), _iq3_xxs),
)  # fmt: skip
