"""The layer under the kernels, instruction by instruction, on whatever processor this is."""

from __future__ import annotations

from typing import Any

import numba as nb
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from localrun.offload.kernels.simd import F32, FLOATS, I32, I64, INTS, WORDS, Simd

Array = npt.NDArray[Any]


@intrinsic
def _ints(_typing: Any, a: Any, b: Any, out: Any) -> Any:
    """out[0:16] = pairs of words multiplied and added; then shifts, a mask and bytes of the first."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        s = Simd(builder)
        a, b, out = (s.pointer(address) for address in args)
        words = s.load(a, 0, WORDS), s.load(b, 0, WORDS)
        ints = s.load(a, 0, INTS)
        for place, value in enumerate((
            s.madd(*words), s.shift_left(ints, 3), s.shift_right(ints, 5), s.mask(ints, 0xFF0), s.byte_field(ints, 2),
            s.splat(I32(-7)), s.splat_dword(a, 8),
        )):  # fmt: skip
            s.store(value if value.type == INTS else builder.bitcast(value, INTS), out, 64 * place)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), codegen


@intrinsic
def _floats(_typing: Any, a: Any, b: Any, out: Any) -> Any:
    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        s = Simd(builder)
        a, b, out = (s.pointer(address) for address in args)
        x, y = s.load(a, 0, FLOATS), s.load(b, 0, FLOATS)
        values = (s.mul(x, y), s.fma(x, y, s.floats(0.5)), s.splat_f32(a, 4), s.halves(b, 0))
        for place, value in enumerate(values):
            s.store(value, out, 64 * place)
        total = s.sum_floats(x)
        s.store(total, out, 64 * len(values))
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), codegen


@intrinsic
def _looped(_typing: Any, rows: Any, n: Any, out: Any) -> Any:
    """out = sum of rows of 16 F32, 80 bytes apart, and how many they were."""

    def codegen(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        s = Simd(builder)
        rows, out = s.pointer(args[0]), s.pointer(args[2])

        def body(i: Any, carried: list[Any]) -> list[Any]:
            total, count = carried
            return [builder.fadd(total, s.load(s.at(rows, i, 80, 16), 0, FLOATS)), builder.add(count, I64(1))]

        total, count = s.loop(args[1], [s.floats(0.0), I64(0)], body)
        s.store(total, out)
        s.store(count, out, 64)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), codegen


@nb.njit
def _run_ints(a: int, b: int, out: int) -> None:
    _ints(a, b, out)


@nb.njit
def _run_floats(a: int, b: int, out: int) -> None:
    _floats(a, b, out)


@nb.njit
def _run_looped(rows: int, n: int, out: int) -> None:
    _looped(rows, n, out)


def test_integers() -> None:
    rng = np.random.default_rng(1)
    a, b = (rng.integers(-30_000, 30_000, 32).astype(np.int16) for _ in range(2))
    out = np.zeros((7, 16), np.int32)
    _run_ints(a.ctypes.data, b.ctypes.data, out.ctypes.data)
    ints = a.view(np.int32)
    pairs = (a.astype(np.int32) * b).reshape(16, 2).sum(1)
    np.testing.assert_array_equal(out[0], pairs)
    np.testing.assert_array_equal(out[1], (ints.view(np.uint32) << 3).view(np.int32))
    np.testing.assert_array_equal(out[2], (ints.view(np.uint32) >> 5).view(np.int32))
    np.testing.assert_array_equal(out[3], ints & 0xFF0)
    np.testing.assert_array_equal(out[4], (ints.view(np.uint32) >> 16).view(np.int32) & 0xFF)
    np.testing.assert_array_equal(out[5], np.full(16, -7))
    np.testing.assert_array_equal(out[6], np.full(16, ints[2]))


def test_floats() -> None:
    rng = np.random.default_rng(2)
    a, b = (rng.standard_normal(16).astype(np.float32) for _ in range(2))
    b[:8] = rng.standard_normal(16).astype(np.float16).view(np.float32)
    b[:8] = np.abs(b[:8])  # bits of halves that are no NaN as F32 either
    out = np.zeros(16 * 5, np.float32)
    _run_floats(a.ctypes.data, b.ctypes.data, out.ctypes.data)
    out = out.reshape(5, 16)
    np.testing.assert_array_equal(out[0], a * b)
    np.testing.assert_allclose(out[1], a.astype(np.float64) * b + 0.5, rtol=1e-6)
    np.testing.assert_array_equal(out[2], np.full(16, a[1]))
    np.testing.assert_array_equal(out[3], b[:8].view(np.float16).astype(np.float32))
    np.testing.assert_allclose(out[4, 0], a.astype(np.float64).sum(), rtol=1e-5)
    assert F32.intrinsic_name == "f32"
    assert isinstance(INTS, ir.VectorType)


def test_loops_carry_values() -> None:
    memory = np.random.default_rng(3).standard_normal((5, 20)).astype(np.float32)
    for n in (1, 2, 5):
        out = np.full(32, 9, np.float32)
        _run_looped(memory.ctypes.data, n, out.ctypes.data)
        np.testing.assert_allclose(out[:16], memory[:n, 4:].sum(0, dtype=np.float64), rtol=1e-5, atol=1e-6)
        assert out[16:18].view(np.int64)[0] == n
