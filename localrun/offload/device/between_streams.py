"""llama.cpp's operations on DeepSeek-V4's residual streams.

Shapes, as ggml has them: (D, STREAMS, T) streams, (STREAMS, T) weights, (STREAMS, STREAMS, T) mixes.

`takes_streams` says which layouts are known; the others do one token. ggml's own take one value after the other.
"""

from __future__ import annotations

from typing import Final

import numba as nb
import numpy as np

from localrun.ggml import structures as ggml
from localrun.offload.device.node_rows import is_rows, is_shaped, place, row_at
from localrun.offload.device.tensors import DATA, NB, NE, PARAMS, SRC
from localrun.offload.kernels.float_rows import STREAMS, gather_streams, spread_streams
from localrun.offload.kernels.lowlevel import float_of_bits, load_f32, load_i32, load_i64, stack, store_f32
from localrun.offload.kernels.simd import LANES

_COMB, _PRE, _POST = ggml.OP_DSV4_HC_COMB, ggml.OP_DSV4_HC_PRE, ggml.OP_DSV4_HC_POST
_WEIGHTS_BYTES: Final = STREAMS * (STREAMS + 1) * 4
_MIX_BYTES: Final = STREAMS * STREAMS * 4
_ROW: Final = STREAMS * 4


@nb.njit
def takes_streams(kind: int, node: int) -> bool:
    """`node` and its first input are `is_rows`."""
    a, b = load_i64(node + SRC), load_i64(node + SRC + 8)
    if kind == _COMB:
        base, n_tokens = load_i64(node + SRC + 16), load_i64(a + NE + 8)
        return bool(
            is_rows(b)
            and is_rows(base)
            and is_shaped(a, STREAMS * (STREAMS + 2), n_tokens, 1)
            and is_shaped(base, STREAMS * (STREAMS + 2), 1, 1)
            and is_shaped(node, STREAMS, STREAMS, n_tokens)
        )
    width, n_tokens = load_i64(a + NE), load_i64(node + NE + 16) if kind == _POST else load_i64(node + NE + 8)
    if width % LANES != 0 or not is_rows(b):
        return False
    if kind == _PRE:
        one = np.int32(0x3F800000)  # as F32: the scale; the other parameter is "gated"
        is_plain = load_i32(node + PARAMS) == one and load_i32(node + PARAMS + 4) == 0
        return bool(is_plain and is_shaped(a, width, STREAMS, n_tokens) and is_shaped(b, STREAMS, n_tokens, 1))
    post, comb = load_i64(node + SRC + 16), load_i64(node + SRC + 24)
    return bool(
        comb != 0
        and is_rows(post)
        and is_rows(comb)
        and is_shaped(b, width, STREAMS, n_tokens)
        and is_shaped(post, STREAMS, n_tokens, 1)
        and is_shaped(comb, STREAMS, STREAMS, n_tokens)
    )


@nb.njit
def _normalize(mix: int, step: int, across: int, epsilon: np.float32) -> None:
    """Divides values `step` bytes apart by their sum; as often as there are streams, `across` bytes apart."""
    for i in range(STREAMS):
        at, total = mix + i * across, epsilon
        for k in range(STREAMS):
            total += load_f32(at + k * step)
        inverse = np.float32(1) / total
        for k in range(STREAMS):
            store_f32(at + k * step, load_f32(at + k * step) * inverse)


@nb.njit
def comb(node: int, token: int) -> None:
    """Sinkhorn's normalization of a token's mixes: softmax over targets, then columns and rows in turn."""
    a, scale, base = load_i64(node + SRC), load_i64(node + SRC + 8), load_i64(node + SRC + 16)
    epsilon, n_rounds = float_of_bits(load_i32(node + PARAMS)), load_i32(node + PARAMS + 4)
    mix = stack(_MIX_BYTES)
    x, y = row_at(a, token) + 2 * _ROW, load_i64(base + DATA) + 2 * _ROW
    factor = load_f32(load_i64(scale + DATA) + 8)
    for source in range(0, STREAMS * _ROW, _ROW):
        largest, total = np.float32(-np.inf), np.float32(0)
        for i in range(source, source + _ROW, 4):
            value = load_f32(x + i) * factor + load_f32(y + i)
            store_f32(mix + i, value)
            largest = max(largest, value)
        for i in range(source, source + _ROW, 4):
            value = np.exp(load_f32(mix + i) - largest)
            store_f32(mix + i, value)
            total += value
        inverse = np.float32(1) / total
        for i in range(source, source + _ROW, 4):
            store_f32(mix + i, load_f32(mix + i) * inverse + epsilon)
    _normalize(mix, _ROW, 4, epsilon)
    for _ in range(1, n_rounds):
        _normalize(mix, 4, _ROW, epsilon)
        _normalize(mix, _ROW, 4, epsilon)
    for source in range(STREAMS):
        out = place(node, source, token)
        for target in range(STREAMS):
            store_f32(out + target * 4, load_f32(mix + source * _ROW + target * 4))


@nb.njit
def post(node: int, token: int) -> None:
    """A layer's output into all streams, and these into one another."""
    x, streams = load_i64(node + SRC), load_i64(node + SRC + 8)
    given, mixes, weights = load_i64(node + SRC + 16), load_i64(node + SRC + 24), stack(_WEIGHTS_BYTES)
    for d in range(STREAMS):
        store_f32(weights + d * 4, load_f32(row_at(given, token) + d * 4))
        for k in range(STREAMS):
            store_f32(weights + (STREAMS * (k + 1) + d) * 4, load_f32(place(mixes, k, token) + d * 4))
    source, out = place(streams, 0, token), place(node, 0, token)
    stride, out_stride = load_i64(streams + NB + 8), load_i64(node + NB + 8)
    spread_streams(row_at(x, token), source, stride, weights, load_i64(node + NE), out, out_stride)


@nb.njit
def pre(node: int, token: int) -> None:
    """The streams' weighted sum."""
    streams, weights = load_i64(node + SRC), load_i64(node + SRC + 8)
    stride = load_i64(streams + NB + 8)
    gather_streams(place(streams, 0, token), stride, row_at(weights, token), load_i64(node + NE), row_at(node, token))
