"""Q2_K and Q3_K: super-blocks of sixteen parts of 16 (ggml-common.h: block_q2_K, block_q3_K).

Part p has bits 2 * shift and up (shift = p // 2 % 4) of bytes 16 * (p % 2) and up of half p // 8. There are two ways, both exact in
integers over a super-block:

* *sums times scales*: a part's sum fits 16 bits, and pairs of them are multiplied by their scales. Nothing is unpacked for Q2_K
  with VNNI: bits stay where they are in a byte, and sums of 1, 4, 16 or 64 times the value are shifted.
* *scaled bytes*: scale times value is looked up as one byte, which costs more per weight and nothing per token; with VNNI this is
  less work for many tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from gguf import GGMLQuantizationType

from localrun.offload.kernels.interleaved.layout import FEW, Field, Format, Tile
from localrun.offload.kernels.panels import SUPER256, Panel
from localrun.offload.kernels.simd import BYTES, I32, I64, INTS, WORDS, Simd

_FEW_Q2: Final = 2
_FEW_Q3: Final = 2
"""With VNNI, most tokens at once for sums times scales."""


def _n_chains(n_tokens: int) -> int:
    """Independent sums per token: a dot product takes five cycles, two can start in each."""
    return max(1, min(4, 8 // n_tokens))


def _join(s: Simd, products: list[Any], n_tokens: int) -> list[Any]:
    """Adds up the chains of each token."""
    while len(products) > n_tokens:
        half = len(products) // 2
        products = [s.b.add(a, b) for a, b in zip(products[:half], products[half:], strict=True)]
    return products


def _add_super(s: Simd, products: list[Any], d: Any, tile: Tile, totals: list[Any]) -> list[Any]:
    return [
        s.fma(s.to_float(p), s.mul(d, tile.scale(t)), total)
        for t, (p, total) in enumerate(zip(products, totals, strict=True))
    ]


def _two_bits(s: Simd, vector: Any, shift: int) -> Any:
    """Indices into a row's four-byte table: two bits of each byte, plus 4 * (row % 4)."""
    return s.choose(3, s.as_bytes(s.shift_right(vector, shift)), s.bytes([lane // 4 * 4 for lane in range(16)]))


WeightsOf = Callable[[Any, Any, Any], Callable[[int], list[Any]]]
"""(quarter, half, sixteen), run-time values -> function from shift to the four weight vectors of a part."""


def _quads(s: Simd, tile: Tile, half: Any, sixteen: Any) -> Any:
    """Activations of shift 0's part; those of the next are 32 bytes further."""
    return s.b.gep(tile.record, [s.b.add(s.b.mul(half, I64(128)), s.b.mul(sixteen, I64(16)))])


def _add_scaled_bytes(s: Simd, tile: Tile, starts: list[Any], weights_of: WeightsOf, *, small: bool) -> list[Any]:
    """Many tokens: per token the sum over a super-block."""
    n_tokens = len(starts)
    n_chains = _n_chains(n_tokens)

    def quarter(i: Any, products: list[Any]) -> list[Any]:
        half, sixteen = s.b.lshr(i, I64(1)), s.b.and_(i, I64(1))
        quads, weights_at = _quads(s, tile, half, sixteen), weights_of(i, half, sixteen)
        for shift in range(4):
            weights = weights_at(shift)
            for t in range(n_tokens):
                for k, weight in enumerate(weights):
                    chain = k % n_chains * n_tokens + t
                    products[chain] = s.dot(products[chain], weight, tile.quad(t, shift * 8 + k, quads), small=small)
        return products

    return _join(s, s.loop(I64(4), starts + [s.ints(0)] * (n_tokens * (n_chains - 1)), quarter), n_tokens)


ScalePairs = Callable[[Any, Any, int], Any]
"""(half, sixteen, j) -> 16-bit scales of the parts with shifts 2j and 2j + 1, as words of a dword; half and sixteen are run-time
values."""


def _add_scaled_parts(
    s: Simd, tile: Tile, starts: list[Any], weights_of: WeightsOf, scale_pairs: ScalePairs, *, in_place: bool = False
) -> list[Any]:
    """Per token the sum over a super-block, by sums of parts, which are below 7 * 127 * 16 and so fit 16 bits.

    Args:
        in_place: weights are 4**shift times the value (with VNNI only).
    """

    def quarter(i: Any, products: list[Any]) -> list[Any]:
        half, sixteen = s.b.lshr(i, I64(1)), s.b.and_(i, I64(1))
        quads, weights_at = _quads(s, tile, half, sixteen), weights_of(i, half, sixteen)
        for j in range(2):
            pair, scales = [weights_at(2 * j), weights_at(2 * j + 1)], scale_pairs(half, sixteen, j)
            for t in range(len(starts)):
                activations = [[tile.quad(t, (2 * j + odd) * 8 + k, quads) for k in range(4)] for odd in range(2)]
                add = _add_pair if s.vnni else _add_pair_of_words
                products[t] = add(s, products[t], pair, activations, scales, 4 * j if in_place else None)
        return products

    return s.loop(I64(4), starts, quarter)


def _add_pair(s: Simd, total: Any, pair: list[Any], activations: list[Any], scales: Any, shift: int | None) -> Any:
    """Two parts' sums, side by side in 16 bits, times their scales. shift: the first is 2**shift times too large, the second
    2**(shift + 2) times; the bits that a shift drops are zeros."""
    sums = []
    for weights, values in zip(pair, activations, strict=True):
        dot = s.ints(0)
        for weight, quad in zip(weights, values, strict=True):
            dot = s.dot(dot, weight, quad)
        sums.append(dot)
    even, odd = s.shift_right(sums[0], shift or 0), s.shift_left(sums[1], 16 if shift is None else 14 - shift)
    return s.dot_words(total, s.and_or(even, s.ints(0xFFFF), odd), scales)


def _add_pair_of_words(
    s: Simd, total: Any, pair: list[Any], activations: list[Any], scales: Any, _shift: int | None
) -> Any:
    """The same without VNNI, where sums of two products are 16 bits wide anyway."""
    for odd, (weights, values) in enumerate(zip(pair, activations, strict=True)):
        words = [s.byte_pairs(weight, quad) for weight, quad in zip(weights, values, strict=True)]
        both = s.lookup16(s.as_bytes(scales), s.bytes([lane // 4 * 4 + 2 * odd + lane % 2 for lane in range(16)]))
        part = s.b.add(s.b.add(words[0], words[1]), s.b.add(words[2], words[3]))
        total = s.b.add(total, s.madd(part, s.b.bitcast(both, WORDS)))
    return total


def sums_times(s: Simd, factors: list[Any], tile: Tile, n_tokens: int) -> list[Any]:
    """Per token: sums of 16 activations times 16-bit factors, eight pairs in the order of `sums16`."""
    products = []
    for t in range(n_tokens):
        product = s.ints(0)
        for pair, factor in enumerate(factors):
            product = s.dot_words(product, factor, tile.sums16(t, pair))
        products.append(product)
    return products


# -- Q2_K --------------------------------------------------------------------------------------------------------------


def _q2_k(s: Simd, meta: Any, body: Any, tile: Tile, totals: list[Any]) -> list[Any]:
    d, dmin = s.halves(meta, 0), s.halves(meta, 32)
    packed, starts = [s.load(meta, 64 + 64 * i, INTS) for i in range(4)], [s.ints(0)] * len(totals)
    if not s.vnni or len(totals) <= _FEW_Q2:
        products = _q2_few(s, packed, body, tile, starts)
    else:
        products = _add_scaled_bytes(s, tile, starts, _q2_scaled(s, packed, body), small=True)
    totals = _add_super(s, products, d, tile, totals)
    minima = [s.mask(s.shift_right(v, shift), 0x000F000F) for v in packed for shift in (4, 12)]
    return _add_super(s, sums_times(s, minima, tile, len(totals)), s.b.fneg(dmin), tile, totals)


def _q2_few(s: Simd, packed: list[Any], body: Any, tile: Tile, starts: list[Any]) -> list[Any]:
    stack = s.stack(8 * 64)
    for i, v in enumerate(packed):  # half, j
        for sixteen in range(2):
            pair = s.mask(s.shift_right(v, 8 * sixteen), 0x000F000F)
            s.store(pair, stack, 64 * (i // 2 * 4 + sixteen * 2 + i % 2))

    def weights_of(quarter: Any, _half: Any, _sixteen: Any) -> Callable[[int], list[Any]]:
        vectors = [s.load_in_order(s.at(body, quarter, 256), 64 * k, INTS) for k in range(4)]
        if s.vnni:
            return lambda shift: [s.as_bytes(s.b.and_(v, s.as_ints(s.bytes([3 << 2 * shift])))) for v in vectors]
        return lambda shift: [s.as_bytes(s.mask(s.shift_right(v, 2 * shift), 0x03030303)) for v in vectors]

    def scale_pairs(half: Any, sixteen: Any, j: int) -> Any:
        return s.load(s.at(s.at(stack, half, 256), sixteen, 128), 64 * j, INTS)

    return _add_scaled_parts(s, tile, starts, weights_of, scale_pairs, in_place=s.vnni)


def _q2_scaled(s: Simd, packed: list[Any], body: Any) -> WeightsOf:
    stack = s.stack(16 * 64)
    for part in range(16):
        scale = s.byte_field(packed[part // 4], part % 4, 4)
        s.store(s.b.mul(scale, s.ints(0x03020100)), stack, 64 * (part // 8 * 8 + part % 2 * 4 + part // 2 % 4))

    def weights_of(quarter: Any, _half: Any, _sixteen: Any) -> Callable[[int], list[Any]]:
        source, tables = s.at(body, quarter, 256), s.at(stack, quarter, 256)
        vectors = [s.load_in_order(source, 64 * k, INTS) for k in range(4)]
        return lambda shift: [
            s.lookup16(s.load(tables, 64 * shift, BYTES), _two_bits(s, v, 2 * shift)) for v in vectors
        ]

    return weights_of


# -- Q3_K --------------------------------------------------------------------------------------------------------------


def _q3_scales(s: Simd, meta: Any) -> list[Any]:
    """Scales + 32 of the 16 parts, four bytes per dword."""
    low = [s.load(meta, 32 + 64 * i, INTS) for i in range(3)]
    four_bits = [s.mask(v, 0x0F0F0F0F) for v in low[:2]] + [s.mask(s.shift_right(v, 4), 0x0F0F0F0F) for v in low[:2]]
    return [
        s.b.or_(v, s.shift_left(s.mask(s.shift_right(low[2], 2 * i), 0x03030303), 4)) for i, v in enumerate(four_bits)
    ]


def _q3_k(s: Simd, meta: Any, body: Any, tile: Tile, totals: list[Any]) -> list[Any]:
    d, scales = s.halves(meta, 0), _q3_scales(s, meta)
    for line in range(8):
        s.touch(body, 64 * line)  # the high bits
    if not s.vnni or len(totals) <= _FEW_Q3:
        products = _q3_few(s, scales, body, tile, len(totals))
    else:
        starts = [tile.start(t) for t in range(len(totals))]
        products = _add_scaled_bytes(s, tile, starts, _q3_scaled(s, scales, body), small=False)
    return _add_super(s, products, d, tile, totals)


def _q3_few(s: Simd, scales: list[Any], body: Any, tile: Tile, n_tokens: int) -> list[Any]:
    """Values 0..7; their offset of 4 is taken off through the sums of activations."""
    stack = s.stack(8 * 64)
    pairs = [s.words_sub(s.mask(s.shift_right(v, shift), 0x003F003F), 32) for v in scales for shift in (0, 8)]
    for i, pair in enumerate(pairs):  # half, j, sixteen -> half, sixteen, j
        s.store(pair, stack, 64 * (i // 4 * 4 + i % 2 * 2 + i // 2 % 2))
    offsets = [s.as_ints(s.b.shl(s.b.bitcast(pair, WORDS), s.words(2))) for pair in pairs]
    starts = [s.b.neg(v) for v in sums_times(s, offsets, tile, n_tokens)]

    def weights_of(quarter: Any, half: Any, sixteen: Any) -> Callable[[int], list[Any]]:
        source, highs = s.at(body, quarter, 256, 512), s.at(body, sixteen, 256)
        vectors = [s.load_in_order(source, 64 * k, INTS) for k in range(4)]
        count = s.splat(s.b.trunc(s.b.mul(half, I64(4)), I32))
        high = [s.shift_left(s.b.lshr(s.load(highs, 64 * k, INTS), count), 2) for k in range(4)]

        def weights(shift: int) -> list[Any]:
            four = s.ints(0x04040404)
            return [
                s.as_bytes(s.and_or(s.shift_right(h, shift), four, s.mask(s.shift_right(v, 2 * shift), 0x03030303)))
                for v, h in zip(vectors, high, strict=True)
            ]

        return weights

    def scale_pairs(half: Any, sixteen: Any, j: int) -> Any:
        return s.load(s.at(s.at(stack, half, 256), sixteen, 128), 64 * j, INTS)

    return _add_scaled_parts(s, tile, starts, weights_of, scale_pairs)


def _q3_scaled(s: Simd, scales: list[Any], body: Any) -> WeightsOf:
    """(value - 4) * (scale - 32) + 127 fits a byte for all values, -4 * -32 included."""
    stack = s.stack(32 * 64)
    bias = s.bytes([127 + 128 - 32 * value for value in range(4)])
    for part in range(16):
        scale = s.byte_field(scales[part // 4], part % 4)
        fourfold = s.as_bytes(s.b.mul(scale, s.ints(0x04040404)))
        place = 128 * (part // 8 * 8 + part % 2 * 4 + part // 2 % 4)
        s.store(s.b.sub(s.b.add(s.as_bytes(s.b.mul(scale, s.ints(0x03020100))), bias), fourfold), stack, place)
        s.store(
            s.b.sub(fourfold, s.bytes([128])), stack, place + 64
        )  # 4 * (scale - 32), added where the high bit is set

    def weights_of(quarter: Any, half: Any, sixteen: Any) -> Callable[[int], list[Any]]:
        source, highs, tables = s.at(body, quarter, 256, 512), s.at(body, sixteen, 256), s.at(stack, quarter, 512)
        vectors = [s.load_in_order(source, 64 * k, INTS) for k in range(4)]
        # The high bits of this half are bits 4 * half and up of each byte.
        count = s.splat(s.b.trunc(s.b.mul(half, I64(4)), I32))
        high = [s.as_bytes(s.b.lshr(s.load(highs, 64 * k, INTS), count)) for k in range(4)]

        def weights(shift: int) -> list[Any]:
            table, more = s.load(tables, 128 * shift, BYTES), s.load(tables, 128 * shift + 64, BYTES)
            results = []
            for v, bits in zip(vectors, high, strict=True):
                below = s.lookup16(table, _two_bits(s, v, 2 * shift))
                is_set = s.b.icmp_unsigned("!=", s.b.and_(bits, s.bytes([1 << shift])), s.bytes([0]))
                results.append(s.b.select(is_set, s.b.add(below, more), below))
            return results

        return weights

    return weights_of


_T = GGMLQuantizationType

FORMATS: Final = (
    Format(_T.Q2_K, 256, 84, 320, 1024, Panel(SUPER256),
           (Field(80, 2, 2, 0, in_meta=True), Field(0, 4, 4, 64, in_meta=True), Field(16, 4, 16, 0)), _q2_k, FEW),
    Format(_T.Q3_K, 256, 110, 224, 1536, Panel(SUPER256, 127),
           (Field(108, 2, 1, 0, in_meta=True), Field(96, 4, 3, 32, in_meta=True), Field(0, 4, 24, 0)), _q3_k, FEW),
)  # fmt: skip
