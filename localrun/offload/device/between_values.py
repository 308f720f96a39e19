"""Operations on the values of rows: sums, products, functions, norms, softmax.

`takes_values` says which layouts are known; `values` does one unit of the result: a row, of a softmax `LANES` rows.
"""

from __future__ import annotations

import numba as nb
import numpy as np

from localrun.ggml import structures as ggml
from localrun.offload.device.node_rows import is_rows, n_rows_of, place, row_at, same_shape
from localrun.offload.device.tensors import NB, NE, PARAMS, SRC, TYPE
from localrun.offload.kernels.float_rows import (
    UNIT,
    add_halves,
    add_rows,
    exponentials,
    largest_of_row,
    multiply_rows,
    scale_row,
    sum_of_row,
    sum_of_squares,
)
from localrun.offload.kernels.lowlevel import float_of_bits, load_f32, load_i32, load_i64, store_f32
from localrun.offload.kernels.simd import LANES

_ADD, _MUL, _DIV, _SCALE, _UNARY = ggml.OP_ADD, ggml.OP_MUL, ggml.OP_DIV, ggml.OP_SCALE, ggml.OP_UNARY
_NORM, _SOFT_MAX, _SUM, _SQRT, _CLAMP = (
    ggml.OP_RMS_NORM,
    ggml.OP_SOFT_MAX,
    ggml.OP_SUM_ROWS,
    ggml.OP_SQRT,
    ggml.OP_CLAMP,
)
_F16, _SIGMOID, _SOFTPLUS = ggml.TYPE_F16, ggml.UNARY_SIGMOID, ggml.UNARY_SOFTPLUS
_ONE = 0x3F800000
"""1.0 as F32."""


@nb.njit
def is_of_values(kind: int) -> bool:
    """Of this module."""
    return kind in (_ADD, _MUL, _DIV, _SCALE, _UNARY, _NORM, _SOFT_MAX, _SUM, _SQRT, _CLAMP)


@nb.njit
def _are_halves(node: int, a: int, b: int) -> bool:
    """A sum of two masks."""
    for tensor in (node, a, b):
        if load_i32(tensor + TYPE) != _F16 or load_i64(tensor + NB) != 2 or load_i64(tensor + NE + 24) != 1:
            return False
    return same_shape(node, a) and same_shape(a, b) and load_i64(a + NE) % LANES == 0


@nb.njit
def takes_values(kind: int, node: int) -> bool:
    """A layout that `values` knows."""
    a, b = load_i64(node + SRC), load_i64(node + SRC + 8)
    if kind == _ADD and _are_halves(node, a, b):
        return True
    if not is_rows(a) or not is_rows(node):
        return False
    if kind in (_ADD, _MUL, _DIV):  # ggml repeats the second one
        if not is_rows(b) or not same_shape(node, a):
            return False
        for i in range(3):
            n = load_i64(b + NE + i * 8)
            if n not in (1, load_i64(a + NE + i * 8)):
                return False
        return True
    if kind == _NORM:
        return bool(load_i64(a + NE) % UNIT == 0)
    if kind == _UNARY:
        return load_i32(node + PARAMS) in (_SIGMOID, _SOFTPLUS)
    if kind == _SOFT_MAX:  # neither mask nor sinks, neither scale nor ALiBi; vectors may reach from row to row
        row_bytes = load_i64(a + NE) * 4
        is_plain = load_i32(node + PARAMS) == _ONE and load_i32(node + PARAMS + 4) == 0 and b == 0
        return bool(
            is_plain
            and load_i64(node + SRC + 16) == 0
            and load_i64(a + NE + 8) % LANES == 0
            and load_i64(a + NB + 8) == load_i64(node + NB + 8) == row_bytes
        )
    return True


@nb.njit
def n_values_units(kind: int, node: int) -> int:
    """How many units the result has."""
    return int(n_rows_of(node) // LANES if kind == _SOFT_MAX else n_rows_of(node))


@nb.njit
def _norm(x: int, node: int, out: int) -> None:
    width, epsilon = load_i64(node + NE), float_of_bits(load_i32(node + PARAMS))
    mean = sum_of_squares(x, width) / np.float32(width)
    scale_row(x, np.float32(1) / np.sqrt(mean + epsilon), width, out)


@nb.njit
def _pair(kind: int, node: int, row: int) -> None:
    """A row and what is added to it, multiplied with it or divides it: a row or a number."""
    a, b, width = load_i64(node + SRC), load_i64(node + SRC + 8), load_i64(node + NE)
    n1 = load_i64(node + NE + 8)
    x, out = row_at(a, row), row_at(node, row)
    y = place(b, row % n1 % load_i64(b + NE + 8), row // n1 % load_i64(b + NE + 16))
    step = 0 if load_i64(b + NE) == 1 else 4
    if width % LANES == 0 and kind != _DIV:
        if load_i32(node + TYPE) == _F16:
            add_halves(x, y, width, out)
            return
        if step == 0 and kind == _MUL:
            scale_row(x, load_f32(y), width, out)
            return
        if step != 0 and kind == _MUL:
            multiply_rows(x, y, width, out)
            return
        if step != 0:
            add_rows(x, y, width, out)
            return
    for i in range(width):
        value, other = load_f32(x + i * 4), load_f32(y + i * step)
        if kind == _MUL:
            value *= other
        elif kind == _ADD:
            value += other
        else:
            value /= other
        store_f32(out + i * 4, value)


@nb.njit
def _map(kind: int, node: int, x: int, out: int) -> None:
    """A function of each value."""
    first, second = float_of_bits(load_i32(node + PARAMS)), float_of_bits(load_i32(node + PARAMS + 4))
    is_sigmoid, one = load_i32(node + PARAMS) == _SIGMOID, np.float32(1)
    for i in range(load_i64(node + NE)):
        value = load_f32(x + i * 4)
        if kind == _SCALE:
            value = value * first + second
        elif kind == _CLAMP:
            value = max(first, min(second, value))
        elif kind == _SQRT:
            value = np.sqrt(value)
        elif is_sigmoid:
            value = one / (one + np.exp(-value))
        elif value <= np.float32(20):  # above, softplus is the identity
            value = np.log(one + np.exp(value))
        store_f32(out + i * 4, value)


@nb.njit
def _sum(x: int, width: int) -> np.float32:
    if width % UNIT == 0:
        return np.float32(sum_of_row(x, width))
    total = np.float32(0)
    for i in range(width):
        total += load_f32(x + i * 4)
    return total


@nb.njit
def _soft_max(node: int, unit: int) -> None:
    """`LANES` rows one after the other in memory, of any length."""
    a, width = load_i64(node + SRC), load_i64(node + NE)
    x, out, whole = row_at(a, unit * LANES), row_at(node, unit * LANES), width % LANES == 0
    for row in range(LANES):
        at, to = x + row * width * 4, out + row * width * 4
        if whole:
            exponentials(at, largest_of_row(at, width), width, to)
            continue
        largest = load_f32(at)
        for i in range(1, width):
            largest = max(largest, load_f32(at + i * 4))
        for i in range(width):
            store_f32(to + i * 4, load_f32(at + i * 4) - largest)
    if not whole:
        exponentials(out, np.float32(0), width * LANES, out)
    for row in range(LANES):
        to = out + row * width * 4
        inverse = np.float32(1) / _sum(to, width)
        if whole:
            scale_row(to, inverse, width, to)
        else:
            for i in range(width):
                store_f32(to + i * 4, load_f32(to + i * 4) * inverse)


@nb.njit
def values(kind: int, node: int, unit: int) -> None:
    """One unit of a node that `takes_values` is true of."""
    if kind in (_ADD, _MUL, _DIV):
        _pair(kind, node, unit)
    elif kind == _SOFT_MAX:
        _soft_max(node, unit)
    else:
        x, out = row_at(load_i64(node + SRC), unit), row_at(node, unit)
        if kind == _NORM:
            _norm(x, node, out)
        elif kind == _SUM:
            store_f32(out, _sum(x, load_i64(load_i64(node + SRC) + NE)))
        else:
            _map(kind, node, x, out)
