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


@intrinsic
def unpack32(_typing: Any, low: Any, low_shift: Any, low_mask: Any, high: Any, high_shift: Any, high_mask: Any, up: Any,
             offset: Any, target: Any) -> Any:  # fmt: skip
    """int8 at `target`: (low >> low_shift & low_mask | (high >> high_shift & high_mask) << up) - offset, for 32 bytes."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        s = Simd(builder)
        low, low_shift, low_mask, high, high_shift, high_mask, up, offset, target = args
        low_shift, low_mask, high_shift, high_mask, up, offset = (
            s.splat(builder.trunc(v, I8), 32) for v in (low_shift, low_mask, high_shift, high_mask, up, offset)
        )
        first = builder.and_(builder.lshr(s.load(s.pointer(low), 0, _BYTES32), low_shift), low_mask)
        second = builder.and_(builder.lshr(s.load(s.pointer(high), 0, _BYTES32), high_shift), high_mask)
        s.store(builder.sub(builder.or_(first, builder.shl(second, up)), offset), s.pointer(target))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 9), codegen


@intrinsic
def unpack_e2m1(_typing: Any, source: Any, target: Any) -> Any:
    """16 bytes of two FP4 codes -> 32 int8 of twice their value, low halves first."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        s = Simd(builder)
        packed = s.load(s.pointer(args[0]), 0, _BYTES16)

        def constant(value: int) -> Any:
            return ir.Constant(_BYTES16, [value] * 16)

        for half in range(2):
            code = builder.lshr(packed, constant(4)) if half else builder.and_(packed, constant(15))
            size = builder.and_(code, constant(7))
            value = size  # 0 1 2 3 4 5 6 7 -> 0 1 2 3 4 6 8 12
            for above, more in ((4, 1), (5, 1), (6, 3)):
                added = builder.add(value, constant(more))
                value = builder.select(builder.icmp_unsigned(">", size, constant(above)), added, value)
            negative = builder.sub(constant(0), value)
            s.store(
                builder.select(builder.icmp_unsigned(">", code, constant(7)), negative, value),
                s.pointer(args[1]),
                16 * half,
            )
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), codegen


def _weights(s: Simd, w: Any, offset: int) -> Any:
    return s.b.sext(s.load(w, offset, _BYTES32), _WORDS32)


@intrinsic
def add_block32(_typing: Any, w: Any, scale: Any, minimum: Any, record: Any, nt: Any, totals: Any) -> Any:
    """totals[t] += scale * w . x - minimum * sum(x): one block of 32 int8 and a BLOCK32 record with SUM."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        s = Simd(builder)
        w, scale, minimum, record, nt, totals = args
        weights, record, totals = _weights(s, s.pointer(w), 0), s.pointer(record), s.pointer(totals)
        tail = builder.gep(record, [builder.mul(nt, I64(32))])
        sums = builder.gep(record, [builder.mul(nt, I64(36))])

        def token(t: Any, _carried: list[Any]) -> list[Any]:
            dot = s.madd(weights, _weights(s, s.at(record, t, 32), 0))
            target = s.at(totals, t, 64)
            factor = builder.fmul(scale, s.load(s.at(tail, t, 4), 0, F32))
            total = s.fma(s.to_float(dot), s.splat(factor), s.load(target, 0, FLOATS))
            least = builder.fmul(minimum, s.load(s.at(sums, t, 4), 0, F32))
            s.store(builder.fsub(total, builder.insert_element(s.floats(0.0), least, I32(0))), target)
            return []

        s.loop(nt, [], token)
        return context.get_dummy_value()

    return types.void(types.intp, types.float32, types.float32, types.intp, types.intp, types.intp), codegen


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
                dot = s.madd(_weights(s, s.at(w, i, 32), 0), _weights(s, s.at(values, i, 32), 0))
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
