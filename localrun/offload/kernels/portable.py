"""Vector code of the generic kernels, in plain LLVM: unpacking 32 weights of one row, and dot products with a tile's tokens.

Sums per token are vectors of 16 F32, 64 bytes apart at `totals`, added up across only at the end of a row.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from localrun.offload.kernels.simd import F32, FLOATS, I8, I16, I32, I64, INTS, Simd

_BYTES16, _BYTES32, _WORDS32 = ir.VectorType(I8, 16), ir.VectorType(I8, 32), ir.VectorType(I16, 32)
_WORDS16 = ir.VectorType(I16, 16)


def _add_tokens(s: Simd, weights: Any, scale: Any, minimum: Any, record: Any, nt: Any, totals: Any) -> None:
    """totals[t] += scale * w . x - minimum * sum(x): one block of 32 int8 and a BLOCK32 record with SUM."""
    b = s.b
    words, record, totals = b.sext(weights, _WORDS32), s.pointer(record), s.pointer(totals)
    tail, sums = b.gep(record, [b.mul(nt, I64(32))]), b.gep(record, [b.mul(nt, I64(36))])

    def token(t: Any, _carried: list[Any]) -> list[Any]:
        dot = s.madd(words, b.sext(s.load(s.at(record, t, 32), 0, _BYTES32), _WORDS32))
        target = s.at(totals, t, 64)
        factor = b.fmul(scale, s.load(s.at(tail, t, 4), 0, F32))
        total = s.fma(s.to_float(dot), s.splat(factor), s.load(target, 0, FLOATS))
        least = b.fmul(minimum, s.load(s.at(sums, t, 4), 0, F32))
        s.store(b.fsub(total, b.insert_element(s.floats(0.0), least, I32(0))), target)
        return []

    s.loop(nt, [], token)


def _bits(s: Simd, source: Any, shift: Any, mask: Any) -> Any:
    shift, mask = (s.splat(s.b.trunc(v, I8), 32) for v in (shift, mask))
    return s.b.and_(s.b.lshr(s.load(s.pointer(source), 0, _BYTES32), shift), mask)


@intrinsic
def add_int8(_typing: Any, source: Any, scale: Any, record: Any, nt: Any, totals: Any) -> Any:
    """A block of 32 int8."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        s = Simd(builder)
        _add_tokens(s, s.load(s.pointer(args[0]), 0, _BYTES32), args[1], F32(0.0), *args[2:])
        return context.get_dummy_value()

    return types.void(types.intp, types.float32, *[types.intp] * 3), codegen


@intrinsic
def add_bits(_typing: Any, low: Any, shift: Any, mask: Any, high: Any, high_shift: Any, high_mask: Any, up: Any, scale: Any,
             minimum: Any, record: Any, nt: Any, totals: Any) -> Any:  # fmt: skip
    """A block of 32 weights (low >> shift & mask) | (high >> high_shift & high_mask) << up, 32 bytes at `low` and at `high`."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        s = Simd(builder)
        more = builder.shl(_bits(s, *args[3:6]), s.splat(builder.trunc(args[6], I8), 32))
        _add_tokens(s, builder.or_(_bits(s, *args[:3]), more), *args[7:])
        return context.get_dummy_value()

    return types.void(*[types.intp] * 7, types.float32, types.float32, *[types.intp] * 3), codegen


@intrinsic
def add_e2m1(_typing: Any, source: Any, scale: Any, record: Any, nt: Any, totals: Any) -> Any:
    """A block of 16 bytes of two FP4 codes, low halves first; weights are twice their value."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        s = Simd(builder)
        packed = s.load(s.pointer(args[0]), 0, _BYTES16)
        halves = builder.and_(packed, _bytes(15, 16)), builder.lshr(packed, _bytes(4, 16))
        code = builder.shuffle_vector(*halves, ir.Constant(ir.VectorType(I32, 32), list(range(32))))
        size = builder.and_(code, _bytes(7))
        value = size  # 0 1 2 3 4 5 6 7 -> 0 1 2 3 4 6 8 12
        for above, more in ((4, 1), (5, 1), (6, 3)):
            value = builder.select(
                builder.icmp_unsigned(">", size, _bytes(above)), builder.add(value, _bytes(more)), value
            )
        negative = builder.icmp_unsigned(">", code, _bytes(7))
        weights = builder.select(negative, builder.sub(_bytes(0), value), value)
        _add_tokens(s, weights, args[1], F32(0.0), *args[2:])
        return context.get_dummy_value()

    return types.void(types.intp, types.float32, *[types.intp] * 3), codegen


def _bytes(value: int, count: int = 32) -> Any:
    return ir.Constant(ir.VectorType(I8, count), [value] * count)


@intrinsic
def add_grid(
    _typing: Any, entry_bytes: Any, indices: Any, signs: Any, table: Any, scale: Any, record: Any, nt: Any, totals: Any
) -> Any:
    """A block of 32 from a grid of `entry_bytes` (a constant) per index.

    signs: four times seven bits from bit 0 on. table: 128 eight-byte masks of signs, then the grid.
    """
    if not isinstance(entry_bytes, types.IntegerLiteral):
        return None
    n = entry_bytes.literal_value

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        s = Simd(builder)
        indices, signs, table = s.pointer(args[1]), args[2], s.pointer(args[3])
        entry = ir.IntType(8 * n)
        values = ir.Constant(ir.VectorType(entry, 32 // n), ir.Undefined)
        for i in range(32 // n):
            index = builder.zext(s.load(indices, i, I8), I64)
            values = builder.insert_element(values, s.load(s.at(table, index, n, 1024), 0, entry), I32(i))
        masks = ir.Constant(ir.VectorType(I64, 4), ir.Undefined)
        for i in range(4):
            pattern = builder.and_(builder.lshr(signs, I64(7 * i)), I64(127))
            masks = builder.insert_element(masks, s.load(s.at(table, pattern, 8), 0, I64), I32(i))
        values, masks = builder.bitcast(values, _BYTES32), builder.bitcast(masks, _BYTES32)
        _add_tokens(s, builder.sub(builder.xor(values, masks), masks), args[4], F32(0.0), *args[5:])
        return context.get_dummy_value()

    return types.void(entry_bytes, *[types.intp] * 3, types.float32, *[types.intp] * 3), codegen


@intrinsic
def unpack_bits(_typing: Any, low: Any, shift: Any, mask: Any, high: Any, high_shift: Any, high_mask: Any, up: Any, offset: Any,
                target: Any) -> Any:  # fmt: skip
    """As `add_bits`, minus an offset, but only unpacked to int8 at `target`."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        s = Simd(builder)
        more = builder.shl(_bits(s, *args[3:6]), s.splat(builder.trunc(args[6], I8), 32))
        weights = builder.sub(builder.or_(_bits(s, *args[:3]), more), s.splat(builder.trunc(args[7], I8), 32))
        s.store(weights, s.pointer(args[8]))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 9), codegen


@intrinsic
def add_super256(
    _typing: Any, w: Any, scales: Any, d: Any, minima: Any, dmin: Any, record: Any, nt: Any, totals: Any
) -> Any:
    """As above for 256 int8 and a SUPER256 record; 16 int8 scales, and int8 minima in the order of the record's sums."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        s = Simd(builder)
        w, scales, d, minima, dmin, record, nt, totals = args
        w, scales, record, totals = s.pointer(w), s.pointer(scales), s.pointer(record), s.pointer(totals)
        tail = builder.gep(record, [builder.mul(nt, I64(256))])
        sums = builder.gep(record, [builder.mul(nt, I64(264))])
        least = builder.sext(s.load(s.pointer(minima), 0, _BYTES16), INTS)

        def token(t: Any, _carried: list[Any]) -> list[Any]:
            values = s.at(record, t, 256)

            def parts(i: Any, carried: list[Any]) -> list[Any]:
                dot = s.madd(
                    builder.sext(s.load(s.at(w, i, 32), 0, _BYTES32), _WORDS32),
                    builder.sext(s.load(s.at(values, i, 32), 0, _BYTES32), _WORDS32),
                )
                pair = builder.sext(s.load(s.at(scales, i, 2), 0, ir.VectorType(I8, 2)), ir.VectorType(I32, 2))
                lanes = ir.Constant(ir.VectorType(I32, 16), [0] * 8 + [1] * 8)
                return [builder.add(carried[0], builder.mul(dot, builder.shuffle_vector(pair, pair, lanes)))]

            product = s.loop(I64(8), [s.ints(0)], parts)[0]
            target, factor = s.at(totals, t, 64), s.load(s.at(tail, t, 4), 0, F32)
            total = s.fma(s.to_float(product), s.splat(builder.fmul(d, factor)), s.load(target, 0, FLOATS))
            offsets = builder.mul(least, builder.sext(s.load(s.at(sums, t, 32), 0, _WORDS16), INTS))
            negative = builder.fneg(builder.fmul(dmin, factor))
            s.store(s.fma(s.to_float(offsets), s.splat(negative), total), target)
            return []

        s.loop(nt, [], token)
        return context.get_dummy_value()

    arguments = (types.intp, types.intp, types.float32, types.intp, types.float32, types.intp, types.intp, types.intp)
    return types.void(*arguments), codegen


@intrinsic
def clear_totals(_typing: Any, totals: Any, nt: Any) -> Any:
    """Zeroes `nt` tokens' totals, 16 F32 each, from address `totals` on."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        s = Simd(builder)

        def token(t: Any, _carried: list[Any]) -> list[Any]:
            s.store(s.floats(0.0), s.at(s.pointer(args[0]), t, 64))
            return []

        s.loop(args[1], [], token)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), codegen


@intrinsic
def sum_of(_typing: Any, total: Any) -> Any:
    """Sum of the 16 F32 at `total`."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        s = Simd(builder)
        return s.sum_floats(s.load(s.pointer(args[0]), 0, FLOATS))

    return types.float32(types.intp), codegen
