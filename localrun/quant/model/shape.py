"""A model's dimensions: the single description that readers produce and everything else uses.

It comes from a GGUF's metadata (`read_shape`, `shape_of`) or from an official config.json (`ModelConfig.shape`). Values are not
checked here: readers of untrusted files do that (`gguf/checks.py`, `gguf/deepseek4.py`, `checkpoint/model_config.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from localrun.quant.model.source import ModelSource

DEEPSEEK4: Final = "deepseek4"
"""llama.cpp's name of DeepSeek-V4's architecture."""

CSA: Final = 4
HCA: Final = 128
"""Compression ratios of deepseek4's two kinds of compressed layers."""

_LEAST_LIMIT = 1e-6
"""llama.cpp clamps where the key's value exceeds this (llama-graph.cpp, build_moe_ffn)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Dimensions of one model. Per-layer numbers are given once, as their maximum.

    Attributes:
        architecture: llama.cpp's name.
        n_layers: blocks.
        n_embd: hidden size.
        n_vocab: tokens of the vocabulary.
        n_ctx_train: context length that the model was trained for; 0: unknown.
        n_heads, n_kv_heads: of attention.
        head_dim, value_dim: of a key and of a value.
        moe_layers: blocks with routed experts.
        n_experts, n_used, n_shared: routed experts of a layer, how many of them a token uses, and shared ones.
        n_ff: width of an expert.
        clamp_limits: SwiGLU's limit by block, of blocks with routed experts that have one.
        window: tokens that attention sees uncompressed; 0: all.
        ratios: compression ratio per layer; empty for models without compressed layers. This and the following: deepseek4 only.
        index_heads, index_dim, index_top_k: of the indexer.
        n_hash_layers: number of initial blocks whose experts follow from the token id.
        q_rank, o_groups, o_rank: of the low-rank projections of queries and outputs.
        n_streams: residual streams (mHC).
    """

    architecture: str
    n_layers: int
    n_embd: int
    n_vocab: int
    n_ctx_train: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    value_dim: int
    moe_layers: tuple[int, ...]
    n_experts: int
    n_used: int
    n_ff: int
    n_shared: int = 0
    clamp_limits: Mapping[int, float] = field(default_factory=dict)
    window: int = 0
    ratios: tuple[int, ...] = ()
    index_heads: int = 0
    index_dim: int = 0
    index_top_k: int = 0
    n_hash_layers: int = 0
    q_rank: int = 0
    o_groups: int = 0
    o_rank: int = 0
    n_streams: int = 0

    @property
    def kv_row(self) -> int:
        """Values per token and layer of a plain KV cache: keys and values of all heads."""
        return self.n_kv_heads * (self.head_dim + self.value_dim)

    @property
    def expert_weights(self) -> int:
        """Weights of one expert."""
        return 3 * self.n_embd * self.n_ff

    def n_layers_of(self, ratio: int) -> int:
        """Layers of that compression ratio."""
        return self.ratios.count(ratio)


def shape_of(source: ModelSource) -> ModelShape:
    """The shape of a model that is open."""
    first = next(iter(source.moe_layers.values()), None)
    embedding = source.tensors.get("token_embd.weight")
    return read_shape(
        source.metadata,
        moe_layers=tuple(source.moe_layers),
        n_experts=first.n_experts if first else 0,
        n_ff=first.n_ff if first else 0,
        n_vocab=int(embedding.shape[1]) if embedding is not None else 0,
    )


def read_shape(
    metadata: Mapping[str, object], *, moe_layers: Sequence[int], n_experts: int, n_ff: int, n_vocab: int
) -> ModelShape:
    """The shape described by GGUF metadata.

    Args:
        metadata: keys and plain values.
        moe_layers, n_experts, n_ff: from the expert tensors, which are what is computed with.
        n_vocab: if the metadata lacks it.
    """
    architecture = str(metadata.get("general.architecture", "unknown"))

    def number(key: str, default: int = 0) -> int:
        value = metadata.get(f"{architecture}.{key}")
        items = value if isinstance(value, (list, tuple, np.ndarray)) else [value]
        return max((int(item) for item in items if isinstance(item, (int, np.integer))), default=default)

    heads = max(1, number("attention.head_count", 1))
    head_dim = number("attention.key_length") or number("embedding_length") // heads
    n_layers = number("block_count")
    is_v4 = architecture == DEEPSEEK4
    ratios: Any = metadata.get(f"{architecture}.attention.compress_ratios", ()) if is_v4 else ()
    return ModelShape(
        architecture=architecture,
        n_layers=n_layers,
        n_embd=number("embedding_length"),
        n_vocab=number("vocab_size") or n_vocab,
        n_ctx_train=number("context_length"),
        n_heads=heads,
        n_kv_heads=number("attention.head_count_kv", heads),
        head_dim=head_dim,
        value_dim=number("attention.value_length") or head_dim,
        moe_layers=tuple(moe_layers),
        n_experts=n_experts,
        n_used=number("expert_used_count"),
        n_ff=n_ff,
        n_shared=number("expert_shared_count"),
        clamp_limits=clamp_limits(metadata.get(f"{architecture}.swiglu_clamp_exp"), moe_layers),
        window=number("attention.sliding_window"),
        ratios=tuple(int(ratio) for ratio in ratios)[:n_layers],
        index_heads=number("attention.indexer.head_count"),
        index_dim=number("attention.indexer.key_length"),
        index_top_k=number("attention.indexer.top_k"),
        n_hash_layers=number("hash_layer_count"),
        q_rank=number("attention.q_lora_rank"),
        o_groups=number("attention.output_group_count"),
        o_rank=number("attention.output_lora_rank"),
        n_streams=number("hyper_connection.count"),
    )


def clamp_limits(value: Any, moe_layers: Iterable[int]) -> dict[int, float]:
    """SwiGLU's limit by block, for those that have one.

    Args:
        value: one for all blocks, one for each of them, or None.
        moe_layers: blocks with routed experts.
    """
    if value is None:
        return {}
    is_list = isinstance(value, (list, tuple, np.ndarray))
    limits = {layer: float(value[layer] if is_list else value) for layer in moe_layers}
    return {layer: limit for layer, limit in limits.items() if limit > _LEAST_LIMIT}
