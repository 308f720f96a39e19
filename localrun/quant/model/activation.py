"""The activation between an expert's matrices, in plain F32 for measurements and graphs that kernels don't fuse."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]


def swiglu(gate: F32, up: F32, limit: float) -> F32:
    """silu(min(gate, limit)) * clip(up, -limit, limit), elementwise; as ggml's `SWIGLU_CLAMP`, without one if `limit` is infinite.

    Args:
        gate, up: f32 of the same shape, (T, n_ff) of an expert.
    """
    gate = np.minimum(gate, np.float32(limit))
    with np.errstate(over="ignore"):  # exp(-gate) may be infinite: the quotient is then 0, which is correct
        result: F32 = gate / (1 + np.exp(-gate)) * np.clip(up, np.float32(-limit), np.float32(limit))
    return result
