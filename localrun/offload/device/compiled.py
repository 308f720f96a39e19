"""The compiled half of our device: `graph_compute` without Python as long as calls are short.

A layer enters our device once per token, or about ten times with the dense matrices on it (see `dense.py`). So ggml's callback
is a compiled C function: it walks the split's nodes, multiplies dense matrices, and runs expert chains whose experts are in RAM or,
in calls of few tokens, on GPUs (`compiled_gpu.py`) or missing (`compiled_misses.py`). It hands anything else (many tokens with
experts to be read, a graph of another architecture, a stop request) to Python, which takes the interpreter lock.

Both sides share the records of `layouts`; a weight's record is the tensor's `extra`, the process's the backend's context.
"""

from __future__ import annotations

from typing import Final

import numba as nb

from localrun.ggml import structures as ggml
from localrun.kernel_cache import cached_cfunc
from localrun.offload.device import between, compiled_dense, compressor, shadow, weighting
from localrun.offload.device.calls import now_ns
from localrun.offload.device.compiled_attention import ROWS_DIMENSION, attend_node, index_node
from localrun.offload.device.compiled_experts import DONE_THERE, NOT_DONE, find_chain, run_chain, settle
from localrun.offload.device.layouts import KIND_DENSE, PROCESS, WEIGHT
from localrun.offload.device.shadow import in_ram
from localrun.offload.device.tensors import EXTRA, NE, OP, PARAMS, SRC, is_name
from localrun.offload.kernels.lowlevel import call_1, call_5, call_i32, call_i64, load_i32, load_i64
from localrun.offload.kernels.records import add, get, put

_CONTEXT: Final = ggml.Backend.context.offset

_MUL_MAT, _MUL_MAT_ID, _GLU = ggml.OP_MUL_MAT, ggml.OP_MUL_MAT_ID, ggml.OP_GLU
_ADD, _MUL = ggml.OP_ADD, ggml.OP_MUL
_CONCAT, _ATTENTION, _INDEXER = ggml.OP_CONCAT, ggml.OP_FLASH_ATTN_EXT, ggml.OP_LIGHTNING_INDEXER


@cached_cfunc("uint8(intp, intp, intp, intp)")
def copy_in(source: int, backend: int, tensor: int, target: int) -> int:
    """ggml_backend_i.cpy_tensor_async: a split's inputs come from another device one after the other, and `graph_compute` waits
    once for all of them. llama.cpp's scheduler calls it next."""
    process = load_i64(backend + _CONTEXT)
    awaited = get(process, PROCESS.awaited)
    if awaited == 0:
        put(process, PROCESS.n_inputs, 0)
    elif awaited != source:
        call_1(get(process, PROCESS.synchronize), awaited)
    size = call_i64(get(process, PROCESS.n_bytes), tensor, 0)
    call_5(get(process, PROCESS.get_tensor), source, tensor, in_ram(process, target), 0, size)
    shadow.note_input(process, tensor, target)
    put(process, PROCESS.awaited, source)
    return 1


@nb.njit
def _await_inputs(process: int) -> None:
    """Waits for the split's inputs, and so for all of our work that was queued before them."""
    awaited, behind = get(process, PROCESS.awaited), get(process, PROCESS.behind)
    if awaited == 0:
        put(process, PROCESS.n_inputs, 0)
    else:
        call_1(get(process, PROCESS.synchronize), awaited)
    if behind != 0 and behind != awaited:
        call_1(get(process, PROCESS.synchronize), behind)
    put(process, PROCESS.near, awaited)
    put(process, PROCESS.awaited, 0)
    put(process, PROCESS.behind, 0)


@nb.njit
def _multiply(process: int, node: int) -> int:
    """A MUL_MAT with one of our matrices, or between activations; nodes done."""
    started, weight = now_ns(process), load_i64(load_i64(node + SRC) + EXTRA)
    if weight == 0:
        if get(process, PROCESS.takes_between) == 0 or not between.takes(process, node):
            return 0
        between.compute(process, node)
        return 1
    if get(weight, WEIGHT.kind) != KIND_DENSE or not compiled_dense.multiply(process, node, weight):
        return 0
    add(process, PROCESS.dense_ns, now_ns(process) - started)
    return 1


@nb.njit
def _attend(process: int, node: int) -> int:
    """FLASH_ATTN_EXT or LIGHTNING_INDEXER; nodes done."""
    started = now_ns(process)
    if load_i32(node + OP) == _ATTENTION:
        attend_node(process, node)
    else:
        index_node(process, node)
    add(process, PROCESS.attention_ns, now_ns(process) - started)
    return 1


@nb.njit
def _compute_experts(process: int, graph: int, index: int, n_nodes: int) -> tuple[int, bool]:
    """The expert chain that starts at node `index`, and its weighted sum.

    Returns:
        Nodes done, or the negative answer with which it fails; whether the result is where llama.cpp expects it on its GPU.
    """
    weight, end = find_chain(graph, process, index, n_nodes), 0
    put(process, PROCESS.tail_end, 0)
    if index + 4 <= n_nodes:
        down = call_i64(get(process, PROCESS.node_at), graph, index + 3)
        if load_i64(down + NE + 16) <= between.FEW_TOKENS:  # more are added up by several threads
            end = weighting.find(process, graph, index + 4, n_nodes, down)
    became = run_chain(process, graph, index, n_nodes, weight, end) if weight != 0 else NOT_DONE
    if became < 0:
        return became, False
    if became == NOT_DONE:
        return 0, False
    return (end - index if end != 0 else 4), became == DONE_THERE


@nb.njit
def _compute_between(process: int, graph: int, index: int, n_nodes: int, node: int) -> int:
    """An operation between matrices, or a compressor's chain of them; nodes done."""
    if compressor.is_end(process, node):
        compressor.compute(process)
    elif load_i32(node + OP) != _CONCAT or not compressor.find(process, graph, index, n_nodes):
        between.compute(process, node)
    return 1


@nb.njit
def _compute(process: int, graph: int, index: int, n_nodes: int, node: int) -> tuple[int, bool]:
    """What starts at node `index`; as `_compute_experts`, 0 nodes if Python must do it."""
    op = load_i32(node + OP)
    if op == _MUL_MAT:
        return _multiply(process, node), False
    if op == _GLU:
        return (1 if compiled_dense.glu(process, node) else 0), False
    if op == _CONCAT and load_i32(node + PARAMS) == ROWS_DIMENSION:  # attention reads the rows where they are
        add(process, PROCESS.unread_joins, 1)
        return 1, False
    if op in (_ATTENTION, _INDEXER):
        return _attend(process, node), False
    if op == _MUL_MAT_ID:
        done, is_there = _compute_experts(process, graph, index, n_nodes)
        return done, is_there
    if get(process, PROCESS.takes_between) != 0 and between.is_known(op):
        return _compute_between(process, graph, index, n_nodes, node), False
    if op == _ADD:
        weighting.add(process, node)
        return 1, False
    if op == _MUL:
        weighting.multiply(process, node)
        return 1, False
    return 0, False


@nb.njit
def _compute_in_python(process: int, graph: int, index: int) -> int:
    """Nodes done, or a negative answer: -1 for FAILED (-1), -3 for ABORTED (1)."""
    answer = settle(process)
    if answer != 0:
        return int(answer)
    add(process, PROCESS.n_entered, 1)
    answer = call_i64(get(process, PROCESS.python), graph, index)
    return int(answer) if answer != 0 else -1


@cached_cfunc("int32(intp, intp)")
def graph_compute(backend: int, graph: int) -> int:
    """ggml_backend_i.graph_compute: 0, or the status that Python gave as a negative number."""
    process = load_i64(backend + _CONTEXT)
    _await_inputs(process)
    compressor.forget(process)
    add(process, PROCESS.n_parts, 1)
    n_nodes, node_at = call_i32(get(process, PROCESS.n_nodes), graph, 0), get(process, PROCESS.node_at)
    index = 0
    while index < n_nodes:
        node = call_i64(node_at, graph, index)
        if is_name(node) or compressor.is_left_out(process, node):
            index += 1
            continue
        done, is_there = _compute(process, graph, index, n_nodes, node)
        if done == 0:
            done = _compute_in_python(process, graph, index)
        if done < 0:
            return int(-done - 2)
        index += done
        if not is_there:
            shadow.push(process, call_i64(node_at, graph, index - 1))
    return 0
