"""Weight formats as they lie in interleaved slots, and the vector code that unpacks them.

A matrix is cut into groups of 16 rows. Of a group, first the *meta* parts of all units lie one after another (scales), padded to
64 bytes, then their *bodies*; a unit is one block of the ggml type (32 plain floats for the float types). Within both, item i of
row r lies at i * 16 + r, an item being what `Field` says, so that one vector load brings the same item of 16 rows. All formats
keep ggml's size per weight; only order changes. Block layouts are those of ggml-common.h, ggml 0.25.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from gguf import GGMLQuantizationType
from llvmlite import ir

from localrun.offload.kernels.panels import BLOCK32, FLOAT32, SUM, SUPER256, Panel
from localrun.offload.kernels.simd import BYTES, FLOATS, I16, I32, I64, INTS, Simd

COPY: Final = 0
XOR: Final = 1  # flips the top bit of every byte: signed to offset 128
SIGNS: Final = 2  # odd items: 4 x 7 sign bits and a 4-bit scale become 4 bytes of 7 sign bits below one scale bit


@dataclass(frozen=True, slots=True)
class Field:
    """`count` items of `width` bytes from offset `source` of a block; they go to `target` in the meta or the body."""

    source: int
    width: int
    count: int
    target: int
    in_meta: bool = False
    change: int = COPY


@dataclass(frozen=True, slots=True)
class Format:
    """One ggml type's interleaved layout.

    Attributes:
        block_bytes: ggml's block (of `panel.unit` or, for Q4_K's family, 256 elements).
        unit: elements of a block.
        meta_bytes, body_bytes: of one unit of 16 rows.
        step: emits code that adds one unit's products to the accumulators.
    """

    type: GGMLQuantizationType
    unit: int
    block_bytes: int
    meta_bytes: int
    body_bytes: int
    panel: Panel
    fields: tuple[Field, ...]
    step: Callable[[Simd, Any, Any, Tile, list[Any]], list[Any]]

    def group_bytes(self, n_in: int) -> int:
        """Bytes of 16 rows of `n_in` elements."""
        units = -(-n_in // self.unit)
        return -(-units * self.meta_bytes // 64) * 64 + units * self.body_bytes

    def matrix_bytes(self, n_out: int, n_in: int) -> int:
        return -(-n_out // 16) * self.group_bytes(n_in)


class Tile:
    """A record of the activation panel, seen from the code emitter: what to broadcast for token t."""

    def __init__(self, simd: Simd, record: Any, n_tokens: int, kind: int) -> None:
        self.s, self.record, self.n_tokens = simd, record, n_tokens
        self.values = {BLOCK32: 32, SUPER256: 256, FLOAT32: 128}[kind]
        self.record_bytes = {BLOCK32: 40, SUPER256: 296, FLOAT32: 128}[kind] * n_tokens

    def next(self, index: Any, kind: int) -> Tile:
        """The record `index` further on (a run-time value)."""
        return Tile(self.s, self.s.at(self.record, index, self.record_bytes), self.n_tokens, kind)

    def quad(self, token: int, quad: int, base: Any = None) -> Any:
        """Four activations in all lanes."""
        return self.s.splat_dword(self.record if base is None else base, token * self.values + quad * 4)

    def f32(self, token: int, index: int) -> Any:
        return self.s.splat_f32(self.record, token * self.values + index * 4)

    def scale(self, token: int) -> Any:
        return self.s.splat_f32(self.record, self.n_tokens * self.values + token * 4)

    def start(self, token: int) -> Any:
        return self.s.splat_i32(self.record, self.n_tokens * (self.values + 4) + token * 4)

    def sum(self, token: int) -> Any:
        return self.s.splat_f32(self.record, self.n_tokens * (self.values + 4) + token * 4)

    def sums16(self, token: int, pair: int) -> Any:
        return self.s.splat_i32(self.record, self.n_tokens * 264 + token * 32 + pair * 4)


def _add_block(s: Simd, weights: list[Any], scale: Any, tile: Tile, totals: list[Any], *, start: bool) -> list[Any]:
    """One block of 32: eight unsigned byte vectors, a scale per row."""
    results = []
    for t, total in enumerate(totals):
        dot = tile.start(t) if start else s.ints(0)
        for quad, weight in enumerate(weights):
            dot = s.dot(dot, weight, tile.quad(t, quad))
        results.append(s.fma(s.to_float(dot), s.mul(scale, tile.scale(t)), total))
    return results


# -- MXFP4 and Q8_0: blocks of 32 -------------------------------------------------------------------------------------

_E2M1 = (
    0,
    1,
    2,
    3,
    4,
    6,
    8,
    12,
    0,
    -1,
    -2,
    -3,
    -4,
    -6,
    -8,
    -12,
)  # twice the value; OCP MX specification 1.0, section 5.3.3


def _nibbles(s: Simd, vectors: list[Any]) -> tuple[list[Any], list[Any]]:
    low = [s.as_bytes(s.mask(v, 0x0F0F0F0F)) for v in vectors]
    return low, [s.as_bytes(s.mask(s.shift_right(v, 4), 0x0F0F0F0F)) for v in vectors]


def _mxfp4(s: Simd, meta: Any, body: Any, tile: Tile, totals: list[Any]) -> list[Any]:
    table = s.bytes([v + 12 for v in _E2M1])
    low, high = _nibbles(s, [s.load(body, 64 * i, INTS) for i in range(4)])
    weights = [s.lookup16(table, v) for v in low + high]
    # E8M0: the bits are an F32 exponent. Halved for the doubled table; 2**-127 becomes 0.
    scale = s.mul(s.b.bitcast(s.shift_left(s.byte_lanes(meta, 0), 23), FLOATS), s.floats(0.5))
    return _add_block(s, weights, scale, tile, totals, start=True)


def _q8_0(s: Simd, meta: Any, body: Any, tile: Tile, totals: list[Any]) -> list[Any]:
    return _add_block(s, [s.load(body, 64 * i, BYTES) for i in range(8)], s.halves(meta, 0), tile, totals, start=True)


# -- K-quants: super-blocks of 256 ------------------------------------------------------------------------------------


def _q4_k(s: Simd, meta: Any, body: Any, tile: Tile, totals: list[Any]) -> list[Any]:
    d, dmin = s.halves(meta, 0), s.halves(meta, 32)
    packed = [s.load(meta, 64 + 64 * i, INTS) for i in range(3)]
    scales = (
        s.mask(packed[0], 0x3F3F3F3F),
        s.b.or_(s.mask(packed[2], 0x0F0F0F0F), s.mask(s.shift_right(packed[0], 2), 0x30303030)),
    )
    mins = (
        s.mask(packed[1], 0x3F3F3F3F),
        s.b.or_(s.mask(s.shift_right(packed[2], 4), 0x0F0F0F0F), s.mask(s.shift_right(packed[1], 2), 0x30303030)),
    )
    stack = s.stack(16 * 64)
    for block in range(8):
        s.store(s.mul(d, s.to_float(s.byte_field(scales[block // 4], block % 4))), stack, 128 * block)
        s.store(s.mul(dmin, s.to_float(s.byte_field(mins[block // 4], block % 4))), stack, 128 * block + 64)

    def chunk(i: Any, totals: list[Any]) -> list[Any]:
        source, factors = s.at(body, i, 512), s.at(stack, i, 256)
        for half, weights in enumerate(_nibbles(s, [s.load(source, 64 * k, INTS) for k in range(8)])):
            totals = add(weights, factors, 128 * half, s.b.add(s.b.mul(i, I64(2)), I64(half)), totals)
        return totals

    def block(i: Any, totals: list[Any]) -> list[Any]:
        # With many tokens there are registers for one half's weights only: load again and shift for the other.
        source, shift = (
            s.at(body, s.b.lshr(i, I64(1)), 512),
            s.splat(s.b.trunc(s.b.mul(s.b.and_(i, I64(1)), I64(4)), I32)),
        )
        weights = [s.as_bytes(s.mask(s.b.lshr(s.load(source, 64 * k, INTS), shift), 0x0F0F0F0F)) for k in range(8)]
        return add(weights, s.at(stack, i, 128), 0, i, totals)

    def add(weights: list[Any], factors: Any, offset: int, index: Any, totals: list[Any]) -> list[Any]:
        record = tile.next(index, BLOCK32)
        totals = _add_block(s, weights, s.load(factors, offset, FLOATS), record, totals, start=False)
        minimum = s.b.fneg(s.load(factors, offset + 64, FLOATS))
        return [s.fma(minimum, record.sum(t), total) for t, total in enumerate(totals)]

    return s.loop(I64(4), totals, chunk) if len(totals) < 8 else s.loop(I64(8), totals, block)


def _two_bits(s: Simd, vector: Any, shift: int) -> Any:
    """Indices into a row's four-byte table: two bits of each byte, plus 4 * (row % 4)."""
    return s.choose(3, s.as_bytes(s.shift_right(vector, shift)), s.bytes([lane // 4 * 4 for lane in range(16)]))


def _add_super(s: Simd, products: list[Any], d: Any, tile: Tile, totals: list[Any]) -> list[Any]:
    return [
        s.fma(s.to_float(p), s.mul(d, tile.scale(t)), total)
        for t, (p, total) in enumerate(zip(products, totals, strict=True))
    ]


def _n_chains(n_tokens: int) -> int:
    """Independent sums per token: a dot product takes five cycles, two can start in each."""
    return max(1, min(4, 8 // n_tokens))


def _join(s: Simd, products: list[Any], n_tokens: int) -> list[Any]:
    """Adds up the chains of each token."""
    while len(products) > n_tokens:
        half = len(products) // 2
        products = [s.b.add(a, b) for a, b in zip(products[:half], products[half:], strict=True)]
    return products


def _q2_k(s: Simd, meta: Any, body: Any, tile: Tile, totals: list[Any]) -> list[Any]:
    """Scale times 2-bit value is looked up as one byte, so that a whole super-block adds up in integers."""
    d, dmin = s.halves(meta, 0), s.halves(meta, 32)
    packed = [s.load(meta, 64 + 64 * i, INTS) for i in range(4)]
    stack = s.stack(16 * 64)
    for part in range(16):  # stored in the order of use: half of the super-block, half of 32, shift
        half, shift, sixteen = part // 8, part // 2 % 4, part % 2
        scale = s.byte_field(packed[part // 4], part % 4, 4)
        s.store(s.b.mul(scale, s.ints(0x03020100)), stack, 64 * (half * 8 + sixteen * 4 + shift))

    def quarter(i: Any, products: list[Any]) -> list[Any]:
        source, tables = s.at(body, i, 256), s.at(stack, i, 256)
        vectors = [s.load(source, 64 * k, INTS) for k in range(4)]
        first = s.b.add(s.b.mul(s.b.lshr(i, I64(1)), I64(128)), s.b.mul(s.b.and_(i, I64(1)), I64(16)))
        quads = s.b.gep(tile.record, [first])
        for shift in range(4):
            table = s.load(tables, 64 * shift, BYTES)
            weights = [s.lookup16(table, _two_bits(s, v, 2 * shift)) for v in vectors]
            for t in range(len(totals)):
                for k, weight in enumerate(weights):
                    chain = k % n_chains * len(totals) + t
                    products[chain] = s.dot(products[chain], weight, tile.quad(t, shift * 8 + k, quads))
        return products

    n_chains = _n_chains(len(totals))
    products = _join(s, s.loop(I64(4), [s.ints(0)] * (len(totals) * n_chains), quarter), len(totals))
    totals = _add_super(s, products, d, tile, totals)
    minima = [s.mask(s.shift_right(v, shift), 0x000F000F) for v in packed for shift in (4, 12)]
    products = []
    for t in range(len(totals)):
        product = s.ints(0)
        for pair, minimum in enumerate(minima):
            product = s.dot_words(product, minimum, tile.sums16(t, pair))
        products.append(product)
    return _add_super(s, products, s.b.fneg(dmin), tile, totals)


def _q3_k(s: Simd, meta: Any, body: Any, tile: Tile, totals: list[Any]) -> list[Any]:
    """As Q2_K; (value - 4) * (scale - 32) + 127 fits a byte for all values, -4 * -32 included."""
    d = s.halves(meta, 0)
    low = [s.load(meta, 32 + 64 * i, INTS) for i in range(3)]
    nibbles = [s.mask(low[0], 0x0F0F0F0F), s.mask(low[1], 0x0F0F0F0F)]
    nibbles += [s.mask(s.shift_right(v, 4), 0x0F0F0F0F) for v in low[:2]]
    scales = [
        s.b.or_(nibble, s.shift_left(s.mask(s.shift_right(low[2], 2 * i), 0x03030303), 4))
        for i, nibble in enumerate(nibbles)
    ]
    stack = s.stack(32 * 64)
    bias = s.bytes([127 + 128 - 32 * value for value in range(4)])
    for part in range(16):
        half, shift, sixteen = part // 8, part // 2 % 4, part % 2
        scale = s.byte_field(scales[part // 4], part % 4)
        fourfold = s.as_bytes(s.b.mul(scale, s.ints(0x04040404)))
        table = s.b.sub(s.b.add(s.as_bytes(s.b.mul(scale, s.ints(0x03020100))), bias), fourfold)
        place = 128 * (half * 8 + sixteen * 4 + shift)
        s.store(table, stack, place)
        s.store(
            s.b.sub(fourfold, s.bytes([128])), stack, place + 64
        )  # 4 * (scale - 32), added where the high bit is set

    def quarter(i: Any, products: list[Any]) -> list[Any]:
        source, tables = s.at(body, i, 256, 512), s.at(stack, i, 512)
        half, sixteen = s.b.lshr(i, I64(1)), s.b.and_(i, I64(1))
        highs = s.at(body, sixteen, 256)
        vectors = [s.load(source, 64 * k, INTS) for k in range(4)]
        # The high bits of this half are bits 4 * half and up of each byte.
        count = s.splat(s.b.trunc(s.b.mul(half, I64(4)), I32))
        high = [s.b.lshr(s.load(highs, 64 * k, INTS), count) for k in range(4)]
        quads = s.b.gep(tile.record, [s.b.add(s.b.mul(half, I64(128)), s.b.mul(sixteen, I64(16)))])
        for shift in range(4):
            table, more = s.load(tables, 128 * shift, BYTES), s.load(tables, 128 * shift + 64, BYTES)
            weights = []
            for k, v in enumerate(vectors):
                below = s.lookup16(table, _two_bits(s, v, 2 * shift))
                bit = s.b.icmp_unsigned("!=", s.b.and_(s.as_bytes(high[k]), s.bytes([1 << shift])), s.bytes([0]))
                weights.append(s.b.select(bit, s.b.add(below, more), below))
            for t in range(len(totals)):
                for k, weight in enumerate(weights):
                    chain = k % n_chains * len(totals) + t
                    products[chain] = s.dot(products[chain], weight, tile.quad(t, shift * 8 + k, quads))
        return products

    n_chains = _n_chains(len(totals))
    starts = [tile.start(t) for t in range(len(totals))] + [s.ints(0)] * (len(totals) * (n_chains - 1))
    return _add_super(s, _join(s, s.loop(I64(4), starts, quarter), len(totals)), d, tile, totals)


# -- plain floats -----------------------------------------------------------------------------------------------------


def _floats(read: Callable[[Simd, Any, int], Any]) -> Callable[[Simd, Any, Any, Tile, list[Any]], list[Any]]:
    def step(s: Simd, _meta: Any, body: Any, tile: Tile, totals: list[Any]) -> list[Any]:
        # Four sums per token break the chain of dependent additions.
        parts = [[total] + [s.floats(0.0)] * 3 for total in totals]
        for i in range(32):
            weights = read(s, body, i)
            for t, part in enumerate(parts):
                part[i % 4] = s.fma(weights, tile.f32(t, i), part[i % 4])
        return [s.b.fadd(s.b.fadd(p[0], p[1]), s.b.fadd(p[2], p[3])) for p in parts]

    return step


def _read_bf16(s: Simd, body: Any, i: int) -> Any:
    return s.b.bitcast(s.shift_left(s.b.zext(s.load(body, 32 * i, ir.VectorType(I16, 16)), INTS), 16), FLOATS)


def _read_f16(s: Simd, body: Any, i: int) -> Any:
    return s.halves(body, 32 * i)


def _read_f32(s: Simd, body: Any, i: int) -> Any:
    return s.load(body, 64 * i, FLOATS)


_T = GGMLQuantizationType
_FLOAT = Panel(FLOAT32)

FORMATS: Final[dict[GGMLQuantizationType, Format]] = {
    f.type: f
    for f in (
        Format(_T.MXFP4, 32, 17, 16, 256, Panel(BLOCK32, 12), (Field(0, 1, 1, 0, True), Field(1, 4, 4, 0)), _mxfp4),
        Format(_T.Q8_0, 32, 34, 32, 512, Panel(BLOCK32, 128), (Field(0, 2, 1, 0, True), Field(2, 4, 8, 0, change=XOR)), _q8_0),
        Format(
            _T.Q4_K, 256, 144, 256, 2048, Panel(BLOCK32, SUM),
            (Field(0, 2, 2, 0, True), Field(4, 4, 3, 64, True), Field(16, 4, 32, 0)), _q4_k,
        ),
        Format(
            _T.Q2_K, 256, 84, 320, 1024, Panel(SUPER256),
            (Field(80, 2, 2, 0, True), Field(0, 4, 4, 64, True), Field(16, 4, 16, 0)), _q2_k,
        ),
        Format(
            _T.Q3_K, 256, 110, 224, 1536, Panel(SUPER256, 127),
            (Field(108, 2, 1, 0, True), Field(96, 4, 3, 32, True), Field(0, 4, 8, 0), Field(32, 4, 16, 512)), _q3_k,
        ),
        Format(_T.BF16, 32, 64, 0, 1024, _FLOAT, (Field(0, 2, 32, 0),), _floats(_read_bf16)),
        Format(_T.F16, 32, 64, 0, 1024, _FLOAT, (Field(0, 2, 32, 0),), _floats(_read_f16)),
        Format(_T.F32, 32, 128, 0, 2048, _FLOAT, (Field(0, 4, 32, 0),), _floats(_read_f32)),
    )
}  # fmt: skip
