"""What stands between matrices in DeepSeek-V4's graph: norms, residual streams, and other operations on rows of F32.

llama.cpp's operations on residual streams take one value after the other and cost more than attention; the small ones cost a
barrier of all threads each, and a part of the graph of their own between two of our matrices. `takes` says which of them we
compute, the same for ggml's scheduler and for the running graph; `compute` does one of them. Results are llama.cpp's but for
rounding: sums run over 16 values at a time, and BF16 matrices meet inputs in F32 where ggml rounds those to BF16.

A row is always one task's, so results do not depend on the number of threads. Activations are in the CPU's memory: with the dense
model on a GPU, nothing of this is ours.
"""

from __future__ import annotations

from typing import Final

import numba as nb
import numpy as np

from localrun.ggml import structures as ggml
from localrun.kernel_cache import cached_cfunc
from localrun.offload.device.layouts import BETWEEN, PROCESS
from localrun.offload.device.tensors import BUFFER, DATA, NB, NE, OP, PARAMS, SRC, TYPE
from localrun.offload.kernels.exact import dot, dot_bf16
from localrun.offload.kernels.float_rows import (
    STREAMS,
    UNIT,
    add_rows,
    gather_streams,
    multiply_rows,
    scale_row,
    spread_streams,
    sum_of_squares,
)
from localrun.offload.kernels.lowlevel import (
    blocks_of,
    call_i32,
    call_i64,
    float_of_bits,
    load_f32,
    load_i32,
    load_i64,
    stack,
    store_f32,
)
from localrun.offload.kernels.records import get, put
from localrun.offload.kernels.simd import LANES
from localrun.offload.kernels.threads import run_tasks

FEW_TOKENS: Final = 16
"""Up to so many tokens, what has work for many threads only with more tokens is ours, too."""

_ADD, _MUL, _MUL_MAT, _SCALE, _UNARY = ggml.OP_ADD, ggml.OP_MUL, ggml.OP_MUL_MAT, ggml.OP_SCALE, ggml.OP_UNARY
_NORM, _COMB, _PRE, _POST = ggml.OP_RMS_NORM, ggml.OP_DSV4_HC_COMB, ggml.OP_DSV4_HC_PRE, ggml.OP_DSV4_HC_POST
_F32, _BF16, _SIGMOID = ggml.TYPE_F32, ggml.TYPE_BF16, ggml.UNARY_SIGMOID

SHARED_BYTES: Final = 256 << 10
"""From so many bytes of a result, or of a matrix, on, waking other threads pays off."""
_TASK_BYTES: Final = 192 << 10
"""Of a matrix, for one task."""
_WEIGHTS_BYTES: Final = STREAMS * (STREAMS + 1) * 4


# -- which operations ------------------------------------------------------------------------------------------------


@nb.njit
def _is_rows(tensor: int) -> bool:
    """F32, values of a row side by side, at most three dimensions."""
    return load_i32(tensor + TYPE) == _F32 and load_i64(tensor + NB) == 4 and load_i64(tensor + NE + 24) == 1


@nb.njit
def _is_shaped(tensor: int, n0: int, n1: int, n2: int) -> bool:
    return load_i64(tensor + NE) == n0 and load_i64(tensor + NE + 8) == n1 and load_i64(tensor + NE + 16) == n2


@nb.njit
def _takes_streams(kind: int, node: int) -> bool:
    """Mixing of residual streams: (D, STREAMS, T) streams, (STREAMS, T) weights, (STREAMS, STREAMS, T) mixes."""
    a, b = load_i64(node + SRC), load_i64(node + SRC + 8)
    if kind == _COMB:
        base, n_tokens = load_i64(node + SRC + 16), load_i64(a + NE + 8)
        return bool(
            _is_rows(b)
            and _is_rows(base)
            and _is_shaped(a, STREAMS * (STREAMS + 2), n_tokens, 1)
            and _is_shaped(base, STREAMS * (STREAMS + 2), 1, 1)
            and _is_shaped(node, STREAMS, STREAMS, n_tokens)
        )
    width, n_tokens = load_i64(a + NE), load_i64(node + NE + 16) if kind == _POST else load_i64(node + NE + 8)
    if width % LANES != 0 or not _is_rows(b):
        return False
    if kind == _PRE:
        one = np.int32(0x3F800000)  # as F32: the scale; the other parameter is "gated"
        is_plain = load_i32(node + PARAMS) == one and load_i32(node + PARAMS + 4) == 0
        return bool(is_plain and _is_shaped(a, width, STREAMS, n_tokens) and _is_shaped(b, STREAMS, n_tokens, 1))
    post, comb = load_i64(node + SRC + 16), load_i64(node + SRC + 24)
    return bool(
        comb != 0
        and _is_rows(post)
        and _is_rows(comb)
        and _is_shaped(b, width, STREAMS, n_tokens)
        and _is_shaped(post, STREAMS, n_tokens, 1)
        and _is_shaped(comb, STREAMS, STREAMS, n_tokens)
    )


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
        or not _is_rows(x)
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
    kind, a, b = load_i32(node + OP), load_i64(node + SRC), load_i64(node + SRC + 8)
    if kind == _MUL_MAT:
        return bool(_takes_product(process, node))
    if kind not in (_ADD, _MUL, _SCALE, _UNARY, _NORM, _COMB, _PRE, _POST) or not _is_rows(a) or not _is_rows(node):
        return False
    if kind in (_COMB, _PRE, _POST):
        return bool(_takes_streams(kind, node))
    if kind == _NORM:
        return bool(load_i64(a + NE) % UNIT == 0)
    if kind == _SCALE:
        return True
    if kind == _UNARY:
        return load_i32(node + PARAMS) == _SIGMOID
    # The other factor or summand is one row, or one number.
    width = load_i64(b + NE)
    return bool(_is_rows(b) and width in (1, load_i64(a + NE)) and load_i64(b + NE + 8) == load_i64(b + NE + 16) == 1)


# -- computing -------------------------------------------------------------------------------------------------------


@nb.njit
def _row(tensor: int, row: int) -> int:
    """Address of a row, counted over the second and third dimension."""
    n1 = load_i64(tensor + NE + 8)
    return int(load_i64(tensor + DATA) + row % n1 * load_i64(tensor + NB + 8) + row // n1 * load_i64(tensor + NB + 16))


@nb.njit
def _n_rows(kind: int, node: int) -> int:
    """Units of work: rows; of streams, tokens; of products, rows of the matrix."""
    if kind == _MUL_MAT:
        return int(load_i64(node + NE))
    if kind in (_COMB, _POST):
        return int(load_i64(node + NE + 16))
    return int(load_i64(node + NE + 8) * load_i64(node + NE + 16))


@nb.njit
def _norm(node: int, row: int) -> None:
    a, width = load_i64(node + SRC), load_i64(node + NE)
    x, epsilon = _row(a, row), float_of_bits(load_i32(node + PARAMS))
    mean = sum_of_squares(x, width) / np.float32(width)
    scale_row(x, np.float32(1) / np.sqrt(mean + epsilon), width, _row(node, row))


@nb.njit
def _add_or_multiply(kind: int, node: int, row: int) -> None:
    a, b, width = load_i64(node + SRC), load_i64(node + SRC + 8), load_i64(node + NE)
    x, y, out = _row(a, row), load_i64(b + DATA), _row(node, row)
    step = 0 if load_i64(b + NE) == 1 else 4
    if step != 0 and width % LANES == 0:
        if kind == _MUL:
            multiply_rows(x, y, width, out)
        else:
            add_rows(x, y, width, out)
        return
    for i in range(width):
        if kind == _MUL:
            store_f32(out + i * 4, load_f32(x + i * 4) * load_f32(y + i * step))
        else:
            store_f32(out + i * 4, load_f32(x + i * 4) + load_f32(y + i * step))


@nb.njit
def _scale_or_sigmoid(kind: int, node: int, row: int) -> None:
    x, out = _row(load_i64(node + SRC), row), _row(node, row)
    factor, bias = float_of_bits(load_i32(node + PARAMS)), float_of_bits(load_i32(node + PARAMS + 4))
    for i in range(load_i64(node + NE)):
        value = load_f32(x + i * 4)
        if kind == _SCALE:
            store_f32(out + i * 4, value * factor + bias)
        else:
            store_f32(out + i * 4, np.float32(1) / (np.float32(1) + np.exp(-value)))


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
def _comb(node: int, token: int) -> None:
    """Sinkhorn's normalization of a token's mixes: softmax over targets, then columns and rows in turn."""
    a, scale, base = load_i64(node + SRC), load_i64(node + SRC + 8), load_i64(node + SRC + 16)
    epsilon, n_rounds = float_of_bits(load_i32(node + PARAMS)), load_i32(node + PARAMS + 4)
    mix, row = stack(64), STREAMS * 4
    x, y = _row(a, token) + 2 * row, load_i64(base + DATA) + 2 * row
    factor = load_f32(load_i64(scale + DATA) + 8)
    for source in range(0, STREAMS * row, row):
        largest, total = np.float32(-np.inf), np.float32(0)
        for i in range(source, source + row, 4):
            value = load_f32(x + i) * factor + load_f32(y + i)
            store_f32(mix + i, value)
            largest = max(largest, value)
        for i in range(source, source + row, 4):
            value = np.exp(load_f32(mix + i) - largest)
            store_f32(mix + i, value)
            total += value
        inverse = np.float32(1) / total
        for i in range(source, source + row, 4):
            store_f32(mix + i, load_f32(mix + i) * inverse + epsilon)
    _normalize(mix, row, 4, epsilon)
    for _ in range(1, n_rounds):
        _normalize(mix, 4, row, epsilon)
        _normalize(mix, row, 4, epsilon)
    out = load_i64(node + DATA) + token * load_i64(node + NB + 16)
    for source in range(STREAMS):
        for target in range(STREAMS):
            at = out + source * load_i64(node + NB + 8) + target * 4
            store_f32(at, load_f32(mix + source * row + target * 4))


@nb.njit
def _post(node: int, token: int) -> None:
    x, streams = load_i64(node + SRC), load_i64(node + SRC + 8)
    post, comb, weights = load_i64(node + SRC + 16), load_i64(node + SRC + 24), stack(_WEIGHTS_BYTES)
    mixes = load_i64(comb + DATA) + token * load_i64(comb + NB + 16)
    for d in range(STREAMS):
        store_f32(weights + d * 4, load_f32(_row(post, token) + d * 4))
        for k in range(STREAMS):
            store_f32(weights + (STREAMS * (k + 1) + d) * 4, load_f32(mixes + k * load_i64(comb + NB + 8) + d * 4))
    source = load_i64(streams + DATA) + token * load_i64(streams + NB + 16)
    out = load_i64(node + DATA) + token * load_i64(node + NB + 16)
    stride, out_stride = load_i64(streams + NB + 8), load_i64(node + NB + 8)
    spread_streams(_row(x, token), source, stride, weights, load_i64(node + NE), out, out_stride)


@nb.njit
def _pre(node: int, token: int) -> None:
    streams, weights = load_i64(node + SRC), load_i64(node + SRC + 8)
    source = load_i64(streams + DATA) + token * load_i64(streams + NB + 16)
    stride = load_i64(streams + NB + 8)
    gather_streams(source, stride, _row(weights, token), load_i64(node + NE), _row(node, token))


@nb.njit
def _product(node: int, row: int) -> None:
    """One row of a matrix with all tokens."""
    matrix, x, n_in = load_i64(node + SRC), load_i64(node + SRC + 8), load_i64(load_i64(node + SRC) + NE)
    weights, is_bf16 = _row(matrix, row), load_i32(matrix + TYPE) == _BF16
    for t in range(load_i64(x + NE + 8)):
        if is_bf16:
            store_f32(_row(node, t) + row * 4, dot_bf16(weights, _row(x, t), 4 * UNIT, n_in // UNIT))
        else:
            store_f32(_row(node, t) + row * 4, dot(weights, _row(x, t), 4 * UNIT, n_in // UNIT))


@cached_cfunc("int64(intp, intp)")
def _task(call: int, ticket: int) -> int:
    """Some rows of a BETWEEN record's node."""
    node, kind, step = get(call, BETWEEN.node), get(call, BETWEEN.kind), get(call, BETWEEN.rows_per_task)
    for row in range(ticket * step, min((ticket + 1) * step, get(call, BETWEEN.n_rows))):
        if kind == _NORM:
            _norm(node, row)
        elif kind in (_ADD, _MUL):
            _add_or_multiply(kind, node, row)
        elif kind in (_SCALE, _UNARY):
            _scale_or_sigmoid(kind, node, row)
        elif kind == _COMB:
            _comb(node, row)
        elif kind == _POST:
            _post(node, row)
        elif kind == _PRE:
            _pre(node, row)
        else:
            _product(node, row)
    return 0


@nb.njit
def compute(process: int, node: int) -> None:
    """A node that `takes` is true of."""
    call, kind, n_threads = get(process, PROCESS.between), load_i32(node + OP), get(process, PROCESS.threads)
    n_rows, task = _n_rows(kind, node), get(process, PROCESS.between_task)
    put(call, BETWEEN.node, node)
    put(call, BETWEEN.kind, kind)
    put(call, BETWEEN.n_rows, n_rows)
    n_bytes = 4 * load_i64(node + NE) * load_i64(node + NE + 8) * load_i64(node + NE + 16)
    step = max(1, n_rows // (8 * max(1, n_threads)))
    if kind == _MUL_MAT:
        row_bytes = load_i64(load_i64(node + SRC) + NB + 8)
        n_bytes, step = n_rows * row_bytes, max(1, _TASK_BYTES // row_bytes)
    if n_bytes >= get(process, PROCESS.shared_bytes) and get(process, PROCESS.pool) != 0:
        put(call, BETWEEN.rows_per_task, step)
        run_tasks(get(process, PROCESS.pool), task, call, blocks_of(n_rows, step), n_threads)
    else:
        put(call, BETWEEN.rows_per_task, n_rows)
        call_i64(task, call, 0)


def task_address() -> int:
    """Address of the task that `compute` runs; compiles it on first use."""
    return int(_task.address)
