"""K-quants and IQ4_XS: super-blocks of 256 with small integer scales (ggml-common.h: block_q2_K and so on).

Q2_K and Q3_K look up scale times value as one byte, so that a whole super-block adds up in integers; the others have a scale per
32 or 16 elements that is too large for that, and add up in F32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from gguf import GGMLQuantizationType

from localrun.offload.kernels.interleaved.blocks import IQ4_NL
from localrun.offload.kernels.interleaved.layout import Field, Format, Tile, add_block, nibbles
from localrun.offload.kernels.panels import BLOCK32, SUM, SUPER256, Panel
from localrun.offload.kernels.simd import BYTES, FLOATS, HALF_WORDS, I32, I64, INTS, WORDS, Simd

# -- Q4_K and Q5_K: eight blocks of 32, each with a 6-bit scale and minimum -------------------------------------------


def _scales_and_minima(s: Simd, meta: Any) -> Any:
    """F32 scale and minimum per block, 128 bytes apart on the stack. 12 bytes hold 8 + 8 six-bit numbers (get_scale_min_k4)."""
    d, dmin = s.halves(meta, 0), s.halves(meta, 32)
    first, second, third = (s.load(meta, 64 + 64 * i, INTS) for i in range(3))
    scales = (
        s.mask(first, 0x3F3F3F3F),
        s.b.or_(s.mask(third, 0x0F0F0F0F), s.mask(s.shift_right(first, 2), 0x30303030)),
    )
    high_nibbles = s.mask(s.shift_right(third, 4), 0x0F0F0F0F)
    minima = (s.mask(second, 0x3F3F3F3F), s.b.or_(high_nibbles, s.mask(s.shift_right(second, 2), 0x30303030)))
    stack = s.stack(8 * 128)
    for block in range(8):
        s.store(s.mul(d, s.to_float(s.byte_field(scales[block // 4], block % 4))), stack, 128 * block)
        s.store(s.mul(dmin, s.to_float(s.byte_field(minima[block // 4], block % 4))), stack, 128 * block + 64)
    return stack


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
    stack = _scales_and_minima(s, meta)

    def chunk(i: Any, totals: list[Any]) -> list[Any]:
        source = s.at(body, i, 512)
        for half, weights in enumerate(nibbles(s, [s.load(source, 64 * k, INTS) for k in range(8)])):
            block = s.b.add(s.b.mul(i, I64(2)), I64(half))
            totals = _add_with_minimum(s, weights, s.at(stack, block, 128), tile.next(block), totals)
        return totals

    def block(i: Any, totals: list[Any]) -> list[Any]:
        weights = [s.as_bytes(v) for v in _nibbles_of_block(s, body, i)]
        return _add_with_minimum(s, weights, s.at(stack, i, 128), tile.next(i), totals)

    # With many tokens there are registers for one half's weights only: load them again for the other.
    return s.loop(I64(4), totals, chunk) if len(totals) < 8 else s.loop(I64(8), totals, block)


def _q5_k(s: Simd, meta: Any, body: Any, tile: Tile, totals: list[Any]) -> list[Any]:
    stack, highs = _scales_and_minima(s, meta), body

    def block(i: Any, totals: list[Any]) -> list[Any]:
        shift, weights = s.splat(s.b.trunc(i, I32)), []
        for k, low in enumerate(_nibbles_of_block(s, s.b.gep(body, [I64(512)]), i)):
            bit = s.mask(s.b.lshr(s.load(highs, 64 * k, INTS), shift), 0x01010101)
            weights.append(s.as_bytes(s.b.or_(low, s.shift_left(bit, 4))))
        return _add_with_minimum(s, weights, s.at(stack, i, 128), tile.next(i), totals)

    return s.loop(I64(8), totals, block)


# -- Q2_K and Q3_K: sixteen parts of 16 -------------------------------------------------------------------------------
#
# Part p has bits 2 * shift and up (shift = p // 2 % 4) of bytes 16 * (p % 2) and up of half p // 8. Scale times value is looked up
# as one byte, so that a whole super-block adds up in one go per token. For Q3_K and few tokens that unpacks too much: there, sums
# of parts are multiplied by their scales as 16-bit pairs. [m] Q3_K, one token: 26 against 35 cycles per 512 weights.

_FEW: Final = 2


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


def _add_scaled_parts(
    s: Simd, tile: Tile, starts: list[Any], weights_of: WeightsOf, scale_pairs: Callable[[Any, Any, int], Any]
) -> list[Any]:
    """Few tokens: as above. `scale_pairs(half, sixteen, j)`: 16-bit scales of the parts with shifts 2j and 2j + 1.

    A part's sum is below 7 * 127 * 16 and so fits 16 bits.
    """
    low_words = s.ints(0xFFFF)

    def quarter(i: Any, products: list[Any]) -> list[Any]:
        half, sixteen = s.b.lshr(i, I64(1)), s.b.and_(i, I64(1))
        quads, weights_at = _quads(s, tile, half, sixteen), weights_of(i, half, sixteen)
        for j in range(2):
            sums: list[list[Any]] = [[], []]
            for parity in range(2):
                weights = weights_at(2 * j + parity)
                for t in range(len(starts)):
                    dot = s.ints(0)
                    for k, weight in enumerate(weights):
                        dot = s.dot(dot, weight, tile.quad(t, (2 * j + parity) * 8 + k, quads))
                    sums[parity].append(dot)
            scales = scale_pairs(half, sixteen, j)
            for t, (even, odd) in enumerate(zip(*sums, strict=True)):
                products[t] = s.dot_words(products[t], s.and_or(even, low_words, s.shift_left(odd, 16)), scales)
        return products

    return s.loop(I64(4), starts, quarter)


def _sums_times(s: Simd, factors: list[Any], tile: Tile, n_tokens: int) -> list[Any]:
    """Per token: sums of 16 activations times 16-bit factors, eight pairs in the order of `sums16`."""
    products = []
    for t in range(n_tokens):
        product = s.ints(0)
        for pair, factor in enumerate(factors):
            product = s.dot_words(product, factor, tile.sums16(t, pair))
        products.append(product)
    return products


def _q2_k(s: Simd, meta: Any, body: Any, tile: Tile, totals: list[Any]) -> list[Any]:
    d, dmin = s.halves(meta, 0), s.halves(meta, 32)
    packed = [s.load(meta, 64 + 64 * i, INTS) for i in range(4)]
    products = _add_scaled_bytes(s, tile, [s.ints(0)] * len(totals), _q2_scaled(s, packed, body), small=True)
    totals = _add_super(s, products, d, tile, totals)
    minima = [s.mask(s.shift_right(v, shift), 0x000F000F) for v in packed for shift in (4, 12)]
    return _add_super(s, _sums_times(s, minima, tile, len(totals)), s.b.fneg(dmin), tile, totals)


def _q2_scaled(s: Simd, packed: list[Any], body: Any) -> WeightsOf:
    stack = s.stack(16 * 64)
    for part in range(16):
        scale = s.byte_field(packed[part // 4], part % 4, 4)
        s.store(s.b.mul(scale, s.ints(0x03020100)), stack, 64 * (part // 8 * 8 + part % 2 * 4 + part // 2 % 4))

    def weights_of(quarter: Any, _half: Any, _sixteen: Any) -> Callable[[int], list[Any]]:
        source, tables = s.at(body, quarter, 256), s.at(stack, quarter, 256)
        vectors = [s.load(source, 64 * k, INTS) for k in range(4)]
        return lambda shift: [
            s.lookup16(s.load(tables, 64 * shift, BYTES), _two_bits(s, v, 2 * shift)) for v in vectors
        ]

    return weights_of


def _q3_scales(s: Simd, meta: Any) -> list[Any]:
    """Scales + 32 of the 16 parts, four bytes per dword."""
    low = [s.load(meta, 32 + 64 * i, INTS) for i in range(3)]
    four_bits = [s.mask(v, 0x0F0F0F0F) for v in low[:2]] + [s.mask(s.shift_right(v, 4), 0x0F0F0F0F) for v in low[:2]]
    return [
        s.b.or_(v, s.shift_left(s.mask(s.shift_right(low[2], 2 * i), 0x03030303), 4)) for i, v in enumerate(four_bits)
    ]


def _q3_k(s: Simd, meta: Any, body: Any, tile: Tile, totals: list[Any]) -> list[Any]:
    d, scales = s.halves(meta, 0), _q3_scales(s, meta)
    if len(totals) <= _FEW:
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
    starts = [s.b.neg(v) for v in _sums_times(s, offsets, tile, n_tokens)]

    def weights_of(quarter: Any, half: Any, sixteen: Any) -> Callable[[int], list[Any]]:
        source, highs = s.at(body, quarter, 256, 512), s.at(body, sixteen, 256)
        vectors = [s.load(source, 64 * k, INTS) for k in range(4)]
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
        vectors = [s.load(source, 64 * k, INTS) for k in range(4)]
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


# -- Q6_K: sixteen parts of 16 with 8-bit scales ----------------------------------------------------------------------


def _q6_k(s: Simd, meta: Any, body: Any, tile: Tile, totals: list[Any]) -> list[Any]:
    n_tokens = len(totals)
    d, packed = s.halves(meta, 0), [s.load(meta, 32 + 64 * i, INTS) for i in range(4)]
    stack = s.stack(16 * 64)
    for part in range(16):  # half, quarter of the half, half of the quarter -> half, half of the quarter, quarter
        signed = s.b.ashr(s.shift_left(packed[part // 4], 24 - 8 * (part % 4)), s.ints(24))
        s.store(s.to_float(signed), stack, 64 * (part // 8 * 8 + part % 2 * 4 + part // 2 % 4))

    def eighth(i: Any, sums: list[Any]) -> list[Any]:
        half, sixteen = s.b.lshr(i, I64(1)), s.b.and_(i, I64(1))
        source = s.b.gep(body, [s.b.add(s.b.mul(half, I64(1024)), s.b.mul(sixteen, I64(256)))])
        high = s.at(body, i, 256, 2048)
        quads = s.b.gep(tile.record, [s.b.add(s.b.mul(half, I64(128)), s.b.mul(sixteen, I64(16)))])
        for quarter in range(4):
            weights = []
            for k in range(4):
                low = s.shift_right(s.load(source, 64 * k + 512 * (quarter % 2), INTS), 4 * (quarter // 2))
                top = s.load(high, 64 * k, INTS)
                top = s.shift_left(top, 4 - 2 * quarter) if quarter < 2 else s.shift_right(top, 2 * quarter - 4)
                weights.append(s.as_bytes(s.b.or_(s.mask(low, 0x0F0F0F0F), s.mask(top, 0x30303030))))
            scale = s.load(s.at(stack, i, 256), 64 * quarter, FLOATS)
            for t in range(n_tokens):
                dot = s.ints(0)
                for k, weight in enumerate(weights):
                    dot = s.dot(dot, weight, tile.quad(t, quarter * 8 + k, quads))
                sums[t] = s.fma(s.to_float(dot), scale, sums[t])
        return sums

    sums = s.loop(I64(4), [s.floats(0.0)] * n_tokens, eighth)
    # The weights' offset of 32: 32 * scale * sum(q), as pairs of 16-bit scales in the order of `sums16`.
    pairs = []
    for v in packed:
        words, eight = s.b.bitcast(v, WORDS), s.words(8)
        pairs += [s.b.ashr(s.b.shl(words, eight), eight), s.b.ashr(words, eight)]
    offsets = _sums_times(s, pairs, tile, n_tokens)
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
        first, second = nibbles(s, [s.load(source, 64 * k, INTS) for k in range(4)])
        weights = [s.lookup16(table, v) for v in first + second]
        return add_block(s, weights, s.load(s.at(stack, i, 64), 0, FLOATS), tile.next(i), totals, small=False)

    return s.loop(I64(8), totals, block_of)


_T = GGMLQuantizationType
_D_DMIN_SCALES = (Field(0, 2, 2, 0, in_meta=True), Field(4, 4, 3, 64, in_meta=True))

FORMATS: Final = (
    Format(_T.Q2_K, 256, 84, 320, 1024, Panel(SUPER256),
           (Field(80, 2, 2, 0, in_meta=True), Field(0, 4, 4, 64, in_meta=True), Field(16, 4, 16, 0)), _q2_k),
    Format(_T.Q3_K, 256, 110, 224, 1536, Panel(SUPER256, 127),
           (Field(108, 2, 1, 0, in_meta=True), Field(96, 4, 3, 32, in_meta=True), Field(0, 4, 24, 0)), _q3_k),
    Format(_T.Q4_K, 256, 144, 256, 2048, Panel(BLOCK32, SUM), (*_D_DMIN_SCALES, Field(16, 4, 32, 0)), _q4_k),
    Format(_T.Q5_K, 256, 176, 256, 2560, Panel(BLOCK32, SUM), (*_D_DMIN_SCALES, Field(16, 4, 40, 0)), _q5_k),
    Format(_T.Q6_K, 256, 210, 288, 3072, Panel(SUPER256),
           (Field(208, 2, 1, 0, in_meta=True), Field(192, 4, 4, 32, in_meta=True), Field(0, 4, 48, 0)), _q6_k),
    Format(_T.IQ4_XS, 256, 136, 128, 2048, Panel(BLOCK32, 127),
           (Field(0, 2, 2, 0, in_meta=True), Field(4, 4, 1, 64, in_meta=True), Field(8, 4, 32, 0)), _iq4_xs),
)  # fmt: skip
