"""Our IQ2_XXS: every group has the grid entry that is best for its block's step, by trying all 256 in numpy."""

from __future__ import annotations

import gguf.quants
import numpy as np
import numpy.typing as npt

from localrun.quant.formats import grid_kernels as kernels
from localrun.quant.formats.grid_quantize import quantize
from localrun.quant.formats.k_kernels import PITCH

F32 = npt.NDArray[np.float32]


def grid() -> F32:
    gguf.quants.IQ2_XXS.init_grid()
    return np.asarray(gguf.quants.IQ2_XXS.grid, np.float32).reshape(256, 8)


def test_signs_have_even_parity_and_the_one_that_matters_least_is_turned() -> None:
    x = np.zeros(256, np.float32)
    x[:8], x[8:16] = (-3, 1, 2, 4, 5, 6, 7, 8), (-3, 1, 2, -4, 5, 6, 7, 8)
    weights, s = np.ones(256, np.float32), np.zeros(kernels.ROWS * PITCH, np.float32)
    weights[2] = 0.1  # 0.1 * 2 ** 2 is less than 1 * 1 ** 2
    kernels.load_groups(x, weights, 0, 0, 32, s)
    rows = s.reshape(-1, PITCH)
    assert rows[kernels.NEGATIVE, :2].tolist() == [0b101, 0b1001]
    assert np.sign(rows[kernels.A : kernels.A + 8, :2].T).tolist() == [[1, 1, -1, 1, 1, 1, 1, 1], [1] * 8]
    assert rows[kernels.STEP, :4].tolist() == [8] * 4, "the block's largest magnitude"


def test_every_group_has_the_entry_that_is_best_for_its_step() -> None:
    rng = np.random.default_rng(23)
    values = rng.standard_normal((3, 512), dtype=np.float32)
    importance = rng.lognormal(0, 1, 512).astype(np.float32)
    out = np.zeros(3 * 2 * 66, np.uint8)
    quantize(values, importance, out)
    blocks = out.reshape(-1, 66)
    steps = blocks[:, :2].copy().view(np.float16).astype(np.float64)  # (6, 1)
    words = blocks[:, 2:].reshape(-1, 8, 8)
    packed = words[:, :, 4:].copy().view(np.uint32)[:, :, 0]  # (6, 8)
    d = steps * (2 * (packed >> 28) + 1) / 8
    x = np.abs(values.reshape(-1, 8, 4, 8))  # super-block, block, group, element
    square = 2 * np.square(values.reshape(-1, 256)).mean(1)[:, None, None, None]
    w = np.broadcast_to(importance.reshape(2, 8, 4, 8), (3, 2, 8, 4, 8)).reshape(x.shape) * np.sqrt(square + x**2)
    odd = (values.reshape(x.shape) < 0).sum(-1) % 2 == 1
    turned = np.argmin(w * x**2, -1)
    x[odd, turned[odd]] *= -1
    errors = (w[..., None, :] * np.square(x[..., None, :] - d[:, :, None, None, None] * grid())).sum(-1)
    chosen = np.take_along_axis(errors, words[:, :, :4, None].astype(np.int64), -1)[..., 0]
    # The super-block's step is changed once more afterwards, for the size of outputs: [m] 8 % of the decisions would be others.
    best = errors.min(-1)
    assert (chosen == best).mean() > 0.85
    assert chosen.sum() < 1.02 * best.sum()


def test_zeros_stay_zeros() -> None:
    out = np.full(66, 255, np.uint8)
    quantize(np.zeros((1, 256), np.float32), np.ones(256, np.float32), out)
    assert not gguf.quants.dequantize(out.reshape(1, -1), gguf.GGMLQuantizationType.IQ2_XXS).any()
