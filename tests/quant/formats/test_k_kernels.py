"""The search for K types: what a format can express is found, anything else is fitted better than by rounding alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as QT

from localrun.quant.formats import k_kernels, q3_kernels
from localrun.quant.formats.k_quantize import _STEPS
from tests.offload.kernels.support import quantize

F32 = npt.NDArray[np.float32]
KINDS = [QT.Q2_K, QT.Q3_K, QT.Q4_K, QT.Q5_K]


def quantized(kind: QT, x: F32, importance: F32 | None = None) -> npt.NDArray[np.uint8]:
    """The kernel's bytes for whole super-blocks, laid out over memory that holds something else."""
    out = np.full(x.size // 256 * GGML_QUANT_SIZES[kind][1], 0xEE, np.uint8)
    weights = np.ones(256, np.float32) if importance is None else importance
    scratch = np.full(k_kernels.ROWS * k_kernels.PITCH, np.nan, np.float32)
    step_d, step_m = np.empty(32, np.float32), np.empty(32, np.float32)
    if kind == QT.Q3_K:
        q3_kernels.quantize_q3_k(x, weights, scratch, out, out.view(np.uint16))
    elif kind == QT.Q2_K:
        arrays: tuple[Any, ...] = (scratch, step_d, step_m, out, out.view(np.uint16))
        k_kernels.quantize_q2_k(x, weights, _STEPS[kind], *arrays)
    else:
        arrays = (scratch, step_d, step_m, out, out.view(np.uint16))
        k_kernels.quantize_q45_k(x, weights, kind == QT.Q5_K, _STEPS[kind], *arrays)
    return out


def decoded(kind: QT, data: npt.NDArray[np.uint8]) -> F32:
    return np.asarray(gguf.quants.dequantize(data, kind), np.float32)


def expressible(kind: QT, n_blocks: int) -> F32:
    """Super-blocks that the format holds exactly: every group uses its whole range of integers, one its largest step."""
    rng = np.random.default_rng(int(kind))
    size, n_max, s_max = {QT.Q2_K: (16, 3, 15), QT.Q3_K: (16, 7, 31), QT.Q4_K: (32, 15, 63), QT.Q5_K: (32, 31, 63)}[
        kind
    ]
    n_groups = 256 // size
    blocks = []
    for _ in range(n_blocks):
        q = rng.integers(0, n_max + 1, (n_groups, size))
        q[:, 0], q[:, 1] = 0, n_max
        steps = rng.integers(s_max // 2, s_max + 1, (n_groups, 1))
        steps[0] = s_max
        if kind == QT.Q3_K:
            blocks.append(0.125 * steps * (q - 4))
        else:
            minima = rng.integers(s_max // 2, s_max + 1, (n_groups, 1))
            minima[1] = s_max
            blocks.append(0.125 * steps * q - 0.0625 * minima)
    return np.concatenate(blocks).astype(np.float32).reshape(-1)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("n_blocks", [1, 37])
def test_what_the_format_can_express_comes_back(kind: QT, n_blocks: int) -> None:
    x = expressible(kind, n_blocks)
    error = decoded(kind, quantized(kind, x)) - x
    # Gaussian weights of this size lose 3 to 30 %.
    assert np.sqrt(np.square(error).mean() / np.square(x).mean()) < 2e-3


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_fit_beats_ggml_s(kind: QT) -> None:
    x = np.random.default_rng(9).standard_normal(256 * 64).astype(np.float32)
    importance = np.random.default_rng(8).lognormal(0, 1.5, 256).astype(np.float32)
    weights = np.tile(importance, 64)

    def loss(found: F32) -> float:
        return float((weights * np.square(found - x)).sum())

    ours = loss(decoded(kind, quantized(kind, x, importance)))
    theirs = loss(decoded(kind, quantize(kind, x.reshape(64, 256)).reshape(-1)))
    assert ours < theirs


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_super_block_does_not_depend_on_its_neighbours(kind: QT) -> None:
    x = np.random.default_rng(10).standard_normal(256 * 40).astype(np.float32)
    whole = quantized(kind, x).reshape(40, -1)
    np.testing.assert_array_equal(quantized(kind, x[256 * 35 :].copy()).reshape(5, -1), whole[35:])


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize(
    "make", [np.zeros, np.ones, lambda n: -np.ones(n), lambda n: np.full(n, 1e-30)], ids=["0", "1", "-1", "tiny"]
)
def test_constant_blocks_stay_finite_and_close(kind: QT, make: Callable[[int], F32]) -> None:
    x = make(512).astype(np.float32)
    found = decoded(kind, quantized(kind, x))
    # A minimum can't be positive, so ones are 3 of 3 and the like; Q3_K's largest is 3 of 4.
    assert np.abs(found - x).max() <= 0.02 * np.abs(x).max() + 1e-29


def test_halves_keep_their_sign() -> None:
    values = np.array([1.0, -1.0, 0.1, -65504.0, -0.0, 6e-8], np.float32)
    found = [k_kernels.f16(value) for value in values]
    np.testing.assert_array_equal(np.array(found, np.float32), values.astype(np.float16).astype(np.float32))
