"""DeepSeek-V4's attention and its indexer on our device: from ggml's nodes to the records of `kernels.attention`.

llama.cpp joins the rows of the window and the compressed rows by CONCAT, which copies the cache in every layer and for every
token, and attends to the result. If both operations are ours, nothing is copied: attention reads the CONCAT's inputs in place.
`Process.take_unread_joins` counts CONCATs that no attention of ours has read this way; any would mean a wrong answer.
"""

from __future__ import annotations

from typing import Final

import numba as nb

from localrun.ggml import structures as ggml
from localrun.offload.device.layouts import PROCESS
from localrun.offload.device.tensors import BUFFER, DATA, NAME, NB, NE, OP, PARAMS, SRC, TYPE, VIEW_OFFS, VIEW_SRC
from localrun.offload.kernels.attention import (
    ATTENTION,
    INDEXER,
    MOST_INDEX_HEADS,
    MOST_INDEX_VALUES,
    MOST_VALUES,
    attend,
    index,
)
from localrun.offload.kernels.lowlevel import call_i32, call_i64, load_i32, load_i64, load_u8
from localrun.offload.kernels.records import add, get, put
from localrun.offload.kernels.vectors import Q8_BYTES

_CSA_K_ALL: Final = int.from_bytes(b"csa_k_al", "little")
_HCA_K_ALL: Final = int.from_bytes(b"hca_k_al", "little")
_L: Final = ord("l")
_CONCAT, _F16, _F32, _Q8_0 = ggml.OP_CONCAT, ggml.TYPE_F16, ggml.TYPE_F32, ggml.TYPE_Q8_0

ROWS_DIMENSION: Final = 2
"""Dimension of a cache's rows in a CONCAT: (values, 1 head, rows, 1 sequence)."""


@nb.njit
def attend_node(process: int, node: int) -> None:
    """FLASH_ATTN_EXT, of which `takes_attention` is true."""
    record = get(process, PROCESS.attention)
    q, k, mask, sinks = (
        load_i64(node + SRC),
        load_i64(node + SRC + 8),
        load_i64(node + SRC + 24),
        load_i64(node + SRC + 32),
    )
    put(record, ATTENTION.n_values, load_i64(q + NE))
    put(record, ATTENTION.n_tokens, load_i64(q + NE + 8))
    put(record, ATTENTION.n_heads, load_i64(q + NE + 16))
    put(record, ATTENTION.q, load_i64(q + DATA))
    put(record, ATTENTION.q_token, load_i64(q + NB + 8))
    put(record, ATTENTION.q_head, load_i64(q + NB + 16))
    n_rows, joined = load_i64(k + NE + 8), load_i64(k + VIEW_SRC)
    put(record, ATTENTION.n_rows, n_rows)
    put(record, ATTENTION.row_type, load_i32(k + TYPE))
    if joined != 0 and load_i32(joined + OP) == _CONCAT:
        first, second = load_i64(joined + SRC), load_i64(joined + SRC + 8)
        put(record, ATTENTION.rows, load_i64(first + DATA))
        put(record, ATTENTION.row_stride, load_i64(first + NB + 16))
        put(record, ATTENTION.n_first, load_i64(first + NE + 16))
        put(record, ATTENTION.others, load_i64(second + DATA))
        put(record, ATTENTION.other_stride, load_i64(second + NB + 16))
        add(process, PROCESS.unread_joins, -1)
    else:
        put(record, ATTENTION.rows, load_i64(k + DATA))
        put(record, ATTENTION.row_stride, load_i64(k + NB + 8))
        put(record, ATTENTION.n_first, n_rows)
        put(record, ATTENTION.others, 0)
    put(record, ATTENTION.mask, load_i64(mask + DATA))
    put(record, ATTENTION.mask_token, load_i64(mask + NB + 8))
    put(record, ATTENTION.sinks, load_i64(sinks + DATA) if sinks != 0 else 0)
    put(record, ATTENTION.scale_bits, load_i32(node + PARAMS))
    put(record, ATTENTION.out, load_i64(node + DATA))
    attend(get(process, PROCESS.attend), record, get(process, PROCESS.pool), get(process, PROCESS.threads))


@nb.njit
def index_node(process: int, node: int) -> None:
    """LIGHTNING_INDEXER, of which `takes_indexer` is true."""
    record = get(process, PROCESS.indexer)
    q, k, weights, mask = (
        load_i64(node + SRC),
        load_i64(node + SRC + 8),
        load_i64(node + SRC + 16),
        load_i64(node + SRC + 24),
    )
    put(record, INDEXER.n_values, load_i64(q + NE))
    put(record, INDEXER.n_heads, load_i64(q + NE + 8))
    put(record, INDEXER.n_tokens, load_i64(q + NE + 16))
    put(record, INDEXER.q, load_i64(q + DATA))
    put(record, INDEXER.q_head, load_i64(q + NB + 8))
    put(record, INDEXER.q_token, load_i64(q + NB + 16))
    put(record, INDEXER.weights, load_i64(weights + DATA))
    put(record, INDEXER.weight_token, load_i64(weights + NB + 8))
    put(record, INDEXER.key_type, load_i32(k + TYPE))
    put(record, INDEXER.keys, load_i64(k + DATA))
    put(record, INDEXER.key_stride, load_i64(k + NB + 16))
    put(record, INDEXER.n_keys, load_i64(k + NE + 16))
    put(record, INDEXER.mask, load_i64(mask + DATA))
    put(record, INDEXER.mask_token, load_i64(mask + NB + 8))
    put(record, INDEXER.out, load_i64(node + DATA))
    put(record, INDEXER.out_token, load_i64(node + NB + 8))
    index(get(process, PROCESS.index), record, get(process, PROCESS.pool), get(process, PROCESS.threads))


@nb.njit
def _is_cache(process: int, rows: int) -> bool:
    """F16 or Q8_0 rows of one head and one sequence in a buffer that stays where it is: a KV cache in the CPU's memory."""
    kind, block_bytes = load_i32(rows + TYPE), load_i64(rows + NB)
    is_readable = (kind == _F16 and block_bytes == 2) or (kind == _Q8_0 and block_bytes == Q8_BYTES)
    if not is_readable or load_i64(rows + NE + 24) != 1:
        return False
    cache = load_i64(rows + VIEW_SRC)
    buffer = load_i64(cache + BUFFER) if cache != 0 else 0
    return (
        buffer != 0
        and call_i32(get(process, PROCESS.is_host), call_i64(get(process, PROCESS.buffer_type), buffer, 0), 0) & 1 != 0
    )


@nb.njit
def takes_join(process: int, node: int) -> bool:
    """A CONCAT whose result llama.cpp makes for attention alone (models/deepseek4.cpp: csa_k_all, hca_k_all)."""
    name, values = load_i64(node + NAME), load_i64(node + NE)
    return (
        name in (_CSA_K_ALL, _HCA_K_ALL)
        and load_u8(node + NAME + 8) == _L
        and load_i32(node + PARAMS) == ROWS_DIMENSION
        and values <= MOST_VALUES
        and values % 32 == 0
        and load_i64(node + NE + 8) == 1
        and _is_cache(process, load_i64(node + SRC))
        and _is_cache(process, load_i64(node + SRC + 8))
    )


@nb.njit
def _same_view(a: int, b: int) -> bool:
    """Two views of the same bytes."""
    if load_i64(a + VIEW_SRC) != load_i64(b + VIEW_SRC) or load_i64(a + VIEW_OFFS) != load_i64(b + VIEW_OFFS):
        return False
    for i in range(4):
        if load_i64(a + NE + i * 8) != load_i64(b + NE + i * 8) or load_i64(a + NB + i * 8) != load_i64(b + NB + i * 8):
            return False
    return True


@nb.njit
def takes_attention(process: int, node: int) -> bool:
    """A FLASH_ATTN_EXT over rows that are keys and values, all heads alike: neither ALiBi nor soft cap, one sequence."""
    q, k, v = load_i64(node + SRC), load_i64(node + SRC + 8), load_i64(node + SRC + 16)
    mask, sinks = load_i64(node + SRC + 24), load_i64(node + SRC + 32)
    if q == 0 or k == 0 or v == 0 or mask == 0 or not _same_view(k, v):
        return False
    joined = load_i64(k + VIEW_SRC)
    if joined == 0:
        return False
    if load_i32(joined + OP) == _CONCAT:
        is_whole = load_i64(k + VIEW_OFFS) == 0 and load_i64(k + NE + 8) == load_i64(joined + NE + 16)
        if not is_whole or not takes_join(process, joined):
            return False
    elif not _is_cache(process, k):
        return False
    values = load_i64(q + NE)
    return (
        load_i32(q + TYPE) == _F32
        and load_i64(q + NB) == 4
        and values == load_i64(k + NE)
        and values <= MOST_VALUES
        and values % 32 == 0
        and load_i64(q + NE + 24) == 1
        and load_i64(k + NE + 16) == 1
        and load_i64(k + NE + 24) == 1
        and load_i32(mask + TYPE) == _F16
        and load_i64(mask + NE) == load_i64(k + NE + 8)
        and load_i64(mask + NE + 16) == 1
        and load_i64(mask + NE + 24) == 1
        and (sinks == 0 or load_i32(sinks + TYPE) == _F32)
        and load_i64(node + PARAMS + 4) == 0  # two F32: ALiBi's largest bias, soft cap
    )


@nb.njit
def takes_indexer(process: int, node: int) -> bool:
    """A LIGHTNING_INDEXER over a cache's keys, one sequence."""
    q, k, weights = load_i64(node + SRC), load_i64(node + SRC + 8), load_i64(node + SRC + 16)
    values = load_i64(q + NE)
    return (
        _is_cache(process, k)
        and load_i64(q + NE + 24) == 1
        and load_i64(q + NB) == 4
        and load_i64(weights + NB) == 4
        and values <= MOST_INDEX_VALUES
        and values % 32 == 0
        and load_i64(q + NE + 8) <= MOST_INDEX_HEADS
    )
