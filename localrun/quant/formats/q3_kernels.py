"""Compiled search for Q3_K, the K type without a minimum: x = d q per group, d in six bits and of either sign.

Works on batches and the scratch array of `k_kernels`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from localrun.kernel_cache import cached_jit
from localrun.quant.formats.k_kernels import (
    BEST,
    DQ,
    INT_D,
    INVERSE,
    LANES,
    LOWER,
    MAGIC,
    PITCH,
    SPAN,
    SUM_QQ,
    SUPER,
    UPPER,
    D,
    Q,
    U,
    W,
    X,
    f16,
    fit_super,
    load,
    spread,
)
from localrun.quant.formats.kernels import _f16_bits


@cached_jit(nogil=True, forceinline=True)
def _signed_f16_bits(x: Any) -> Any:
    bits = _f16_bits(abs(x))
    return np.uint16(bits | np.uint16(0x8000)) if x < np.float32(0) else bits


@cached_jit(nogil=True, error_model="numpy")
def fit_symmetric(s: Any) -> None:
    """One pass over groups of 16 for integers -4 to 3 and the step 1 / INVERSE of either sign; keeps what is better."""
    zero, one, low, high = np.float32(0), np.float32(1), np.float32(-4), np.float32(3)
    for j in range(LANES):
        inverse = s[U(INVERSE * PITCH + j)]
        sum_qq = sum_qx = np.float32(0)
        for e in range(16):
            v = s[U((X + e) * PITCH + j)]
            q = min(max((v * inverse + MAGIC) - MAGIC, low), high)
            wq = s[U((W + e) * PITCH + j)] * q
            sum_qq += wq * q
            sum_qx += wq * v
        d = sum_qx / (sum_qq if sum_qq > zero else one)
        better = d * sum_qx > s[U(BEST * PITCH + j)]
        s[U(BEST * PITCH + j)] = d * sum_qx if better else s[U(BEST * PITCH + j)]
        s[U(D * PITCH + j)] = d if better else s[U(D * PITCH + j)]
        s[U(SUM_QQ * PITCH + j)] = sum_qq if better else s[U(SUM_QQ * PITCH + j)]


@cached_jit(nogil=True, error_model="numpy")
def search_symmetric(s: Any) -> None:
    """Best step of every group: the element of largest magnitude becomes about -4 or about 3; then two rounds of refining."""
    zero, one = np.float32(0), np.float32(1)
    for j in range(LANES):
        s[U(SPAN * PITCH + j)] = s[U(BEST * PITCH + j)] = s[U(D * PITCH + j)] = s[U(SUM_QQ * PITCH + j)] = zero
    for e in range(16):
        for j in range(LANES):
            v, most = s[U((X + e) * PITCH + j)], s[U(SPAN * PITCH + j)]
            s[U(SPAN * PITCH + j)] = v if abs(v) > abs(most) else most
    for i in range(14):
        # -4.8 to -3 in steps of 0.2, and 3 to 3.6
        top = (
            np.float32(-4.8) + np.float32(0.2) * np.float32(i)
            if i < 10
            else np.float32(1) + np.float32(0.2) * np.float32(i)
        )
        for j in range(LANES):
            most = s[U(SPAN * PITCH + j)]
            s[U(INVERSE * PITCH + j)] = top / (most if abs(most) > np.float32(1e-20) else one)
        fit_symmetric(s)
    for _ in range(2):
        for j in range(LANES):
            d = s[U(D * PITCH + j)]
            s[U(INVERSE * PITCH + j)] = one / (d if abs(d) > np.float32(1e-30) else one)
        fit_symmetric(s)


@cached_jit(nogil=True, error_model="numpy")
def round_symmetric(s: Any) -> None:
    """Integers of all elements, -4 to 3, for the quantized steps of their groups."""
    zero, low, high = np.float32(0), np.float32(-4), np.float32(3)
    for j in range(LANES):
        d = s[U(DQ * PITCH + j)]
        s[U(INVERSE * PITCH + j)] = np.float32(1) / d if d != zero else zero
    for e in range(16):
        for j in range(LANES):
            q = (s[U((X + e) * PITCH + j)] * s[U(INVERSE * PITCH + j)] + MAGIC) - MAGIC
            s[U((Q + e) * PITCH + j)] = min(max(q, low), high)


@cached_jit(nogil=True, error_model="numpy")
def quantize_batch_q3(x: Any, importance: Any, first: int, s: Any) -> None:
    """A batch of 16 super-blocks: integers in rows Q and INT_D, the super-blocks' steps in row SUPER."""
    load(x, importance, first, 16, s)
    search_symmetric(s)
    fit_super(D, SUM_QQ, INT_D, 16, np.float32(-32), np.float32(31), s)
    spread(SUPER, INT_D, DQ, 16, s)
    round_symmetric(s)
    for b in range(16):
        s[U(UPPER * PITCH + b)] = s[U(LOWER * PITCH + b)] = np.float32(0)
    for e in range(16):
        for g in range(16):
            for b in range(16):
                j = g * 16 + b
                kq = s[U(INT_D * PITCH + j)] * s[U((Q + e) * PITCH + j)]
                w = s[U((W + e) * PITCH + j)] * kq
                s[U(UPPER * PITCH + b)] += w * s[U((X + e) * PITCH + j)]
                s[U(LOWER * PITCH + b)] += w * kq
    for b in range(16):
        lower = s[U(LOWER * PITCH + b)]
        if lower > np.float32(0):
            s[U(SUPER * PITCH + b)] = f16(s[U(UPPER * PITCH + b)] / lower)
    spread(SUPER, INT_D, DQ, 16, s)
    round_symmetric(s)


@cached_jit(nogil=True)
def pack_q3(b: int, s: Any, at: Any, out: Any) -> None:
    """block_q3_K (ggml-common.h), 110 bytes: 32 of third bits, 64 of 2 bits, 12 of 6-bit scales, then d by the caller."""
    for j in range(32):
        byte = np.int32(0)
        for k in range(8):
            i = k * 32 + j
            byte |= (np.int32(s[U((Q + i % 16) * PITCH + i // 16 * 16 + b)]) + 4) >> 2 << k
        out[U(at + j)] = np.uint8(byte)
    for half in range(2):
        for j in range(32):
            byte = np.int32(0)
            for k in range(4):
                i = half * 128 + k * 32 + j
                byte |= (np.int32(s[U((Q + i % 16) * PITCH + i // 16 * 16 + b)]) + 4 & 3) << (2 * k)
            out[U(at + 32 + half * 32 + j)] = np.uint8(byte)
    for j in range(4):
        out[U(at + 104 + j)] = np.uint8(0)
    for g in range(16):
        step = np.int32(s[U(INT_D * PITCH + g * 16 + b)]) + 32
        if g < 8:
            out[U(at + 96 + g)] = np.uint8(step & 15)
        else:
            out[U(at + 96 + g - 8)] |= np.uint8((step & 15) << 4)
        out[U(at + 104 + g % 4)] |= np.uint8(step >> 4 << (2 * (g // 4)))


@cached_jit(nogil=True)
def quantize_q3_k(x: Any, importance: Any, s: Any, out: Any, out16: Any) -> None:
    """All of `x` to block_q3_K."""
    n_blocks = x.size // 256
    for first in range(0, n_blocks, 16):
        quantize_batch_q3(x, importance, first, s)
        for b in range(min(16, n_blocks - first)):
            at = 110 * (first + b)
            pack_q3(b, s, at, out)
            out16[U(at // 2 + 54)] = _signed_f16_bits(s[U(SUPER * PITCH + b)])
