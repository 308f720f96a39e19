"""config.json: official values, and what is refused with which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from localrun.errors import FormatError, UnsupportedModelError
from localrun.quant.checkpoint.model_config import ModelConfig, parse_config
from tools.synthetic_config import FLASH, PRO

PATH = Path("/models/x/config.json")


def parse(**changes: Any) -> ModelConfig:
    return parse_config(PATH, FLASH | changes)


def test_official_flash_and_pro_values_are_read() -> None:
    flash, pro = parse_config(PATH, FLASH), parse_config(PATH, PRO)
    assert (flash.hidden_size, flash.num_hidden_layers, flash.n_routed_experts) == (4096, 43, 256)
    assert (pro.hidden_size, pro.num_hidden_layers, pro.n_routed_experts) == (7168, 61, 384)
    assert flash.compress_ratios[:4] == (0, 0, 4, 128)
    assert pro.rope_scaling is not None
    assert pro.rope_scaling.original_context == 65536
    assert not flash.has_dspark


def test_expert_dtype_does_not_matter() -> None:
    without = {key: value for key, value in FLASH.items() if key != "expert_dtype"}
    assert parse_config(PATH, without) == parse_config(PATH, FLASH)


def test_dspark_keys_mark_a_later_release() -> None:
    config = parse(dspark_target_layer_ids=[40, 41, 42], dspark_markov_rank=256)
    assert config.has_dspark


def test_rope_type_is_accepted_for_type() -> None:
    scaling = {("rope_type" if key == "type" else key): value for key, value in FLASH["rope_scaling"].items()}
    assert parse(rope_scaling=scaling) == parse()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "4096"}, "hidden_size: expected an integer"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_size": 4096.0}, "hidden_size"),
        ({"hidden_size": 2**40}, "hidden_size"),
        ({"hidden_size": 4097}, "not a multiple of 32"),
        ({"moe_intermediate_size": 2040}, "moe_intermediate_size 2040 is not a multiple of 32"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"vocab_size": None}, "vocab_size: expected an integer from 1 to 16777216, found None"),
        ({"n_routed_experts": 2000}, "n_routed_experts"),
        ({"num_experts_per_tok": 257}, "num_experts_per_tok"),
        ({"qk_rope_head_dim": 63}, "odd"),
        ({"qk_rope_head_dim": 1024}, "qk_rope_head_dim"),
        ({"index_head_dim": 96}, "index_head_dim 96"),
        ({"o_groups": 7}, "multiple of o_groups"),
        ({"compress_ratios": [0, 4]}, "2 entries for 43 layers"),
        ({"compress_ratios": "0,4"}, "compress_ratios"),
        ({"compress_ratios": [0.5] * 44}, "compress_ratios"),
        ({"compress_ratios": [0] * 10_000}, "compress_ratios"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_scaling": [1]}, "rope_scaling: expected an object"),
        ({"rope_scaling": {"type": "yarn", "factor": "16"}}, "rope_scaling.factor"),
        ({"bos_token_id": 129280}, "bos_token_id"),
        ({"norm_topk_prob": 1}, "norm_topk_prob"),
        ({"num_hash_layers": 44}, "num_hash_layers"),
        ({"dspark_target_layer_ids": [99]}, "dspark_target_layer_ids"),
        ({"model_type": None}, "model_type is missing"),
    ],
)
def test_wrong_values_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        parse(**changes)
    assert str(PATH) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "deepseek_v41"}, "DeepSeek-V4.1"),
        ({"model_type": "deepseek_v3"}, "DeepSeek-V3,"),
        ({"model_type": "llama"}, "a model of type 'llama'"),
        ({"vision_config": {}}, "vision variant"),
        ({"vision_n_layers": 32}, "vision variant"),
        ({"hidden_act": "gelu"}, "silu"),
        ({"scoring_func": "sigmoid"}, "sqrtsoftplus"),
        ({"tie_word_embeddings": True}, "tied"),
        ({"attention_bias": True}, "bias"),
        ({"num_key_value_heads": 8}, "one key-value head"),
        ({"hc_mult": 2}, "4 residual streams"),
        ({"compress_ratios": [2] * 44}, "contains 2"),
        ({"quantization_config": FLASH["quantization_config"] | {"weight_block_size": [32, 32]}}, "128 x 128"),
        ({"quantization_config": FLASH["quantization_config"] | {"scale_fmt": "float"}}, "ue8m0"),
        ({"rope_scaling": FLASH["rope_scaling"] | {"type": "linear"}}, "yarn"),
    ],
)
def test_other_models_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        parse(**changes)


def test_config_rewritten_by_transformers_is_not_guessed_at() -> None:
    rewritten = {key: value for key, value in FLASH.items() if key != "rope_scaling"} | {
        "rope_parameters": {"main": {}}
    }
    with pytest.raises(FormatError, match="rope_parameters is a rewrite"):
        parse_config(PATH, rewritten)
