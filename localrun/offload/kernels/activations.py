"""Vector code for the activation side, in plain LLVM: quantizing 16 values, the largest of some, SwiGLU of 16 rows.

numba's own loops over raw addresses stay scalar, and these cost a tenth of a prefill that way.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from localrun.offload.kernels.simd import F32, FLOATS, I8, I32, INTS, Simd


@intrinsic
def largest_of(_typing: Any, source: Any, n_vectors: Any) -> Any:
    """max |x| of 16 * n_vectors (a constant) F32; NaN where one is infinite or NaN."""
    if not isinstance(n_vectors, types.IntegerLiteral):
        return None

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        s = Simd(builder)
        source = s.pointer(args[0])
        largest, poison = s.floats(0.0), s.floats(0.0)
        for i in range(n_vectors.literal_value):
            values = s.load(source, 64 * i, FLOATS)
            size = s.call("llvm.fabs.v16f32", FLOATS, values)
            largest = builder.select(builder.fcmp_ordered(">", size, largest), size, largest)
            poison = s.fma(values, s.floats(0.0), poison)
        return builder.fadd(
            s.call("llvm.vector.reduce.fmax.v16f32", F32, largest),
            s.sum_floats(poison),
        )

    return types.float32(types.intp, n_vectors), codegen


@intrinsic
def quantize16(_typing: Any, source: Any, inverse: Any, target: Any) -> Any:
    """16 F32 times `inverse`, rounded to nearest, as int8 at `target`; returns their sum."""

    def codegen(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        s = Simd(builder)
        scaled = s.mul(s.load(s.pointer(args[0]), 0, FLOATS), s.splat(args[1]))
        values = builder.fptosi(s.call("llvm.rint.v16f32", FLOATS, scaled), INTS)
        s.store(builder.trunc(values, ir.VectorType(I8, 16)), s.pointer(args[2]))
        return s.call("llvm.vector.reduce.add.v16i32", I32, values)

    return types.int32(types.intp, types.float32, types.intp), codegen


@intrinsic
def four_groups_aside(_typing: Any, target: Any) -> Any:
    """32 bytes at `target` in the order 0, 8, 16, 24, 1, 9, ...: byte e of each of four groups of eight, then byte e + 1."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        s = Simd(builder)
        values = s.load(s.pointer(args[0]), 0, ir.VectorType(I8, 32))
        order = [8 * group + e for e in range(8) for group in range(4)]
        s.store(builder.shuffle_vector(values, values, ir.Constant(ir.VectorType(I32, 32), order)), s.pointer(args[0]))
        return context.get_dummy_value()

    return types.void(types.intp), codegen


def exp16(s: Simd, x: Any) -> Any:
    """e**x to about 2 ulp, saturating at +-87 (constants of Cephes' expf)."""
    b = s.b
    x = b.select(b.fcmp_ordered("<", x, s.floats(-87.0)), s.floats(-87.0), x)
    x = b.select(b.fcmp_ordered(">", x, s.floats(87.0)), s.floats(87.0), x)
    n = s.call("llvm.rint.v16f32", FLOATS, s.mul(x, s.floats(1.44269504)))
    r = s.fma(n, s.floats(2.12194440e-4), s.fma(n, s.floats(-0.693359375), x))
    p = s.floats(1.9875691500e-4)
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = s.fma(p, r, s.floats(c))
    p = b.fadd(s.fma(s.mul(p, r), r, r), s.floats(1.0))
    power = b.shl(b.add(b.fptosi(n, INTS), s.ints(127)), s.ints(23))
    return s.mul(p, b.bitcast(power, FLOATS))


@intrinsic
def swiglu16(_typing: Any, gate: Any, up: Any, limit: Any) -> Any:
    """16 values in place at `gate`: silu(min(gate, limit)) * clamp(up, -limit, limit)."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        s = Simd(builder)
        target, limit = s.pointer(args[0]), s.splat(args[2])
        g, u, least = s.load(target, 0, FLOATS), s.load(s.pointer(args[1]), 0, FLOATS), builder.fneg(limit)
        # Comparisons are written so that a NaN stays one.
        g = builder.select(builder.fcmp_ordered(">", g, limit), limit, g)
        u = builder.select(builder.fcmp_ordered(">", u, limit), limit, u)
        u = builder.select(builder.fcmp_ordered("<", u, least), least, u)
        s.store(s.mul(builder.fdiv(g, builder.fadd(exp16(s, builder.fneg(g)), s.floats(1.0))), u), target)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.float32), codegen
