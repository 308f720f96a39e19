"""Vector code on rows of F32 beside numpy: odd numbers of vectors, and results in the place of an input."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from localrun.kernel_cache import cached_jit
from localrun.offload.kernels import float_rows
from localrun.offload.kernels.float_rows import STREAMS, UNIT

F32 = npt.NDArray[np.float32]


@cached_jit()
def _sum_of_squares(x: F32) -> float:
    return float(float_rows.sum_of_squares(x.ctypes.data, x.size))


@cached_jit()
def _map(name: str, a: F32, b: F32, out: F32) -> None:
    if name == "scale":
        float_rows.scale_row(a.ctypes.data, b[0], a.size, out.ctypes.data)
    elif name == "multiply":
        float_rows.multiply_rows(a.ctypes.data, b.ctypes.data, a.size, out.ctypes.data)
    else:
        float_rows.add_rows(a.ctypes.data, b.ctypes.data, a.size, out.ctypes.data)


@cached_jit()
def _streams(x: F32, streams: F32, weights: F32, one: F32, out: F32) -> None:
    n = x.size
    float_rows.spread_streams(x.ctypes.data, streams.ctypes.data, n * 4, weights.ctypes.data, n, out.ctypes.data, n * 4)
    float_rows.gather_streams(streams.ctypes.data, n * 4, weights.ctypes.data, n, one.ctypes.data)


def normal(*shape: int) -> F32:
    return np.random.default_rng(sum(shape)).standard_normal(shape, dtype=np.float32)


@pytest.mark.parametrize("n", [UNIT, 3 * UNIT, 4096])
def test_sums_of_squares(n: int) -> None:
    x = normal(n)
    assert _sum_of_squares(x) == pytest.approx(float((x.astype(np.float64) ** 2).sum()), rel=1e-6)


@pytest.mark.parametrize("n", [16, 48, 4096])
@pytest.mark.parametrize("name", ["scale", "multiply", "add"])
def test_values_are_numpys_even_in_place(name: str, n: int) -> None:
    a, b = normal(n), normal(n + 1)[1:].copy()
    expected = {"scale": a * b[0], "multiply": a * b, "add": a + b}[name]
    out = np.full(n, np.nan, np.float32)
    _map(name, a, b, out)
    np.testing.assert_array_equal(out, expected)
    _map(name, a, b, a)
    np.testing.assert_array_equal(a, expected)


@pytest.mark.parametrize("n", [16, 48, 4096])
def test_streams_are_mixed_and_gathered(n: int) -> None:
    x, streams, weights = normal(n), normal(STREAMS, n), normal(STREAMS * (STREAMS + 1))
    one, out = np.empty(n, np.float32), np.empty((STREAMS, n), np.float32)
    _streams(x, streams, weights, one, out)
    post, comb = weights[:STREAMS], weights[STREAMS:].reshape(STREAMS, STREAMS)
    expected = post[:, None] * x + comb.astype(np.float64).T @ streams
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(one, post.astype(np.float64) @ streams, rtol=1e-5, atol=1e-5)
