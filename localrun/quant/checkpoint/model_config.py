"""config.json of a DeepSeek-V4 checkpoint, read strictly.

Only the file's keys count, never a model's name. Valid values that llama.cpp's `deepseek4` graph does not support are rejected
here by name, because llama.cpp would abort the process on them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localrun.errors import FormatError, UnsupportedModelError
from localrun.quant.model.shape import DEEPSEEK4, ModelShape, clamp_limits

FP8_BLOCK = 128
"""FP8 matrices have one scale per 128 x 128 weights."""
FP4_BLOCK = 32
"""FP4 matrices have one scale per row and 32 consecutive inputs."""

MAX_LAYERS = 512
MAX_EXPERTS = 1024
"""llama.cpp's LLAMA_MAX_LAYERS and LLAMA_MAX_EXPERTS."""

N_STREAMS = 4
"""Residual streams (`hc_mult`) that llama.cpp's deepseek4 graph is written for."""

_MAX_DIM = 1 << 20
_MAX_INT = 1 << 31

OTHER_MODELS: Mapping[str, str] = {
    "deepseek_v41": "DeepSeek-V4.1",
    "deepseek_v4_vision": "DeepSeek-V4 with vision",
    "deepseek_v32": "DeepSeek-V3.2",
    "deepseek_v3": "DeepSeek-V3",
    "deepseek_v2": "DeepSeek-V2",
}
"""`model_type` values that users are likely to try, with their common names."""


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """YaRN parameters of the compressed layers."""

    factor: float
    original_context: int
    beta_fast: float
    beta_slow: float


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """config.json of a DeepSeek-V4 checkpoint, every value checked. Names are config.json's."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_lora_rank: int
    o_groups: int
    sliding_window: int
    compress_ratios: tuple[int, ...]
    compress_rope_theta: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    n_routed_experts: int
    num_experts_per_tok: int
    n_shared_experts: int
    moe_intermediate_size: int
    num_hash_layers: int
    norm_topk_prob: bool
    routed_scaling_factor: float
    swiglu_limit: float
    hc_mult: int
    hc_sinkhorn_iters: int
    hc_eps: float
    rms_norm_eps: float
    vocab_size: int
    max_position_embeddings: int
    bos_token_id: int
    eos_token_id: int
    pad_token_id: int | None
    num_nextn_predict_layers: int
    dspark_target_layer_ids: tuple[int, ...]
    dspark_markov_rank: int

    @property
    def has_dspark(self) -> bool:
        """Whether this is a later checkpoint with the DSpark drafter (its chat encoder differs too)."""
        return bool(self.dspark_target_layer_ids)

    @property
    def shape(self) -> ModelShape:
        """Of the trunk, which is what is converted and run."""
        layers = range(self.num_hidden_layers)
        return ModelShape(
            architecture=DEEPSEEK4,
            n_layers=self.num_hidden_layers,
            n_embd=self.hidden_size,
            n_vocab=self.vocab_size,
            n_ctx_train=self.max_position_embeddings,
            n_heads=self.num_attention_heads,
            n_kv_heads=1,
            head_dim=self.head_dim,
            value_dim=self.head_dim,
            moe_layers=tuple(layers),
            n_experts=self.n_routed_experts,
            n_used=self.num_experts_per_tok,
            n_ff=self.moe_intermediate_size,
            n_shared=self.n_shared_experts,
            clamp_limits=clamp_limits(self.swiglu_limit, layers),
            window=self.sliding_window,
            ratios=self.compress_ratios[: self.num_hidden_layers],
            index_heads=self.index_n_heads,
            index_dim=self.index_head_dim,
            index_top_k=self.index_topk,
            n_hash_layers=self.num_hash_layers,
            q_rank=self.q_lora_rank,
            o_groups=self.o_groups,
            o_rank=self.o_lora_rank,
            n_streams=self.hc_mult,
        )


class _Reader:
    """Typed access to one JSON object; every error names the file and the key."""

    def __init__(self, path: Path, values: Mapping[str, Any], prefix: str = "") -> None:
        self._path = path
        self._values = values
        self._prefix = prefix

    def fail(self, key: str, expected: str) -> FormatError:
        found = repr(self._values[key])[:60] if key in self._values else "nothing"
        return FormatError(f"{self._path}: {self._prefix}{key}: expected {expected}, found {found}")

    def has(self, key: str) -> bool:
        return self._values.get(key) is not None

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        value = self._values.get(key)
        if value is None and default is not None:
            return default
        if type(value) is not int or not low <= value <= high:
            raise self.fail(key, f"an integer from {low} to {high}")
        return value

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        value: Any = self._values.get(key)
        if value is None and default is not None:
            return default
        if type(value) not in (int, float) or not low <= value <= high or not math.isfinite(value):
            raise self.fail(key, f"a number from {low:g} to {high:g}")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self._values.get(key)
        if value is None:
            return default
        if type(value) is not bool:
            raise self.fail(key, "true or false")
        return value

    def integers(self, key: str, low: int, high: int, max_count: int) -> tuple[int, ...]:
        value = self._values.get(key)
        if not isinstance(value, list) or len(value) > max_count:
            raise self.fail(key, f"a list of at most {max_count} integers")
        if not all(type(item) is int and low <= item <= high for item in value):
            raise self.fail(key, f"integers from {low} to {high}")
        return tuple(value)

    def token(self, key: str, vocab_size: int, default: int | None) -> int | None:
        value = self._values.get(key)
        if isinstance(value, list) and value:
            value = value[0]
        if value is None:
            return default
        if type(value) is not int or not 0 <= value < vocab_size:
            raise self.fail(key, f"a token id below vocab_size {vocab_size}")
        return value

    def part(self, key: str) -> _Reader:
        value = self._values.get(key)
        if not isinstance(value, dict):
            raise self.fail(key, "an object")
        return _Reader(self._path, value, f"{self._prefix}{key}.")

    def expect(self, key: str, allowed: tuple[object, ...], why: str) -> None:
        """Refuses a value that is sound but that llama.cpp's graph does not compute."""
        if key in self._values and not any(
            self._values[key] == value and type(self._values[key]) is type(value) for value in allowed
        ):
            found = repr(self._values[key])[:60]
            raise UnsupportedModelError(f"{self._path}: {self._prefix}{key} is {found}: {why}")


def check_model_type(path: Path, raw: Mapping[str, Any]) -> None:
    """Rejects models that are not DeepSeek-V4 language models, by their common names.

    Raises:
        FormatError: config.json does not identify the model.
        UnsupportedModelError: another model.
    """
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise FormatError(f"{path}: model_type is missing", hint="this is not a model's config.json")
    if model_type != "deepseek_v4":
        name = OTHER_MODELS.get(model_type, f"a model of type '{model_type[:40]}'")
        hint = "localrun converts DeepSeek-V4-Flash and V4-Pro; other models run from a llama.cpp GGUF"
        raise UnsupportedModelError(f"{path}: this is {name}, not DeepSeek-V4", hint=hint)
    vision = next((key for key in raw if key == "vision_config" or key.startswith("vision_")), None)
    if vision is not None:
        raise UnsupportedModelError(
            f"{path}: this is a vision variant of DeepSeek-V4 (key {vision}), which localrun does not run",
            hint="use the text checkpoint of the same release",
        )


def parse_config(path: Path, raw: Mapping[str, Any]) -> ModelConfig:
    """Checks config.json.

    Args:
        path: for messages.
        raw: the parsed file. Keys that don't matter to inference are ignored.

    Raises:
        FormatError: a value is missing, of the wrong type, or out of bounds.
        UnsupportedModelError: another model, or a setting that llama.cpp does not compute.
    """
    check_model_type(path, raw)
    read = _Reader(path, raw)
    read.expect("hidden_act", ("silu",), "only silu is supported")
    read.expect("scoring_func", ("sqrtsoftplus",), "only sqrtsoftplus routing is supported")
    read.expect("topk_method", ("noaux_tc",), "only noaux_tc routing is supported")
    read.expect("tie_word_embeddings", (False, None), "tied embeddings are not supported")
    read.expect("attention_bias", (False, None), "attention biases are not supported")
    read.expect("num_key_value_heads", (1, None), "V4 attention has one key-value head")
    read.expect("hc_mult", (N_STREAMS,), f"llama.cpp runs {N_STREAMS} residual streams only")
    _check_quantization(read)
    vocab_size = read.integer("vocab_size", 1, 1 << 24)
    n_layers = read.integer("num_hidden_layers", 1, MAX_LAYERS)
    n_experts = read.integer("n_routed_experts", 1, MAX_EXPERTS)
    head_dim = read.integer("head_dim", 2, _MAX_DIM)
    config = ModelConfig(
        hidden_size=read.integer("hidden_size", 1, _MAX_DIM),
        num_hidden_layers=n_layers,
        num_attention_heads=read.integer("num_attention_heads", 1, 1 << 16),
        head_dim=head_dim,
        qk_rope_head_dim=read.integer("qk_rope_head_dim", 2, head_dim),
        q_lora_rank=read.integer("q_lora_rank", 1, _MAX_DIM),
        o_lora_rank=read.integer("o_lora_rank", 1, _MAX_DIM),
        o_groups=read.integer("o_groups", 1, 1 << 16),
        sliding_window=read.integer("sliding_window", 1, 1 << 24),
        compress_ratios=read.integers("compress_ratios", 0, _MAX_INT, MAX_LAYERS),
        compress_rope_theta=read.number("compress_rope_theta", 1, 1e12),
        rope_theta=read.number("rope_theta", 1, 1e12),
        rope_scaling=_rope_scaling(read),
        index_n_heads=read.integer("index_n_heads", 1, 1 << 16),
        index_head_dim=read.integer("index_head_dim", 64, _MAX_DIM),
        index_topk=read.integer("index_topk", 1, 1 << 24),
        n_routed_experts=n_experts,
        num_experts_per_tok=read.integer("num_experts_per_tok", 1, n_experts),
        n_shared_experts=read.integer("n_shared_experts", 1, 64),
        moe_intermediate_size=read.integer("moe_intermediate_size", 1, _MAX_DIM),
        num_hash_layers=read.integer("num_hash_layers", 0, n_layers),
        norm_topk_prob=read.boolean("norm_topk_prob", True),
        routed_scaling_factor=read.number("routed_scaling_factor", 1e-6, 1e6),
        swiglu_limit=read.number("swiglu_limit", 0, 1e6),
        hc_mult=read.integer("hc_mult", 1, 64),
        hc_sinkhorn_iters=read.integer("hc_sinkhorn_iters", 1, 1000),
        hc_eps=read.number("hc_eps", 0, 1),
        rms_norm_eps=read.number("rms_norm_eps", 0, 1),
        vocab_size=vocab_size,
        max_position_embeddings=read.integer("max_position_embeddings", 1, _MAX_INT - 1),
        bos_token_id=read.token("bos_token_id", vocab_size, 0) or 0,
        eos_token_id=read.token("eos_token_id", vocab_size, min(1, vocab_size - 1)) or 0,
        pad_token_id=read.token("pad_token_id", vocab_size, None),
        num_nextn_predict_layers=read.integer("num_nextn_predict_layers", 0, 16, default=0),
        dspark_target_layer_ids=read.integers("dspark_target_layer_ids", 0, n_layers - 1, 16)
        if read.has("dspark_target_layer_ids")
        else (),
        dspark_markov_rank=read.integer("dspark_markov_rank", 0, _MAX_DIM, default=0),
    )
    _check_consistency(path, config)
    return config


def _check_quantization(read: _Reader) -> None:
    if not read.has("quantization_config"):
        return
    quant = read.part("quantization_config")
    quant.expect("quant_method", ("fp8",), "only the official FP8 layout is supported")
    quant.expect("fmt", ("e4m3",), "only E4M3 weights are supported")
    quant.expect("scale_fmt", ("ue8m0",), "only power-of-two (ue8m0) scales are supported")
    quant.expect("weight_block_size", ([FP8_BLOCK, FP8_BLOCK],), "only 128 x 128 blocks are supported")


def _rope_scaling(read: _Reader) -> RopeScaling | None:
    if not read.has("rope_scaling"):
        if read.has("rope_parameters"):
            raise read.fail(
                "rope_scaling", "the official key (rope_parameters is a rewrite by transformers that loses YaRN values)"
            )
        return None
    part = read.part("rope_scaling")
    kind = "type" if part.has("type") else "rope_type"
    part.expect(kind, ("yarn",), "only yarn scaling is supported")
    return RopeScaling(
        factor=part.number("factor", 1, 1e6),
        original_context=part.integer("original_max_position_embeddings", 1, _MAX_INT - 1),
        beta_fast=part.number("beta_fast", 0, 1e6, default=32.0),
        beta_slow=part.number("beta_slow", 0, 1e6, default=1.0),
    )


def _check_consistency(path: Path, config: ModelConfig) -> None:
    def require(holds: bool, message: str) -> None:
        if not holds:
            raise FormatError(f"{path}: {message}")

    n_layers, ratios = config.num_hidden_layers, config.compress_ratios
    require(len(ratios) >= n_layers, f"compress_ratios has {len(ratios)} entries for {n_layers} layers")
    other = next((ratio for ratio in ratios if ratio not in (0, 4, 128)), None)
    if other is not None:
        raise UnsupportedModelError(f"{path}: compress_ratios contains {other}; llama.cpp runs 0, 4 and 128 only")
    require(
        config.num_attention_heads % config.o_groups == 0,
        f"num_attention_heads {config.num_attention_heads} is not a multiple of o_groups {config.o_groups}",
    )
    require(config.qk_rope_head_dim % 2 == 0, f"qk_rope_head_dim {config.qk_rope_head_dim} is odd")
    require(
        config.qk_rope_head_dim <= config.index_head_dim and config.index_head_dim % 64 == 0,
        f"index_head_dim {config.index_head_dim} is not a multiple of 64 that holds qk_rope_head_dim",
    )
    for key in ("hidden_size", "moe_intermediate_size"):
        # Routed experts are quantised in blocks of 32 along both.
        value = getattr(config, key)
        require(value % FP4_BLOCK == 0, f"{key} {value} is not a multiple of {FP4_BLOCK}")
