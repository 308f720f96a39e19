"""Which operations of llama.cpp's graph are ours: compiled, because its scheduler asks for hundreds whenever it builds a graph.

Ours are the products with routed experts and with the dense matrices that we hold, attention and the indexer over an F16
cache in the CPU's memory, and what comes between matrices (`between.py`). For few tokens (`MOST_SUMMED`), so is what follows the
experts: the products with the router's weights, the sum over a token's experts, and the sum with the shared expert if that is
ours. All of a layer's FFN is then one split, which takes an input, ids and weights, and gives one row per token. For many tokens,
llama.cpp's threads add faster than our one thread.
"""

from __future__ import annotations

from typing import Final

import numba as nb

from localrun.ggml import structures as ggml
from localrun.kernel_cache import cached_cfunc
from localrun.offload.device import between
from localrun.offload.device.compiled_attention import takes_attention, takes_indexer, takes_join
from localrun.offload.device.layouts import PROCESS
from localrun.offload.device.tensors import BUFFER, NB, NE, OP, PARAMS, SRC, TYPE, VIEW_SRC
from localrun.offload.kernels.lowlevel import call_i64, load_i32, load_i64
from localrun.offload.kernels.records import get

MOST_SUMMED: Final = between.FEW_TOKENS
"""Tokens whose experts we weight and add up."""

_MUL_MAT, _MUL_MAT_ID, _GLU = ggml.OP_MUL_MAT, ggml.OP_MUL_MAT_ID, ggml.OP_GLU
_NONE, _ADD, _MUL, _VIEW = ggml.OP_NONE, ggml.OP_ADD, ggml.OP_MUL, ggml.OP_VIEW
_SWIGLU, _SWIGLU_CLAMP = ggml.GLU_SWIGLU, ggml.GLU_SWIGLU_CLAMP
_CONCAT, _ATTENTION, _INDEXER = ggml.OP_CONCAT, ggml.OP_FLASH_ATTN_EXT, ggml.OP_LIGHTNING_INDEXER
_F32 = ggml.TYPE_F32
_CONTEXT: Final = ggml.Device.context.offset


@nb.njit
def is_ours(process: int, tensor: int) -> bool:
    """The tensor lies in a weights buffer of ours."""
    buffer = load_i64(tensor + BUFFER) if tensor != 0 else 0
    return buffer != 0 and call_i64(get(process, PROCESS.buffer_type), buffer, 0) == get(process, PROCESS.weights_type)


@nb.njit
def _is_product(process: int, tensor: int) -> bool:
    """A product with one of our weights."""
    op = load_i32(tensor + OP)
    return op in (_MUL_MAT_ID, _MUL_MAT) and is_ours(process, load_i64(tensor + SRC))


@nb.njit
def _is_gate(process: int, op: int) -> bool:
    """The gated activation of two products of the same kind."""
    gate, up, kind = load_i64(op + SRC), load_i64(op + SRC + 8), load_i32(op + PARAMS)
    return (
        gate != 0
        and up != 0
        and kind in (_SWIGLU, _SWIGLU_CLAMP)
        and load_i32(op + PARAMS + 4) == 0  # not swapped
        and load_i32(gate + OP) == load_i32(up + OP)
        and _is_product(process, gate)
        and _is_product(process, up)
    )


@nb.njit
def is_weighting(process: int, op: int) -> bool:
    """Experts' outputs (D, K, T) times weights (1, K, T), of few tokens."""
    if load_i32(op + OP) != _MUL:
        return False
    experts, weights = load_i64(op + SRC), load_i64(op + SRC + 8)
    if load_i32(experts + OP) != _MUL_MAT_ID or not _is_product(process, experts):
        return False
    for i in range(1, 4):
        if load_i64(weights + NE + i * 8) != load_i64(experts + NE + i * 8):
            return False
    return (
        load_i64(op + NE + 16) <= MOST_SUMMED
        and load_i64(op + NE + 24) == 1
        and load_i64(weights + NE) == 1
        and load_i32(weights + TYPE) == _F32
        and load_i32(op + TYPE) == _F32
        and load_i64(op + NB) == 4
    )


@nb.njit
def _is_choice(process: int, tensor: int) -> bool:
    """All tokens' k-th choice: a view of weighted outputs."""
    return load_i32(tensor + OP) == _VIEW and is_weighting(process, load_i64(tensor + VIEW_SRC))


@nb.njit
def _same_rows(a: int, b: int) -> bool:
    """F32 matrices of one shape."""
    return (
        load_i32(a + TYPE) == _F32
        and load_i32(b + TYPE) == _F32
        and load_i64(a + NB) == 4
        and load_i64(b + NB) == 4
        and load_i64(a + NE) == load_i64(b + NE)
        and load_i64(a + NE + 8) == load_i64(b + NE + 8)
        and load_i64(a + NE + 16) == load_i64(b + NE + 16) == 1
        and load_i64(a + NE + 24) == load_i64(b + NE + 24) == 1
    )


@nb.njit
def _is_sum(process: int, op: int) -> bool:
    """The sum of a token's choices up to one of them, or all of it with our shared expert's output."""
    first = True
    while load_i32(op + OP) == _ADD:
        a, b = load_i64(op + SRC), load_i64(op + SRC + 8)
        if not _same_rows(op, a) or not _same_rows(op, b):
            return False
        is_shared = first and load_i32(b + OP) == _MUL_MAT and load_i32(a + OP) == _ADD and _is_product(process, b)
        if not is_shared and not _is_choice(process, b):
            return False
        op, first = a, False
    return not first and _is_choice(process, op)


@cached_cfunc("uint8(intp, intp)")
def supports_op(device: int, op: int) -> int:
    """ggml_backend_device_i.supports_op."""
    process, kind = load_i64(device + _CONTEXT), load_i32(op + OP)
    if kind == _NONE or (get(process, PROCESS.takes_between) != 0 and between.takes(process, op)):
        return 1
    ours = False
    if kind in (_MUL_MAT_ID, _MUL_MAT):
        ours = is_ours(process, load_i64(op + SRC))
    elif kind == _GLU:
        ours = _is_gate(process, op)
    elif kind == _MUL:
        ours = is_weighting(process, op)
    elif kind == _ADD:
        ours = _is_sum(process, op)
    elif get(process, PROCESS.takes_attention) == 0:
        ours = False
    elif kind == _CONCAT:
        ours = takes_join(process, op)
    elif kind == _ATTENTION:
        ours = takes_attention(process, op)
    elif kind == _INDEXER:
        ours = takes_indexer(process, op)
    return 1 if ours else 0
