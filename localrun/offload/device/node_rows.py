"""Rows of a ggml tensor's memory, for compiled code: where they are, and whether they are what kernels take."""

from __future__ import annotations

import numba as nb

from localrun.ggml import structures as ggml
from localrun.offload.device.tensors import DATA, NB, NE, TYPE
from localrun.offload.kernels.lowlevel import load_i32, load_i64

_F32, _F16, _I32 = ggml.TYPE_F32, ggml.TYPE_F16, ggml.TYPE_I32


@nb.njit
def value_bytes(tensor: int) -> int:
    """Of F32, I32 and F16; 0 for anything else."""
    kind = load_i32(tensor + TYPE)
    if kind == _F16:
        return 2
    return 4 if kind in (_F32, _I32) else 0


@nb.njit
def is_rows(tensor: int) -> bool:
    """F32, values of a row side by side, at most three dimensions."""
    return bool(load_i32(tensor + TYPE) == _F32 and load_i64(tensor + NB) == 4 and load_i64(tensor + NE + 24) == 1)


@nb.njit
def is_shaped(tensor: int, n0: int, n1: int, n2: int) -> bool:
    """Its first three dimensions."""
    return bool(load_i64(tensor + NE) == n0 and load_i64(tensor + NE + 8) == n1 and load_i64(tensor + NE + 16) == n2)


@nb.njit
def same_shape(a: int, b: int) -> bool:
    """In the first three dimensions."""
    return bool(is_shaped(a, load_i64(b + NE), load_i64(b + NE + 8), load_i64(b + NE + 16)))


@nb.njit
def n_rows_of(tensor: int) -> int:
    """Over the second and third dimension."""
    return int(load_i64(tensor + NE + 8) * load_i64(tensor + NE + 16))


@nb.njit
def place(tensor: int, i1: int, i2: int) -> int:
    """Address of the row at (i1, i2)."""
    return int(load_i64(tensor + DATA) + i1 * load_i64(tensor + NB + 8) + i2 * load_i64(tensor + NB + 16))


@nb.njit
def row_at(tensor: int, row: int) -> int:
    """Address of a row, counted over the second and third dimension."""
    n1 = load_i64(tensor + NE + 8)
    return int(place(tensor, row % n1, row // n1))
