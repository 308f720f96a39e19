"""Expert chains in compiled code: gate, up, SwiGLU and down as one operation, with the weighted sum that follows.

What is missing is asked for first (`compiled_misses.py`), GPUs start (`compiled_gpu.py`), then the CPU computes what is in RAM
(`compiled_pairs.py`), and at last what arrives.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numba as nb
import numpy as np

from localrun.ggml import structures as ggml
from localrun.offload.cache import gate
from localrun.offload.cache.telemetry import Counter
from localrun.offload.device import compiled_gpu as gpu_native
from localrun.offload.device import compiled_misses as miss_native
from localrun.offload.device import shadow, weighting
from localrun.offload.device.calls import now_ns
from localrun.offload.device.compiled_pairs import (
    Chosen,
    count_pairs,
    note_gpu_uses,
    run_arrived,
    run_sorted,
    sort_pairs,
)
from localrun.offload.device.layouts import LAYER, MISSES, PROCESS, VARIANT, WEIGHT
from localrun.offload.device.shadow import in_ram
from localrun.offload.device.tensors import EXTRA, NB, NE, OP, PARAMS, SRC, is_name
from localrun.offload.kernels import futex
from localrun.offload.kernels.layouts import CALL
from localrun.offload.kernels.lowlevel import atomic_load, call_i64, load_i32, load_i64, store_i64, store_u8
from localrun.offload.kernels.records import add, get, put

NOT_DONE: Final = 0
DONE: Final = 1
DONE_THERE: Final = 2
"""What became of an expert chain: nothing; results in RAM; the sum, where llama.cpp expects it on its GPU."""

_MUL_MAT_ID, _GLU, _SWIGLU = ggml.OP_MUL_MAT_ID, ggml.OP_GLU, ggml.GLU_SWIGLU
_CALLS, _TOKENS, _REQUESTS, _HITS = (
    Counter.CALLS.value,
    Counter.TOKENS.value,
    Counter.REQUESTS.value,
    Counter.HITS.value,
)
_GPU_HITS, _COMPUTE_NS, _TOTAL_NS = Counter.GPU_HITS.value, Counter.COMPUTE_NS.value, Counter.TOTAL_NS.value
_WAIT_NS = Counter.WAIT_NS.value


class _Call(NamedTuple):
    """An expert chain and the weighted sum after it: tensors, and whose experts."""

    layer: int
    chosen: Chosen
    x: int
    down: int
    total: int
    is_summed: bool


class _OnGpus(NamedTuple):
    """What GPUs do of a call.

    Attributes:
        n_pairs, n_experts: on GPUs.
        n_launches: how many it takes; negative if it can't be done.
        n_near: launches, the first ones, on the GPU that the dense model is on.
        near: that GPU's backend, if a single token's input is taken and its sum put there; 0 otherwise.
        x_there: the input there.
        is_all_near: nothing else computes.
    """

    n_pairs: int
    n_experts: int
    n_launches: int
    n_near: int
    near: int
    x_there: int
    is_all_near: bool


@nb.njit
def find_chain(graph: int, process: int, index: int, n_nodes: int) -> int:
    """The weight record of the complete expert chain that starts at node `index`, 0 if there is none."""
    if index + 4 > n_nodes:
        return 0
    node_at = get(process, PROCESS.node_at)
    first, second = call_i64(node_at, graph, index), call_i64(node_at, graph, index + 1)
    glu, down = call_i64(node_at, graph, index + 2), call_i64(node_at, graph, index + 3)
    if load_i32(second + OP) != _MUL_MAT_ID or load_i32(glu + OP) != _GLU or load_i32(down + OP) != _MUL_MAT_ID:
        return 0
    gate, up = load_i64(glu + SRC), load_i64(glu + SRC + 8)
    same_nodes = (gate == first and up == second) or (gate == second and up == first)
    x, ids = load_i64(first + SRC + 8), load_i64(first + SRC + 16)
    same_input = (
        load_i64(second + SRC + 8) == x and load_i64(second + SRC + 16) == ids and load_i64(down + SRC + 16) == ids
    )
    if not same_nodes or not same_input or load_i64(down + SRC + 8) != glu or load_i64(x + NE + 8) != 1:
        return 0
    a, b = load_i64(load_i64(gate + SRC) + EXTRA), load_i64(load_i64(up + SRC) + EXTRA)
    c = load_i64(load_i64(down + SRC) + EXTRA)
    if (
        a == 0
        or b == 0
        or c == 0
        or get(a, WEIGHT.layer) != get(b, WEIGHT.layer)
        or get(b, WEIGHT.layer) != get(c, WEIGHT.layer)
    ):
        return 0
    if get(a, WEIGHT.projection) != 0 or get(b, WEIGHT.projection) != 1 or get(c, WEIGHT.projection) != 2:
        return 0
    infinity = np.int32(0x7F800000)  # as F32
    limit_bits = infinity if load_i32(glu + PARAMS) == _SWIGLU else np.int32(load_i32(glu + PARAMS + 12))
    if limit_bits != np.int32(get(get(get(get(c, WEIGHT.layer), LAYER.calls), VARIANT.call), CALL.limit_bits)):
        return 0
    return c


@nb.njit
def settle(process: int) -> int:
    """Waits until the last posted call's Python half is over, before anything else happens to experts; 0, or the negative answer
    with which that call fails."""
    misses = get(process, PROCESS.unsettled)
    if misses == 0:
        return 0
    put(process, PROCESS.unsettled, 0)
    began = now_ns(process)
    answer = miss_native.settle(misses)
    gate.leave(get(misses, MISSES.gate))
    add(process, PROCESS.settle_ns, now_ns(process) - began)
    return int(answer)


@nb.njit
def _run_missing(process: int, layer: int, chosen: Chosen, x: int, down: int) -> int:
    """Computes the posted call's experts as they arrive; 0, or the negative answer with which it fails. `_settle` must follow."""
    misses, n_done = get(layer, LAYER.misses), 0
    n_missing, words, experts = get(misses, MISSES.n_experts), get(misses, MISSES.words), get(misses, MISSES.experts)
    while n_done < n_missing:
        seen, over, before = atomic_load(misses + MISSES.answered * 8), miss_native.is_settled(misses), n_done
        for i in range(n_missing):
            word = atomic_load(words + i * 8)
            if word > 0:
                store_i64(words + i * 8, -1)
                expert = load_i32(experts + i * 4)
                run_arrived(process, layer, word, expert, chosen, x, down)
                miss_native.note_computed(misses)
                n_done += 1
        if n_done == before:
            if over:
                break  # it has failed
            began = now_ns(process)
            futex.wait(get(misses, MISSES.syscall), misses + MISSES.answered * 8, seen)
            add(get(layer, LAYER.telemetry), _WAIT_NS, now_ns(process) - began)
    put(process, PROCESS.unsettled, misses)
    return 0 if n_done == n_missing else settle(process)


@nb.njit
def _give_back(process: int, layer: int, n_hits: int, counted_in_ram: bool, counted_missing: bool) -> int:
    """Leaves a call that was counted to Python, which counts it anew, once its experts are fetched; or what it fails with.

    Args:
        n_hits: hits that were counted.
        counted_in_ram: the uses of experts in RAM were, not only those on GPUs.
        counted_missing: those of experts that were missing.
    """
    answer = settle(process)
    if answer != 0:
        return int(answer)
    add(get(layer, LAYER.telemetry), _HITS, -n_hits)
    counts, uses, gpu = get(process, PROCESS.counts), get(layer, LAYER.uses), get(layer, LAYER.gpu)
    for e in range(get(layer, LAYER.n_experts)):
        n = load_i32(counts + e * 4)
        if gpu_native.is_on_gpu(gpu, e) or (n > 0 and counted_in_ram) or (n < 0 and counted_missing):
            store_i64(uses + e * 8, load_i64(uses + e * 8) - abs(n))
    return NOT_DONE


@nb.njit
def _call_at(process: int, graph: int, index: int, layer: int, end: int) -> _Call:
    node_at = get(process, PROCESS.node_at)
    first, down = call_i64(node_at, graph, index), call_i64(node_at, graph, index + 3)
    x, ids = load_i64(first + SRC + 8), load_i64(first + SRC + 16)
    chosen = Chosen(in_ram(process, ids), load_i64(ids + NB + 8), load_i64(ids + NE + 8), load_i64(ids + NE))
    return _Call(layer, chosen, x, down, get(process, PROCESS.tail_sum), end != 0)


@nb.njit
def _is_short(process: int, call: _Call) -> bool:
    """Compiled code may do the call: few tokens, in the layout that llama.cpp gives them."""
    n_tokens, n_used = call.chosen.n_tokens, call.chosen.n_used
    return bool(
        n_tokens < load_i64(get(call.layer, LAYER.compiled_below))
        and n_used * n_tokens <= get(process, PROCESS.capacity)
        and load_i64(call.x + NB) == 4
        and load_i64(call.down + NB + 16) == load_i64(call.down + NB + 8) * n_used
    )


@nb.njit
def _is_one_token(call: _Call) -> bool:
    """Its weights go with it to GPUs, and sums come back."""
    return call.is_summed and call.chosen.n_tokens == 1


@nb.njit
def _is_last(process: int, graph: int, end: int, n_nodes: int) -> bool:
    """Nothing is computed from node `end` on."""
    while end < n_nodes and is_name(call_i64(get(process, PROCESS.node_at), graph, end)):
        end += 1
    return end == n_nodes


@nb.njit
def _assign(process: int, graph: int, end: int, n_nodes: int, call: _Call, n_pairs: int) -> _OnGpus:
    """Divides the counted pairs among GPUs."""
    near, x_there = 0, 0
    if _is_one_token(call) and shadow.is_shadowed(process, call.total) and _is_last(process, graph, end, n_nodes):
        x_there = shadow.original(process, call.x)
        near = get(process, PROCESS.near) if x_there != 0 else 0
    if n_pairs == 0:
        return _OnGpus(0, 0, 0, 0, near, x_there, False)
    gpu, weights = get(call.layer, LAYER.gpu), get(process, PROCESS.weights) if _is_one_token(call) else 0
    c = call.chosen
    n_launches = gpu_native.assign(gpu, c.ids, c.stride, c.n_tokens, c.n_used, n_pairs, weights)
    if n_launches < 0:
        return _OnGpus(n_pairs, 0, n_launches, 0, near, x_there, False)
    n_near = gpu_native.use_near(gpu, n_launches, near)
    is_all_near = n_near == n_launches and n_pairs == call.chosen.n_used
    return _OnGpus(n_pairs, note_gpu_uses(process, call.layer), n_launches, n_near, near, x_there, is_all_near)


@nb.njit
def _post(process: int, call: _Call) -> None:
    misses, number = get(call.layer, LAYER.misses), get(call.layer, LAYER.number)
    c, x, width = call.chosen, in_ram(process, call.x), load_i64(call.x + NE)
    miss_native.post(misses, number, c.ids, c.stride, c.n_tokens, c.n_used, x, width)


@nb.njit
def _start(process: int, call: _Call, there: _OnGpus) -> bool:
    """GPUs begin; False: they can't."""
    gpu, out_there = get(call.layer, LAYER.gpu), call.total if there.is_all_near and there.n_near == 1 else 0
    x, x_stride = in_ram(process, call.x), load_i64(call.x + NB + 16)
    if not gpu_native.start(gpu, there.n_launches, x, x_stride, there.x_there, out_there):
        return False
    for k in range(call.chosen.n_used if _is_one_token(call) else 0):
        if gpu_native.is_on_gpu(gpu, load_i32(call.chosen.ids + k * 4)):
            store_u8(get(process, PROCESS.taken) + k, 1)
    return True


@nb.njit
def _finish(process: int, call: _Call, there: _OnGpus) -> bool:
    """Gathers and adds up, once the CPU's pairs are computed; False: a GPU can't."""
    gpu, total = get(call.layer, LAYER.gpu), call.total
    rows, row_bytes = in_ram(process, call.down), load_i64(call.down + NB + 8)
    if there.n_launches > 0 and not _is_one_token(call):
        gpu_native.finish(gpu, there.n_launches, rows, row_bytes)
    if call.is_summed and not there.is_all_near:
        out, out_bytes, width = in_ram(process, total), load_i64(total + NB + 8), load_i64(total + NE)
        n_tokens, n_used = call.chosen.n_tokens, call.chosen.n_used
        weighting.add_up(process, n_tokens, n_used, width, rows, row_bytes, out, out_bytes)
        if there.n_launches > there.n_near and _is_one_token(call):
            gpu_native.finish(gpu, there.n_launches, out, out_bytes)
    if there.n_near == 0:
        return True
    put(process, PROCESS.behind, there.near)
    if there.is_all_near and there.n_near == 1:
        return True
    share = 0 if there.is_all_near else in_ram(process, total)
    return bool(gpu_native.join(gpu, there.n_launches, there.n_near, share, total))


@nb.njit
def _compute(process: int, graph: int, index: int, n_nodes: int, layer: int, end: int, started: int) -> int:
    """Computes an expert chain, and the weighted sum after it, up to node `end` (0: there is none).

    If experts are missing, they are asked for before anything is computed.

    With the dense model on a GPU, a single token's input is taken and its sum put where they are there, in llama.cpp's own
    queue: nobody waits. What the CPU and other GPUs compute is uploaded and added there.

    Args:
        started: when the layer's call began, ns.
    """
    call = _call_at(process, graph, index, layer, end)
    if not _is_short(process, call):
        return NOT_DONE
    chosen, row, misses = call.chosen, get(layer, LAYER.telemetry), get(layer, LAYER.misses)
    n_pairs, n_missing, n_in_ram = count_pairs(process, layer, chosen), 0, 0
    if n_pairs < 0:
        return NOT_DONE
    if misses != 0:
        n_missing = miss_native.list_missing(misses, get(process, PROCESS.counts), get(layer, LAYER.n_experts))
    if call.is_summed:
        weighting.take_weights(process, chosen.n_tokens, chosen.n_used)
    there = _assign(process, graph, end, n_nodes, call, n_pairs)
    if there.n_launches < 0:
        return NOT_DONE
    is_posted = n_missing > 0 or (misses != 0 and chosen.n_tokens == 1 and get(misses, MISSES.looks) != 0)
    if is_posted:
        n_in_ram = sort_pairs(process, layer, chosen)  # they are the last ones to go now
    n_noted = n_in_ram + there.n_experts if n_missing > 0 else 0
    add(row, _HITS, n_noted)
    if is_posted:
        _post(process, call)
    begun, waited = now_ns(process), get(row, _WAIT_NS)
    if n_pairs > 0 and not _start(process, call, there):
        if is_posted:
            miss_native.give_up(misses)
            put(process, PROCESS.unsettled, misses)
        return int(_give_back(process, layer, n_noted, is_posted, False))
    if not is_posted and n_pairs < chosen.n_tokens * chosen.n_used:
        n_in_ram = sort_pairs(process, layer, chosen)
    if n_in_ram > 0:
        run_sorted(process, layer, call.x, call.down)
    if is_posted:
        miss_native.note_computed(misses)
        answer = _run_missing(process, layer, chosen, call.x, call.down)
        if answer != 0:
            if there.n_launches > 0:
                gpu_native.settle(get(layer, LAYER.gpu), there.n_launches)
            return int(answer)
    if not _finish(process, call, there):
        return int(_give_back(process, layer, n_noted, n_in_ram > 0, True))
    ended = now_ns(process)
    add(row, _CALLS, 1)
    add(row, _TOKENS, chosen.n_tokens)
    add(row, _REQUESTS, chosen.n_tokens * chosen.n_used)
    if n_missing == 0:  # else they are noted, and the fetching thread may be adding what it found
        add(row, _HITS, n_in_ram + there.n_experts)
    add(row, _GPU_HITS, there.n_experts)
    add(row, _COMPUTE_NS, ended - begun - (get(row, _WAIT_NS) - waited))
    add(row, _TOTAL_NS, ended - started)
    return DONE_THERE if there.n_near > 0 else DONE


@nb.njit
def run_chain(process: int, graph: int, index: int, n_nodes: int, weight: int, end: int) -> int:
    """The chain that `find_chain` found, and the sum after it up to node `end` (0: there is none).

    The layer's slots stay meanwhile, and if the call was posted, until it is settled.

    Returns:
        `NOT_DONE`, `DONE`, `DONE_THERE`, or a negative answer with which the graph fails.
    """
    started, answer, layer = now_ns(process), settle(process), get(weight, WEIGHT.layer)
    if answer != 0:
        return int(answer)
    gate.enter(get(layer, LAYER.gate), get(layer, LAYER.number))
    became = _compute(process, graph, index, n_nodes, layer, end, started)
    if get(process, PROCESS.unsettled) == 0:
        gate.leave(get(layer, LAYER.gate))
    return int(became)
