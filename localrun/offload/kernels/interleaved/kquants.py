"""Q4_K to Q6_K and IQ4_XS: super-blocks of 256 with small integer scales, added up in F32 (ggml-common.h: block_q4_K and so on)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from gguf import GGMLQuantizationType

from localrun.offload.kernels.interleaved.blocks import IQ4_NL
from localrun.offload.kernels.interleaved.layout import FEW, Field, Format, Tile, add_block, nibbles
from localrun.offload.kernels.interleaved.parts import sums_times
from localrun.offload.kernels.panels import BLOCK32, SUM, SUPER256, Panel
from localrun.offload.kernels.simd import FLOATS, HALF_WORDS, I32, I64, INTS, WORDS, Simd

_FEW: Final = 2
"""Tokens up to which unpacking scales costs more than multiplying by them as integers."""

# -- Q4_K and Q5_K: eight blocks of 32, each with a 6-bit scale and minimum -------------------------------------------


def _six_bits(s: Simd, meta: Any) -> tuple[list[Any], list[Any]]:
    """Scale and minimum per block, as 32-bit lanes: 12 bytes hold 8 + 8 six-bit numbers (get_scale_min_k4)."""
    first, second, third = (s.load(meta, 64 + 64 * i, INTS) for i in range(3))
    scales = (
        s.mask(first, 0x3F3F3F3F),
        s.b.or_(s.mask(third, 0x0F0F0F0F), s.mask(s.shift_right(first, 2), 0x30303030)),
    )
    high_nibbles = s.mask(s.shift_right(third, 4), 0x0F0F0F0F)
    minima = (s.mask(second, 0x3F3F3F3F), s.b.or_(high_nibbles, s.mask(s.shift_right(second, 2), 0x30303030)))

    def lanes(packed: tuple[Any, Any]) -> list[Any]:
        return [s.byte_field(packed[i // 4], i % 4) for i in range(8)]

    return lanes(scales), lanes(minima)


def _scales_and_minima(s: Simd, meta: Any) -> Any:
    """F32 scale and minimum per block, 128 bytes apart on the stack."""
    d, dmin = s.halves(meta, 0), s.halves(meta, 32)
    stack = s.stack(8 * 128)
    for block, (scale, minimum) in enumerate(zip(*_six_bits(s, meta), strict=True)):
        s.store(s.mul(d, s.to_float(scale)), stack, 128 * block)
        s.store(s.mul(dmin, s.to_float(minimum)), stack, 128 * block + 64)
    return stack


def _add_few(
    s: Simd,
    meta: Any,
    pair: Callable[[int, int], tuple[Any, Any]],
    tile: Tile,
    totals: list[Any],
    *,
    in_place: bool = False,
) -> list[Any]:
    """One or two tokens: scales stay integers, so that nothing goes through memory.

    Args:
        pair: (i, k) -> the k-th byte vectors of blocks 2 * i and 2 * i + 1.
        in_place: those of the second are 16 times the weights: one shift of a sum is less than eight of weights.
    """
    n_tokens = len(totals)
    scales, minima = _six_bits(s, meta)
    sums, offsets = ([s.floats(0.0)] * n_tokens for _ in range(2))
    for i in range(4):
        records = [tile.next(I64(2 * i + half)) for half in range(2)]
        dots = [[s.ints(0)] * n_tokens for _ in range(2)]
        for k in range(8):
            for half, weight in enumerate(pair(i, k)):
                for t in range(n_tokens):
                    dots[half][t] = s.dot(dots[half][t], weight, records[half].quad(t, k))
        for half, record in enumerate(records):
            minimum = s.to_float(minima[2 * i + half])
            for t, dot in enumerate(dots[half]):
                if half and in_place:
                    dot = s.b.ashr(dot, s.ints(4))
                sums[t] = s.fma(s.to_float(s.b.mul(dot, scales[2 * i + half])), record.scale(t), sums[t])  # below 2**24
                offsets[t] = s.fma(minimum, record.sum(t), offsets[t])
    d, dmin = s.halves(meta, 0), s.b.fneg(s.halves(meta, 32))
    return [
        s.fma(dmin, offset, s.fma(d, total, before))
        for total, offset, before in zip(sums, offsets, totals, strict=True)
    ]


def _add_with_minimum(s: Simd, weights: list[Any], factors: Any, tile: Tile, totals: list[Any]) -> list[Any]:
    totals = add_block(s, weights, s.load(factors, 0, FLOATS), tile, totals, start=False)
    minimum = s.b.fneg(s.load(factors, 64, FLOATS))
    return [s.fma(minimum, tile.sum(t), total) for t, total in enumerate(totals)]


def _nibbles_of_block(s: Simd, body: Any, block: Any) -> list[Any]:
    """Elements of block `block` (a run-time value): low or high nibbles of chunk block // 2."""
    chunk = s.at(body, s.b.lshr(block, I64(1)), 512)
    shift = s.splat(s.b.trunc(s.b.mul(s.b.and_(block, I64(1)), I64(4)), I32))
    return [s.mask(s.b.lshr(s.load(chunk, 64 * k, INTS), shift), 0x0F0F0F0F) for k in range(8)]


def _q4_k(s: Simd, meta: Any, body: Any, tile: Tile, totals: list[Any]) -> list[Any]:
    if len(totals) <= _FEW:

        def pair(i: int, k: int) -> tuple[Any, Any]:
            v = s.load_in_order(body, 512 * i + 64 * k, INTS)
            high = s.mask(v, -0x0F0F0F10) if s.vnni else s.mask(s.shift_right(v, 4), 0x0F0F0F0F)
            return s.as_bytes(s.mask(v, 0x0F0F0F0F)), s.as_bytes(high)

        return _add_few(s, meta, pair, tile, totals, in_place=s.vnni)
    stack = _scales_and_minima(s, meta)

    def chunk(i: Any, totals: list[Any]) -> list[Any]:
        source = s.at(body, i, 512)
        for half, weights in enumerate(nibbles(s, [s.load_in_order(source, 64 * k, INTS) for k in range(8)])):
            block = s.b.add(s.b.mul(i, I64(2)), I64(half))
            totals = _add_with_minimum(s, weights, s.at(stack, block, 128), tile.next(block), totals)
        return totals

    def block(i: Any, totals: list[Any]) -> list[Any]:
        weights = [s.as_bytes(v) for v in _nibbles_of_block(s, body, i)]
        return _add_with_minimum(s, weights, s.at(stack, i, 128), tile.next(i), totals)

    # With many tokens there are registers for one half's weights only: load them again for the other.
    return s.loop(I64(4), totals, chunk) if len(totals) <= FEW else s.loop(I64(8), totals, block)


def _q5_k(s: Simd, meta: Any, body: Any, tile: Tile, totals: list[Any]) -> list[Any]:
    if len(totals) <= _FEW:
        highs = [s.load_in_order(body, 64 * k, INTS) for k in range(8)]

        def fifth_bit(high: Any, block: int) -> Any:
            return s.shift_left(high, 4 - block) if block <= 4 else s.shift_right(high, block - 4)

        def pair(i: int, k: int) -> tuple[Any, Any]:
            low, high = nibbles(s, [s.load_in_order(body, 512 + 512 * i + 64 * k, INTS)])
            parts = [s.as_ints(low[0]), s.as_ints(high[0])]
            weights = [
                s.as_bytes(s.and_or(fifth_bit(highs[k], 2 * i + half), s.ints(0x10101010), part))
                for half, part in enumerate(parts)
            ]
            return weights[0], weights[1]

        return _add_few(s, meta, pair, tile, totals)
    stack = _scales_and_minima(s, meta)

    def block(i: Any, totals: list[Any]) -> list[Any]:
        shift, weights = s.splat(s.b.trunc(i, I32)), []
        for k, low in enumerate(_nibbles_of_block(s, s.b.gep(body, [I64(512)]), i)):
            bit = s.mask(s.b.lshr(s.load(body, 64 * k, INTS), shift), 0x01010101)
            weights.append(s.as_bytes(s.b.or_(low, s.shift_left(bit, 4))))
        return _add_with_minimum(s, weights, s.at(stack, i, 128), tile.next(i), totals)

    return s.loop(I64(8), totals, block)


# -- Q6_K: sixteen parts of 16 with 8-bit scales ----------------------------------------------------------------------


def _high_bits(s: Simd, top: Any, quarter: int) -> Any:
    """Bits 2 * quarter and up of each byte, at bits 4 and 5."""
    return s.shift_left(top, 4 - 2 * quarter) if quarter <= 2 else s.shift_right(top, 2 * quarter - 4)


def _q6_k(s: Simd, meta: Any, body: Any, tile: Tile, totals: list[Any]) -> list[Any]:
    n_tokens = len(totals)
    d, packed = s.halves(meta, 0), [s.load(meta, 32 + 64 * i, INTS) for i in range(4)]
    stack = s.stack(16 * 64)
    for part in range(16):  # half, quarter of the half, half of the quarter -> half, half of the quarter, quarter
        signed = s.b.ashr(s.shift_left(packed[part // 4], 24 - 8 * (part % 4)), s.ints(24))
        s.store(s.to_float(signed), stack, 64 * (part // 8 * 8 + part % 2 * 4 + part // 2 % 4))

    for line in range(16):
        s.touch(body, 64 * line)  # the high bits

    def half(i: Any, sums: list[Any]) -> list[Any]:
        lows, highs, quads = s.at(body, i, 1024, 1024), s.at(body, i, 512), s.at(tile.record, i, 128)
        scales = s.at(stack, i, 512)
        for odd in range(2):  # quarters `odd` and `odd + 2`
            for sixteen in range(2):
                low, high = nibbles(
                    s, [s.load_in_order(lows, 512 * odd + 256 * sixteen + 64 * k, INTS) for k in range(4)]
                )
                tops = [s.load(highs, 256 * sixteen + 64 * k, INTS) for k in range(4)]
                for quarter, parts in ((odd, low), (odd + 2, high)):
                    weights = [
                        s.as_bytes(s.and_or(_high_bits(s, top, quarter), s.ints(0x30303030), s.as_ints(part)))
                        for part, top in zip(parts, tops, strict=True)
                    ]
                    scale = s.load(scales, 256 * sixteen + 64 * quarter, FLOATS)
                    for t in range(n_tokens):
                        dot = s.ints(0)
                        for k, weight in enumerate(weights):
                            dot = s.dot(dot, weight, tile.quad(t, quarter * 8 + sixteen * 4 + k, quads))
                        sums[t] = s.fma(s.to_float(dot), scale, sums[t])
        return sums

    sums = s.loop(I64(2), [s.floats(0.0)] * n_tokens, half)
    # The weights' offset of 32: 32 * scale * sum(q), as pairs of 16-bit scales in the order of `sums16`.
    pairs = []
    for v in packed:
        words, eight = s.b.bitcast(v, WORDS), s.words(8)
        pairs += [s.b.ashr(s.b.shl(words, eight), eight), s.b.ashr(words, eight)]
    offsets = sums_times(s, pairs, tile, n_tokens)
    sums = [s.fma(s.to_float(offset), s.floats(-32.0), total) for offset, total in zip(offsets, sums, strict=True)]
    return [
        s.fma(part, s.mul(d, tile.scale(t)), total) for t, (part, total) in enumerate(zip(sums, totals, strict=True))
    ]


# -- IQ4_XS: eight blocks of 32 with 6-bit scales and the table of IQ4_NL ----------------------------------------------


def _iq4_xs(s: Simd, meta: Any, body: Any, tile: Tile, totals: list[Any]) -> list[Any]:
    d, high = s.halves(meta, 0), s.b.zext(s.load(meta, 32, HALF_WORDS), INTS)
    low = s.load(meta, 64, INTS)
    stack, table = s.stack(8 * 64), s.bytes([v + 127 for v in IQ4_NL])
    for block in range(8):
        bits = s.b.or_(
            s.mask(s.shift_right(low, 4 * block), 15),
            s.shift_left(s.mask(s.shift_right(high, 2 * block), 3), 4),
        )
        s.store(s.mul(d, s.to_float(s.b.sub(bits, s.ints(32)))), stack, 64 * block)

    def block_of(i: Any, totals: list[Any]) -> list[Any]:
        source = s.at(body, i, 256)
        first, second = nibbles(s, [s.load_in_order(source, 64 * k, INTS) for k in range(4)])
        weights = [s.lookup16(table, v) for v in first + second]
        return add_block(s, weights, s.load(s.at(stack, i, 64), 0, FLOATS), tile.next(i), totals, small=False)

    return s.loop(I64(8), totals, block_of)


_T = GGMLQuantizationType
_D_DMIN_SCALES = (Field(0, 2, 2, 0, in_meta=True), Field(4, 4, 3, 64, in_meta=True))

FORMATS: Final = (
    Format(_T.Q4_K, 256, 144, 256, 2048, Panel(BLOCK32, SUM), (*_D_DMIN_SCALES, Field(16, 4, 32, 0)), _q4_k, FEW),
    Format(_T.Q5_K, 256, 176, 256, 2560, Panel(BLOCK32, SUM), (*_D_DMIN_SCALES, Field(16, 4, 40, 0)), _q5_k, _FEW),
    Format(_T.Q6_K, 256, 210, 288, 3072, Panel(SUPER256),
           (Field(208, 2, 1, 0, in_meta=True), Field(192, 4, 4, 32, in_meta=True), Field(0, 4, 32, 1024), Field(128, 4, 16, 0)),
           _q6_k, FEW),
    Format(_T.IQ4_XS, 256, 136, 128, 2048, Panel(BLOCK32, 127),
           (Field(0, 2, 2, 0, in_meta=True), Field(4, 4, 1, 64, in_meta=True), Field(8, 4, 32, 0)), _iq4_xs, FEW),
)  # fmt: skip
