"""The compiled half of our device: `graph_compute` without Python as long as calls are short.

A layer enters our device once per token, or about ten times with the dense matrices on it (see `dense.py`). So ggml's callback
is a compiled C function: it walks the split's nodes, multiplies dense matrices, and runs expert chains whose experts are in RAM or,
in calls of few tokens, on GPUs (`compiled_gpu.py`) or missing (`compiled_misses.py`). It hands anything else (many tokens with
experts to be read, a graph of another architecture, a stop request) to Python, which takes the interpreter lock.

Both sides share the records of `layouts`; a weight's record is the tensor's `extra`, the process's the backend's context.
"""

from __future__ import annotations

import ctypes as C
from collections.abc import Sequence
from typing import Any, Final

import numba as nb
import numpy as np
import numpy.typing as npt

from localrun.alignment import align_up
from localrun.ggml import structures as ggml
from localrun.ggml.library import Library
from localrun.ggml.structures import STATUS_ABORTED, STATUS_FAILED
from localrun.kernel_cache import cached_cfunc, cached_jit
from localrun.offload.cache import gate
from localrun.offload.cache.slots import TAIL_TOKENS, VARIANT_MASK
from localrun.offload.cache.telemetry import Counter
from localrun.offload.device import between, compressor, shadow, weighting
from localrun.offload.device import compiled_gpu as gpu_native
from localrun.offload.device import compiled_misses as miss_native
from localrun.offload.device.compiled_attention import ROWS_DIMENSION, attend_node, index_node
from localrun.offload.device.layouts import (
    BETWEEN,
    COMPRESSOR,
    KIND_DENSE,
    KIND_EXPERTS,
    LAYER,
    MISSES,
    MOST_INPUTS,
    MOST_LEFT_OUT,
    MOST_PAIRS,
    MOST_POOLED,
    PROCESS,
    VARIANT,
    WEIGHT,
)
from localrun.offload.device.shadow import in_ram
from localrun.offload.device.tensors import EXTRA, NB, NE, OP, PARAMS, SRC, TYPE
from localrun.offload.device.view import F32
from localrun.offload.kernels import attention, futex, threads
from localrun.offload.kernels.activations import swiglu16
from localrun.offload.kernels.layouts import CALL
from localrun.offload.kernels.lowlevel import (
    atomic_load,
    call_1,
    call_5,
    call_i32,
    call_i64,
    copy,
    float_of_bits,
    load_f32,
    load_i32,
    load_i64,
    store_f32,
    store_i32,
    store_i64,
    store_u8,
)
from localrun.offload.kernels.records import Record, add, get, put
from localrun.offload.kernels.tasks import KernelCall, runner

MAX_EXPERTS: Final = 4096
MAX_VARIANTS: Final = 16
"""Formats that experts of one layer may have."""

_CONTEXT: Final = ggml.Backend.context.offset

_MUL_MAT, _MUL_MAT_ID, _GLU, _NONE = ggml.OP_MUL_MAT, ggml.OP_MUL_MAT_ID, ggml.OP_GLU, ggml.OP_NONE
_ADD, _MUL = ggml.OP_ADD, ggml.OP_MUL
_CONCAT, _ATTENTION, _INDEXER = ggml.OP_CONCAT, ggml.OP_FLASH_ATTN_EXT, ggml.OP_LIGHTNING_INDEXER
_FIRST_VIEW, _LAST_VIEW = ggml.OP_RESHAPE, ggml.OP_TRANSPOSE
_SWIGLU, _SWIGLU_CLAMP = ggml.GLU_SWIGLU, ggml.GLU_SWIGLU_CLAMP
_CALLS, _TOKENS, _REQUESTS, _HITS = (
    Counter.CALLS.value,
    Counter.TOKENS.value,
    Counter.REQUESTS.value,
    Counter.HITS.value,
)
_GPU_HITS, _COMPUTE_NS, _TOTAL_NS = Counter.GPU_HITS.value, Counter.COMPUTE_NS.value, Counter.TOTAL_NS.value
_WAIT_NS = Counter.WAIT_NS.value


@nb.njit
def _now_ns(process: int) -> int:
    clock_monotonic = (
        1  # <time.h>, Linux; macOS has 6, where the field is only a duration of unknown origin all the same
    )
    call_i32(get(process, PROCESS.clock), clock_monotonic, get(process, PROCESS.timespec))
    timespec = get(process, PROCESS.timespec)
    return load_i64(timespec) * 1_000_000_000 + load_i64(timespec + 8)


@nb.njit
def _begin(process: int, call: int, jobs_bytes: int, tasks_bytes: int) -> None:
    """Points a call at the process's scratch."""
    scratch = get(process, PROCESS.scratch)
    put(call, CALL.jobs, scratch)
    put(call, CALL.tasks, scratch + jobs_bytes)
    put(call, CALL.panels, scratch + jobs_bytes + tasks_bytes)
    put(call, CALL.expert, 0)
    put(call, CALL.pair, 0)


@nb.njit
def _dense(process: int, node: int, weight: int) -> bool:
    """One MUL_MAT with one of our matrices; False for an unknown layout."""
    source, call = load_i64(node + SRC + 8), get(weight, WEIGHT.call)
    n_rows, n_batch = load_i64(source + NE + 8), load_i64(source + NE + 16)
    plain = (
        load_i32(source + TYPE) == 0
        and load_i32(node + TYPE) == 0
        and load_i64(source + NB) == 4
        and load_i64(node + NB) == 4
        and load_i64(source + NE + 24) == 1
        and n_batch % get(weight, WEIGHT.n_batch) == 0
    )
    if not plain:
        return False
    repeat = n_batch // get(weight, WEIGHT.n_batch)  # ggml broadcasts a weight over consecutive matrices of the input
    starts, iota, most = get(process, PROCESS.starts), get(process, PROCESS.iota), get(process, PROCESS.iota_size)
    x_stride, out_stride = load_i64(source + NB + 8), load_i64(node + NB + 8)
    at_once = 1
    if n_rows == 1 and repeat == 1 and 1 < n_batch < most:  # one row per matrix: all in one call, row i by matrix i
        at_once, starts, x_stride, out_stride = n_batch, iota, load_i64(source + NB + 16), load_i64(node + NB + 16)
    else:
        store_i32(starts, 0)
    for batch in range(0, n_batch, at_once):
        for row in range(0, n_rows, most):
            if at_once == 1:
                store_i32(starts + 4, min(most, n_rows - row))
            _begin(process, call, get(weight, WEIGHT.jobs_bytes), get(weight, WEIGHT.tasks_bytes))
            put(call, CALL.n_experts, at_once)
            put(call, CALL.slots, get(weight, WEIGHT.packed) + batch // repeat * 8)
            put(call, CALL.starts, starts)
            put(call, CALL.x_rows, iota)
            put(call, CALL.out_rows, iota)
            put(call, CALL.x, in_ram(process, source) + batch * load_i64(source + NB + 16) + row * x_stride)
            put(call, CALL.x_stride, x_stride)
            put(call, CALL.out, in_ram(process, node) + batch * load_i64(node + NB + 16) + row * out_stride)
            put(call, CALL.out_stride, out_stride)
            call_1(get(process, PROCESS.run), call)
    return True


@nb.njit
def _glu(process: int, node: int) -> bool:
    """SwiGLU of two contiguous F32 tensors (the shared expert's); False for another layout."""
    gate, up = load_i64(node + SRC), load_i64(node + SRC + 8)
    width, n_rows = load_i64(node + NE), load_i64(node + NE + 8) * load_i64(node + NE + 16)
    for tensor in (gate, up, node):
        if load_i32(tensor + TYPE) != 0 or load_i64(tensor + NB) != 4 or load_i64(tensor + NB + 8) != width * 4:
            return False
    limit = np.float32(np.inf)
    if load_i32(node + PARAMS) == _SWIGLU_CLAMP:
        limit = float_of_bits(load_i32(node + PARAMS + 12))
    a, b, out = in_ram(process, gate), in_ram(process, up), in_ram(process, node)
    n_values = width * n_rows
    if out != a:
        copy(out, a, n_values * 4)
    whole = n_values // 16 * 16
    for i in range(0, whole, 16):
        swiglu16(out + i * 4, b + i * 4, limit)
    for i in range(whole, n_values):
        g, u = min(load_f32(out + i * 4), limit), max(-limit, min(load_f32(b + i * 4), limit))
        store_f32(out + i * 4, g / (np.float32(1) + np.exp(-g)) * u)
    return True


@nb.njit
def _chain(graph: int, process: int, index: int, n_nodes: int) -> int:
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
def _count_pairs(process: int, layer: int, ids: int, ids_stride: int, n_tokens: int, n_used: int) -> int:
    """Counts pairs by expert into the process's array, as negative numbers of those that are nowhere; how many pairs are on GPUs,
    -1 if Python must do this call."""
    n_experts, resident, gpu = get(layer, LAYER.n_experts), get(layer, LAYER.resident), get(layer, LAYER.gpu)
    counts, n_on_gpu = get(process, PROCESS.counts), 0
    may_miss = get(layer, LAYER.misses) != 0 and n_tokens * n_used <= MOST_PAIRS
    for e in range(n_experts):
        store_i32(counts + e * 4, 0)
    for t in range(n_tokens):
        for k in range(n_used):
            e = load_i32(ids + t * ids_stride + k * 4)
            if e < 0 or e >= n_experts:
                return -1
            n = load_i32(counts + e * 4)
            if gpu_native.is_on_gpu(gpu, e):
                n_on_gpu += 1
            # Whose read ends meanwhile stays missing: the fetching thread was or will be asked for it.
            elif n < 0 or (n == 0 and load_i64(resident + e * 8) == 0):
                if not may_miss:
                    return -1
                store_i32(counts + e * 4, n - 1)
                continue
            store_i32(counts + e * 4, n + 1)
    return n_on_gpu


@nb.njit
def _sort_pairs(process: int, layer: int, ids: int, ids_stride: int, n_tokens: int, n_used: int) -> int:
    """Groups the counted pairs of experts in RAM by expert, and experts by variant, into the process's arrays; returns the
    number of distinct experts. Variant v's experts are `bounds[v]..bounds[v + 1]`."""
    n_experts, resident = get(layer, LAYER.n_experts), get(layer, LAYER.resident)
    counts, places, gpu = get(process, PROCESS.counts), get(process, PROCESS.places), get(layer, LAYER.gpu)
    starts, slots, bounds = get(process, PROCESS.starts), get(process, PROCESS.slots), get(process, PROCESS.bounds)
    n_distinct, at, n_variants = 0, 0, get(layer, LAYER.n_calls)
    stamps, uses = get(layer, LAYER.stamps), get(layer, LAYER.uses)
    tick = load_i64(get(layer, LAYER.tick)) + 1
    store_i64(get(layer, LAYER.tick), tick)
    for v in range(n_variants):
        store_i32(bounds + v * 4, n_distinct)
        for e in range(n_experts):
            n = load_i32(counts + e * 4)
            if n <= 0 or gpu_native.is_on_gpu(gpu, e):
                continue
            word = load_i64(resident + e * 8)
            if word & VARIANT_MASK == v:
                store_i32(places + e * 4, at)  # where the expert's next pair goes
                store_i64(slots + n_distinct * 8, word - v)
                store_i32(starts + n_distinct * 4, at)
                store_i64(uses + e * 8, load_i64(uses + e * 8) + n)
                n_distinct += 1
                at += n
    store_i32(bounds + n_variants * 4, n_distinct)
    store_i32(starts + n_distinct * 4, at)
    x_rows, out_rows = get(process, PROCESS.x_rows), get(process, PROCESS.out_rows)
    for t in range(n_tokens):
        for k in range(n_used):
            e = load_i32(ids + t * ids_stride + k * 4)
            if load_i32(counts + e * 4) < 0 or gpu_native.is_on_gpu(gpu, e):
                continue
            if t >= n_tokens - TAIL_TOKENS:
                store_i64(stamps + e * 8, tick)
            place = load_i32(places + e * 4)
            store_i32(places + e * 4, place + 1)
            store_i32(x_rows + place * 4, t)
            store_i32(out_rows + place * 4, t * n_used + k)
    return n_distinct


@nb.njit
def _note_gpu_uses(process: int, layer: int) -> int:
    """Counts the uses of the counted experts on GPUs; how many there are."""
    counts, uses, gpu, n_distinct = get(process, PROCESS.counts), get(layer, LAYER.uses), get(layer, LAYER.gpu), 0
    for e in range(get(layer, LAYER.n_experts)):
        n = load_i32(counts + e * 4)
        if n > 0 and gpu_native.is_on_gpu(gpu, e):
            store_i64(uses + e * 8, load_i64(uses + e * 8) + n)
            n_distinct += 1
    return n_distinct


@nb.njit
def _run_experts(process: int, layer: int, x: int, down: int) -> None:
    """The sorted pairs, variant by variant."""
    starts, slots, bounds = get(process, PROCESS.starts), get(process, PROCESS.slots), get(process, PROCESS.bounds)
    for v in range(get(layer, LAYER.n_calls)):
        first, last = load_i32(bounds + v * 4), load_i32(bounds + v * 4 + 4)
        if first == last:
            continue
        record = get(layer, LAYER.calls) + v * VARIANT.size * 8
        call = get(record, VARIANT.call)
        _begin(process, call, get(record, VARIANT.jobs_bytes), get(record, VARIANT.tasks_bytes))
        put(call, CALL.pair, load_i32(starts + first * 4))
        put(call, CALL.n_experts, last - first)
        put(call, CALL.slots, slots + first * 8)
        put(call, CALL.starts, starts + first * 4)
        put(call, CALL.x_rows, get(process, PROCESS.x_rows))
        put(call, CALL.out_rows, get(process, PROCESS.out_rows))
        put(call, CALL.x, in_ram(process, x))
        put(call, CALL.x_stride, load_i64(x + NB + 16))
        put(call, CALL.out, in_ram(process, down))
        put(call, CALL.out_stride, load_i64(down + NB + 8))
        call_1(get(process, PROCESS.run), call)


@nb.njit
def _run_arrived(
    process: int,
    layer: int,
    word: int,
    expert: int,
    ids: int,
    ids_stride: int,
    n_tokens: int,
    n_used: int,
    x: int,
    down: int,
) -> None:
    """The pairs of one expert that was missing; `word` as in `LAYER.resident`."""
    starts, bounds, uses = get(process, PROCESS.starts), get(process, PROCESS.bounds), get(layer, LAYER.uses)
    x_rows, out_rows, n = get(process, PROCESS.x_rows), get(process, PROCESS.out_rows), 0
    for t in range(n_tokens):
        for k in range(n_used):
            if load_i32(ids + t * ids_stride + k * 4) == expert:
                store_i32(x_rows + n * 4, t)
                store_i32(out_rows + n * 4, t * n_used + k)
                n += 1
    store_i32(starts, 0)
    store_i32(starts + 4, n)
    variant = word & VARIANT_MASK
    store_i64(get(process, PROCESS.slots), word - variant)
    for v in range(get(layer, LAYER.n_calls) + 1):
        store_i32(bounds + v * 4, 1 if v > variant else 0)
    store_i64(uses + expert * 8, load_i64(uses + expert * 8) + n)
    _run_experts(process, layer, x, down)


@nb.njit
def _settle(process: int) -> int:
    """Waits until the last posted call's Python half is over, before anything else happens to experts; 0, or the negative answer
    with which that call fails."""
    misses = get(process, PROCESS.unsettled)
    if misses == 0:
        return 0
    put(process, PROCESS.unsettled, 0)
    began = _now_ns(process)
    answer = miss_native.settle(misses)
    gate.leave(get(misses, MISSES.gate))
    add(process, PROCESS.settle_ns, _now_ns(process) - began)
    return int(answer)


@nb.njit
def _run_missing(
    process: int, layer: int, ids: int, ids_stride: int, n_tokens: int, n_used: int, x: int, down: int
) -> int:
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
                _run_arrived(process, layer, word, expert, ids, ids_stride, n_tokens, n_used, x, down)
                miss_native.note_computed(misses)
                n_done += 1
        if n_done == before:
            if over:
                break  # it has failed
            began = _now_ns(process)
            futex.wait(get(misses, MISSES.syscall), misses + MISSES.answered * 8, seen)
            add(get(layer, LAYER.telemetry), _WAIT_NS, _now_ns(process) - began)
    put(process, PROCESS.unsettled, misses)
    return 0 if n_done == n_missing else _settle(process)


@nb.njit
def _give_back(process: int, layer: int, n_hits: int, counted_in_ram: bool, counted_missing: bool) -> int:
    """Leaves a call that was counted to Python, which counts it anew, once its experts are fetched; or what it fails with.

    Args:
        n_hits: hits that were counted.
        counted_in_ram: the uses of experts in RAM were, not only those on GPUs.
        counted_missing: those of experts that were missing.
    """
    answer = _settle(process)
    if answer != 0:
        return int(answer)
    add(get(layer, LAYER.telemetry), _HITS, -n_hits)
    counts, uses, gpu = get(process, PROCESS.counts), get(layer, LAYER.uses), get(layer, LAYER.gpu)
    for e in range(get(layer, LAYER.n_experts)):
        n = load_i32(counts + e * 4)
        if gpu_native.is_on_gpu(gpu, e) or (n > 0 and counted_in_ram) or (n < 0 and counted_missing):
            store_i64(uses + e * 8, load_i64(uses + e * 8) - abs(n))
    return _NOT_DONE


@nb.njit
def _is_last(process: int, graph: int, end: int, n_nodes: int) -> bool:
    """Nothing is computed from node `end` on: other names for bytes that are there."""
    for index in range(end, n_nodes):
        op = load_i32(call_i64(get(process, PROCESS.node_at), graph, index) + OP)
        if op != _NONE and not _FIRST_VIEW <= op <= _LAST_VIEW:
            return False
    return True


_NOT_DONE, _DONE, _DONE_THERE = 0, 1, 2
"""What became of an expert chain: nothing; results in RAM; the sum, where llama.cpp expects it on its GPU."""


@nb.njit
def _experts(process: int, graph: int, index: int, n_nodes: int, weight: int, end: int) -> int:
    """Computes an expert chain, and the weighted sum after it, up to node `end` (0: there is none).

    If experts are missing, they are asked for before anything is computed.

    With the dense model on a GPU, a single token's input is taken and its sum put where they are there, in llama.cpp's own
    queue: nobody waits. What the CPU and other GPUs compute is uploaded and added there.
    """
    started = _now_ns(process)
    answer = _settle(process)
    if answer != 0:
        return int(answer)
    gate.enter(get(get(weight, WEIGHT.layer), LAYER.gate), get(get(weight, WEIGHT.layer), LAYER.number))
    node_at = get(process, PROCESS.node_at)
    first, down = call_i64(node_at, graph, index), call_i64(node_at, graph, index + 3)
    x, ids = load_i64(first + SRC + 8), load_i64(first + SRC + 16)
    n_used, n_tokens, is_summed = load_i64(ids + NE), load_i64(ids + NE + 8), end != 0
    if (
        n_tokens >= load_i64(get(get(weight, WEIGHT.layer), LAYER.compiled_below))
        or n_used * n_tokens > get(process, PROCESS.capacity)
        or load_i64(x + NB) != 4
        or load_i64(down + NB + 16) != (load_i64(down + NB + 8) * n_used)
    ):
        return _NOT_DONE
    layer, chosen, ids_stride = get(weight, WEIGHT.layer), in_ram(process, ids), load_i64(ids + NB + 8)
    n_gpu_pairs, n_launches = _count_pairs(process, layer, chosen, ids_stride, n_tokens, n_used), 0
    if n_gpu_pairs < 0:
        return _NOT_DONE
    gpu, n_gpu, row = get(layer, LAYER.gpu), 0, get(layer, LAYER.telemetry)
    misses, n_missing, n_in_ram = get(layer, LAYER.misses), 0, 0
    if misses != 0:
        n_missing = miss_native.list_missing(misses, get(process, PROCESS.counts), get(layer, LAYER.n_experts))
    if is_summed:
        weighting.take_weights(process, n_tokens, n_used)
    one_token, total = is_summed and n_tokens == 1, get(process, PROCESS.tail_sum)
    near, x_there, n_near, all_near = 0, 0, 0, False
    if one_token and shadow.is_shadowed(process, total) and _is_last(process, graph, end, n_nodes):
        x_there = shadow.original(process, x)
        near = get(process, PROCESS.near) if x_there != 0 else 0
    if n_gpu_pairs > 0:
        weights = get(process, PROCESS.weights) if one_token else 0
        n_launches = gpu_native.assign(gpu, chosen, ids_stride, n_tokens, n_used, n_gpu_pairs, weights)
        if n_launches < 0:
            return _NOT_DONE
        n_near = gpu_native.use_near(gpu, n_launches, near)
        n_gpu = _note_gpu_uses(process, layer)
        all_near = n_near == n_launches and n_gpu_pairs == n_used
    is_posted = n_missing > 0 or (misses != 0 and n_tokens == 1 and get(misses, MISSES.looks) != 0)
    if is_posted:
        n_in_ram = _sort_pairs(process, layer, chosen, ids_stride, n_tokens, n_used)  # they are the last ones to go now
        if n_missing > 0:
            add(row, _HITS, n_in_ram + n_gpu)
        row_of_x, width, number = in_ram(process, x), load_i64(x + NE), get(layer, LAYER.number)
        miss_native.post(misses, number, chosen, ids_stride, n_tokens, n_used, row_of_x, width)
    begun, waited = _now_ns(process), get(row, _WAIT_NS)
    if n_gpu_pairs > 0:
        out_there = total if all_near and n_near == 1 else 0
        if not gpu_native.start(gpu, n_launches, in_ram(process, x), load_i64(x + NB + 16), x_there, out_there):
            if is_posted:
                miss_native.give_up(misses)
                put(process, PROCESS.unsettled, misses)
            return int(_give_back(process, layer, n_in_ram + n_gpu if n_missing > 0 else 0, is_posted, False))
        for k in range(n_used if one_token else 0):
            if gpu_native.is_on_gpu(gpu, load_i32(chosen + k * 4)):
                store_u8(get(process, PROCESS.taken) + k, 1)
    if not is_posted and n_gpu_pairs < n_tokens * n_used:
        n_in_ram = _sort_pairs(process, layer, chosen, ids_stride, n_tokens, n_used)
    if n_in_ram > 0:
        _run_experts(process, layer, x, down)
    if is_posted:
        miss_native.note_computed(misses)
        answer = _run_missing(process, layer, chosen, ids_stride, n_tokens, n_used, x, down)
        if answer != 0:
            if n_launches > 0:
                gpu_native.settle(gpu, n_launches)
            return int(answer)
    rows, row_bytes = in_ram(process, down), load_i64(down + NB + 8)
    if n_launches > 0 and not one_token:
        gpu_native.finish(gpu, n_launches, rows, row_bytes)
    if is_summed and not all_near:
        out, out_bytes = in_ram(process, total), load_i64(total + NB + 8)
        weighting.add_up(process, n_tokens, n_used, load_i64(total + NE), rows, row_bytes, out, out_bytes)
        if n_launches > n_near and one_token:
            gpu_native.finish(gpu, n_launches, out, out_bytes)
    if n_near > 0:
        put(process, PROCESS.behind, near)
        if not all_near or n_near > 1:
            share = 0 if all_near else in_ram(process, total)
            if not gpu_native.join(gpu, n_launches, n_near, share, total):
                return int(_give_back(process, layer, n_in_ram + n_gpu if n_missing > 0 else 0, n_in_ram > 0, True))
    ended = _now_ns(process)
    add(row, _CALLS, 1)
    add(row, _TOKENS, n_tokens)
    add(row, _REQUESTS, n_tokens * n_used)
    if n_missing == 0:
        add(row, _HITS, n_in_ram + n_gpu)
    add(row, _GPU_HITS, n_gpu)
    add(row, _COMPUTE_NS, ended - begun - (get(row, _WAIT_NS) - waited))
    add(row, _TOTAL_NS, ended - started)
    return _DONE_THERE if n_near > 0 else _DONE


@nb.njit
def _gated_experts(process: int, graph: int, index: int, n_nodes: int, weight: int, end: int) -> int:
    """`_experts`; meanwhile the layer's slots stay, and if the call was posted, until it is settled."""
    became = _experts(process, graph, index, n_nodes, weight, end)
    if get(process, PROCESS.unsettled) == 0:
        gate.leave(get(get(weight, WEIGHT.layer), LAYER.gate))
    return int(became)


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


@cached_cfunc("int32(intp, intp)")
def graph_compute(backend: int, graph: int) -> int:
    """ggml_backend_i.graph_compute: 0, or the status that Python gave as a negative number."""
    process = load_i64(backend + _CONTEXT)
    _await_inputs(process)
    compressor.forget(process)
    add(process, PROCESS.n_parts, 1)
    n_nodes = call_i32(get(process, PROCESS.n_nodes), graph, 0)
    index = 0
    while index < n_nodes:
        node = call_i64(get(process, PROCESS.node_at), graph, index)
        op = load_i32(node + OP)
        # Other names for bytes that are there, and what a compressor does without.
        if op == _NONE or _FIRST_VIEW <= op <= _LAST_VIEW or compressor.is_left_out(process, node):
            index += 1
            continue
        done, is_there = 0, False
        if op == _MUL_MAT:
            started = _now_ns(process)
            weight = load_i64(load_i64(node + SRC) + EXTRA)
            if weight == 0 and get(process, PROCESS.takes_between) != 0 and between.takes(process, node):
                between.compute(process, node)
                done = 1
            elif weight != 0 and get(weight, WEIGHT.kind) == KIND_DENSE and _dense(process, node, weight):
                done = 1
                add(process, PROCESS.dense_ns, _now_ns(process) - started)
        elif op == _GLU:
            done = 1 if _glu(process, node) else 0
        elif op == _CONCAT and load_i32(node + PARAMS) == ROWS_DIMENSION:  # attention reads the rows where they are
            add(process, PROCESS.unread_joins, 1)
            done = 1
        elif op in (_ATTENTION, _INDEXER):
            started, done = _now_ns(process), 1
            if op == _ATTENTION:
                attend_node(process, node)
            else:
                index_node(process, node)
            add(process, PROCESS.attention_ns, _now_ns(process) - started)
        elif op == _MUL_MAT_ID:
            weight, end = _chain(graph, process, index, n_nodes), 0
            put(process, PROCESS.tail_end, 0)
            if index + 4 <= n_nodes:
                down = call_i64(get(process, PROCESS.node_at), graph, index + 3)
                if load_i64(down + NE + 16) <= between.FEW_TOKENS:  # more are added up by several threads
                    end = weighting.find(process, graph, index + 4, n_nodes, down)
            became = _gated_experts(process, graph, index, n_nodes, weight, end) if weight != 0 else _NOT_DONE
            if became < 0:
                return int(-became - 2)
            if became != _NOT_DONE:
                done, is_there = end - index if end != 0 else 4, became == _DONE_THERE
        elif get(process, PROCESS.takes_between) != 0 and between.is_known(op):
            done = 1
            if compressor.is_end(process, node):
                compressor.compute(process)
            elif op != _CONCAT or not compressor.find(process, graph, index, n_nodes):
                between.compute(process, node)
        elif op == _ADD:
            weighting.add(process, node)
            done = 1
        elif op == _MUL:
            weighting.multiply(process, node)
            done = 1
        if done == 0:
            answer = _settle(process)
            if answer != 0:
                return int(-answer - 2)
            add(process, PROCESS.n_entered, 1)
            answer = call_i64(get(process, PROCESS.python), graph, index)
            if answer <= 0:
                return int(-answer - 2)  # Python gives -1 for FAILED (-1), -3 for ABORTED (1)
            done = answer
        index += done
        if not is_there:
            shadow.push(process, call_i64(get(process, PROCESS.node_at), graph, index - 1))
    return 0


@cached_jit()
def _in_ram(process: int, tensor: int) -> int:
    return int(in_ram(process, tensor))


@cached_jit(nogil=True)
def _settle_now(process: int) -> int:
    return int(_settle(process))


@cached_jit(nogil=True)
def _take_weights(process: int, n_tokens: int, n_used: int) -> None:
    weighting.take_weights(process, n_tokens, n_used)


@cached_jit(nogil=True)
def _add_up(
    process: int, n_tokens: int, n_used: int, width: int, rows: int, row_bytes: int, out: int, out_bytes: int
) -> None:
    weighting.add_up(process, n_tokens, n_used, width, rows, row_bytes, out, out_bytes)


def _place(rows: F32) -> tuple[int, int]:
    """Address and bytes of a row."""
    return int(rows.ctypes.data), int(rows.strides[0])


FAILED_ANSWER: Final = -STATUS_FAILED - 2
ABORTED_ANSWER: Final = -STATUS_ABORTED - 2
"""What Python answers for ggml's statuses: `-answer - 2` is the status."""


class Process:
    """The process's field array and its targets; created once by the device.

    `python` is `int64 f(graph, index)`: nodes done, or one of the `*_ANSWER`s. `weights_type` is our weights' buffer type.
    """

    def __init__(self, lib: Library, python: int, weights_type: int) -> None:
        self.fields = PROCESS.empty()
        self.address = int(self.fields.ctypes.data)
        """For the backend's context."""
        self._arrays: dict[int, npt.NDArray[Any]] = {}
        self._lib = lib  # keeps the functions' library
        libc = C.CDLL(None)
        functions: tuple[tuple[int, Any], ...] = (
            (PROCESS.n_nodes, lib.ggml_graph_n_nodes),
            (PROCESS.node_at, lib.ggml_graph_node),
            (PROCESS.is_host, lib.ggml_backend_buft_is_host),
            (PROCESS.clock, libc.clock_gettime),
            (PROCESS.n_bytes, lib.ggml_nbytes),
            (PROCESS.get_tensor, lib.ggml_backend_tensor_get_async),
            (PROCESS.synchronize, lib.ggml_backend_synchronize),
            (PROCESS.buffer_type, lib.ggml_backend_buffer_get_type),
            (PROCESS.get_base, lib.ggml_backend_buffer_get_base),
            (PROCESS.set_tensor, lib.ggml_backend_tensor_set_async),
            (PROCESS.set_now, lib.ggml_backend_tensor_set),
        )
        for field, function in functions:
            self.fields[field] = C.cast(function, C.c_void_p).value or 0
        self.fields[PROCESS.python] = python
        self.fields[PROCESS.weights_type] = weights_type
        self.fields[PROCESS.run] = runner().run_address
        self._point(PROCESS.attention, attention.ATTENTION.empty())
        self._point(PROCESS.indexer, attention.INDEXER.empty())
        self._point(PROCESS.between, BETWEEN.empty())
        self._rows = np.zeros((2, MOST_POOLED), np.int64)
        self._made = np.repeat(np.array([[0], [-np.inf]], np.float32), 2 * MOST_POOLED, axis=1)
        self._left_out = np.zeros(MOST_LEFT_OUT, np.int64)
        self._compressors = COMPRESSOR.empty()
        COMPRESSOR.fill(
            self._compressors,
            values=self._rows[0].ctypes.data,
            scores=self._rows[1].ctypes.data,
            left_out=self._left_out.ctypes.data,
            zeros=self._made[0].ctypes.data,
            lowest=self._made[1].ctypes.data,
        )
        self._point(PROCESS.compressor, self._compressors)
        self._point(PROCESS.timespec, np.zeros(2, np.int64))
        self._point(PROCESS.inputs, np.zeros(2 * MOST_INPUTS, np.int64))
        self._point(PROCESS.counts, np.zeros(MAX_EXPERTS, np.int32))
        self._point(PROCESS.places, np.zeros(MAX_EXPERTS, np.int32))
        self._point(PROCESS.bounds, np.zeros(MAX_VARIANTS + 1, np.int32))
        self._point(PROCESS.slots, np.zeros(MAX_EXPERTS, np.uint64))
        self._point(PROCESS.starts, np.zeros(MAX_EXPERTS + 1, np.int32))
        self.grow(0, 64, 64)

    def in_ram(self, tensor: int) -> int | None:
        """Address of a tensor's bytes in RAM, if that is not its own: those of its shadow."""
        return int(_in_ram(self.address, tensor)) if self.fields[PROCESS.read_back] else None

    def settle(self) -> bool:
        """Waits until no device computes for us, or reads our memory, and no thread fetches for us: after each decode, while its
        context exists.

        Returns:
            False: the decode has failed, even if llama.cpp doesn't know it; the cause is kept as usual.
        """
        behind = int(self.fields[PROCESS.behind])
        self.fields[PROCESS.behind] = 0
        if behind:
            self._lib.ggml_backend_synchronize(behind)
        return not self.fields[PROCESS.unsettled] or _settle_now(self.address) == 0

    def tail(self) -> tuple[int, int]:
        """The node after the weighting and the sum that follow the present expert chain, 0 if they don't; and the sum's tensor."""
        return int(self.fields[PROCESS.tail_end]), int(self.fields[PROCESS.tail_sum])

    def take_weights(self, n_tokens: int, n_used: int) -> F32:
        """(T * K,) the router's weights of the present chain's pairs; a copy."""
        _take_weights(self.address, n_tokens, n_used)
        result: F32 = self._arrays[PROCESS.weights][: n_tokens * n_used].copy()
        return result

    def add_up(self, n_tokens: int, n_used: int, rows: F32, out: F32, summed: Sequence[int]) -> None:
        """After `take_weights`: weights and adds up the present chain's outputs.

        Args:
            rows: (T * K, D) outputs of its pairs.
            out: (T, D) the sums.
            summed: pairs that are no part of them.
        """
        self._arrays[PROCESS.taken][list(summed)] = 1
        _add_up(self.address, n_tokens, n_used, rows.shape[1], *_place(rows), *_place(out))

    def prepare_attention(self, n_threads: int) -> None:
        """Attention, and what comes between matrices, come with so many threads from now on; while nothing is decoded."""
        if not attention.is_supported():
            return
        self.fields[PROCESS.between_task] = between.task_address()
        self.fields[PROCESS.compressor_task] = compressor.task_address()
        self.fields[PROCESS.shared_bytes] = between.SHARED_BYTES
        self.fields[PROCESS.attend], self.fields[PROCESS.index] = attention.attend_address(), attention.index_address()
        self.fields[PROCESS.pool], self.fields[PROCESS.threads] = threads.pool_for(n_threads), n_threads

    def take_unread_joins(self) -> int:
        """CONCATs left to our attention, but not read by it, since the previous call of this method; resets the count."""
        count = int(self.fields[PROCESS.unread_joins])
        self.fields[PROCESS.unread_joins] = 0
        return max(count, 0)

    @property
    def n_entered(self) -> int:
        """How often compiled code entered Python, of all models."""
        return int(self.fields[PROCESS.n_entered])

    @property
    def n_parts(self) -> int:
        """Parts of llama.cpp's graphs that were ours, of all models; between two of them llama.cpp computes."""
        return int(self.fields[PROCESS.n_parts])

    @property
    def n_compressed(self) -> int:
        """Compressors that were computed as one operation, of all models."""
        return int(self._compressors[COMPRESSOR.n_done])

    @property
    def settle_ns(self) -> int:
        """Time that the decoding thread waited for Python halves of calls that were computed, of all models."""
        return int(self.fields[PROCESS.settle_ns])

    @property
    def dense_ns(self) -> int:
        """Time spent in dense matrices."""
        return int(self.fields[PROCESS.dense_ns])

    @property
    def attention_ns(self) -> int:
        """Time spent in attention and the indexer."""
        return int(self.fields[PROCESS.attention_ns])

    def grow(self, scratch_bytes: int, n_pairs: int, n_rows: int) -> None:
        """Makes room for calls of that size; while nothing is decoded."""
        if scratch_bytes > self._size(PROCESS.scratch):
            self._point(PROCESS.scratch, np.zeros(scratch_bytes + 64, np.uint8), align=64)
        if n_pairs > self.fields[PROCESS.capacity]:
            self.fields[PROCESS.capacity] = n_pairs
            self._point(PROCESS.x_rows, np.zeros(n_pairs, np.int32))
            self._point(PROCESS.out_rows, np.zeros(n_pairs, np.int32))
            self._point(PROCESS.weights, np.zeros(n_pairs, np.float32))
            self._point(PROCESS.taken, np.zeros(n_pairs, np.uint8))
        if n_rows > self.fields[PROCESS.iota_size]:
            self.fields[PROCESS.iota_size] = n_rows
            self._point(PROCESS.iota, np.arange(n_rows, dtype=np.int32))

    def _size(self, field: int) -> int:
        array = self._arrays.get(field)
        return 0 if array is None else array.nbytes - 64

    def _point(self, field: int, array: npt.NDArray[Any], align: int = 1) -> None:
        self._arrays[field] = array
        self.fields[field] = align_up(array.ctypes.data, align)


class LayerRecord:
    """A layer's fields; keeps the arrays that they point to alive. `calls`: by variant."""

    def __init__(
        self,
        number: int,
        n_experts: int,
        resident: npt.NDArray[np.uint64],
        stamps: npt.NDArray[np.int64],
        uses: npt.NDArray[np.int64],
        tick: npt.NDArray[np.int64],
        telemetry: npt.NDArray[np.int64],
        compiled_below: npt.NDArray[np.int64],
        calls: Sequence[KernelCall],
        gate_address: int,
    ) -> None:
        assert 1 <= len(calls) <= MAX_VARIANTS
        self._calls = np.concatenate(
            [VARIANT.make(call=c.address, jobs_bytes=c.jobs_bytes, tasks_bytes=c.tasks_bytes) for c in calls]
        )
        self._keep = (resident, stamps, uses, tick, telemetry, compiled_below, calls)
        self.fields = LAYER.make(
            number=number,
            n_experts=n_experts,
            resident=resident.ctypes.data,
            stamps=stamps.ctypes.data,
            uses=uses.ctypes.data,
            tick=tick.ctypes.data,
            telemetry=telemetry.ctypes.data,
            compiled_below=compiled_below.ctypes.data,
            n_calls=len(calls),
            calls=self._calls.ctypes.data,
            gpu=0,
            misses=0,
            gate=gate_address,
        )

    @property
    def address(self) -> int:
        return int(self.fields.ctypes.data)

    def use_misses(self, record: miss_native.MissRecord | None) -> None:
        """From now on calls of few tokens ask there for what they lack (None: they go to Python); between two decodes. The caller
        keeps it alive."""
        self.fields[LAYER.misses] = 0 if record is None else record.address

    def use_gpu(self, experts: gpu_native.LayerOnGpu | None) -> None:
        """From now on these experts of the layer are on GPUs (None: none); between two decodes. The caller keeps them alive."""
        self.fields[LAYER.gpu] = 0 if experts is None else experts.address


def expert_record(projection: int, layer: LayerRecord) -> Record:
    """Fields of a stacked expert tensor; the caller keeps the array as long as the tensor's `extra` points to it."""
    record = WEIGHT.empty()
    WEIGHT.fill(record, kind=KIND_EXPERTS, projection=projection, layer=layer.address)
    return record


def dense_record(call: KernelCall, packed: npt.NDArray[np.uint64]) -> Record:
    """Fields of a dense matrix; `packed`: address of each of its matrices (one, or one per group)."""
    record = WEIGHT.empty()
    WEIGHT.fill(
        record,
        kind=KIND_DENSE,
        call=call.address,
        jobs_bytes=call.jobs_bytes,
        tasks_bytes=call.tasks_bytes,
        n_batch=packed.size,
        packed=packed.ctypes.data,
    )
    return record
