"""Vector code of attention and of the indexer, in plain LLVM: 16 heads at a time, keys as F32 rows.

Layouts, with D values per key:

* queries of 16 heads: `(D / 16, 16 heads, 16)` F32, so that a step over 16 values has its heads side by side;
* outputs of 16 heads: `(D / 32, 16 heads, 32)` F32, in blocks that fit a core's registers;
* scores and probabilities: `(rows, 16 heads)` F32.

A cache's rows are F16 or Q8_0; `widen_halves` and `widen_blocks` make F32 rows of them, exactly.
"""

from __future__ import annotations

from typing import Any, Final

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from localrun.offload.kernels.activations import exp16
from localrun.offload.kernels.simd import F16, F32, FLOATS, I8, I64, INTS, Simd

HEADS: Final = 16
"""Heads that are computed together."""

Q8_VALUES: Final = 32
"""Values of a block of Q8_0 (ggml-common.h, block_q8_0): an F16 scale, then 32 int8."""
Q8_BYTES: Final = 34

_HALF: Final = 8
"""Heads whose sums fit into registers beside two rows."""


@intrinsic
def scale16(_typing: Any, source: Any, factor: Any, target: Any) -> Any:
    """target = source * factor for 16 F32."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        s = Simd(builder)
        s.store(s.mul(s.load(s.pointer(args[0]), 0, FLOATS), s.splat(args[1])), s.pointer(args[2]))
        return context.get_dummy_value()

    return types.void(types.intp, types.float32, types.intp), codegen


@intrinsic
def widen_halves(_typing: Any, source: Any, n_blocks: Any, target: Any) -> Any:
    """target (32 * n_blocks) F32 = as many F16."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        s = Simd(builder)
        source, target = s.pointer(args[0]), s.pointer(args[2])

        def block(i: Any, _carried: list[Any]) -> list[Any]:
            for k in range(2):
                s.store(s.halves(s.at(source, i, 64), 32 * k), s.at(target, i, 128), 64 * k)
            return []

        s.loop(args[1], [], block)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 3), codegen


@intrinsic
def widen_blocks(_typing: Any, source: Any, n_blocks: Any, target: Any) -> Any:
    """target (32 * n_blocks) F32 = as many blocks of Q8_0."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        s = Simd(builder)
        source, target = s.pointer(args[0]), s.pointer(args[2])

        def block(i: Any, _carried: list[Any]) -> list[Any]:
            at = s.at(source, i, Q8_BYTES)
            scale = s.splat(builder.fpext(s.load(at, 0, F16), F32))
            for k in range(2):
                values = builder.sext(s.load(at, 2 + 16 * k, ir.VectorType(I8, 16)), INTS)
                s.store(s.mul(s.to_float(values), scale), s.at(target, i, 128), 64 * k)
            return []

        s.loop(args[1], [], block)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 3), codegen


@intrinsic
def score_pair(_typing: Any, queries: Any, n_steps: Any, first: Any, second: Any, scores: Any) -> Any:
    """scores[2, 16] = keys at `first` and `second`, 16 * n_steps F32 each, times the queries of 16 heads."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        s = Simd(builder)
        queries, n_steps, first, second, scores = args
        queries, rows, scores = s.pointer(queries), (s.pointer(first), s.pointer(second)), s.pointer(scores)
        for half in range(HEADS // _HALF):

            def step(i: Any, totals: list[Any], half: int = half) -> list[Any]:
                keys = [s.load(s.at(row, i, 64), 0, FLOATS) for row in rows]
                block, results = s.at(queries, i, 64 * HEADS, 64 * _HALF * half), []
                for head in range(_HALF):
                    query = s.load(block, 64 * head, FLOATS)
                    results += [s.fma(query, key, totals[2 * head + k]) for k, key in enumerate(keys)]
                return results

            totals = s.loop(n_steps, [s.floats(0.0)] * (2 * _HALF), step)
            for head in range(_HALF):
                for k in range(2):
                    s.store(s.sum_floats(totals[2 * head + k]), scores, 4 * (HEADS * k + _HALF * half + head))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 5), codegen


@intrinsic
def softmax_step(_typing: Any, scores: Any, masks: Any, n_rows: Any, state: Any) -> Any:
    """One step of a softmax whose rows come in chunks, for 16 heads.

    `scores` (n_rows, 16) become exp(score + mask - largest so far); `state` (3, 16) F32 is the largest score so far, the sum of
    the exponentials relative to it, and by what earlier results have to be multiplied.
    """

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        s = Simd(builder)
        scores, masks, n_rows, state = s.pointer(args[0]), s.pointer(args[1]), args[2], s.pointer(args[3])

        def masked(i: Any, carried: list[Any]) -> list[Any]:
            row = s.at(scores, i, 64)
            value = builder.fadd(s.load(row, 0, FLOATS), s.splat_f32(s.at(masks, i, 4), 0))
            s.store(value, row)
            return [builder.select(builder.fcmp_unordered(">", value, carried[0]), value, carried[0])]

        before = s.load(state, 0, FLOATS)
        (largest,) = s.loop(n_rows, [before], masked)
        factor = exp16(s, builder.fsub(before, largest))

        def exponentiate(i: Any, carried: list[Any]) -> list[Any]:
            row = s.at(scores, i, 64)
            value = exp16(s, builder.fsub(s.load(row, 0, FLOATS), largest))
            s.store(value, row)
            return [builder.fadd(carried[0], value)]

        (total,) = s.loop(n_rows, [s.mul(s.load(state, 64, FLOATS), factor)], exponentiate)
        s.store(largest, state)
        s.store(total, state, 64)
        s.store(factor, state, 128)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), codegen


@intrinsic
def add_rows(
    _typing: Any, rows: Any, row_bytes: Any, n_rows: Any, weights: Any, factors: Any, n_blocks: Any, totals: Any
) -> Any:
    """totals = totals * factors + weights^T @ rows, for 16 heads.

    `rows`: n_rows keys of 32 * n_blocks F32, `row_bytes` from one to the next; `weights` (n_rows, 16); `factors` (16,).
    """

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        s = Simd(builder)
        rows, row_bytes, n_rows, weights, factors, n_blocks, totals = args
        rows, weights, factors, totals = (s.pointer(p) for p in (rows, weights, factors, totals))

        def block(j: Any, _carried: list[Any]) -> list[Any]:
            for half in range(HEADS // _HALF):
                target = s.at(totals, j, 128 * HEADS, 128 * _HALF * half)
                start = []
                for head in range(_HALF):
                    factor = s.splat_f32(factors, 4 * (_HALF * half + head))
                    start += [s.mul(s.load(target, 128 * head + 64 * k, FLOATS), factor) for k in range(2)]

                def row(i: Any, sums: list[Any], half: int = half) -> list[Any]:
                    source = s.at(builder.gep(rows, [builder.mul(i, row_bytes)]), j, 128)
                    keys, weight = [s.load(source, 64 * k, FLOATS) for k in range(2)], s.at(weights, i, 4 * HEADS)
                    results = []
                    for head in range(_HALF):
                        p = s.splat_f32(weight, 4 * (_HALF * half + head))
                        results += [s.fma(p, key, sums[2 * head + k]) for k, key in enumerate(keys)]
                    return results

                sums = s.loop(n_rows, start, row)
                for head in range(_HALF):
                    for k in range(2):
                        s.store(sums[2 * head + k], target, 128 * head + 64 * k)
            return []

        s.loop(n_blocks, [], block)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 7), codegen


INDEX_KEYS: Final = 8
"""Keys that the indexer scores together."""


@intrinsic
def index_keys(
    _typing: Any, queries: Any, n_values: Any, n_blocks: Any, weights: Any, keys: Any, key_bytes: Any, out: Any
) -> Any:
    """out[8] = sum over heads of weight * max(query . key, 0), for 8 keys.

    `queries` (n_blocks, n_values, 16 heads) F32, `weights` (n_blocks, 16) F32, keys of n_values F32, `key_bytes` (a constant)
    from one to the next.
    """
    if not isinstance(key_bytes, types.IntegerLiteral):
        return None
    row_bytes = key_bytes.literal_value

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        s = Simd(builder)
        queries, n_values, n_blocks, weights, keys, _, out = args
        queries, weights, floats, out = (s.pointer(p) for p in (queries, weights, keys, out))
        block_bytes = builder.mul(n_values, I64(4 * HEADS))

        def block(j: Any, scores: list[Any]) -> list[Any]:
            heads = builder.gep(queries, [builder.mul(j, block_bytes)])

            def value(i: Any, products: list[Any]) -> list[Any]:
                query, at = s.load(s.at(heads, i, 64), 0, FLOATS), s.at(floats, i, 4)
                return [s.fma(query, s.splat_f32(at, k * row_bytes), p) for k, p in enumerate(products)]

            products = s.loop(n_values, [s.floats(0.0)] * INDEX_KEYS, value)
            weight, zero, results = s.load(s.at(weights, j, 64), 0, FLOATS), s.floats(0.0), []
            for product, score in zip(products, scores, strict=True):
                positive = builder.select(builder.fcmp_ordered(">", product, zero), product, zero)
                results.append(s.fma(positive, weight, score))
            return results

        for k, score in enumerate(s.loop(n_blocks, [s.floats(0.0)] * INDEX_KEYS, block)):
            s.store(s.sum_floats(score), out, 4 * k)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 5, key_bytes, types.intp), codegen


@intrinsic
def half_at(_typing: Any, address: Any) -> Any:
    """The F16 value at an address as F32."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        s = Simd(builder)
        return builder.fpext(s.load(s.pointer(args[0]), 0, ir.HalfType()), F32)

    return types.float32(types.intp), codegen
