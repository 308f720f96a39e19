"""Estimates the memory that llama.cpp's graph of one batch takes besides weights and cache.

llama.cpp plans one buffer for all tensors; its size is the peak of the tensors alive at a time. For deepseek4 there are three
candidates for the peak, found by varying every dimension of small models and reading llama.cpp's log: mHC with its streams and
queries, the indexer's queries, and the experts' activations; with many compressed rows their masks, which grow with context
times batch, are added. Terms are in 4-byte values per token. docs/planner.md has a comparison: within 1 % up to 131072 tokens
of context, up to a fifth too high beyond that with several consecutive CSA layers.
"""

from __future__ import annotations

from localrun.alignment import ceil_div
from localrun.engine.planner.sizes import ModelSizes, padded
from localrun.quant.model.shape import CSA, HCA

_OTHER = 271
"""Values per token for ids, positions, norms and indices."""


def compute_bytes(sizes: ModelSizes, n_ctx: int, n_batch: int) -> int:
    """Of a context with room for the logits of one token."""
    at, n_ctx = sizes.shape, padded(n_ctx)
    tokens = min(n_batch, n_ctx)
    D, q, index = at.n_embd, at.n_heads * at.head_dim, at.index_heads * at.index_dim
    head = 4 * at.n_vocab
    if not at.ratios:
        # Streams, queries, keys and values, gate and up of the experts in use, an attention mask in F16.
        values = 6 * D + 2 * q + at.kv_row + 2 * at.n_used * max(at.n_ff, D)
        return 4 * tokens * values + 2 * tokens * n_ctx + head
    window = padded(min(n_ctx, at.window + tokens))
    csa_rows = padded(ceil_div(n_ctx, CSA)) if at.n_layers_of(CSA) else 0
    hca_rows = padded(ceil_div(n_ctx, HCA)) if at.n_layers_of(HCA) else 0
    masks = 2 * tokens * (window + hca_rows)
    # Four streams and their copies; queries that fit into a stream's place take no room of their own.
    mixing = 15 * D + (2 * q if q > 4 * D else 0)
    indexing = 7 * D + 2 * index + 16 * at.head_dim + (q if q >= index else 0)
    routing = 11 * D + at.n_used * max(D, 3 * at.n_ff)
    values = max(mixing, indexing, routing) + _OTHER
    # Two masks of the compressed rows in F16. Attention over so many of them that their tensors fit into no query's place: scores
    # and the choice made of them, twice where CSA layers follow each other, and window and rows side by side in F16.
    few_rows = 4 * tokens * csa_rows
    many_rows = (8 if at.n_layers_of(CSA) == 1 else 10) * tokens * csa_rows + 2 * csa_rows * at.head_dim
    return 4 * tokens * values + (many_rows if csa_rows > max(q, index) else few_rows) + masks + head


def exchange_bytes(sizes: ModelSizes, n_ctx: int, n_batch: int) -> int:
    """On a GPU with the dense model, additionally: the experts' activations, which are localrun's there, in a buffer of their own
    (`offload/device/shadow.py`): the input with gate, up and their product, or product and outputs."""
    at, tokens = sizes.shape, min(n_batch, padded(n_ctx))
    ids = at.n_experts  # a token's choices are the first of all of them in order
    return 4 * tokens * (at.n_embd + at.n_used * (at.n_ff + max(2 * at.n_ff, at.n_embd)) + ids)
