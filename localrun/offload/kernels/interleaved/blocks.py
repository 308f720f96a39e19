"""Formats with blocks of 32 and one scale: MXFP4, Q8_0, Q4_0, IQ4_NL (ggml-common.h: block_mxfp4 and so on)."""

from __future__ import annotations

from typing import Any, Final

from gguf import GGMLQuantizationType

from localrun.offload.kernels.interleaved.layout import FEW, FLIP, Field, Format, Step, Tile, add_block, nibbles
from localrun.offload.kernels.panels import BLOCK32, Panel
from localrun.offload.kernels.simd import BYTES, FLOATS, INTS, Simd

# fmt: off
E2M1: Final = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""Twice the FP4 values; OCP MX specification 1.0, section 5.3.3."""
IQ4_NL: Final = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""ggml-common.h, kvalues_iq4nl."""
# fmt: on


def _lookup(s: Simd, body: Any, values: tuple[int, ...], offset: int) -> list[Any]:
    """32 nibbles of 16 rows; byte j of a block holds elements j and j + 16."""
    table = s.bytes([v + offset for v in values])
    low, high = nibbles(s, [s.load_in_order(body, 64 * i, INTS) for i in range(4)])
    return [s.lookup16(table, v) for v in low + high]


def _mxfp4(s: Simd, meta: Any, body: Any, tile: Tile, totals: list[Any]) -> list[Any]:
    # E8M0: the byte is an F32 exponent. Halved for the doubled table; 2**-127 becomes 0.
    scale = s.mul(s.b.bitcast(s.shift_left(s.byte_lanes(meta, 0), 23), FLOATS), s.floats(0.5))
    return add_block(s, _lookup(s, body, E2M1, 12), scale, tile, totals)


def _iq4_nl(s: Simd, meta: Any, body: Any, tile: Tile, totals: list[Any]) -> list[Any]:
    return add_block(s, _lookup(s, body, IQ4_NL, 127), s.halves(meta, 0), tile, totals, small=False)


def _q4_0(s: Simd, meta: Any, body: Any, tile: Tile, totals: list[Any]) -> list[Any]:
    low, high = nibbles(s, [s.load_in_order(body, 64 * i, INTS) for i in range(4)])
    return add_block(s, low + high, s.halves(meta, 0), tile, totals)


def _q8_0(s: Simd, meta: Any, body: Any, tile: Tile, totals: list[Any]) -> list[Any]:
    return add_block(
        s, [s.load_in_order(body, 64 * i, BYTES) for i in range(8)], s.halves(meta, 0), tile, totals, small=False
    )


def _half_scaled(type_: GGMLQuantizationType, n_quads: int, offset: int, step: Step, change: int = 0) -> Format:
    """A block of an F16 scale and `n_quads` groups of four bytes."""
    fields = (Field(0, 2, 1, 0, in_meta=True), Field(2, 4, n_quads, 0, change=change))
    return Format(type_, 32, 2 + 4 * n_quads, 32, 64 * n_quads, Panel(BLOCK32, offset), fields, step, in_order=FEW)


_T = GGMLQuantizationType

FORMATS: Final = (
    Format(
        _T.MXFP4,
        32,
        17,
        16,
        256,
        Panel(BLOCK32, 12),
        (Field(0, 1, 1, 0, in_meta=True), Field(1, 4, 4, 0)),
        _mxfp4,
        True,
    ),
    _half_scaled(_T.Q8_0, 8, 128, _q8_0, FLIP),
    _half_scaled(_T.Q4_0, 4, 8, _q4_0),
    _half_scaled(_T.IQ4_NL, 4, 127, _iq4_nl),
)
