"""Dense matrices and the shared expert's SwiGLU, in compiled code."""

from __future__ import annotations

import numba as nb
import numpy as np

from localrun.ggml import structures as ggml
from localrun.offload.device.calls import begin_call
from localrun.offload.device.layouts import PROCESS, WEIGHT
from localrun.offload.device.shadow import in_ram
from localrun.offload.device.tensors import NB, NE, PARAMS, SRC, TYPE
from localrun.offload.kernels.activations import swiglu16
from localrun.offload.kernels.layouts import CALL
from localrun.offload.kernels.lowlevel import (
    call_1,
    copy,
    float_of_bits,
    load_f32,
    load_i32,
    load_i64,
    store_f32,
    store_i32,
)
from localrun.offload.kernels.records import get, put

_SWIGLU_CLAMP = ggml.GLU_SWIGLU_CLAMP


@nb.njit
def multiply(process: int, node: int, weight: int) -> bool:
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
            begin_call(process, call, get(weight, WEIGHT.jobs_bytes), get(weight, WEIGHT.tasks_bytes))
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
def glu(process: int, node: int) -> bool:
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
