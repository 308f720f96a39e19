"""What follows the experts in a layer's graph: their outputs times the router's weights, and the sum over a token's experts.

llama.cpp's graph has one operation for the products and one for each addition. `find` recognizes them after an expert chain, and
`add_up` does them all in one pass, in the same order and with the same roundings, so the sums have the same bits. The exception is
a single token with experts on GPUs: those are added up there, and their sum comes last. `multiply` and `add` are for graphs that
run one operation at a time, because a callback looks at every node.
"""

from __future__ import annotations

import numba as nb
import numpy as np

from localrun.ggml import structures as ggml
from localrun.offload.device.layouts import PROCESS
from localrun.offload.device.shadow import in_ram
from localrun.offload.device.tensors import DATA, NB, NE, OP, SRC, VIEW_OFFS, VIEW_SRC, is_view
from localrun.offload.kernels.lowlevel import (
    call_i64,
    load_f32,
    load_i32,
    load_i64,
    load_u8,
    pointer,
    store_f32,
    store_u8,
)
from localrun.offload.kernels.records import get, put

_ADD, _MUL = ggml.OP_ADD, ggml.OP_MUL


@nb.njit
def find(process: int, graph: int, index: int, n_nodes: int, down: int) -> int:
    """Recognizes the weighting of `down` at node `index` and the whole sum behind it, and notes both in the process's record.

    Returns:
        The node after the sum; 0 if it is not there, as a whole and in order.
    """
    node_at = get(process, PROCESS.node_at)
    if index >= n_nodes:
        return 0
    product = call_i64(node_at, graph, index)
    if load_i32(product + OP) != _MUL or load_i64(product + SRC) != down:
        return 0
    n_used, choice_bytes = load_i64(down + NE + 8), load_i64(product + NB + 8)
    total, n_added, at = 0, 1, index + 1
    while at < n_nodes and n_added < n_used:
        node = call_i64(node_at, graph, at)
        at += 1
        if is_view(node):
            continue
        a, b = load_i64(node + SRC), load_i64(node + SRC + 8)
        if load_i32(node + OP) != _ADD or not _is_choice(b, product, n_added, choice_bytes):
            return 0
        if not (a == total if total != 0 else _is_choice(a, product, 0, choice_bytes)):
            return 0
        total = node
        n_added += 1
    if n_used < 2 or n_added != n_used or _overlap(total, down):
        return 0
    put(process, PROCESS.tail_weights, load_i64(product + SRC + 8))
    put(process, PROCESS.tail_sum, total)
    put(process, PROCESS.tail_end, at)
    return at


@nb.njit
def _is_choice(view: int, product: int, number: int, choice_bytes: int) -> bool:
    return load_i64(view + VIEW_SRC) == product and load_i64(view + VIEW_OFFS) == number * choice_bytes


@nb.njit
def _overlap(total: int, down: int) -> bool:
    """The sums would be written over experts' outputs that are still to be added."""
    first, last = load_i64(total + DATA), load_i64(total + DATA) + load_i64(total + NE + 8) * load_i64(total + NB + 8)
    begin, end = load_i64(down + DATA), load_i64(down + DATA) + load_i64(down + NE + 16) * load_i64(down + NB + 16)
    return first < end and begin < last


@nb.njit
def take_weights(process: int, n_tokens: int, n_used: int) -> None:
    """Copies the noted weights, because the sums may overwrite them, and marks every pair as ours to add up."""
    tensor, target = get(process, PROCESS.tail_weights), get(process, PROCESS.weights)
    source, k_bytes, t_bytes = in_ram(process, tensor), load_i64(tensor + NB + 8), load_i64(tensor + NB + 16)
    for t in range(n_tokens):
        for k in range(n_used):
            store_f32(target + (t * n_used + k) * 4, load_f32(source + t * t_bytes + k * k_bytes))
            store_u8(get(process, PROCESS.taken) + t * n_used + k, 0)


@nb.njit
def add_up(
    process: int, n_tokens: int, n_used: int, width: int, rows: int, row_bytes: int, out: int, out_bytes: int
) -> None:
    """out[t] = the sum of weight * row over the token's pairs (rows t * n_used ...) not marked `taken`; zeros for none."""
    weights, taken = get(process, PROCESS.weights), get(process, PROCESS.taken)
    for t in range(n_tokens):
        total = nb.carray(pointer(out + t * out_bytes), width, np.float32)
        first = True
        for pair in range(t * n_used, (t + 1) * n_used):
            if load_u8(taken + pair):
                continue
            weight = load_f32(weights + pair * 4)
            row = nb.carray(pointer(rows + pair * row_bytes), width, np.float32)
            if first:
                for d in range(width):
                    total[d] = row[d] * weight
            else:
                for d in range(width):
                    total[d] = total[d] + row[d] * weight
            first = False
        if first:
            total[:] = np.float32(0)


@nb.njit
def add_row(total: int, row: int, width: int) -> None:
    """total += row, F32."""
    a, b = nb.carray(pointer(total), width, np.float32), nb.carray(pointer(row), width, np.float32)
    for d in range(width):
        a[d] = a[d] + b[d]


@nb.njit
def add(process: int, node: int) -> None:
    """One ADD of two F32 matrices of the same shape."""
    a, b, width = load_i64(node + SRC), load_i64(node + SRC + 8), load_i64(node + NE)
    for r in range(load_i64(node + NE + 8)):
        out = nb.carray(pointer(in_ram(process, node) + r * load_i64(node + NB + 8)), width, np.float32)
        left = nb.carray(pointer(in_ram(process, a) + r * load_i64(a + NB + 8)), width, np.float32)
        right = nb.carray(pointer(in_ram(process, b) + r * load_i64(b + NB + 8)), width, np.float32)
        for d in range(width):
            out[d] = left[d] + right[d]


@nb.njit
def multiply(process: int, node: int) -> None:
    """One MUL of (D, K, T) by (1, K, T), F32."""
    rows, weights, width = load_i64(node + SRC), load_i64(node + SRC + 8), load_i64(node + NE)
    for t in range(load_i64(node + NE + 16)):
        for k in range(load_i64(node + NE + 8)):
            weight = load_f32(
                in_ram(process, weights) + t * load_i64(weights + NB + 16) + k * load_i64(weights + NB + 8)
            )
            at = t * load_i64(node + NB + 16) + k * load_i64(node + NB + 8)
            source = in_ram(process, rows) + t * load_i64(rows + NB + 16) + k * load_i64(rows + NB + 8)
            out = nb.carray(pointer(in_ram(process, node) + at), width, np.float32)
            row = nb.carray(pointer(source), width, np.float32)
            for d in range(width):
                out[d] = row[d] * weight
