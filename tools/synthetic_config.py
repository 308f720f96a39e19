"""Dimensions of synthetic checkpoints: the official config.json of Flash and Pro, and small relatives of the same make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from localrun.quant.checkpoint import official

Config = dict[str, Any]

FLASH: Config = dict(official.FLASH)
PRO: Config = dict(official.PRO)

MINI: Config = FLASH | {
    "compress_ratios": [0, 4, 128, 4, 0],
    "head_dim": 512,
    "hidden_size": 1024,
    "index_n_heads": 16,
    "index_topk": 64,
    "moe_intermediate_size": 256,
    "num_attention_heads": 16,
    "num_hash_layers": 1,
    "num_hidden_layers": 4,
    "o_groups": 4,
    "o_lora_rank": 256,
    "q_lora_rank": 512,
    "vocab_size": 4096,
}
"""Flash's number of experts with small ones: for cache and routing experiments (0.47 GB)."""

TINY: Config = MINI | {
    "compress_ratios": [0, 4, 128, 4, 128, 0],
    "head_dim": 128,
    "hidden_size": 256,
    "index_topk": 8,
    "moe_intermediate_size": 128,
    "n_routed_experts": 16,
    "num_attention_heads": 4,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 5,
    "o_groups": 2,
    "o_lora_rank": 128,
    "q_lora_rank": 128,
    "vocab_size": 256,
}

PRESETS: Mapping[str, Config] = {"tiny": TINY, "mini": MINI, "flash": FLASH, "pro": PRO}


@dataclass(frozen=True)
class CheckpointSpec:
    """What to write.

    Attributes:
        config: config.json as it will be written.
        seed: everything random follows from it.
        fp8_experts: routed experts as FP8 like the Base checkpoints, else FP4.
        mtp: also the next-token-prediction block `mtp.0`.
        router_skew: factor on the calibrated popularity of experts; 0: all alike.
    """

    config: Config
    seed: int = 0
    fp8_experts: bool = False
    mtp: bool = False
    router_skew: float = 1.0

    @property
    def ratios(self) -> Sequence[int]:
        """Compression ratio of each trunk layer."""
        return list(self.config["compress_ratios"][: self.config["num_hidden_layers"]])


def scaled_config(
    preset: str,
    *,
    layers: int | None = None,
    vocab: int | None = None,
    hash_layers: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    expert_dtype: bool = True,
    mtp: bool = False,
) -> Config:
    """A preset's config with another depth or vocabulary.

    A shortened model starts at the preset's second layer, so that three Flash layers are one of each kind (ratios 0, 4,
    128), and keeps one hash-routed layer instead of three. One layer alone is of ratio 4: llama.cpp needs one of those.

    Raises:
        ValueError: a size that the format can't hold.
    """
    config = dict(PRESETS[preset])
    full_depth = config["num_hidden_layers"]
    depth = full_depth if layers is None else layers
    if depth < 1:
        raise ValueError(f"{depth} layers")
    if depth != full_depth:
        own = config["compress_ratios"][:full_depth]
        ratios = own[1:] + own[-2:] * depth if full_depth % 2 else own[1:] + own[2:] * depth
        config["compress_ratios"] = ([4] if depth == 1 else ratios[:depth]) + [0]
        config["num_hidden_layers"] = depth
        config["num_hash_layers"] = min(config["num_hash_layers"], 1 if 1 < depth < full_depth else 3, depth - 1)
    if vocab is not None:
        config["vocab_size"] = vocab
    if hash_layers is not None:
        config["num_hash_layers"] = hash_layers
    config.update(overrides or {})
    if not expert_dtype:
        config.pop("expert_dtype", None)
    if not mtp:
        config["num_nextn_predict_layers"] = 0
    _check(config)
    return config


def _check(config: Config) -> None:
    blocks = {
        "hidden_size": 128,
        "q_lora_rank": 128,
        "moe_intermediate_size": 128,
        "o_lora_rank": 1,
        "head_dim": 64,
        "index_head_dim": 64,
    }
    for key, block in blocks.items():
        if config[key] <= 0 or config[key] % block:
            raise ValueError(f"{key} {config[key]} is not a positive multiple of {block}")
    if not 0 < config["num_experts_per_tok"] <= config["n_routed_experts"]:
        raise ValueError(f"{config['num_experts_per_tok']} of {config['n_routed_experts']} experts per token")
    if config["num_attention_heads"] % config["o_groups"]:
        raise ValueError(f"{config['num_attention_heads']} heads in {config['o_groups']} groups")
    if len(config["compress_ratios"]) < config["num_hidden_layers"]:
        raise ValueError(f"{len(config['compress_ratios'])} ratios for {config['num_hidden_layers']} layers")
    needed = {4, 128} if config["head_dim"] == config["index_head_dim"] else {4}
    if absent := needed - set(config["compress_ratios"][: config["num_hidden_layers"]]):
        raise ValueError(f"no layer of ratio {min(absent)}, which llama.cpp can't run")
    if config["vocab_size"] < 2:
        raise ValueError(f"vocabulary of {config['vocab_size']}")
