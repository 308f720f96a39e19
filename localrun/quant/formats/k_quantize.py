"""Our quantizers for Q2_K, Q3_K, Q4_K and Q5_K: 7 to 25 times ggml's speed at a lower error (`k_kernels` and `q3_kernels` say how).

Measured on 128 x 4096 Gaussian weights rounded to FP4, one core of an AVX-512 machine, million weights/s and relative RMS error
weighed by the importance that the quantizer was given (log-normal, sigma 1.5); in brackets the errors without rounding to FP4:

              ggml                    here
    Q2_K    4.5  0.203 (0.202)     114  0.201 (0.201)
    Q3_K     16  0.120 (0.122)     118  0.115 (0.120)
    Q4_K    6.2  0.051 (0.057)     127  0.041 (0.056)
    Q5_K    5.2  0.027 (0.030)      95  0.018 (0.028)

Q2_K's are those before `k_kernels.unshrink`, which trades error for the size of outputs.

The steps tried for Q4_K and Q5_K reach down to where an FP4 source's own step fits. Importance is taken as it is: the error that is
made least is the one that the solver measures; ggml multiplies it by a power of the weight itself.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from localrun.quant.formats import k_kernels as kernels
from localrun.quant.formats import q3_kernels

_T = GGMLQuantizationType

# First and last candidate for 1 / step, as an addition to the largest integer; number of candidates; rounds of refining.
_STEPS = {
    _T.Q2_K: np.array([-1.5, 0.9, 8, 2], np.float32),
    _T.Q3_K: np.empty(0, np.float32),
    _T.Q4_K: np.array([-4, 1, 16, 2], np.float32),
    _T.Q5_K: np.array([-8, 1, 19, 2], np.float32),
}

TYPES = frozenset(_STEPS)


def quantize(
    values: npt.NDArray[np.float32],
    kind: GGMLQuantizationType,
    weights: npt.NDArray[np.float32] | None,
    out: npt.NDArray[np.uint8],
) -> None:
    """Quantizes rows. Releases the interpreter lock; uses one thread.

    Args:
        values: `(n_out, n_in)`, contiguous, finite, within F16's range; n_in a multiple of 256.
        kind: one of TYPES.
        weights: importance of the columns, prepared (`ggml_quantize.prepare_weights`); None: all alike.
        out: the rows' bytes, flat.
    """
    n_out, n_in = values.shape
    assert n_in % 256 == 0
    assert values.flags.c_contiguous
    assert out.size == n_out * n_in // 256 * GGML_QUANT_SIZES[kind][1]
    importance = np.ones(n_in, np.float32) if weights is None else weights
    assert importance.shape == (n_in,)
    scratch = np.empty(kernels.ROWS * kernels.PITCH, np.float32)
    flat, out16, steps = values.reshape(-1), out.view(np.uint16), _STEPS[kind]
    if kind == _T.Q3_K:
        q3_kernels.quantize_q3_k(flat, importance, scratch, out, out16)
        return
    step_d, step_m = np.empty(32, np.float32), np.empty(32, np.float32)
    if kind == _T.Q2_K:
        kernels.quantize_q2_k(flat, importance, steps, scratch, step_d, step_m, out, out16)
    else:
        kernels.quantize_q45_k(flat, importance, kind == _T.Q5_K, steps, scratch, step_d, step_m, out, out16)
