"""Compiled search for IQ2_XXS: groups of eight magnitudes from a grid of 256, signs of even parity, a 4-bit scale per 32.

For a step d and weights w, the entry e that is best for a group has the most P[e] - d / 2 * R[e], where P[e] is the sum of
w |x| g[e] and R[e] that of w g[e]^2. So all 256 entries are tried for every step; ggml tries neighbours of the rounded point. As
there, w is the importance times sqrt(s + x^2), s being twice the super-block's mean square: without it large weights shrink.
256 groups lie side by side, one per lane, in one scratch array of rows (`k_kernels` says why).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from localrun.kernel_cache import cached_jit
from localrun.quant.formats.k_kernels import LANES, PITCH, U, f16
from localrun.quant.formats.kernels import _f16_bits

# Rows of the scratch array.
A = 0  # eight: w |x|, negative where the sign that even parity demands is not x's
NEGATIVE = 8  # the eight signs as bits
HALF = 9  # half of the step
BEST = 10
INDEX = 11
SUM_P = 12  # of the best entry
SUM_R = 13
STEP = 14  # of the block of four groups, then quantized
INT = 15  # its integer, 2 * scale + 1
W = 16  # eight: w
POWER = 24  # sum of w x^2
TRIALS = 25
N_TRIALS = 6
HALVES = TRIALS  # N_TRIALS
BESTS = TRIALS + N_TRIALS
ROWS = BESTS + N_TRIALS

FIRST, NEXT = np.float32(0.62), np.float32(0.11)
"""Trials of a step, relative to the one with which the block's largest magnitude is the grid's largest."""


@cached_jit(nogil=True)
def load_groups(x: Any, importance: Any, at: Any, column: Any, n: Any, s: Any) -> None:
    """Rows A, NEGATIVE and STEP (each block's largest magnitude) of `n` groups, from x[at:] and importance[column:]."""
    for first in range(0, n, 32):
        total = np.float32(0)
        for i in range(8 * first, 8 * first + 256):
            total += x[U(at + i)] * x[U(at + i)]
        for lane in range(first, first + 32):
            s[U(HALF * PITCH + lane)] = total * np.float32(2.0 / 256)
    for lane in range(n):
        negative, largest, least, flip, power = 0, np.float32(0), np.float32(np.inf), 0, np.float32(0)
        for j in range(8):
            v, w = x[U(at + 8 * lane + j)], importance[U(column + 8 * lane + j)]
            size = abs(v)
            w *= np.sqrt(s[U(HALF * PITCH + lane)] + v * v)
            s[U((W + j) * PITCH + lane)] = w
            if v < np.float32(0):
                negative ^= 1 << j
            largest = max(largest, size)
            power += w * size * size
            if w * size * size < least:
                least, flip = w * size * size, j
            s[U((A + j) * PITCH + lane)] = w * size
        odd = negative
        odd ^= odd >> 4
        odd ^= odd >> 2
        odd ^= odd >> 1
        if odd & 1:
            negative ^= 1 << flip
            s[U((A + flip) * PITCH + lane)] = -s[U((A + flip) * PITCH + lane)]
        s[U(NEGATIVE * PITCH + lane)] = np.float32(negative)
        s[U(STEP * PITCH + lane)] = largest
        s[U(POWER * PITCH + lane)] = power
    for lane in range(0, n, 4):
        row = STEP * PITCH + lane
        largest = max(max(s[U(row)], s[U(row + 1)]), max(s[U(row + 2)], s[U(row + 3)]))
        for i in range(4):
            s[U(row + i)] = largest


@cached_jit(nogil=True)
def try_steps(grid: Any, s: Any) -> None:
    """Rows BESTS: most P - HALVES * R of all entries."""
    for k in range(N_TRIALS):
        factor = (FIRST + NEXT * np.float32(k)) * np.float32(0.5 / 43)
        for lane in range(LANES):
            s[U((HALVES + k) * PITCH + lane)] = s[U(STEP * PITCH + lane)] * factor
            s[U((BESTS + k) * PITCH + lane)] = np.float32(-1e30)
    for e in range(256):
        g0, g1, g2, g3 = grid[U(8 * e)], grid[U(8 * e + 1)], grid[U(8 * e + 2)], grid[U(8 * e + 3)]
        g4, g5, g6, g7 = grid[U(8 * e + 4)], grid[U(8 * e + 5)], grid[U(8 * e + 6)], grid[U(8 * e + 7)]
        q0, q1, q2, q3, q4, q5, q6, q7 = g0 * g0, g1 * g1, g2 * g2, g3 * g3, g4 * g4, g5 * g5, g6 * g6, g7 * g7
        for lane in range(LANES):
            low = (s[U(lane)] * g0 + s[U(PITCH + lane)] * g1) + (
                s[U(2 * PITCH + lane)] * g2 + s[U(3 * PITCH + lane)] * g3
            )
            high = (s[U(4 * PITCH + lane)] * g4 + s[U(5 * PITCH + lane)] * g5) + (
                s[U(6 * PITCH + lane)] * g6 + s[U(7 * PITCH + lane)] * g7
            )
            p = low + high
            low = (s[U(W * PITCH + lane)] * q0 + s[U((W + 1) * PITCH + lane)] * q1) + (
                s[U((W + 2) * PITCH + lane)] * q2 + s[U((W + 3) * PITCH + lane)] * q3
            )
            high = (s[U((W + 4) * PITCH + lane)] * q4 + s[U((W + 5) * PITCH + lane)] * q5) + (
                s[U((W + 6) * PITCH + lane)] * q6 + s[U((W + 7) * PITCH + lane)] * q7
            )
            r = low + high
            v0 = p - s[U((HALVES + 0) * PITCH + lane)] * r
            v1 = p - s[U((HALVES + 1) * PITCH + lane)] * r
            v2 = p - s[U((HALVES + 2) * PITCH + lane)] * r
            v3 = p - s[U((HALVES + 3) * PITCH + lane)] * r
            v4 = p - s[U((HALVES + 4) * PITCH + lane)] * r
            v5 = p - s[U((HALVES + 5) * PITCH + lane)] * r
            b0, b1 = s[U((BESTS + 0) * PITCH + lane)], s[U((BESTS + 1) * PITCH + lane)]
            b2, b3 = s[U((BESTS + 2) * PITCH + lane)], s[U((BESTS + 3) * PITCH + lane)]
            b4, b5 = s[U((BESTS + 4) * PITCH + lane)], s[U((BESTS + 5) * PITCH + lane)]
            s[U((BESTS + 0) * PITCH + lane)] = v0 if v0 > b0 else b0
            s[U((BESTS + 1) * PITCH + lane)] = v1 if v1 > b1 else b1
            s[U((BESTS + 2) * PITCH + lane)] = v2 if v2 > b2 else b2
            s[U((BESTS + 3) * PITCH + lane)] = v3 if v3 > b3 else b3
            s[U((BESTS + 4) * PITCH + lane)] = v4 if v4 > b4 else b4
            s[U((BESTS + 5) * PITCH + lane)] = v5 if v5 > b5 else b5


@cached_jit(nogil=True)
def keep_best_step(n: Any, s: Any) -> None:
    """Row HALF: of the trials, the one that explains most of each block."""
    for lane in range(0, n, 4):
        most, chosen = np.float32(-1), np.float32(0)
        for k in range(N_TRIALS):
            row, half = (BESTS + k) * PITCH + lane, s[U((HALVES + k) * PITCH + lane)]
            explained = half * ((s[U(row)] + s[U(row + 1)]) + (s[U(row + 2)] + s[U(row + 3)]))
            if explained > most:
                most, chosen = explained, half
        for i in range(4):
            s[U(HALF * PITCH + lane + i)] = chosen


@cached_jit(nogil=True)
def find_entries(grid: Any, s: Any) -> None:
    """Rows INDEX, SUM_P and SUM_R: the best entry for the step in row HALF."""
    for lane in range(LANES):
        s[U(BEST * PITCH + lane)] = np.float32(-1e30)
    for e in range(256):
        g0, g1, g2, g3 = grid[U(8 * e)], grid[U(8 * e + 1)], grid[U(8 * e + 2)], grid[U(8 * e + 3)]
        g4, g5, g6, g7 = grid[U(8 * e + 4)], grid[U(8 * e + 5)], grid[U(8 * e + 6)], grid[U(8 * e + 7)]
        q0, q1, q2, q3, q4, q5, q6, q7 = g0 * g0, g1 * g1, g2 * g2, g3 * g3, g4 * g4, g5 * g5, g6 * g6, g7 * g7
        number = np.float32(e)
        for lane in range(LANES):
            low = (s[U(lane)] * g0 + s[U(PITCH + lane)] * g1) + (
                s[U(2 * PITCH + lane)] * g2 + s[U(3 * PITCH + lane)] * g3
            )
            high = (s[U(4 * PITCH + lane)] * g4 + s[U(5 * PITCH + lane)] * g5) + (
                s[U(6 * PITCH + lane)] * g6 + s[U(7 * PITCH + lane)] * g7
            )
            p = low + high
            low = (s[U(W * PITCH + lane)] * q0 + s[U((W + 1) * PITCH + lane)] * q1) + (
                s[U((W + 2) * PITCH + lane)] * q2 + s[U((W + 3) * PITCH + lane)] * q3
            )
            high = (s[U((W + 4) * PITCH + lane)] * q4 + s[U((W + 5) * PITCH + lane)] * q5) + (
                s[U((W + 6) * PITCH + lane)] * q6 + s[U((W + 7) * PITCH + lane)] * q7
            )
            r = low + high
            v, best = p - s[U(HALF * PITCH + lane)] * r, s[U(BEST * PITCH + lane)]
            better = v > best
            s[U(BEST * PITCH + lane)] = v if better else best
            s[U(INDEX * PITCH + lane)] = number if better else s[U(INDEX * PITCH + lane)]
            s[U(SUM_P * PITCH + lane)] = p if better else s[U(SUM_P * PITCH + lane)]
            s[U(SUM_R * PITCH + lane)] = r if better else s[U(SUM_R * PITCH + lane)]


@cached_jit(nogil=True, forceinline=True)
def _of_block(row: Any, lane: Any, s: Any) -> Any:
    at = row * PITCH + lane
    return (s[U(at)] + s[U(at + 1)]) + (s[U(at + 2)] + s[U(at + 3)])


@cached_jit(nogil=True)
def quantize_steps(n: Any, s: Any) -> None:
    """Rows INT and HALF from the entries: every block's step fitted, then as odd eighths of the super-block's."""
    zero, eight = np.float32(0), np.float32(8)
    for first in range(0, n, 32):
        largest = zero
        for lane in range(first, first + 32, 4):
            r = _of_block(SUM_R, lane, s)
            step = max(_of_block(SUM_P, lane, s) / r if r > zero else zero, zero)
            s[U(STEP * PITCH + lane)] = step
            largest = max(largest, step)
        unit = largest * np.float32(8.0 / 31)
        for _ in range(3):
            upper, lower = zero, zero
            for lane in range(first, first + 32, 4):
                step = s[U(STEP * PITCH + lane)]
                ratio = step * eight / unit if unit > zero else zero
                scale = min(max(np.floor(ratio * np.float32(0.5)), zero), np.float32(15))
                number = scale * np.float32(2) + np.float32(1)
                r = _of_block(SUM_R, lane, s)
                upper += r * step * number
                lower += r * number * number
                s[U(INT * PITCH + lane)] = number
            if lower > zero:
                unit = f16(eight * upper / lower)
        for lane in range(first, first + 32, 4):
            for i in range(4):
                s[U(HALF * PITCH + lane + i)] = s[U(INT * PITCH + lane)] * unit * np.float32(1.0 / 16)


@cached_jit(nogil=True)
def pack_groups(n: Any, at: Any, s: Any, out: Any, out16: Any) -> None:
    """block_iq2_xxs (ggml-common.h), 66 bytes: d, then per 32 weights four indices and 4 x 7 signs below a scale."""
    zero = np.float32(0)
    for first in range(0, n, 32):
        upper, power = zero, zero
        for lane in range(first, first + 32, 4):
            upper += s[U(INT * PITCH + lane)] * _of_block(SUM_P, lane, s)
            power += _of_block(POWER, lane, s)
        # Not by least squares, which shrinks all outputs: the weights' component along the exact ones is as large as these.
        unit = np.float32(8) * power / upper if upper > zero else zero
        out16[U(at // 2)] = _f16_bits(unit)
        for block in range(8):
            lane, to = first + 4 * block, at + 2 + 8 * block
            signs = np.uint32(np.int32(s[U(INT * PITCH + lane)]) >> 1) << np.uint32(28)
            for i in range(4):
                out[U(to + i)] = np.uint8(np.int32(s[U(INDEX * PITCH + lane + i)]))
                signs |= np.uint32(np.int32(s[U(NEGATIVE * PITCH + lane + i)]) & 127) << np.uint32(7 * i)
            for i in range(4):
                out[U(to + 4 + i)] = np.uint8(signs >> np.uint32(8 * i) & np.uint32(255))
        at += 66


@cached_jit(nogil=True)
def quantize_iq2_xxs(x: Any, importance: Any, n_in: Any, grid: Any, s: Any, out: Any, out16: Any) -> None:
    """All rows of `x` to block_iq2_xxs; grid: (256, 8) magnitudes."""
    n_groups, at = n_in // 8, 0
    for row in range(x.size // n_in):
        for group in range(0, n_groups, LANES):
            n = min(LANES, n_groups - group)
            load_groups(x, importance, row * n_in + 8 * group, 8 * group, n, s)
            try_steps(grid, s)
            keep_best_step(n, s)
            find_entries(grid, s)
            quantize_steps(n, s)
            find_entries(grid, s)
            pack_groups(n, at, s, out, out16)
            at += n // 32 * 66
