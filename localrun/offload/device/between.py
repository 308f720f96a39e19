"""What stands between matrices in DeepSeek-V4's graph: norms, residual streams, and other operations on rows of F32.

llama.cpp's operations on residual streams take one value after the other and cost more than attention; the small ones cost a
barrier of all threads each, and a part of the graph of their own between two of our matrices. `takes` says which of them we
compute, `compute` does one; the modules `between_*` know them. Results are llama.cpp's but for rounding: sums run over 16 values
at a time, and BF16 matrices meet inputs in F32 where ggml rounds those to BF16.

A unit of a result is always one task's, so results do not depend on the number of threads. Activations are in the CPU's memory:
with the dense model on a GPU, nothing of this is ours.
"""

from __future__ import annotations

from typing import Final

import numba as nb

from localrun.ggml import structures as ggml
from localrun.kernel_cache import cached_cfunc
from localrun.offload.device.between_moves import is_of_moves, move, n_move_units, takes_moves
from localrun.offload.device.between_rope import rope, takes_rope
from localrun.offload.device.between_streams import comb, post, pre, takes_streams
from localrun.offload.device.between_values import is_of_values, n_values_units, takes_values, values
from localrun.offload.device.layouts import BETWEEN, PROCESS
from localrun.offload.device.node_rows import is_rows, n_rows_of, row_at
from localrun.offload.device.tensors import BUFFER, NB, NE, OP, SRC, TYPE
from localrun.offload.kernels.exact import dot, dot_bf16
from localrun.offload.kernels.float_rows import UNIT
from localrun.offload.kernels.lowlevel import blocks_of, call_i32, call_i64, load_i32, load_i64, store_f32
from localrun.offload.kernels.records import get, put
from localrun.offload.kernels.threads import run_tasks

FEW_TOKENS: Final = 16
"""Up to so many tokens, what has work for many threads only with more tokens is ours, too."""
SHARED_BYTES: Final = 256 << 10
"""From so many bytes of a result, or of a matrix, on, waking other threads pays off."""
_TASK_BYTES: Final = 192 << 10
"""Of a matrix, for one task."""

_MUL_MAT, _ROPE, _ROPE_BACK, _F32, _BF16 = (
    ggml.OP_MUL_MAT,
    ggml.OP_ROPE,
    ggml.OP_ROPE_BACK,
    ggml.TYPE_F32,
    ggml.TYPE_BF16,
)
_SET, _SUM = ggml.OP_SET_ROWS, ggml.OP_SUM_ROWS
_COMB, _PRE, _POST = ggml.OP_DSV4_HC_COMB, ggml.OP_DSV4_HC_PRE, ggml.OP_DSV4_HC_POST


@nb.njit
def _takes_product(process: int, node: int) -> bool:
    """Few tokens with one of llama.cpp's small matrices in F32 or BF16: the streams' mixes, the router."""
    matrix, x = load_i64(node + SRC), load_i64(node + SRC + 8)
    kind, n_in, buffer = load_i32(matrix + TYPE), load_i64(matrix + NE), load_i64(matrix + BUFFER)
    value_bytes = 4 if kind == _F32 else 2
    if (
        buffer == 0
        or kind not in (_F32, _BF16)
        or load_i64(matrix + NB) != value_bytes
        or n_in % UNIT != 0
        or load_i64(matrix + NE + 16) != 1
        or load_i64(matrix + NE + 24) != 1
        or not is_rows(x)
        or load_i64(x + NE + 8) > FEW_TOKENS
        or load_i64(x + NE + 16) != 1
    ):
        return False
    return bool(
        call_i32(get(process, PROCESS.is_host), call_i64(get(process, PROCESS.buffer_type), buffer, 0), 0) & 1 != 0
    )


@nb.njit
def takes(process: int, node: int) -> bool:
    """One of the operations that `compute` knows, in a layout that it knows; with tensors in the CPU's memory."""
    kind = load_i32(node + OP)
    if kind == _MUL_MAT:
        return bool(_takes_product(process, node))
    if is_of_values(kind):
        return bool(takes_values(kind, node))
    if is_of_moves(kind):
        return bool(takes_moves(kind, node))
    if kind in (_ROPE, _ROPE_BACK):
        return bool(takes_rope(node))
    return (
        kind in (_COMB, _PRE, _POST) and is_rows(load_i64(node + SRC)) and is_rows(node) and takes_streams(kind, node)
    )


@nb.njit
def is_known(kind: int) -> bool:
    """`compute` knows operations of this kind."""
    return is_of_values(kind) or is_of_moves(kind) or kind in (_ROPE, _ROPE_BACK, _COMB, _PRE, _POST)


@nb.njit
def _n_units(kind: int, node: int) -> int:
    """Units of work: rows, tokens, of products rows of the matrix."""
    if kind == _MUL_MAT:
        return int(load_i64(node + NE))
    if kind in (_COMB, _POST, _ROPE, _ROPE_BACK):
        return int(load_i64(node + NE + 16))
    if kind == _PRE:
        return int(n_rows_of(node))
    return int(n_values_units(kind, node) if is_of_values(kind) else n_move_units(kind, node))


@nb.njit
def _product(node: int, row: int) -> None:
    """One row of a matrix with all tokens."""
    matrix, x, n_in = load_i64(node + SRC), load_i64(node + SRC + 8), load_i64(load_i64(node + SRC) + NE)
    weights, is_bf16 = row_at(matrix, row), load_i32(matrix + TYPE) == _BF16
    for t in range(load_i64(x + NE + 8)):
        if is_bf16:
            store_f32(row_at(node, t) + row * 4, dot_bf16(weights, row_at(x, t), 4 * UNIT, n_in // UNIT))
        else:
            store_f32(row_at(node, t) + row * 4, dot(weights, row_at(x, t), 4 * UNIT, n_in // UNIT))


@cached_cfunc("int64(intp, intp)")
def _task(call: int, ticket: int) -> int:
    """Some units of a BETWEEN record's node."""
    node, kind, step = get(call, BETWEEN.node), get(call, BETWEEN.kind), get(call, BETWEEN.units_per_task)
    of_values, of_moves = is_of_values(kind), is_of_moves(kind)
    for unit in range(ticket * step, min((ticket + 1) * step, get(call, BETWEEN.n_units))):
        if of_values:
            values(kind, node, unit)
        elif of_moves:
            move(kind, node, unit)
        elif kind == _COMB:
            comb(node, unit)
        elif kind == _POST:
            post(node, unit)
        elif kind == _PRE:
            pre(node, unit)
        elif kind == _MUL_MAT:
            _product(node, unit)
        else:
            rope(node, unit)
    return 0


@nb.njit
def compute(process: int, node: int) -> None:
    """A node that `takes` is true of."""
    call, kind, n_threads = get(process, PROCESS.between), load_i32(node + OP), get(process, PROCESS.threads)
    n_units, task = _n_units(kind, node), get(process, PROCESS.between_task)
    put(call, BETWEEN.node, node)
    put(call, BETWEEN.kind, kind)
    put(call, BETWEEN.n_units, n_units)
    if kind == _MUL_MAT:
        row_bytes = load_i64(load_i64(node + SRC) + NB + 8)
        n_bytes, step = n_units * row_bytes, max(1, _TASK_BYTES // row_bytes)
    else:
        larger = load_i64(node + SRC) if kind in (_SET, _SUM, _PRE) else node  # of the result and what it comes from
        n_bytes = 4 * load_i64(larger + NE) * n_rows_of(larger)
        step = max(1, n_units // (8 * max(1, n_threads)))
    if n_bytes >= get(process, PROCESS.shared_bytes) and get(process, PROCESS.pool) != 0:
        put(call, BETWEEN.units_per_task, step)
        run_tasks(get(process, PROCESS.pool), task, call, blocks_of(n_units, step), n_threads)
    else:
        put(call, BETWEEN.units_per_task, n_units)
        call_i64(task, call, 0)


def task_address() -> int:
    """Address of the task that `compute` runs; compiles it on first use."""
    return int(_task.address)
