"""DeepSeek-V4's attention over F16 or Q8_0 rows that serve as keys and as values, and the scores of its indexer.

ggml computes both head by head: attention converts each row once per head, and the indexer each key once per token and thread. All
64 heads share their rows here, so a row is made F32 once for 16 heads, and rows that the mask excludes cost a comparison. Rows may
lie in two places (the window and the compressed ones): ggml's graph joins them by copying the whole cache in every layer; here
they are read where they are.

A task is one token and 16 heads, or one token and 1024 keys; nothing is added up across tasks, so results do not depend on the
number of threads. Products are exact to F32 (ggml sums an F16 cache's values in F16, and rounds queries to 8 bits for Q8_0 keys).
"""

from __future__ import annotations

from typing import Final

import numba as nb
import numpy as np

from localrun.ggml.structures import TYPE_F16, TYPE_Q8_0
from localrun.kernel_cache import cached_cfunc
from localrun.offload.kernels.cpu import Level, level
from localrun.offload.kernels.lowlevel import (
    blocks_of,
    call_i64,
    float_of_bits,
    load_f32,
    load_i64,
    load_u16,
    stack,
    store_f32,
)
from localrun.offload.kernels.records import Layout, get
from localrun.offload.kernels.threads import run_tasks
from localrun.offload.kernels.vectors import (
    HEADS,
    INDEX_KEYS,
    add_rows,
    half_at,
    index_keys,
    scale16,
    score_pair,
    softmax_step,
    widen_blocks,
    widen_halves,
)

MOST_VALUES: Final = 512
"""Values of a row at most: what a task has on its stack."""
MOST_INDEX_VALUES: Final = 256
"""Values of an indexer's key at most, likewise."""
MOST_INDEX_HEADS: Final = 64
"""Heads of the indexer at most, likewise."""
ROW_TYPES: Final = (TYPE_F16, TYPE_Q8_0)
"""ggml's types of rows and keys."""

_CHUNK: Final = 64
"""Rows between two corrections of the softmax: 136 KiB as F32, which stay in a core's L2 for the second pass."""
_KEYS: Final = 1024
"""Keys of one task of the indexer."""
_HEADS_BYTES: Final = MOST_VALUES * HEADS * 4
_ROW_BYTES: Final = MOST_VALUES * 4 + 128
"""From row to row of a chunk: not a power of two, else all rows' beginnings compete for the same places in L1."""
_ROWS_BYTES: Final = _CHUNK * _ROW_BYTES
_LIST_BYTES: Final = _CHUNK * 8
_SCORES_BYTES: Final = _CHUNK * HEADS * 4
_STATE_BYTES: Final = 3 * HEADS * 4
_INDEX_BYTES: Final = MOST_INDEX_HEADS * MOST_INDEX_VALUES * 4
_KEY_BYTES: Final = MOST_INDEX_VALUES * 4
_KEYS_BYTES: Final = INDEX_KEYS * _KEY_BYTES
_INDEX_SCORES_BYTES: Final = INDEX_KEYS * 4
_EXCLUDED: Final = 0xFC00
"""Minus infinity as F16: a row that the token does not see."""
_FOUR_EXCLUDED: Final = -0x03FF03FF03FF0400
"""Four of them as an int64."""


class _Attention(Layout):
    """One call of `attend`; the caller fills in all of it."""

    n_tokens: int
    """Tokens of the batch."""
    n_heads: int
    """Heads."""
    n_values: int
    """Values of a row: a multiple of 32, at most `MOST_VALUES`."""
    q: int
    """Address of F32 queries."""
    q_token: int
    """Bytes from token to token."""
    q_head: int
    """Bytes from head to head."""
    row_type: int
    """ggml's type of all rows, one of `ROW_TYPES`."""
    rows: int
    """Address of the first rows."""
    row_stride: int
    """Bytes from row to row."""
    n_first: int
    """How many there are; row i >= n_first of the mask is row i - n_first of the others."""
    others: int
    """Address of the other rows; 0 if there are none."""
    other_stride: int
    """Bytes from row to row."""
    n_rows: int
    """Rows in both places."""
    mask: int
    """Address of (n_tokens, n_rows) F16, added to the scores."""
    mask_token: int
    """Bytes from token to token."""
    sinks: int
    """Address of (n_heads,) F32, scores of a row without a value; 0: none."""
    scale_bits: int
    """By what products are multiplied, bits of an F32."""
    out: int
    """Address of (n_tokens, n_heads, n_values) F32."""


ATTENTION = _Attention()


class _Indexer(Layout):
    """One call of `index`; the caller fills in all of it."""

    n_tokens: int
    """Tokens of the batch."""
    n_heads: int
    """Heads, at most `MOST_INDEX_HEADS`."""
    n_values: int
    """Values of a key: a multiple of 32, at most `MOST_INDEX_VALUES`."""
    q: int
    """Address of F32 queries."""
    q_token: int
    """Bytes from token to token."""
    q_head: int
    """Bytes from head to head."""
    weights: int
    """Address of (n_tokens, n_heads) F32."""
    weight_token: int
    """Bytes from token to token."""
    key_type: int
    """ggml's type of keys, one of `ROW_TYPES`."""
    keys: int
    """Address of keys."""
    key_stride: int
    """Bytes from key to key."""
    n_keys: int
    """Keys."""
    mask: int
    """Address of (n_tokens, n_keys) F16, added to the scores."""
    mask_token: int
    """Bytes from token to token."""
    out: int
    """Address of (n_tokens, n_keys) F32."""
    out_token: int
    """Bytes from token to token."""


INDEXER = _Indexer()


@nb.njit
def _widen(kind: int, source: int, n_values: int, target: int) -> None:
    """A row or key of type `kind` as F32."""
    if kind == TYPE_Q8_0:
        widen_blocks(source, n_values // 32, target)
    else:
        widen_halves(source, n_values // 32, target)


@nb.njit
def _add_chunk(n: int, n_values: int, q: int, rows: int, masks: int, scores: int, state: int, totals: int) -> None:
    """The next n rows (at most `_CHUNK`, F32) of one token and 16 heads."""
    for i in range(0, n, 2):  # the second half of the last pair may be anything: computed, not used
        first = rows + i * _ROW_BYTES
        score_pair(q, n_values // 16, first, first + _ROW_BYTES, scores + i * HEADS * 4)
    softmax_step(scores, masks, n, state)
    add_rows(rows, _ROW_BYTES, n, scores, state + 128, n_values // 32, totals)


@cached_cfunc("int64(intp, intp)")
def _attend_task(call: int, ticket: int) -> int:
    """One token and up to 16 heads."""
    q, totals = stack(_HEADS_BYTES), stack(_HEADS_BYTES)
    rows, masks, scores, state = stack(_ROWS_BYTES), stack(_LIST_BYTES), stack(_SCORES_BYTES), stack(_STATE_BYTES)
    kind, n_values, n_rows = get(call, ATTENTION.row_type), get(call, ATTENTION.n_values), get(call, ATTENTION.n_rows)
    groups = blocks_of(get(call, ATTENTION.n_heads), HEADS)
    token, head = ticket // groups, ticket % groups * HEADS
    n_heads = min(HEADS, get(call, ATTENTION.n_heads) - head)
    scale = float_of_bits(np.int32(get(call, ATTENTION.scale_bits)))
    source = get(call, ATTENTION.q) + token * get(call, ATTENTION.q_token) + head * get(call, ATTENTION.q_head)
    sinks = get(call, ATTENTION.sinks)
    for h in range(HEADS):
        used = min(h, n_heads - 1)  # heads that do not exist repeat the last one
        for i in range(n_values // 16):
            scale16(source + used * get(call, ATTENTION.q_head) + i * 64, scale, q + (i * HEADS + h) * 64)
            scale16(q + (i * HEADS + h) * 64, np.float32(0), totals + (i * HEADS + h) * 64)
        store_f32(state + h * 4, load_f32(sinks + (head + used) * 4) if sinks != 0 else np.float32(-np.inf))
        store_f32(state + 64 + h * 4, np.float32(1) if sinks != 0 else np.float32(0))
    mask, first, stride = (
        get(call, ATTENTION.mask) + token * get(call, ATTENTION.mask_token),
        get(call, ATTENTION.rows),
        get(call, ATTENTION.row_stride),
    )
    n_first, others, other_stride = (
        get(call, ATTENTION.n_first),
        get(call, ATTENTION.others),
        get(call, ATTENTION.other_stride),
    )
    i, n = 0, 0
    while i < n_rows:
        if i + 4 <= n_rows and load_i64(mask + i * 2) == _FOUR_EXCLUDED:
            i += 4
            continue
        if load_u16(mask + i * 2) != _EXCLUDED:
            address = first + i * stride if i < n_first else others + (i - n_first) * other_stride
            _widen(kind, address, n_values, rows + n * _ROW_BYTES)
            store_f32(masks + n * 4, half_at(mask + i * 2))
            n += 1
            if n == _CHUNK:
                _add_chunk(n, n_values, q, rows, masks, scores, state, totals)
                n = 0
        i += 1
    if n > 0:
        _add_chunk(n, n_values, q, rows, masks, scores, state, totals)
    target = get(call, ATTENTION.out) + (token * get(call, ATTENTION.n_heads) + head) * n_values * 4
    for h in range(n_heads):
        total = load_f32(state + 64 + h * 4)
        factor = np.float32(1) / total if total != 0 else np.float32(0)
        for i in range(n_values // 16):
            scale16(totals + (i // 2 * HEADS + h) * 128 + i % 2 * 64, factor, target + (h * n_values + i * 16) * 4)
    return 0


@cached_cfunc("int64(intp, intp)")
def _index_task(call: int, ticket: int) -> int:
    """One token and up to `_KEYS` keys."""
    queries, weights = stack(_INDEX_BYTES), stack(_LIST_BYTES)
    n_values, n_heads, n_keys = get(call, INDEXER.n_values), get(call, INDEXER.n_heads), get(call, INDEXER.n_keys)
    blocks = blocks_of(n_keys, _KEYS)
    token, begin = ticket // blocks, ticket % blocks * _KEYS
    end = min(n_keys, begin + _KEYS)
    mask = get(call, INDEXER.mask) + token * get(call, INDEXER.mask_token)
    out = get(call, INDEXER.out) + token * get(call, INDEXER.out_token)
    keys, stride = get(call, INDEXER.keys), get(call, INDEXER.key_stride)
    q = get(call, INDEXER.q) + token * get(call, INDEXER.q_token)
    given = get(call, INDEXER.weights) + token * get(call, INDEXER.weight_token)
    n_blocks = blocks_of(n_heads, HEADS)
    for h in range(n_blocks * HEADS):
        store_f32(weights + h * 4, load_f32(given + h * 4) if h < n_heads else np.float32(0))
        source, target = q + min(h, n_heads - 1) * get(call, INDEXER.q_head), queries + h % HEADS * 4
        target += h // HEADS * n_values * HEADS * 4
        for i in range(n_values):
            store_f32(target + i * HEADS * 4, load_f32(source + i * 4))
    floats, scores, kind = stack(_KEYS_BYTES), stack(_INDEX_SCORES_BYTES), get(call, INDEXER.key_type)
    for i in range(begin, end, INDEX_KEYS):
        n, seen = min(INDEX_KEYS, end - i), False
        for k in range(n):
            seen = seen or load_u16(mask + (i + k) * 2) != _EXCLUDED
        if seen:
            for k in range(n):  # what was there before stands in for keys beyond the end: computed, not used
                _widen(kind, keys + (i + k) * stride, n_values, floats + k * _KEY_BYTES)
            index_keys(queries, n_values, n_blocks, weights, floats, _KEY_BYTES, scores)
        for k in range(n):
            score = load_f32(scores + k * 4) if seen else np.float32(0)
            store_f32(out + (i + k) * 4, score + half_at(mask + (i + k) * 2))
    return 0


@nb.njit
def _run(task: int, call: int, n_tasks: int, pool: int, n_threads: int) -> None:
    if pool != 0:
        run_tasks(pool, task, call, n_tasks, n_threads)
    else:
        for ticket in range(n_tasks):
            call_i64(task, call, ticket)


@nb.njit
def attend(task: int, call: int, pool: int, n_threads: int) -> None:
    """Computes an ATTENTION record; `task` is `attend_address()`."""
    groups = blocks_of(get(call, ATTENTION.n_heads), HEADS)
    _run(task, call, get(call, ATTENTION.n_tokens) * groups, pool, n_threads)


@nb.njit
def index(task: int, call: int, pool: int, n_threads: int) -> None:
    """Computes an INDEXER record; `task` is `index_address()`."""
    _run(task, call, get(call, INDEXER.n_tokens) * blocks_of(get(call, INDEXER.n_keys), _KEYS), pool, n_threads)


def attend_address() -> int:
    """Address of `attend`'s task; compiles it on first use."""
    return int(_attend_task.address)


def index_address() -> int:
    """Address of `index`'s task; compiles it on first use."""
    return int(_index_task.address)


def is_supported() -> bool:
    """The processor converts F16 (F16C comes with AVX2); without, ggml's own operations are as good."""
    return level() != Level.GENERIC
