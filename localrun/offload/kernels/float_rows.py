"""Vector code for rows of F32, in plain LLVM: norms, DeepSeek-V4's residual streams.

Rows have a multiple of `UNIT` values, at any address; a result may take the place of an input that has its shape. Sums run in a
fixed order, so results depend on nothing but their inputs.
"""

from __future__ import annotations

from typing import Any, Final

from numba import types
from numba.extending import intrinsic

from localrun.offload.kernels.simd import FLOATS, I64, LANES, Simd

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
