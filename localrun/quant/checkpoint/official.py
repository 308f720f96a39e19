"""The official config.json of DeepSeek-V4-Flash and V4-Pro, so planning needs no files.

A test compares the derived sizes with the published byte counts of the checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

FLASH: Final[Mapping[str, Any]] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],
    "compress_rope_theta": 160000,
    "eos_token_id": 1,
    "expert_dtype": "fp4",
    "hc_eps": 1e-06,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "head_dim": 512,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 512,
    "initializer_range": 0.02,
    "max_position_embeddings": 1048576,
    "model_type": "deepseek_v4",
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 64,
    "num_experts_per_tok": 6,
    "num_hash_layers": 3,
    "num_hidden_layers": 43,
    "num_key_value_heads": 1,
    "num_nextn_predict_layers": 1,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "q_lora_rank": 1024,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.5,
    "scoring_func": "sqrtsoftplus",
    "sliding_window": 128,
    "swiglu_limit": 10.0,
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.57.1",
    "use_cache": True,
    "vocab_size": 129280,
}

PRO: Final[Mapping[str, Any]] = {
    **FLASH,
    "compress_ratios": [128, 128, *[4, 128] * 29, 4, 0],
    "hidden_size": 7168,
    "index_topk": 1024,
    "moe_intermediate_size": 3072,
    "n_routed_experts": 384,
    "num_attention_heads": 128,
    "num_hidden_layers": 61,
    "o_groups": 16,
    "q_lora_rank": 1536,
    "routed_scaling_factor": 2.5,
}

BUILT_IN: Final[Mapping[str, Mapping[str, Any]]] = {"flash": FLASH, "pro": PRO}
"""By the name that `localrun plan` takes instead of a path."""

NAMES: Final[Mapping[str, str]] = {"flash": "DeepSeek-V4-Flash", "pro": "DeepSeek-V4-Pro"}

REPOSITORIES: Final[Mapping[str, str]] = {name: f"deepseek-ai/{title}" for name, title in NAMES.items()}
"""On Hugging Face."""

DOWNLOAD_BYTES: Final[Mapping[str, int]] = {"flash": 159_609_485_896, "pro": 864_704_792_696}
"""Of all tensors, the MTP layer's included. Published; they follow from the configs (tests/quant/checkpoint/test_schema.py)."""
