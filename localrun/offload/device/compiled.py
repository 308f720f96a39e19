"""The compiled half of our device: `graph_compute` without Python while nothing has to be read.

A layer enters our device once per token, and with the dense matrices on it (see `dense.py`) about ten times. So the callback that
ggml calls is a compiled C function: it walks the split's nodes, multiplies with dense matrices, and runs an expert chain whose
experts are all in RAM or, in calls of few tokens, on GPUs (`gpu_native.py`). Whatever it does not know (an expert to be read, a
graph of another architecture, a stop request) it gives to Python, which takes the interpreter lock.

All structures are arrays of int64, the same for both sides; `P_` are the process's fields, `W_` a weight's, `L_` a layer's. A
weight's record hangs on its tensor's `extra`. Everything is written by the decoding thread, except that read-ahead may add
residents meanwhile (one aligned store of an address, after the bytes).
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
from localrun.kernel_cache import cached_cfunc
from localrun.offload.cache.policy import TAIL_TOKENS
from localrun.offload.cache.telemetry import Counter
from localrun.offload.device import compiled_gpu as gpu_native
from localrun.offload.kernels.lowlevel import (
    call_1,
    call_i32,
    call_i64,
    float_of_bits,
    load_f32,
    load_i32,
    load_i64,
    store_f32,
    store_i32,
    store_i64,
)
from localrun.offload.kernels.tasks import (
    C_EXPERT,
    C_JOBS,
    C_LIMIT_BITS,
    C_N_EXPERTS,
    C_OUT,
    C_OUT_ROWS,
    C_OUT_STRIDE,
    C_PAIR,
    C_PANELS,
    C_SLOTS,
    C_STARTS,
    C_TASKS,
    C_X,
    C_X_ROWS,
    C_X_STRIDE,
    Call,
    runner,
)

# The process: functions of ggml and libc, the way back to Python, scratch, time in dense matrices
P_N_NODES, P_NODE_AT, P_PYTHON, P_CLOCK, P_TIMESPEC, P_RUN, P_SCRATCH, P_CAPACITY = range(8)
P_SLOTS, P_STARTS, P_X_ROWS, P_OUT_ROWS, P_COUNTS, P_PLACES, P_BOUNDS, P_IOTA, P_IOTA_SIZE, P_DENSE_NS, P_FIELDS = (
    range(8, 19)
)
# A weight: what it is, for experts its layer and projection, for dense matrices their call
W_KIND, W_PROJECTION, W_LAYER, W_CALL, W_JOBS_BYTES, W_TASKS_BYTES, W_N_BATCH, W_PACKED, W_FIELDS = range(9)
KIND_DENSE, KIND_EXPERTS = 1, 2
# A layer: residency by expert (slot address or 0, which variant), recency and use, counters, the number of
# tokens from which calls go to Python, calls by variant (K_ fields each: address, bytes of its jobs and tasks), experts on GPUs
# (see gpu_native.py, 0: none)
L_N_EXPERTS, L_RESIDENT, L_VARIANTS, L_STAMPS, L_USES, L_TICK, L_TELEMETRY = range(7)
L_COMPILED_BELOW, L_N_CALLS, L_CALLS, L_GPU, L_FIELDS = range(7, 12)
K_CALL, K_JOBS_BYTES, K_TASKS_BYTES, K_FIELDS = 0, 1, 2, 3

MAX_EXPERTS: Final = 4096
MAX_VARIANTS: Final = 16
"""Formats that experts of one layer may have."""

# Byte offsets into struct ggml_tensor, from the structure that `library()` has checked
_NE, _NB = ggml.Tensor.ne.offset, ggml.Tensor.nb.offset
_OP, _PARAMS, _SRC = ggml.Tensor.op.offset, ggml.Tensor.op_params.offset, ggml.Tensor.src.offset
_DATA, _EXTRA, _TYPE = ggml.Tensor.data.offset, ggml.Tensor.extra.offset, ggml.Tensor.type.offset
_CONTEXT: Final = ggml.Backend.context.offset

_MUL_MAT, _MUL_MAT_ID, _GLU, _NONE = ggml.OP_MUL_MAT, ggml.OP_MUL_MAT_ID, ggml.OP_GLU, ggml.OP_NONE
_FIRST_VIEW, _LAST_VIEW = ggml.OP_RESHAPE, ggml.OP_TRANSPOSE
_SWIGLU, _SWIGLU_CLAMP = ggml.GLU_SWIGLU, ggml.GLU_SWIGLU_CLAMP
_CALLS, _TOKENS, _REQUESTS, _HITS = (
    Counter.CALLS.value,
    Counter.TOKENS.value,
    Counter.REQUESTS.value,
    Counter.HITS.value,
)
_GPU_HITS, _COMPUTE_NS, _TOTAL_NS = Counter.GPU_HITS.value, Counter.COMPUTE_NS.value, Counter.TOTAL_NS.value


@nb.njit(inline="always")
def _get(structure: int, field: int) -> int:
    return load_i64(structure + field * 8)


@nb.njit(inline="always")
def _add(structure: int, field: int, amount: int) -> None:
    store_i64(structure + field * 8, load_i64(structure + field * 8) + amount)


@nb.njit
def _now_ns(process: int) -> int:
    clock_monotonic = (
        1  # <time.h>, Linux; macOS has 6, where the field is only a duration of unknown origin all the same
    )
    call_i32(_get(process, P_CLOCK), clock_monotonic, _get(process, P_TIMESPEC))
    timespec = _get(process, P_TIMESPEC)
    return load_i64(timespec) * 1_000_000_000 + load_i64(timespec + 8)


@nb.njit
def _begin(process: int, call: int, jobs_bytes: int, tasks_bytes: int) -> None:
    """Points a call at the process's scratch."""
    scratch = _get(process, P_SCRATCH)
    store_i64(call + C_JOBS * 8, scratch)
    store_i64(call + C_TASKS * 8, scratch + jobs_bytes)
    store_i64(call + C_PANELS * 8, scratch + jobs_bytes + tasks_bytes)
    store_i64(call + C_EXPERT * 8, 0)
    store_i64(call + C_PAIR * 8, 0)


@nb.njit
def _dense(process: int, node: int, weight: int) -> bool:
    """One MUL_MAT with a matrix of ours; False for a layout that we don't know."""
    source, call = load_i64(node + _SRC + 8), _get(weight, W_CALL)
    n_rows, n_batch = load_i64(source + _NE + 8), load_i64(source + _NE + 16)
    plain = (
        load_i32(source + _TYPE) == 0
        and load_i32(node + _TYPE) == 0
        and load_i64(source + _NB) == 4
        and load_i64(node + _NB) == 4
        and load_i64(source + _NE + 24) == 1
        and n_batch % _get(weight, W_N_BATCH) == 0
    )
    if not plain:
        return False
    repeat = n_batch // _get(weight, W_N_BATCH)  # ggml broadcasts a weight over consecutive matrices of the input
    starts, iota, most = _get(process, P_STARTS), _get(process, P_IOTA), _get(process, P_IOTA_SIZE)
    x_stride, out_stride = load_i64(source + _NB + 8), load_i64(node + _NB + 8)
    store_i32(starts, 0)
    for batch in range(n_batch):
        for row in range(0, n_rows, most):
            store_i32(starts + 4, min(most, n_rows - row))
            _begin(process, call, _get(weight, W_JOBS_BYTES), _get(weight, W_TASKS_BYTES))
            store_i64(call + C_N_EXPERTS * 8, 1)
            store_i64(call + C_SLOTS * 8, _get(weight, W_PACKED) + batch // repeat * 8)
            store_i64(call + C_STARTS * 8, starts)
            store_i64(call + C_X_ROWS * 8, iota)
            store_i64(call + C_OUT_ROWS * 8, iota)
            store_i64(call + C_X * 8, load_i64(source + _DATA) + batch * load_i64(source + _NB + 16) + row * x_stride)
            store_i64(call + C_X_STRIDE * 8, x_stride)
            store_i64(call + C_OUT * 8, load_i64(node + _DATA) + batch * load_i64(node + _NB + 16) + row * out_stride)
            store_i64(call + C_OUT_STRIDE * 8, out_stride)
            call_1(_get(process, P_RUN), call)
    return True


@nb.njit
def _glu(node: int) -> bool:
    """SwiGLU of two contiguous F32 tensors (the shared expert's); False for another layout."""
    gate, up = load_i64(node + _SRC), load_i64(node + _SRC + 8)
    width, n_rows = load_i64(node + _NE), load_i64(node + _NE + 8) * load_i64(node + _NE + 16)
    for tensor in (gate, up, node):
        if load_i32(tensor + _TYPE) != 0 or load_i64(tensor + _NB) != 4 or load_i64(tensor + _NB + 8) != width * 4:
            return False
    limit = np.float32(np.inf)
    if load_i32(node + _PARAMS) == _SWIGLU_CLAMP:
        limit = float_of_bits(load_i32(node + _PARAMS + 12))
    a, b, out = load_i64(gate + _DATA), load_i64(up + _DATA), load_i64(node + _DATA)
    for i in range(width * n_rows):
        g, u = min(load_f32(a + i * 4), limit), max(-limit, min(load_f32(b + i * 4), limit))
        store_f32(out + i * 4, g / (np.float32(1) + np.exp(-g)) * u)
    return True


@nb.njit
def _chain(graph: int, process: int, index: int, n_nodes: int) -> int:
    """The weight record of a whole expert chain that begins at node `index`, 0 if there is none."""
    if index + 4 > n_nodes:
        return 0
    node_at = _get(process, P_NODE_AT)
    first, second = call_i64(node_at, graph, index), call_i64(node_at, graph, index + 1)
    glu, down = call_i64(node_at, graph, index + 2), call_i64(node_at, graph, index + 3)
    if load_i32(second + _OP) != _MUL_MAT_ID or load_i32(glu + _OP) != _GLU or load_i32(down + _OP) != _MUL_MAT_ID:
        return 0
    gate, up = load_i64(glu + _SRC), load_i64(glu + _SRC + 8)
    same_nodes = (gate == first and up == second) or (gate == second and up == first)
    x, ids = load_i64(first + _SRC + 8), load_i64(first + _SRC + 16)
    same_input = (
        load_i64(second + _SRC + 8) == x and load_i64(second + _SRC + 16) == ids and load_i64(down + _SRC + 16) == ids
    )
    if not same_nodes or not same_input or load_i64(down + _SRC + 8) != glu or load_i64(x + _NE + 8) != 1:
        return 0
    a, b = load_i64(load_i64(gate + _SRC) + _EXTRA), load_i64(load_i64(up + _SRC) + _EXTRA)
    c = load_i64(load_i64(down + _SRC) + _EXTRA)
    if a == 0 or b == 0 or c == 0 or _get(a, W_LAYER) != _get(b, W_LAYER) or _get(b, W_LAYER) != _get(c, W_LAYER):
        return 0
    if _get(a, W_PROJECTION) != 0 or _get(b, W_PROJECTION) != 1 or _get(c, W_PROJECTION) != 2:
        return 0
    infinity = np.int32(0x7F800000)  # as F32
    limit_bits = infinity if load_i32(glu + _PARAMS) == _SWIGLU else np.int32(load_i32(glu + _PARAMS + 12))
    if limit_bits != np.int32(_get(_get(_get(_get(c, W_LAYER), L_CALLS), K_CALL), C_LIMIT_BITS)):
        return 0
    return c


@nb.njit
def _count_pairs(process: int, layer: int, ids: int, ids_stride: int, n_tokens: int, n_used: int) -> int:
    """Counts pairs by expert into the process's array; how many of them are on GPUs, -1 if an expert is nowhere."""
    n_experts, resident, gpu = _get(layer, L_N_EXPERTS), _get(layer, L_RESIDENT), _get(layer, L_GPU)
    counts, n_on_gpu = _get(process, P_COUNTS), 0
    for e in range(n_experts):
        store_i32(counts + e * 4, 0)
    for t in range(n_tokens):
        for k in range(n_used):
            e = load_i32(ids + t * ids_stride + k * 4)
            if e < 0 or e >= n_experts:
                return -1
            if gpu_native.is_on_gpu(gpu, e):
                n_on_gpu += 1
            elif load_i64(resident + e * 8) == 0:
                return -1
            store_i32(counts + e * 4, load_i32(counts + e * 4) + 1)
    return n_on_gpu


@nb.njit
def _sort_pairs(process: int, layer: int, ids: int, ids_stride: int, n_tokens: int, n_used: int) -> int:
    """Groups the counted pairs of experts in RAM by expert, experts by variant, into the process's arrays; the number of distinct
    experts. Variant v's experts are `bounds[v]..bounds[v + 1]`."""
    n_experts, resident, variants = _get(layer, L_N_EXPERTS), _get(layer, L_RESIDENT), _get(layer, L_VARIANTS)
    counts, places, gpu = _get(process, P_COUNTS), _get(process, P_PLACES), _get(layer, L_GPU)
    starts, slots, bounds = _get(process, P_STARTS), _get(process, P_SLOTS), _get(process, P_BOUNDS)
    n_distinct, at, n_variants = 0, 0, _get(layer, L_N_CALLS)
    stamps, uses = _get(layer, L_STAMPS), _get(layer, L_USES)
    tick = load_i64(_get(layer, L_TICK)) + 1
    store_i64(_get(layer, L_TICK), tick)
    for v in range(n_variants):
        store_i32(bounds + v * 4, n_distinct)
        for e in range(n_experts):
            n = load_i32(counts + e * 4)
            if n > 0 and (n_variants == 1 or load_i32(variants + e * 4) == v) and not gpu_native.is_on_gpu(gpu, e):
                store_i32(places + e * 4, at)  # where the expert's next pair goes
                store_i64(slots + n_distinct * 8, load_i64(resident + e * 8))
                store_i32(starts + n_distinct * 4, at)
                store_i64(uses + e * 8, load_i64(uses + e * 8) + n)
                n_distinct += 1
                at += n
    store_i32(bounds + n_variants * 4, n_distinct)
    store_i32(starts + n_distinct * 4, at)
    x_rows, out_rows = _get(process, P_X_ROWS), _get(process, P_OUT_ROWS)
    for t in range(n_tokens):
        for k in range(n_used):
            e = load_i32(ids + t * ids_stride + k * 4)
            if gpu_native.is_on_gpu(gpu, e):
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
    counts, uses, gpu, n_distinct = _get(process, P_COUNTS), _get(layer, L_USES), _get(layer, L_GPU), 0
    for e in range(_get(layer, L_N_EXPERTS)):
        n = load_i32(counts + e * 4)
        if n > 0 and gpu_native.is_on_gpu(gpu, e):
            store_i64(uses + e * 8, load_i64(uses + e * 8) + n)
            n_distinct += 1
    return n_distinct


@nb.njit
def _run_experts(process: int, layer: int, x: int, down: int) -> None:
    """The sorted pairs, variant by variant."""
    starts, slots, bounds = _get(process, P_STARTS), _get(process, P_SLOTS), _get(process, P_BOUNDS)
    for v in range(_get(layer, L_N_CALLS)):
        first, last = load_i32(bounds + v * 4), load_i32(bounds + v * 4 + 4)
        if first == last:
            continue
        record = _get(layer, L_CALLS) + v * K_FIELDS * 8
        call = _get(record, K_CALL)
        _begin(process, call, _get(record, K_JOBS_BYTES), _get(record, K_TASKS_BYTES))
        store_i64(call + C_PAIR * 8, load_i32(starts + first * 4))
        store_i64(call + C_N_EXPERTS * 8, last - first)
        store_i64(call + C_SLOTS * 8, slots + first * 8)
        store_i64(call + C_STARTS * 8, starts + first * 4)
        store_i64(call + C_X_ROWS * 8, _get(process, P_X_ROWS))
        store_i64(call + C_OUT_ROWS * 8, _get(process, P_OUT_ROWS))
        store_i64(call + C_X * 8, load_i64(x + _DATA))
        store_i64(call + C_X_STRIDE * 8, load_i64(x + _NB + 16))
        store_i64(call + C_OUT * 8, load_i64(down + _DATA))
        store_i64(call + C_OUT_STRIDE * 8, load_i64(down + _NB + 8))
        call_1(_get(process, P_RUN), call)


@nb.njit
def _experts(process: int, graph: int, index: int, weight: int) -> bool:
    """An expert chain whose experts are all in RAM or on GPUs; False: somebody must be read first, or Python has to see it."""
    started = _now_ns(process)
    node_at = _get(process, P_NODE_AT)
    first, down = call_i64(node_at, graph, index), call_i64(node_at, graph, index + 3)
    x, ids = load_i64(first + _SRC + 8), load_i64(first + _SRC + 16)
    n_used, n_tokens = load_i64(ids + _NE), load_i64(ids + _NE + 8)
    if (
        n_tokens >= load_i64(_get(_get(weight, W_LAYER), L_COMPILED_BELOW))
        or n_used * n_tokens > _get(process, P_CAPACITY)
        or load_i64(x + _NB) != 4
        or load_i64(down + _NB + 16) != (load_i64(down + _NB + 8) * n_used)
    ):
        return False
    layer, chosen, ids_stride = _get(weight, W_LAYER), load_i64(ids + _DATA), load_i64(ids + _NB + 8)
    n_gpu_pairs, n_parts = _count_pairs(process, layer, chosen, ids_stride, n_tokens, n_used), 0
    if n_gpu_pairs < 0:
        return False
    gpu, n_gpu, x_data, x_stride = _get(layer, L_GPU), 0, load_i64(x + _DATA), load_i64(x + _NB + 16)
    begun = _now_ns(process)
    if n_gpu_pairs > 0:
        n_parts = gpu_native.plan(gpu, chosen, ids_stride, n_tokens, n_used, n_gpu_pairs)
        if n_parts < 0 or not gpu_native.start(gpu, n_parts, x_data, x_stride):
            return False
    n_in_ram = 0
    if n_gpu_pairs < n_tokens * n_used:
        n_in_ram = _sort_pairs(process, layer, chosen, ids_stride, n_tokens, n_used)
        _run_experts(process, layer, x, down)
    if n_parts > 0:
        if not gpu_native.finish(gpu, n_parts, x_data, x_stride, load_i64(down + _DATA), load_i64(down + _NB + 8)):
            return False
        n_gpu = _note_gpu_uses(process, layer)
    ended = _now_ns(process)
    row = _get(layer, L_TELEMETRY)
    _add(row, _CALLS, 1)
    _add(row, _TOKENS, n_tokens)
    _add(row, _REQUESTS, n_tokens * n_used)
    _add(row, _HITS, n_in_ram + n_gpu)
    _add(row, _GPU_HITS, n_gpu)
    _add(row, _COMPUTE_NS, ended - begun)
    _add(row, _TOTAL_NS, ended - started)
    return True


@cached_cfunc("int32(intp, intp)")
def graph_compute(backend: int, graph: int) -> int:
    """ggml_backend_i.graph_compute: 0, or the status that Python gave as a negative number."""
    process = load_i64(backend + _CONTEXT)
    n_nodes = call_i32(_get(process, P_N_NODES), graph, 0)
    index = 0
    while index < n_nodes:
        node = call_i64(_get(process, P_NODE_AT), graph, index)
        op = load_i32(node + _OP)
        if op == _NONE or _FIRST_VIEW <= op <= _LAST_VIEW:  # other names for bytes that are there
            index += 1
            continue
        done = 0
        if op == _MUL_MAT:
            started = _now_ns(process)
            weight = load_i64(load_i64(node + _SRC) + _EXTRA)
            if weight != 0 and _get(weight, W_KIND) == KIND_DENSE and _dense(process, node, weight):
                done = 1
                _add(process, P_DENSE_NS, _now_ns(process) - started)
        elif op == _GLU:
            done = 1 if _glu(node) else 0
        elif op == _MUL_MAT_ID:
            weight = _chain(graph, process, index, n_nodes)
            if weight != 0 and _experts(process, graph, index, weight):
                done = 4
        if done == 0:
            answer = call_i64(_get(process, P_PYTHON), graph, index)
            if answer <= 0:
                return int(-answer - 2)  # Python gives -1 for FAILED (-1), -3 for ABORTED (1)
            done = answer
        index += done
    return 0


FAILED_ANSWER: Final = -1
ABORTED_ANSWER: Final = -3
"""What Python answers for ggml's statuses FAILED (-1) and ABORTED (1): `-answer - 2` is the status."""


class Process:
    """The process's field array and what it points to; made once by the device.

    `python` is `int64 f(graph, index)`: nodes done, or one of the `*_ANSWER`s.
    """

    def __init__(self, lib: Library, python: int) -> None:
        self.fields: npt.NDArray[np.int64] = np.zeros(P_FIELDS, np.int64)
        self._arrays: dict[int, npt.NDArray[Any]] = {}
        self._lib = lib  # keeps the functions' library
        libc = C.CDLL(None)
        functions: tuple[tuple[int, Any], ...] = (
            (P_N_NODES, lib.ggml_graph_n_nodes),
            (P_NODE_AT, lib.ggml_graph_node),
            (P_CLOCK, libc.clock_gettime),
        )
        for field, function in functions:
            self.fields[field] = C.cast(function, C.c_void_p).value or 0
        self.fields[P_PYTHON] = python
        self.fields[P_RUN] = runner().run_address
        self._point(P_TIMESPEC, np.zeros(2, np.int64))
        self._point(P_COUNTS, np.zeros(MAX_EXPERTS, np.int32))
        self._point(P_PLACES, np.zeros(MAX_EXPERTS, np.int32))
        self._point(P_BOUNDS, np.zeros(MAX_VARIANTS + 1, np.int32))
        self._point(P_SLOTS, np.zeros(MAX_EXPERTS, np.uint64))
        self._point(P_STARTS, np.zeros(MAX_EXPERTS + 1, np.int32))
        self.grow(0, 64, 64)

    @property
    def address(self) -> int:
        """For the backend's context."""
        return int(self.fields.ctypes.data)

    @property
    def dense_ns(self) -> int:
        """Time spent in dense matrices."""
        return int(self.fields[P_DENSE_NS])

    def grow(self, scratch_bytes: int, n_pairs: int, n_rows: int) -> None:
        """Makes room for calls of that size; while nothing is decoded."""
        if scratch_bytes > self._size(P_SCRATCH):
            self._point(P_SCRATCH, np.zeros(scratch_bytes + 64, np.uint8), align=64)
        if n_pairs > self.fields[P_CAPACITY]:
            self.fields[P_CAPACITY] = n_pairs
            self._point(P_X_ROWS, np.zeros(n_pairs, np.int32))
            self._point(P_OUT_ROWS, np.zeros(n_pairs, np.int32))
        if n_rows > self.fields[P_IOTA_SIZE]:
            self.fields[P_IOTA_SIZE] = n_rows
            self._point(P_IOTA, np.arange(n_rows, dtype=np.int32))

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
        n_experts: int,
        resident: npt.NDArray[np.uint64],
        variants: npt.NDArray[np.int32],
        stamps: npt.NDArray[np.int64],
        uses: npt.NDArray[np.int64],
        tick: npt.NDArray[np.int64],
        telemetry: npt.NDArray[np.int64],
        compiled_below: npt.NDArray[np.int64],
        calls: Sequence[Call],
    ) -> None:
        assert 1 <= len(calls) <= MAX_VARIANTS
        self._calls = np.array([(call.address, call.jobs_bytes, call.tasks_bytes) for call in calls], np.int64)
        self._keep = (resident, variants, stamps, uses, tick, telemetry, compiled_below, calls)
        addresses = [a.ctypes.data for a in self._keep[:7]]
        self.fields = np.array([n_experts, *addresses, len(calls), self._calls.ctypes.data, 0], np.int64)
        assert self.fields.size == L_FIELDS
        assert self._calls.shape[1] == K_FIELDS

    @property
    def address(self) -> int:
        return int(self.fields.ctypes.data)

    def use_gpu(self, experts: gpu_native.LayerOnGpu | None) -> None:
        """From now on these experts of the layer are on GPUs (None: none); between two decodes. The caller keeps them alive."""
        self.fields[L_GPU] = 0 if experts is None else experts.address


def expert_record(projection: int, layer: LayerRecord) -> npt.NDArray[np.int64]:
    """Fields of a stacked expert tensor; the caller keeps the array as long as the tensor's `extra` points to it."""
    fields = np.zeros(W_FIELDS, np.int64)
    fields[[W_KIND, W_PROJECTION, W_LAYER]] = KIND_EXPERTS, projection, layer.address
    return fields


def dense_record(call: Call, packed: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Fields of a dense matrix; `packed`: address of each of its matrices (one, or one per group)."""
    fields = np.zeros(W_FIELDS, np.int64)
    fields[[W_KIND, W_CALL, W_JOBS_BYTES, W_TASKS_BYTES]] = KIND_DENSE, call.address, call.jobs_bytes, call.tasks_bytes
    fields[[W_N_BATCH, W_PACKED]] = packed.size, packed.ctypes.data
    return fields
