"""DeepSeek-V4's compressors: some rows of state become one, each column weighted by a softmax of its own over the rows.

llama.cpp's graph (models/deepseek4.cpp, `build_hca_compressed_kv_from_state` and `build_overlap_compressed_kv_from_state`) joins
the kept rows and the batch's, chooses rows of both, and turns them into columns, for values and for scores; then softmax, product
and sum. That copies half a megabyte several times for each token and layer. `find` recognizes all of it at its first operation;
`compute` takes the sum's place and reads rows where they are. Both sources outlive the sum: the graph keeps their new rows after
it. Operations left out have no other reader in that graph. What is not recognized as a whole is computed one by one.
"""

from __future__ import annotations

from typing import Final

import numba as nb

from localrun.ggml import structures as ggml
from localrun.kernel_cache import cached_cfunc
from localrun.offload.device.layouts import COMPRESSOR, MOST_LEFT_OUT, MOST_POOLED, PROCESS
from localrun.offload.device.node_rows import is_rows
from localrun.offload.device.tensors import DATA, NB, NE, OP, PARAMS, SRC, VIEW_OFFS, is_view
from localrun.offload.kernels.float_rows import POOLED, pool_columns
from localrun.offload.kernels.lowlevel import call_i64, load_i32, load_i64, store_i64
from localrun.offload.kernels.records import add, get, put
from localrun.offload.kernels.threads import run_tasks

_CONCAT, _CONT, _GET, _SCALE = ggml.OP_CONCAT, ggml.OP_CONT, ggml.OP_GET_ROWS, ggml.OP_SCALE
_SUM, _MUL, _SOFT_MAX, _NONE = ggml.OP_SUM_ROWS, ggml.OP_MUL, ggml.OP_SOFT_MAX, ggml.OP_NONE

_AHEAD: Final = 64
"""Operations from the first one to the sum, at most."""
_SHARED_VALUES: Final = 1 << 16
"""From so many values on, waking other threads pays off."""


@nb.njit
def _root(tensor: int) -> int:
    """The tensor that this one is a view of, itself if it is none."""
    while is_view(tensor):
        tensor = load_i64(tensor + SRC)
    return tensor


@nb.njit
def _leave_out(record: int, tensor: int) -> None:
    n = get(record, COMPRESSOR.n_left_out)
    if n < MOST_LEFT_OUT:
        store_i64(get(record, COMPRESSOR.left_out) + n * 8, tensor)
    put(record, COMPRESSOR.n_left_out, n + 1)


@nb.njit
def _is_join(tensor: int) -> bool:
    """Rows after rows."""
    return bool(load_i32(tensor + OP) == _CONCAT and load_i32(tensor + PARAMS) == 1 and is_rows(tensor))


@nb.njit
def _place(joined: int, row: int, record: int) -> int:
    """Address of a row of joined rows; what a SCALE made, zeros or minus infinity, is a row of ours. 0: unknown."""
    first, second = load_i64(joined + SRC), load_i64(joined + SRC + 8)
    n_first = load_i64(first + NE + 8)
    if row < 0 or row >= load_i64(joined + NE + 8):
        return 0
    if _is_join(first):
        if row < n_first:
            return int(_place_of_two(first, row))
        return int(get(record, COMPRESSOR.lowest if load_i32(_root(second) + PARAMS + 4) != 0 else COMPRESSOR.zeros))
    return int(_place_of_two(joined, row))


@nb.njit
def _place_of_two(joined: int, row: int) -> int:
    first, second = load_i64(joined + SRC), load_i64(joined + SRC + 8)
    n_first = load_i64(first + NE + 8)
    if row < n_first:
        return int(load_i64(first + DATA) + row * load_i64(first + NB + 8))
    return int(load_i64(second + DATA) + (row - n_first) * load_i64(second + NB + 8))


@nb.njit
def _list_rows(record: int, turned: int, n_rows: int, n_blocks: int, width: int, table: int) -> int:
    """Writes the addresses of the rows that a CONT turned into columns, block after block; notes what they went through.

    Returns:
        The first CONCAT; 0: this is something else.
    """
    if load_i32(turned + OP) != _CONT:
        return 0
    rows = _root(load_i64(turned + SRC))
    halves = load_i32(rows + OP) == _CONCAT
    _leave_out(record, turned)
    chosen = rows
    if halves:  # two parts of wider rows: the first columns of earlier ones, the others of later ones
        a, b = _root(load_i64(rows + SRC)), _root(load_i64(rows + SRC + 8))
        if load_i32(rows + PARAMS) != 1 or load_i32(a + OP) != _CONT or load_i32(b + OP) != _CONT:
            return 0
        chosen = _root(load_i64(a + SRC))
        later = load_i64(b + SRC)
        if chosen != _root(later) or load_i64(load_i64(a + SRC) + VIEW_OFFS) != 0:
            return 0
        expected = n_rows // 2 * n_blocks * load_i64(chosen + NB + 8) + width * 4
        if load_i64(later + VIEW_OFFS) != expected or load_i64(chosen + NE) != 2 * width:
            return 0
        _leave_out(record, rows)
        _leave_out(record, a)
        _leave_out(record, b)
    if load_i32(chosen + OP) != _GET or not is_rows(chosen) or load_i64(chosen + NE + 8) != n_rows * n_blocks:
        return 0
    joined, numbers = load_i64(chosen + SRC), load_i64(chosen + SRC + 8)
    if not _is_join(joined) or load_i64(numbers + NB) != 4 or load_i64(joined + NE) != (2 * width if halves else width):
        return 0
    _leave_out(record, chosen)
    _leave_out(record, joined)
    begin = load_i64(joined + SRC)
    kept = load_i64(begin + SRC) if _is_join(begin) else begin
    if load_i32(_root(kept) + OP) != _NONE:  # state, which lies in a buffer of its own
        return 0
    if _is_join(begin):  # and a row of zeros, or of minus infinity
        made = _root(load_i64(joined + SRC + 8))
        if load_i32(made + OP) != _SCALE or load_i32(made + PARAMS) != 0:
            return 0
        _leave_out(record, begin)
        _leave_out(record, made)
    else:
        begin = joined
    for block in range(n_blocks):
        for r in range(n_rows):
            at, column = block * n_rows + r, 0
            if halves:
                half = n_rows // 2
                at = block * half + r % half + (n_blocks * half if r >= half else 0)
                column = width * 4 if r >= half else 0
            row = _place(joined, load_i32(load_i64(numbers + DATA) + at * 4), record)
            if row == 0:
                return 0
            store_i64(table + (block * n_rows + r) * 8, row + column)
    return int(begin)


@nb.njit
def _recognize(record: int, total: int, first: int) -> bool:
    """`total` sums up what begins with the CONCAT `first`."""
    product = load_i64(total + SRC)
    if load_i32(product + OP) != _MUL or not is_rows(product) or not is_rows(total):
        return False
    turned, weights = load_i64(product + SRC), load_i64(product + SRC + 8)
    if load_i32(weights + OP) != _SOFT_MAX or load_i64(weights + SRC + 8) != 0:
        return False
    n_rows, width, n_blocks = load_i64(product + NE), load_i64(product + NE + 8), load_i64(product + NE + 16)
    if width % POOLED != 0 or width > MOST_POOLED or n_rows * n_blocks > MOST_POOLED or n_rows % 2 != 0:
        return False
    put(record, COMPRESSOR.n_left_out, 0)
    _leave_out(record, product)
    _leave_out(record, weights)
    values, scores = get(record, COMPRESSOR.values), get(record, COMPRESSOR.scores)
    if load_i32(_root(load_i64(turned + SRC)) + OP) not in (_CONCAT, _GET):
        return False
    if _list_rows(record, turned, n_rows, n_blocks, width, values) != first:
        return False
    if _list_rows(record, load_i64(weights + SRC), n_rows, n_blocks, width, scores) == 0:
        return False
    put(record, COMPRESSOR.total, total)
    put(record, COMPRESSOR.n_rows, n_rows)
    put(record, COMPRESSOR.width, width)
    put(record, COMPRESSOR.n_blocks, n_blocks)
    return bool(get(record, COMPRESSOR.n_left_out) <= MOST_LEFT_OUT)


@nb.njit
def forget(process: int) -> None:
    """There is no running compressor: at the start of a graph, because the one before may have failed on the way."""
    record = get(process, PROCESS.compressor)
    put(record, COMPRESSOR.n_left_out, 0)
    put(record, COMPRESSOR.total, 0)


@nb.njit
def find(process: int, graph: int, index: int, n_nodes: int) -> bool:
    """Whether a compressor begins with the CONCAT at node `index` and ends in the same graph; if so, `is_left_out` knows what need
    not be computed, and `is_end` where `compute` belongs."""
    record, node_at = get(process, PROCESS.compressor), get(process, PROCESS.node_at)
    first = call_i64(node_at, graph, index)
    for i in range(index + 1, min(n_nodes, index + _AHEAD) if _is_join(first) else 0):
        node = call_i64(node_at, graph, i)
        if load_i32(node + OP) == _SUM:
            if _recognize(record, node, first):
                return True
            break
    forget(process)
    return False


@nb.njit
def is_left_out(process: int, node: int) -> bool:
    """The running compressor does without this node."""
    record, found = get(process, PROCESS.compressor), False
    for i in range(get(record, COMPRESSOR.n_left_out)):
        found = found or load_i64(get(record, COMPRESSOR.left_out) + i * 8) == node
    return bool(found)


@nb.njit
def is_end(process: int, node: int) -> bool:
    """The node is the running compressor's result."""
    return bool(get(get(process, PROCESS.compressor), COMPRESSOR.total) == node)


@cached_cfunc("int64(intp, intp)")
def _task(record: int, ticket: int) -> int:
    """Some columns of a block."""
    n_rows, per_block = get(record, COMPRESSOR.n_rows), get(record, COMPRESSOR.width) // POOLED
    block, part, total = ticket // per_block, ticket % per_block, get(record, COMPRESSOR.total)
    values = get(record, COMPRESSOR.values) + block * n_rows * 8
    scores = get(record, COMPRESSOR.scores) + block * n_rows * 8
    out = load_i64(total + DATA) + block * load_i64(total + NB + 16)
    pool_columns(values, scores, n_rows, part * POOLED * 4, out + part * POOLED * 4)
    return 0


@nb.njit
def compute(process: int) -> None:
    """The running compressor's result; then there is none."""
    record, task = get(process, PROCESS.compressor), get(process, PROCESS.compressor_task)
    n_tasks = get(record, COMPRESSOR.width) // POOLED * get(record, COMPRESSOR.n_blocks)
    n_values = n_tasks * POOLED * get(record, COMPRESSOR.n_rows)
    if n_values >= _SHARED_VALUES and get(process, PROCESS.pool) != 0:
        run_tasks(get(process, PROCESS.pool), task, record, n_tasks, get(process, PROCESS.threads))
    else:
        for ticket in range(n_tasks):
            call_i64(task, record, ticket)
    add(record, COMPRESSOR.n_done, 1)
    forget(process)


def task_address() -> int:
    """Address of the task that `compute` runs; compiles it on first use."""
    return int(_task.address)
