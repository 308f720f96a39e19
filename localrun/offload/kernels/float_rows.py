"""Vector code for rows of F32, in plain LLVM: what DeepSeek-V4 computes between matrices, norms and residual streams above all.

Rows have a multiple of `UNIT` or `LANES` values, as each function says, at any address; a result may take the place of an input
that has its shape. Sums run in a fixed order, so results depend on nothing but their inputs.
"""

from __future__ import annotations

from typing import Any, Final

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from localrun.offload.kernels.activations import exp16
from localrun.offload.kernels.simd import F16, F32, FLOATS, I32, I64, LANES, Simd

UNIT: Final = 2 * LANES
"""Values of a row are a multiple of this."""
STREAMS: Final = 4
"""Residual streams of DeepSeek-V4 (llama.cpp's operations on them know no other number)."""


def _steps(s: Simd, n_values: Any, per_step: int = LANES) -> Any:
    return s.b.sdiv(n_values, I64(per_step))


@intrinsic
def sum_of_squares(_typing: Any, x: Any, n_values: Any) -> Any:
    """Of one row."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        s = Simd(builder)
        x, n_values = s.pointer(args[0]), args[1]

        def step(i: Any, totals: list[Any]) -> list[Any]:
            at = s.at(x, i, 4 * UNIT)
            values = [s.load(at, 64 * k, FLOATS) for k in range(2)]
            return [s.fma(v, v, total) for v, total in zip(values, totals, strict=True)]

        low, high = s.loop(_steps(s, n_values, UNIT), [s.floats(0.0)] * 2, step)
        return s.sum_floats(builder.fadd(low, high))

    return types.float32(types.intp, types.intp), codegen


def _map(s: Simd, n_values: Any, inputs: list[Any], out: Any, function: Any) -> None:
    """out[i] = function(inputs[i]...), 16 values at a time; addresses as int64."""
    pointers, target = [s.pointer(p) for p in inputs], s.pointer(out)

    def step(i: Any, _carried: list[Any]) -> list[Any]:
        s.store(function(*(s.load(s.at(p, i, 64), 0, FLOATS) for p in pointers)), s.at(target, i, 64))
        return []

    s.loop(_steps(s, n_values), [], step)


@intrinsic
def scale_row(_typing: Any, x: Any, factor: Any, n_values: Any, out: Any) -> Any:
    """out = x * factor."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        s = Simd(builder)
        x, factor, n_values, out = args
        by = s.splat(factor)
        _map(s, n_values, [x], out, lambda v: s.mul(v, by))
        return context.get_dummy_value()

    return types.void(types.intp, types.float32, types.intp, types.intp), codegen


@intrinsic
def multiply_rows(_typing: Any, a: Any, b: Any, n_values: Any, out: Any) -> Any:
    """out = a * b, value by value."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        s = Simd(builder)
        a, b, n_values, out = args
        _map(s, n_values, [a, b], out, s.mul)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), codegen


@intrinsic
def add_rows(_typing: Any, a: Any, b: Any, n_values: Any, out: Any) -> Any:
    """out = a + b, value by value."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        s = Simd(builder)
        a, b, n_values, out = args
        _map(s, n_values, [a, b], out, builder.fadd)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), codegen


@intrinsic
def gather_streams(_typing: Any, x: Any, stride: Any, weights: Any, n_values: Any, out: Any) -> Any:
    """out = the sum over streams of weight * stream: `x` has `STREAMS` rows `stride` bytes apart, `weights` as many F32."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        s = Simd(builder)
        x, stride, weights, n_values, out = args
        weights = s.pointer(weights)
        by = [s.splat_f32(weights, 4 * k) for k in range(STREAMS)]
        rows = [builder.add(x, builder.mul(stride, I64(k))) for k in range(STREAMS)]

        def total(*values: Any) -> Any:
            result = s.mul(values[0], by[0])
            for value, weight in zip(values[1:], by[1:], strict=True):
                result = s.fma(value, weight, result)
            return result

        _map(s, n_values, rows, out, total)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 5), codegen


@intrinsic
def spread_streams(
    _typing: Any, x: Any, streams: Any, stride: Any, weights: Any, n_values: Any, out: Any, out_stride: Any
) -> Any:
    """out[d] = x * post[d] + the sum over s of streams[s] * comb[s][d]: the layer's output goes into all streams, which are mixed.

    `weights`: F32, `STREAMS` of post, then comb, (STREAMS, STREAMS) with d innermost. The streams must not lie where `out` does.
    """

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        s = Simd(builder)
        x, streams, stride, weights, n_values, out, out_stride = args
        x, weights = s.pointer(x), s.pointer(weights)
        sources = [s.pointer(streams, builder.mul(stride, I64(k))) for k in range(STREAMS)]
        targets = [s.pointer(out, builder.mul(out_stride, I64(k))) for k in range(STREAMS)]
        by = [s.splat_f32(weights, 4 * k) for k in range(STREAMS * (STREAMS + 1))]

        def step(i: Any, _carried: list[Any]) -> list[Any]:
            value = s.load(s.at(x, i, 64), 0, FLOATS)
            rows = [s.load(s.at(source, i, 64), 0, FLOATS) for source in sources]
            for d, target in enumerate(targets):
                total = s.mul(value, by[d])
                for k, row in enumerate(rows):
                    total = s.fma(row, by[STREAMS * (k + 1) + d], total)
                s.store(total, s.at(target, i, 64))
            return []

        s.loop(_steps(s, n_values), [], step)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 7), codegen


@intrinsic
def sum_of_row(_typing: Any, x: Any, n_values: Any) -> Any:
    """Of a whole number of units."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        s = Simd(builder)
        x, n_values = s.pointer(args[0]), args[1]

        def step(i: Any, totals: list[Any]) -> list[Any]:
            at = s.at(x, i, 4 * UNIT)
            return [builder.fadd(s.load(at, 64 * k, FLOATS), total) for k, total in enumerate(totals)]

        low, high = s.loop(_steps(s, n_values, UNIT), [s.floats(0.0)] * 2, step)
        return s.sum_floats(builder.fadd(low, high))

    return types.float32(types.intp, types.intp), codegen


@intrinsic
def largest_of_row(_typing: Any, x: Any, n_values: Any) -> Any:
    """The largest of a whole number of vectors."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        s = Simd(builder)
        x, n_values = s.pointer(args[0]), args[1]

        def step(i: Any, totals: list[Any]) -> list[Any]:
            value = s.load(s.at(x, i, 64), 0, FLOATS)
            return [builder.select(builder.fcmp_ordered(">", value, totals[0]), value, totals[0])]

        (largest,) = s.loop(_steps(s, n_values), [s.floats(float("-inf"))], step)
        return s.call("llvm.vector.reduce.fmax.v16f32", F32, largest)

    return types.float32(types.intp, types.intp), codegen


@intrinsic
def exponentials(_typing: Any, x: Any, less: Any, n_values: Any, out: Any) -> Any:
    """out = e**(x - less), whole vectors."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        s = Simd(builder)
        x, less, n_values, out = args
        by = s.splat(less)
        _map(s, n_values, [x], out, lambda v: exp16(s, builder.fsub(v, by)))
        return context.get_dummy_value()

    return types.void(types.intp, types.float32, types.intp, types.intp), codegen


@intrinsic
def turn_columns(_typing: Any, x: Any, stride: Any, n_rows: Any, out: Any, out_stride: Any) -> Any:
    """Sixteen columns of 32-bit values become rows: out[k][i] = x[i][k], rows `stride` and `out_stride` bytes apart."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        s = Simd(builder)
        x, stride, n_rows, out, out_stride = args
        source = s.pointer(x)
        targets = [s.pointer(out, builder.mul(out_stride, I64(k))) for k in range(LANES)]

        def row(i: Any, _carried: list[Any]) -> list[Any]:
            values = s.load(builder.gep(source, [builder.mul(i, stride)]), 0, FLOATS)
            for k, target in enumerate(targets):
                s.store(builder.extract_element(values, I32(k)), s.at(target, i, 4))
            return []

        s.loop(n_rows, [], row)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 5), codegen


@intrinsic
def to_halves(_typing: Any, x: Any, n_values: Any, out: Any) -> Any:
    """out = x as F16, rounded to nearest; whole vectors."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        s = Simd(builder)
        x, n_values, out = s.pointer(args[0]), args[1], s.pointer(args[2])

        def step(i: Any, _carried: list[Any]) -> list[Any]:
            values = builder.fptrunc(s.load(s.at(x, i, 64), 0, FLOATS), ir.VectorType(F16, LANES))
            s.store(values, s.at(out, i, 32))
            return []

        s.loop(_steps(s, n_values), [], step)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 3), codegen


@intrinsic
def add_halves(_typing: Any, a: Any, b: Any, n_values: Any, out: Any) -> Any:
    """out = a + b, F16; whole vectors."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        s = Simd(builder)
        a, b, n_values, out = s.pointer(args[0]), s.pointer(args[1]), args[2], s.pointer(args[3])

        def step(i: Any, _carried: list[Any]) -> list[Any]:
            total = builder.fadd(s.halves(s.at(a, i, 32), 0), s.halves(s.at(b, i, 32), 0))
            s.store(builder.fptrunc(total, ir.VectorType(F16, LANES)), s.at(out, i, 32))
            return []

        s.loop(_steps(s, n_values), [], step)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), codegen


POOLED: Final = 4 * LANES
"""Columns that `pool_columns` does at once."""


@intrinsic
def pool_columns(_typing: Any, values: Any, scores: Any, n_rows: Any, offset: Any, out: Any) -> Any:
    """out[c] = the sum over rows of value[c] * softmax(score[c]), the softmax over rows, for `POOLED` columns.

    `values` and `scores`: n_rows addresses of rows each, whose columns begin `offset` bytes further on.
    """

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        s = Simd(builder)
        values, scores, n_rows, offset, out = args
        values, scores, out, n = s.pointer(values), s.pointer(scores), s.pointer(out), POOLED // LANES

        def columns(table: Any, i: Any) -> list[Any]:
            row = s.pointer(s.load(s.at(table, i, 8), 0, I64), offset)
            return [s.load(row, 64 * k, FLOATS) for k in range(n)]

        def larger(i: Any, largest: list[Any]) -> list[Any]:
            found = columns(scores, i)
            return [builder.select(builder.fcmp_ordered(">", v, m), v, m) for v, m in zip(found, largest, strict=True)]

        largest = s.loop(n_rows, [s.floats(float("-inf"))] * n, larger)

        def add(i: Any, totals: list[Any]) -> list[Any]:
            weights = [exp16(s, builder.fsub(v, m)) for v, m in zip(columns(scores, i), largest, strict=True)]
            sums = [builder.fadd(w, total) for w, total in zip(weights, totals[:n], strict=True)]
            return sums + [s.fma(w, v, t) for w, v, t in zip(weights, columns(values, i), totals[n:], strict=True)]

        totals = s.loop(n_rows, [s.floats(0.0)] * (2 * n), add)
        for k in range(n):
            s.store(builder.fdiv(totals[n + k], totals[k]), out, 64 * k)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 5), codegen
