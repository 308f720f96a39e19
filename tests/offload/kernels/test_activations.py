"""Sixteen values at a time: rounding, largest values and SwiGLU, against numpy."""

from __future__ import annotations

import math

import numba as nb
import numpy as np
import pytest

from localrun.offload.kernels.activations import largest_of, quantize16, swiglu16


@nb.njit
def _largest(source: int) -> float:
    return largest_of(source, 2)  # type: ignore[no-any-return]


@nb.njit
def _quantize(source: int, inverse: float, target: int) -> int:
    return quantize16(source, np.float32(inverse), target)  # type: ignore[no-any-return]


@nb.njit
def _swiglu(gate: int, up: int, limit: float) -> None:
    swiglu16(gate, up, np.float32(limit))


@pytest.mark.parametrize(("value", "expected"), [(-7.5, 7.5), (math.inf, math.nan), (math.nan, math.nan)])
def test_the_largest_of_32_values_and_whether_one_is_none(value: float, expected: float) -> None:
    x = np.linspace(-1, 1, 32, dtype=np.float32)
    assert _largest(x.ctypes.data) == 1
    for at in (0, 17, 31):
        x[at] = value
        np.testing.assert_equal(np.float32(_largest(x.ctypes.data)), np.float32(expected))
        x[at] = 0


def test_values_are_rounded_to_even_and_summed() -> None:
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 127, -127, 0.49, 0.51, 3, -3, 100.4, 0, 0, 0, 1], np.float32)
    out = np.zeros(16, np.int8)
    total = _quantize(x.ctypes.data, 1.0, out.ctypes.data)
    np.testing.assert_array_equal(out, np.rint(x).astype(np.int8))
    assert total == int(out.astype(int).sum())


def test_swiglu_clamps_and_keeps_what_is_none() -> None:
    gate = np.array([-100, -10, -3, -1, -0.5, 0, 0.5, 1, 2, 3, 5, 9.5, 10, 11, 50, np.nan], np.float32)
    up = np.array([1, 2, -20, 20, 3, 4, -1, -2, 0.5, 1, 1, 1, 12, -12, 1, 1], np.float32)
    g, u = np.minimum(gate.astype(np.float64), 10), np.clip(up.astype(np.float64), -10, 10)
    expected = g / (1 + np.exp(-g)) * u
    _swiglu(gate.ctypes.data, up.ctypes.data, 10.0)
    np.testing.assert_allclose(gate[:-1], expected[:-1], rtol=4e-6, atol=1e-30)
    assert np.isnan(gate[-1])
