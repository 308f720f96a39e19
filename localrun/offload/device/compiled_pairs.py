"""The pairs (token, expert) of a call: counted and sorted by expert, then computed from RAM, in compiled code."""

from __future__ import annotations

from typing import NamedTuple

import numba as nb

from localrun.offload.cache.slots import TAIL_TOKENS, VARIANT_MASK
from localrun.offload.device import compiled_gpu as gpu_native
from localrun.offload.device.calls import begin_call
from localrun.offload.device.layouts import LAYER, MOST_PAIRS, PROCESS, VARIANT
from localrun.offload.device.shadow import in_ram
from localrun.offload.device.tensors import NB
from localrun.offload.kernels.layouts import CALL
from localrun.offload.kernels.lowlevel import call_1, load_i32, load_i64, store_i32, store_i64
from localrun.offload.kernels.records import get, put


class Chosen(NamedTuple):
    """The experts that the router chose: (n_tokens, n_used) int32 ids at an address, `stride` bytes from token to token."""

    ids: int
    stride: int
    n_tokens: int
    n_used: int


@nb.njit
def count_pairs(process: int, layer: int, chosen: Chosen) -> int:
    """Counts pairs by expert into the process's array, as negative numbers of those that are nowhere; how many pairs are on GPUs,
    -1 if Python must do this call."""
    n_experts, resident, gpu = get(layer, LAYER.n_experts), get(layer, LAYER.resident), get(layer, LAYER.gpu)
    counts, n_on_gpu = get(process, PROCESS.counts), 0
    may_miss = get(layer, LAYER.misses) != 0 and chosen.n_tokens * chosen.n_used <= MOST_PAIRS
    for e in range(n_experts):
        store_i32(counts + e * 4, 0)
    for t in range(chosen.n_tokens):
        for k in range(chosen.n_used):
            e = load_i32(chosen.ids + t * chosen.stride + k * 4)
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
def sort_pairs(process: int, layer: int, chosen: Chosen) -> int:
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
    for t in range(chosen.n_tokens):
        for k in range(chosen.n_used):
            e = load_i32(chosen.ids + t * chosen.stride + k * 4)
            if load_i32(counts + e * 4) < 0 or gpu_native.is_on_gpu(gpu, e):
                continue
            if t >= chosen.n_tokens - TAIL_TOKENS:
                store_i64(stamps + e * 8, tick)
            place = load_i32(places + e * 4)
            store_i32(places + e * 4, place + 1)
            store_i32(x_rows + place * 4, t)
            store_i32(out_rows + place * 4, t * chosen.n_used + k)
    return n_distinct


@nb.njit
def note_gpu_uses(process: int, layer: int) -> int:
    """Counts the uses of the counted experts on GPUs; how many there are."""
    counts, uses, gpu, n_distinct = get(process, PROCESS.counts), get(layer, LAYER.uses), get(layer, LAYER.gpu), 0
    for e in range(get(layer, LAYER.n_experts)):
        n = load_i32(counts + e * 4)
        if n > 0 and gpu_native.is_on_gpu(gpu, e):
            store_i64(uses + e * 8, load_i64(uses + e * 8) + n)
            n_distinct += 1
    return n_distinct


@nb.njit
def run_sorted(process: int, layer: int, x: int, down: int) -> None:
    """The sorted pairs, variant by variant."""
    starts, slots, bounds = get(process, PROCESS.starts), get(process, PROCESS.slots), get(process, PROCESS.bounds)
    for v in range(get(layer, LAYER.n_calls)):
        first, last = load_i32(bounds + v * 4), load_i32(bounds + v * 4 + 4)
        if first == last:
            continue
        record = get(layer, LAYER.calls) + v * VARIANT.size * 8
        call = get(record, VARIANT.call)
        begin_call(process, call, get(record, VARIANT.jobs_bytes), get(record, VARIANT.tasks_bytes))
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
def run_arrived(process: int, layer: int, word: int, expert: int, chosen: Chosen, x: int, down: int) -> None:
    """The pairs of one expert that was missing; `word` as in `LAYER.resident`."""
    starts, bounds, uses = get(process, PROCESS.starts), get(process, PROCESS.bounds), get(layer, LAYER.uses)
    x_rows, out_rows, n = get(process, PROCESS.x_rows), get(process, PROCESS.out_rows), 0
    for t in range(chosen.n_tokens):
        for k in range(chosen.n_used):
            if load_i32(chosen.ids + t * chosen.stride + k * 4) == expert:
                store_i32(x_rows + n * 4, t)
                store_i32(out_rows + n * 4, t * chosen.n_used + k)
                n += 1
    store_i32(starts, 0)
    store_i32(starts + 4, n)
    variant = word & VARIANT_MASK
    store_i64(get(process, PROCESS.slots), word - variant)
    for v in range(get(layer, LAYER.n_calls) + 1):
        store_i32(bounds + v * 4, 1 if v > variant else 0)
    store_i64(uses + expert * 8, load_i64(uses + expert * 8) + n)
    run_sorted(process, layer, x, down)
