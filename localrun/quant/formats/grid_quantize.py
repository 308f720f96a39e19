"""Our quantizer for IQ2_XXS: six times ggml's speed at a lower error (`grid_kernels` says how).

Measured as in `k_quantize`, one core of Zen 4: 14.6 million weights/s where ggml has 2.5, and a relative RMS error of 0.243 where
ggml has 0.263 (without rounding to FP4: 0.244 and 0.264; without importance: 0.353 and 0.347). All experts of the demo model,
3,072 tokens: KL 0.0218 and 0.0269.
"""

from __future__ import annotations

import functools

import gguf.quants
import numpy as np
import numpy.typing as npt

from localrun.quant.formats.grid_kernels import ROWS, quantize_iq2_xxs
from localrun.quant.formats.k_kernels import PITCH

Floats = npt.NDArray[np.float32]


@functools.cache
def _grid() -> Floats:
    """(256, 8) magnitudes."""
    gguf.quants.IQ2_XXS.init_grid()
    return np.ascontiguousarray(np.asarray(gguf.quants.IQ2_XXS.grid, np.float32).reshape(256, 8))


def quantize(values: Floats, weights: Floats, out: npt.NDArray[np.uint8]) -> None:
    """Quantizes rows. Releases the interpreter lock; uses one thread.

    Args:
        values: `(n_out, n_in)`, contiguous, finite, within F16's range; n_in a multiple of 256.
        weights: importance of the columns, prepared (`quantize.prepare_weights`).
        out: the rows' bytes, flat.
    """
    n_out, n_in = values.shape
    assert n_in % 256 == 0
    assert values.flags.c_contiguous
    assert weights.shape == (n_in,)
    assert out.size == n_out * n_in // 256 * 66
    grid = _grid()
    scratch = np.zeros(ROWS * PITCH, np.float32)
    flat, out16 = values.reshape(-1), out.view(np.uint16)
    quantize_iq2_xxs(flat, weights, n_in, grid.reshape(-1), scratch, out, out16)
