"""Operations that move values: rows chosen, joined, repeated, filled, laid out anew; and the cache's rows written.

`takes_moves` says which layouts are known; `move` does one unit of the result: a row, or `LANES` rows that were columns.
"""

from __future__ import annotations

import numba as nb
import numpy as np

from localrun.ggml import structures as ggml
from localrun.offload.device.node_rows import is_rows, n_rows_of, place, row_at, value_bytes
from localrun.offload.device.tensors import DATA, NB, NE, PARAMS, SRC, TYPE
from localrun.offload.kernels.float_rows import to_halves, turn_columns
from localrun.offload.kernels.lowlevel import (
    blocks_of,
    copy,
    load_f32,
    load_i32,
    load_i64,
    store_f32,
    store_u16,
)
from localrun.offload.kernels.simd import LANES

_CONCAT, _CONT, _GET, _SET = ggml.OP_CONCAT, ggml.OP_CONT, ggml.OP_GET_ROWS, ggml.OP_SET_ROWS
_REPEAT, _FILL = ggml.OP_REPEAT, ggml.OP_FILL
_F32, _F16, _I32, _I64 = ggml.TYPE_F32, ggml.TYPE_F16, ggml.TYPE_I32, ggml.TYPE_I64
_LOWEST = -0x800000
"""Minus infinity as F32."""
_EXCLUDED = 0xFC00
"""The same as F16."""


@nb.njit
def is_of_moves(kind: int) -> bool:
    """Of this module."""
    return kind in (_CONCAT, _CONT, _GET, _SET, _REPEAT, _FILL)


@nb.njit
def _is_lined_up(tensor: int) -> bool:
    """Values of a row side by side, at most three dimensions."""
    size = value_bytes(tensor)
    return size != 0 and load_i64(tensor + NB) == size and load_i64(tensor + NE + 24) == 1


@nb.njit
def _has_columns(tensor: int) -> bool:
    """32-bit values of a *column* side by side."""
    return load_i64(tensor + NB + 8) == 4 and load_i64(tensor + NB) != 4 and load_i64(tensor + NE + 24) == 1


@nb.njit
def _is_dense(tensor: int) -> bool:
    """Row after row without gaps."""
    row = load_i64(tensor + NE) * value_bytes(tensor)
    return bool(
        _is_lined_up(tensor)
        and load_i64(tensor + NB + 8) == row
        and load_i64(tensor + NB + 16) == row * load_i64(tensor + NE + 8)
    )


@nb.njit
def _takes_writing(node: int) -> bool:
    """Rows of F32 or F16 into rows of F32 or F16, by numbers of 32 or 64 bits."""
    a, b = load_i64(node + SRC), load_i64(node + SRC + 8)
    source, target, index = load_i32(a + TYPE), load_i32(node + TYPE), load_i32(b + TYPE)
    if not _is_lined_up(a) or not _is_lined_up(node) or index not in (_I32, _I64) or load_i64(b + NE + 24) != 1:
        return False
    if load_i64(b + NE + 16) != 1 or load_i64(a + NE + 16) % load_i64(b + NE + 8) != 0:
        return False
    if source == _F32 and target == _F16:
        return bool(load_i64(a + NE) % LANES == 0)
    return source == target and source in (_F32, _F16)


@nb.njit
def takes_moves(kind: int, node: int) -> bool:
    """A layout that `move` knows; all tensors are in the CPU's memory."""
    a, b = load_i64(node + SRC), load_i64(node + SRC + 8)
    if kind == _SET:
        return bool(_takes_writing(node))
    if kind == _FILL:
        value = load_i32(node + PARAMS)
        is_known = is_rows(node) or (load_i32(node + TYPE) == _F16 and value in (0, _LOWEST))
        return is_known and _is_dense(node)
    if value_bytes(a) == 0 or load_i32(a + TYPE) != load_i32(node + TYPE):
        return False
    if kind == _CONT:
        has_rows = _is_lined_up(a)
        has_columns = value_bytes(a) == 4 and _has_columns(a)
        return bool(_is_dense(node) and (has_rows or has_columns))
    if not _is_lined_up(a) or not _is_lined_up(node):
        return False
    if kind == _GET:
        is_small = load_i64(b + NE + 16) == load_i64(b + NE + 24) == 1
        return value_bytes(a) == 4 and load_i32(b + TYPE) == _I32 and is_small
    if kind == _REPEAT:
        return bool(load_i64(a + NE) == load_i64(node + NE))
    dimension = load_i32(node + PARAMS)
    if load_i32(b + TYPE) != load_i32(a + TYPE) or not _is_lined_up(b) or dimension not in (0, 1):
        return False
    return bool(
        load_i64(a + NE + 16) == load_i64(b + NE + 16)
        and load_i64(a + NE + (1 - dimension) * 8) == load_i64(b + NE + (1 - dimension) * 8)
    )


@nb.njit
def n_move_units(kind: int, node: int) -> int:
    """How many units the result has."""
    a = load_i64(node + SRC)
    if kind == _SET:
        return int(n_rows_of(a))
    if kind == _CONT:
        if _has_columns(a) and load_i64(a + NE) > 1:
            return int(blocks_of(load_i64(a + NE + 8), LANES) * load_i64(a + NE + 16))
        return int(n_rows_of(a))
    return int(n_rows_of(node))


@nb.njit
def _lay_out(node: int, unit: int) -> None:
    """CONT: the result's values are in the order of the source's rows, whatever the result's shape."""
    a = load_i64(node + SRC)
    n0, n1 = load_i64(a + NE), load_i64(a + NE + 8)
    size, out = value_bytes(a), load_i64(node + DATA)
    if not (_has_columns(a) and n0 > 1):
        copy(out + unit * n0 * size, row_at(a, unit), n0 * size)
        return
    blocks = blocks_of(n1, LANES)
    first, i2 = unit % blocks * LANES, unit // blocks
    source, target, stride = place(a, first, i2), out + (i2 * n1 + first) * n0 * 4, load_i64(a + NB)
    if first + LANES <= n1:
        turn_columns(source, stride, n0, target, n0 * 4)
        return
    for k in range(n1 - first):
        for i in range(n0):
            store_f32(target + (k * n0 + i) * 4, load_f32(source + i * stride + k * 4))


@nb.njit
def _join(node: int, row: int) -> None:
    """CONCAT of rows, or of what they consist of."""
    a, b, n1 = load_i64(node + SRC), load_i64(node + SRC + 8), load_i64(node + NE + 8)
    size, i1, i2, out = value_bytes(node), row % n1, row // n1, row_at(node, row)
    first = load_i64(a + NE) * size
    if load_i32(node + PARAMS) == 0:
        copy(out, place(a, i1, i2), first)
        copy(out + first, place(b, i1, i2), load_i64(b + NE) * size)
    elif i1 < load_i64(a + NE + 8):
        copy(out, place(a, i1, i2), first)
    else:
        copy(out, place(b, i1 - load_i64(a + NE + 8), i2), first)


@nb.njit
def _read(node: int, row: int) -> None:
    """GET_ROWS: row b[i, j] of a's matrix j. A number outside of it gives zeros."""
    a, b, n0 = load_i64(node + SRC), load_i64(node + SRC + 8), load_i64(node + NE)
    n = load_i64(b + NE)
    i, j, out = row % n, row // n, row_at(node, row)
    number = load_i32(load_i64(b + DATA) + i * load_i64(b + NB) + j * load_i64(b + NB + 8))
    if 0 <= number < load_i64(a + NE + 8):
        copy(out, place(a, number, j), n0 * 4)
        return
    for k in range(n0):
        store_f32(out + k * 4, np.float32(0))


@nb.njit
def _write(node: int, row: int) -> None:
    """SET_ROWS: row i of a becomes row b[i] of the result. A number outside of it writes nothing."""
    a, b, n1 = load_i64(node + SRC), load_i64(node + SRC + 8), load_i64(load_i64(node + SRC) + NE + 8)
    i, i2 = row % n1, row // n1
    at = load_i64(b + DATA) + i * load_i64(b + NB) + i2 % load_i64(b + NE + 8) * load_i64(b + NB + 8)
    number = load_i64(at) if load_i32(b + TYPE) == _I64 else load_i32(at)
    if not 0 <= number < load_i64(node + NE + 8):
        return
    source, target, n0 = row_at(a, row), place(node, number, i2), load_i64(a + NE)
    if load_i32(a + TYPE) == load_i32(node + TYPE):
        copy(target, source, n0 * value_bytes(a))
    else:
        to_halves(source, n0, target)


@nb.njit
def _fill(node: int, row: int) -> None:
    """FILL: the first values, then twice as many each time."""
    value, out, size = load_i32(node + PARAMS), row_at(node, row), load_i64(node + NE) * value_bytes(node)
    if load_i32(node + TYPE) == _F16:
        store_u16(out, np.uint16(_EXCLUDED if value == _LOWEST else 0))
        done = 2
    else:
        store_f32(out, load_f32(node + PARAMS))
        done = 4
    while done < size:
        more = min(done, size - done)
        copy(out + done, out, more)
        done += more


@nb.njit
def move(kind: int, node: int, unit: int) -> None:
    """One unit of a node that `takes_moves` is true of."""
    if kind == _CONT:
        _lay_out(node, unit)
    elif kind == _CONCAT:
        _join(node, unit)
    elif kind == _GET:
        _read(node, unit)
    elif kind == _SET:
        _write(node, unit)
    elif kind == _FILL:
        _fill(node, unit)
    else:
        a, n1 = load_i64(node + SRC), load_i64(node + NE + 8)
        i1, i2 = unit % n1 % load_i64(a + NE + 8), unit // n1 % load_i64(a + NE + 16)
        copy(row_at(node, unit), place(a, i1, i2), load_i64(node + NE) * value_bytes(node))
