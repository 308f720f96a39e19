"""Compiled search for K types with a minimum (Q2_K, Q4_K, Q5_K): x = d q - m per group, d and m in a few bits each; and what
`q3_kernels`, for the one without, shares with it.

ggml's own search is compiled for any x86-64 and works on one group at a time (5 to 11 million weights per second and core); here
256 groups lie side by side, one per lane, so that LLVM turns each loop over the lanes into vector instructions. What is searched
differs too: candidates for the step are fewer, but each is fitted by weighted least squares and the best is refined, and at the end
step and minimum of the super-block are fitted once more to the integers that were chosen.

Everything of a batch lies in one scratch array `s` of rows of 256 lanes: one array, and offsets that are constants, because LLVM
otherwise can't prove that reads and writes do not overlap and keeps the loops scalar. In a batch of S super-blocks, group g of
super-block b has lane g * S + b. No reassociation anywhere: results do not depend on the width of the vectors.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from localrun.kernel_cache import cached_jit
from localrun.quant.formats.kernels import _f16_bits, _f16_value

U = np.uintp
LANES = 256
PITCH = 272
"""Floats from row to row: not a power of two, whose rows would share a few sets of the first-level cache."""

# Rows of the scratch array. X, W and Q have one per element of a group.
X = 0
W = 32
Q = 64
LOW = 96  # minimum that the running pass subtracts
INVERSE = 97  # 1 / step of the running pass
SPAN = 98  # largest less smallest element
SUM_W = 99
SUM_X = 100
BEST = 101  # what the best fit so far explains of the sum of w x^2
D = 102
M = 103
SUM_QQ = 104  # of the best fit: how much an error of the step counts
FIT = 105  # values of the super-block fit that is running
SUPER = 106  # ... its step, in the first S lanes
TRIAL = 107
DQ = 108  # quantized step and minimum of each group
MQ = 109
INT_D = 110  # their integers
INT_M = 111
UPPER = 112  # sums of the super-block fit, in the first S lanes
LOWER = 113
MOST = 114
EXPLAINED = 115
ROWS = 116

MAGIC = np.float32(12582912.0)
"""1.5 * 2^23: adding and subtracting it rounds a float below 2^22 to the nearest integer."""


@cached_jit(nogil=True, forceinline=True)
def f16(x: Any) -> Any:
    """Nearest F16, as F32."""
    magnitude = _f16_value(_f16_bits(abs(x)))
    return -magnitude if x < np.float32(0) else magnitude


@cached_jit(nogil=True)
def load(x: Any, importance: Any, first: int, size: int, s: Any) -> None:
    """Lays a batch out by lanes; super-blocks beyond the end of `x` are zeros that count nothing."""
    n_groups = 256 // size
    S = LANES // n_groups
    n_inside = min(S, x.size // 256 - first)
    for g in range(n_groups):
        for e in range(size):
            to, at = (X + e) * PITCH + g * S, first * 256 + g * size + e
            for b in range(n_inside):
                s[U(to + b)] = x[U(at + 256 * b)]
            for b in range(n_inside, S):
                s[U(to + b)] = np.float32(0)
    n_in, column = importance.size, first * 256 % importance.size
    for b in range(S):
        for g in range(n_groups):
            for e in range(size):
                w = importance[U(column + g * size + e)]
                s[U((W + e) * PITCH + g * S + b)] = w if b < n_inside else np.float32(0)
        column = column + 256 if column + 256 < n_in else 0


@cached_jit(nogil=True, error_model="numpy")
def begin(size: int, s: Any) -> None:
    """Sums of each group, and the fit without a step: all elements -m."""
    zero, tiny = np.float32(0), np.float32(1e-20)
    for j in range(LANES):
        s[U(LOW * PITCH + j)] = s[U(X * PITCH + j)]
        s[U(SPAN * PITCH + j)] = s[U(X * PITCH + j)]
        s[U(SUM_W * PITCH + j)] = zero
        s[U(SUM_X * PITCH + j)] = zero
    for e in range(size):
        for j in range(LANES):
            v, w = s[U((X + e) * PITCH + j)], s[U((W + e) * PITCH + j)]
            s[U(LOW * PITCH + j)] = min(s[U(LOW * PITCH + j)], v)
            s[U(SPAN * PITCH + j)] = max(s[U(SPAN * PITCH + j)], v)
            s[U(SUM_W * PITCH + j)] += w
            s[U(SUM_X * PITCH + j)] += w * v
    for j in range(LANES):
        low = min(s[U(LOW * PITCH + j)], zero)
        s[U(LOW * PITCH + j)] = low
        s[U(SPAN * PITCH + j)] = max(s[U(SPAN * PITCH + j)] - low, tiny)
        sum_x = s[U(SUM_X * PITCH + j)]
        mean = min(sum_x / max(s[U(SUM_W * PITCH + j)], tiny), zero)
        s[U(BEST * PITCH + j)] = mean * sum_x
        s[U(D * PITCH + j)] = zero
        s[U(M * PITCH + j)] = -mean
        s[U(SUM_QQ * PITCH + j)] = zero


@cached_jit(nogil=True, error_model="numpy", forceinline=True)
def _keep_if_better(s: Any, j: Any, sum_q: Any, sum_qq: Any, sum_qx: Any) -> None:
    """Weighted least squares for one lane's integers; minima below zero only, which is what the format has."""
    zero = np.float32(0)
    sum_w, sum_x = s[U(SUM_W * PITCH + j)], s[U(SUM_X * PITCH + j)]
    determinant = sum_w * sum_qq - sum_q * sum_q
    sound = determinant > np.float32(1e-6) * sum_w * sum_qq
    inverse = np.float32(1) / (determinant if sound else np.float32(1))
    d = (sum_w * sum_qx - sum_x * sum_q) * inverse
    b = (sum_qq * sum_x - sum_q * sum_qx) * inverse
    free = sound and b < zero
    alone = sum_qx / (sum_qq if sum_qq > zero else np.float32(1))
    d, b = (d if free else alone), (b if free else zero)
    explained = d * sum_qx + b * sum_x
    better = explained > s[U(BEST * PITCH + j)] and d > zero
    s[U(BEST * PITCH + j)] = explained if better else s[U(BEST * PITCH + j)]
    s[U(D * PITCH + j)] = d if better else s[U(D * PITCH + j)]
    s[U(M * PITCH + j)] = -b if better else s[U(M * PITCH + j)]
    s[U(SUM_QQ * PITCH + j)] = sum_qq if better else s[U(SUM_QQ * PITCH + j)]


@cached_jit(nogil=True, error_model="numpy")
def fit_16(n_max: Any, s: Any) -> None:
    """One pass over groups of 16: rounds with LOW and INVERSE, fits, keeps what is better. The loop over elements is unrolled."""
    for j in range(LANES):
        low, inverse = s[U(LOW * PITCH + j)], s[U(INVERSE * PITCH + j)]
        sum_q = sum_qq = sum_qx = np.float32(0)
        for e in range(16):
            v = s[U((X + e) * PITCH + j)]
            q = ((v - low) * inverse + MAGIC) - MAGIC
            q = min(max(q, np.float32(0)), n_max)
            wq = s[U((W + e) * PITCH + j)] * q
            sum_q += wq
            sum_qq += wq * q
            sum_qx += wq * v
        _keep_if_better(s, j, sum_q, sum_qq, sum_qx)


@cached_jit(nogil=True, error_model="numpy")
def fit_32(n_max: Any, s: Any) -> None:
    """The same for groups of 32, in two halves: LLVM does not unroll 32 elements, and then would not vectorise."""
    for j in range(LANES):
        s[U(UPPER * PITCH + j)] = s[U(LOWER * PITCH + j)] = s[U(FIT * PITCH + j)] = np.float32(0)
    for half in range(0, 32, 16):
        for j in range(LANES):
            low, inverse = s[U(LOW * PITCH + j)], s[U(INVERSE * PITCH + j)]
            sum_q = sum_qq = sum_qx = np.float32(0)
            for e in range(16):
                v = s[U((X + half + e) * PITCH + j)]
                q = ((v - low) * inverse + MAGIC) - MAGIC
                q = min(max(q, np.float32(0)), n_max)
                wq = s[U((W + half + e) * PITCH + j)] * q
                sum_q += wq
                sum_qq += wq * q
                sum_qx += wq * v
            s[U(UPPER * PITCH + j)] += sum_q
            s[U(LOWER * PITCH + j)] += sum_qq
            s[U(FIT * PITCH + j)] += sum_qx
    for j in range(LANES):
        _keep_if_better(s, j, s[U(UPPER * PITCH + j)], s[U(LOWER * PITCH + j)], s[U(FIT * PITCH + j)])


@cached_jit(nogil=True, error_model="numpy")
def search(size: int, n_max: Any, first_step: Any, last_step: Any, n_steps: int, n_refine: int, s: Any) -> None:
    """Best d and m of every group: candidates (n_max + step) / span for 1 / d, then a few rounds of refining the best."""
    for i in range(n_steps):
        step = first_step + (last_step - first_step) * np.float32(i) / np.float32(max(1, n_steps - 1))
        for j in range(LANES):
            s[U(INVERSE * PITCH + j)] = (n_max + step) / s[U(SPAN * PITCH + j)]
        if size == 16:
            fit_16(n_max, s)
        else:
            fit_32(n_max, s)
    for _ in range(n_refine):
        for j in range(LANES):
            d = s[U(D * PITCH + j)]
            s[U(INVERSE * PITCH + j)] = np.float32(1) / d if d > np.float32(1e-30) else np.float32(0)
            s[U(LOW * PITCH + j)] = -s[U(M * PITCH + j)]
        if size == 16:
            fit_16(n_max, s)
        else:
            fit_32(n_max, s)


@cached_jit(nogil=True, error_model="numpy")
def fit_super(value: int, weight: int, target: int, n_groups: int, s_min: Any, s_max: Any, s: Any) -> None:
    """Integers s_min to s_max for one value of each group (row `value`) and an F16 step for each super-block (row SUPER).

    With s_min 0 the values are not negative; else the value of largest magnitude shall become s_min, and the step takes its sign.
    """
    S = LANES // n_groups
    zero, one = np.float32(0), np.float32(1)
    extreme = s_max if s_min == zero else s_min
    for b in range(S):
        s[U(MOST * PITCH + b)] = zero
        s[U(SUPER * PITCH + b)] = zero
        s[U(EXPLAINED * PITCH + b)] = np.float32(-1)
    for g in range(n_groups):
        for b in range(S):
            v, most = s[U(value * PITCH + g * S + b)], s[U(MOST * PITCH + b)]
            s[U(MOST * PITCH + b)] = v if abs(v) > abs(most) else most
    for i in range(-6, 7):
        for b in range(S):
            most = s[U(MOST * PITCH + b)]
            top = extreme * (one + np.float32(0.1) * np.float32(i) / abs(extreme))
            s[U(INVERSE * PITCH + b)] = top / most if abs(most) > np.float32(1e-30) else zero
            s[U(UPPER * PITCH + b)] = zero
            s[U(LOWER * PITCH + b)] = zero
        for g in range(n_groups):
            for b in range(S):
                v, w = s[U(value * PITCH + g * S + b)], s[U(weight * PITCH + g * S + b)]
                k = min(max((v * s[U(INVERSE * PITCH + b)] + MAGIC) - MAGIC, s_min), s_max)
                s[U(UPPER * PITCH + b)] += w * k * v
                s[U(LOWER * PITCH + b)] += w * k * k
        for b in range(S):
            upper, lower = s[U(UPPER * PITCH + b)], s[U(LOWER * PITCH + b)]
            step = upper / (lower if lower > zero else one)
            better = step * upper > s[U(EXPLAINED * PITCH + b)]
            s[U(EXPLAINED * PITCH + b)] = step * upper if better else s[U(EXPLAINED * PITCH + b)]
            s[U(SUPER * PITCH + b)] = step if better else s[U(SUPER * PITCH + b)]
    for b in range(S):
        step = s[U(SUPER * PITCH + b)]
        step = f16(step if step != zero else s[U(MOST * PITCH + b)] / extreme)
        s[U(SUPER * PITCH + b)] = step
        s[U(INVERSE * PITCH + b)] = one / step if step != zero else zero
    for g in range(n_groups):
        for b in range(S):
            k = (s[U(value * PITCH + g * S + b)] * s[U(INVERSE * PITCH + b)] + MAGIC) - MAGIC
            s[U(target * PITCH + g * S + b)] = min(max(k, s_min), s_max)


@cached_jit(nogil=True, error_model="numpy")
def spread(super_row: int, integers: int, target: int, n_groups: int, s: Any) -> None:
    """`target` of every group = its integer times its super-block's step."""
    S = LANES // n_groups
    for g in range(n_groups):
        for b in range(S):
            s[U(target * PITCH + g * S + b)] = s[U(super_row * PITCH + b)] * s[U(integers * PITCH + g * S + b)]


@cached_jit(nogil=True, error_model="numpy")
def round_elements(size: int, n_max: Any, s: Any) -> None:
    """Integers of all elements for the quantized d and m of their groups."""
    zero = np.float32(0)
    for j in range(LANES):
        d = s[U(DQ * PITCH + j)]
        s[U(INVERSE * PITCH + j)] = np.float32(1) / d if d > zero else zero
    for e in range(size):
        for j in range(LANES):
            q = ((s[U((X + e) * PITCH + j)] + s[U(MQ * PITCH + j)]) * s[U(INVERSE * PITCH + j)] + MAGIC) - MAGIC
            s[U((Q + e) * PITCH + j)] = min(max(q, zero), n_max)


@cached_jit(nogil=True, error_model="numpy")
def refit_super(size: int, n_groups: int, steps_d: Any, steps_m: Any, s: Any) -> None:
    """Steps of d and m of every super-block, by least squares over its 256 weights with all integers as they are."""
    S = LANES // n_groups
    zero = np.float32(0)
    for j in range(LANES):
        sum_q = sum_qq = sum_qx = zero
        for e in range(size):
            q, v = s[U((Q + e) * PITCH + j)], s[U((X + e) * PITCH + j)]
            wq = s[U((W + e) * PITCH + j)] * q
            sum_q += wq
            sum_qq += wq * q
            sum_qx += wq * v
        s[U(LOW * PITCH + j)] = sum_q
        s[U(FIT * PITCH + j)] = sum_qq
        s[U(TRIAL * PITCH + j)] = sum_qx
    for b in range(S):
        a11 = a12 = a22 = b1 = b2 = 0.0
        for g in range(n_groups):
            j = g * S + b
            k, t = np.float64(s[U(INT_D * PITCH + j)]), np.float64(s[U(INT_M * PITCH + j)])
            a11 += k * k * s[U(FIT * PITCH + j)]
            a12 -= k * t * s[U(LOW * PITCH + j)]
            a22 += t * t * s[U(SUM_W * PITCH + j)]
            b1 += k * s[U(TRIAL * PITCH + j)]
            b2 -= t * s[U(SUM_X * PITCH + j)]
        determinant = a11 * a22 - a12 * a12
        if determinant > 1e-9 * a11 * a22:
            d, m = (a22 * b1 - a12 * b2) / determinant, (a11 * b2 - a12 * b1) / determinant
            if d > 0 and m > 0:
                steps_d[U(b)], steps_m[U(b)] = np.float32(d), np.float32(m)
        elif a11 > 0 and b1 > 0 and a22 == 0:
            steps_d[U(b)] = np.float32(b1 / a11)


@cached_jit(nogil=True, error_model="numpy")
def quantize_batch(
    x: Any,
    importance: Any,
    first: int,
    size: int,
    n_max: Any,
    s_max: Any,
    steps: Any,
    s: Any,
    steps_d: Any,
    steps_m: Any,
) -> None:
    """A whole batch from super-block `first` on: integers in rows Q, INT_D and INT_M, super-block steps (F16 values) apart.

    Args:
        x: all weights, flat, whole super-blocks.
        importance: of the columns; its length divides x's and is a multiple of 256.
        size, n_max: elements of a group, largest integer of an element.
        s_max: largest integer of a group's d and m.
        steps: (4,) first and last candidate, their number, rounds of refining.
        s: scratch (ROWS * PITCH,); steps_d, steps_m: (LANES * size // 256,).
    """
    n_groups = 256 // size
    S = LANES // n_groups
    load(x, importance, first, size, s)
    begin(size, s)
    search(size, n_max, steps[0], steps[1], int(steps[2]), int(steps[3]), s)
    fit_super(D, SUM_QQ, INT_D, n_groups, np.float32(0), s_max, s)
    for b in range(S):
        steps_d[U(b)] = s[U(SUPER * PITCH + b)]
    spread(SUPER, INT_D, DQ, n_groups, s)
    fit_super(M, SUM_W, INT_M, n_groups, np.float32(0), s_max, s)
    for b in range(S):
        steps_m[U(b)] = s[U(SUPER * PITCH + b)]
    spread(SUPER, INT_M, MQ, n_groups, s)
    round_elements(size, n_max, s)
    refit_super(size, n_groups, steps_d, steps_m, s)
    for b in range(S):
        steps_d[U(b)] = f16(steps_d[U(b)])
        s[U(SUPER * PITCH + b)] = steps_d[U(b)]
    spread(SUPER, INT_D, DQ, n_groups, s)
    for b in range(S):
        steps_m[U(b)] = f16(steps_m[U(b)])
        s[U(SUPER * PITCH + b)] = steps_m[U(b)]
    spread(SUPER, INT_M, MQ, n_groups, s)
    round_elements(size, n_max, s)


@cached_jit(nogil=True, error_model="numpy")
def unshrink(s: Any, step_d: Any, step_m: Any) -> None:
    """Scales 16 super-blocks of 16 groups so that their component along the exact weights is as large as these.

    Least squares makes it smaller by the relative squared error, 4 % for Q2_K, and so all experts' outputs. [m] Demo model, all
    experts in Q2_K, 3,072 tokens: KL 0.0188 by least squares, 0.0149 with 5 % more.
    """
    zero = np.float32(0)
    for b in range(16):
        s[U(UPPER * PITCH + b)] = s[U(LOWER * PITCH + b)] = zero
    for e in range(16):
        for g in range(16):
            for b in range(16):
                j = g * 16 + b
                x = s[U((X + e) * PITCH + j)]
                wx = s[U((W + e) * PITCH + j)] * x
                s[U(UPPER * PITCH + b)] += wx * x
                s[U(LOWER * PITCH + b)] += wx * (
                    s[U(DQ * PITCH + j)] * s[U((Q + e) * PITCH + j)] - s[U(MQ * PITCH + j)]
                )
    for b in range(16):
        lower = s[U(LOWER * PITCH + b)]
        factor = s[U(UPPER * PITCH + b)] / lower if lower > zero else np.float32(1)
        factor = min(max(factor, np.float32(1)), np.float32(1.25))
        step_d[U(b)], step_m[U(b)] = f16(step_d[U(b)] * factor), f16(step_m[U(b)] * factor)


# --- bytes -------------------------------------------------------------------------------------------------------------------


@cached_jit(nogil=True)
def pack_q2(b: int, s: Any, at: Any, out: Any) -> None:
    """block_q2_K (ggml-common.h), 84 bytes: 16 x (d | m << 4), 64 bytes of 2 bits, then d and dmin by the caller."""
    for g in range(16):
        k, t = s[U(INT_D * PITCH + g * 16 + b)], s[U(INT_M * PITCH + g * 16 + b)]
        out[U(at + g)] = np.uint8(np.int32(k) | np.int32(t) << 4)
    for half in range(2):
        for j in range(32):
            byte = np.int32(0)
            for k in range(4):
                i = half * 128 + k * 32 + j
                byte |= np.int32(s[U((Q + i % 16) * PITCH + i // 16 * 16 + b)]) << (2 * k)
            out[U(at + 16 + half * 32 + j)] = np.uint8(byte)


@cached_jit(nogil=True)
def pack_scales_6(b: int, s: Any, at: Any, out: Any) -> None:
    """12 bytes for 8 pairs of 6 bits, as get_scale_min_k4 (ggml-quants.c) reads them."""
    for g in range(4):
        k, t = np.int32(s[U(INT_D * PITCH + g * 32 + b)]), np.int32(s[U(INT_M * PITCH + g * 32 + b)])
        high_k = np.int32(s[U(INT_D * PITCH + (g + 4) * 32 + b)])
        high_t = np.int32(s[U(INT_M * PITCH + (g + 4) * 32 + b)])
        out[U(at + g)] = np.uint8(k | high_k >> 4 << 6)
        out[U(at + 4 + g)] = np.uint8(t | high_t >> 4 << 6)
        out[U(at + 8 + g)] = np.uint8(high_k & 15 | (high_t & 15) << 4)


@cached_jit(nogil=True)
def pack_nibbles(b: int, s: Any, at: Any, out: Any) -> None:
    """128 bytes: groups 2k (low) and 2k + 1 (high nibbles), without the fifth bit."""
    for k in range(4):
        for j in range(32):
            low = np.int32(s[U((Q + j) * PITCH + 2 * k * 32 + b)]) & 15
            high = np.int32(s[U((Q + j) * PITCH + (2 * k + 1) * 32 + b)]) & 15
            out[U(at + 32 * k + j)] = np.uint8(low | high << 4)


@cached_jit(nogil=True)
def pack_fifth_bits(b: int, s: Any, at: Any, out: Any) -> None:
    """32 bytes: bit g of byte j is the fifth bit of element j of group g."""
    for j in range(32):
        byte = np.int32(0)
        for g in range(8):
            byte |= np.int32(s[U((Q + j) * PITCH + g * 32 + b)]) >> 4 << g
        out[U(at + j)] = np.uint8(byte)


@cached_jit(nogil=True)
def quantize_q2_k(x: Any, importance: Any, steps: Any, s: Any, step_d: Any, step_m: Any, out: Any, out16: Any) -> None:
    """All of `x` to block_q2_K."""
    n_blocks = x.size // 256
    for first in range(0, n_blocks, 16):
        quantize_batch(x, importance, first, 16, np.float32(3), np.float32(15), steps, s, step_d, step_m)
        unshrink(s, step_d, step_m)
        for b in range(min(16, n_blocks - first)):
            at = 84 * (first + b)
            pack_q2(b, s, at, out)
            out16[U(at // 2 + 40)] = _f16_bits(step_d[U(b)])
            out16[U(at // 2 + 41)] = _f16_bits(step_m[U(b)])


@cached_jit(nogil=True)
def quantize_q45_k(
    x: Any, importance: Any, five: bool, steps: Any, s: Any, step_d: Any, step_m: Any, out: Any, out16: Any
) -> None:
    """All of `x` to block_q4_K (144 bytes: d, dmin, scales, nibbles) or block_q5_K (176: fifth bits before the nibbles)."""
    n_blocks = x.size // 256
    size, n_max = (176, np.float32(31)) if five else (144, np.float32(15))
    for first in range(0, n_blocks, 32):
        quantize_batch(x, importance, first, 32, n_max, np.float32(63), steps, s, step_d, step_m)
        for b in range(min(32, n_blocks - first)):
            at = size * (first + b)
            out16[U(at // 2)] = _f16_bits(step_d[U(b)])
            out16[U(at // 2 + 1)] = _f16_bits(step_m[U(b)])
            pack_scales_6(b, s, at + 4, out)
            if five:
                pack_fifth_bits(b, s, at + 16, out)
            pack_nibbles(b, s, at + size - 128, out)
