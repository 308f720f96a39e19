"""Rotary positions: llama.cpp's ROPE and ROPE_BACK of neighbouring pairs, with YaRN's scaling (arXiv 2309.00071).

Angles are products of F32, one after the other, as ggml's are (ggml-cpu/ops.cpp, `ggml_rope_cache_init`): in long contexts they
are so large that their rounding shows in the result.
"""

from __future__ import annotations

from typing import Final

import numba as nb
import numpy as np

from localrun.ggml import structures as ggml
from localrun.offload.device.node_rows import is_rows, place, same_shape
from localrun.offload.device.tensors import DATA, NE, OP, PARAMS, SRC, TYPE
from localrun.offload.kernels.lowlevel import copy, float_of_bits, load_f32, load_i32, load_i64, stack, store_f32

_ROPE, _BACK, _I32 = ggml.OP_ROPE, ggml.OP_ROPE_BACK, ggml.TYPE_I32
MOST_ROTATED: Final = 256
"""Values of a row that are rotated, at most: what a task has on its stack."""
_ANGLES_BYTES: Final = MOST_ROTATED * 4
# Places in `op_params` (ggml.c, ggml_rope_impl), in bytes.
_DIMS, _MODE, _TRAINED, _BASE, _SCALE, _MIX, _FACTOR, _FAST, _SLOW, _FIRST = 4, 8, 16, 20, 24, 28, 32, 36, 40, 60


@nb.njit
def takes_rope(node: int) -> bool:
    """Pairs of neighbours, without factors for frequencies."""
    a, b, width = load_i64(node + SRC), load_i64(node + SRC + 8), load_i64(node + NE)
    n_dims, first = load_i32(node + PARAMS + _DIMS), load_i32(node + PARAMS + _FIRST)
    return bool(
        is_rows(a)
        and is_rows(node)
        and same_shape(a, node)
        and load_i32(b + TYPE) == _I32
        and load_i64(node + SRC + 16) == 0
        and load_i32(node + PARAMS + _MODE) == 0
        and 0 < n_dims <= MOST_ROTATED
        and n_dims % 2 == 0
        and 0 <= first <= width - n_dims
    )


@nb.njit
def _number(node: int, at: int) -> np.float32:
    return np.float32(float_of_bits(load_i32(node + PARAMS + at)))


@nb.njit
def _bound(n_dims: int, n_trained: int, turns: np.float32, base: np.float32) -> np.float32:
    """The pair that turns so often in the trained context."""
    ratio = np.float32(n_trained) / (turns * np.float32(2) * np.float32(np.pi))
    return np.float32(np.float32(n_dims) * np.log(ratio) / (np.float32(2) * np.log(base)))


@nb.njit
def _angles(node: int, position: int, out: int) -> None:
    """Cosine and sine of each pair, times the magnitude."""
    n_dims, one, zero = load_i32(node + PARAMS + _DIMS), np.float32(1), np.float32(0)
    base, scale = _number(node, _BASE), _number(node, _SCALE)
    mix, factor = _number(node, _MIX), _number(node, _FACTOR)
    low, high = zero, one
    if mix != zero:
        n_trained = load_i32(node + PARAMS + _TRAINED)
        low = max(zero, np.floor(_bound(n_dims, n_trained, _number(node, _FAST), base)))
        high = min(np.float32(n_dims - 1), np.ceil(_bound(n_dims, n_trained, _number(node, _SLOW), base)))
        factor *= one + np.float32(0.1) * np.log(one / scale)
    step, theta = np.power(base, np.float32(-2) / np.float32(n_dims)), np.float32(position)
    sign = -one if load_i32(node + OP) == _BACK else one
    for i in range(n_dims // 2):
        angle = scale * theta
        if mix != zero:
            ramp = (np.float32(i) - low) / max(np.float32(0.001), high - low)
            share = (one - min(one, max(zero, ramp))) * mix
            angle = angle * (one - share) + theta * share
        store_f32(out + i * 8, np.cos(angle) * factor)
        store_f32(out + i * 8 + 4, np.sin(angle) * factor * sign)
        theta *= step


@nb.njit
def rope(node: int, token: int) -> None:
    """All heads of a token."""
    a, positions, angles = load_i64(node + SRC), load_i64(load_i64(node + SRC + 8) + DATA), stack(_ANGLES_BYTES)
    _angles(node, load_i32(positions + token * 4), angles)
    n_dims, first = load_i32(node + PARAMS + _DIMS), load_i32(node + PARAMS + _FIRST)
    for head in range(load_i64(node + NE + 8)):
        source, target = place(a, head, token), place(node, head, token)
        if source != target:
            copy(target, source, load_i64(node + NE) * 4)
        for at in range(first * 4, (first + n_dims) * 4, 8):
            cosine, sine = load_f32(angles + at - first * 4), load_f32(angles + at - first * 4 + 4)
            x, y = load_f32(source + at), load_f32(source + at + 4)
            store_f32(target + at, x * cosine - y * sine)
            store_f32(target + at + 4, x * sine + y * cosine)
