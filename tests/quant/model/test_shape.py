"""One description of a model, whichever file it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as QT

from localrun.quant.checkpoint.mapping import model_metadata
from localrun.quant.checkpoint.model_config import parse_config
from localrun.quant.checkpoint.official import FLASH, PRO
from localrun.quant.model.shape import CSA, HCA, clamp_limits, read_shape, shape_of
from localrun.quant.model.source import TensorInfo
from localrun.quant.open import open_model
from tests.gguf_models import TinyDeepseek4, write_deepseek4

PATH = Path("config.json")


@pytest.mark.parametrize("raw", [FLASH, PRO], ids=["flash", "pro"])
def test_a_config_and_the_metadata_of_its_conversion_describe_the_same_shape(raw: Mapping[str, Any]) -> None:
    config = parse_config(PATH, raw)
    stack = TensorInfo("blk.0.ffn_gate_exps.weight", (1, 1, 1), QT.MXFP4, 1)
    metadata = {key: value.value for key, value in model_metadata(config, PATH, [stack]).items()}
    found = read_shape(
        metadata,
        moe_layers=range(config.num_hidden_layers),
        n_experts=config.n_routed_experts,
        n_ff=config.moe_intermediate_size,
        n_vocab=0,
    )
    assert found == config.shape


def test_flash_is_what_its_config_says() -> None:
    shape = parse_config(PATH, FLASH).shape
    assert (shape.n_layers, shape.n_embd, shape.n_vocab, shape.n_ctx_train) == (43, 4096, 129280, 1 << 20)
    assert (shape.n_experts, shape.n_used, shape.n_shared, shape.n_ff) == (256, 6, 1, 2048)
    assert (len(shape.ratios), shape.n_layers_of(0), shape.n_layers_of(CSA), shape.n_layers_of(HCA)) == (43, 2, 21, 20)
    assert shape.kv_row == 2 * 512
    assert shape.expert_weights == 3 * 4096 * 2048
    assert shape.clamp_limits == dict.fromkeys(range(43), 10.0)


def test_a_gguf_has_the_shape_that_it_was_written_with(tmp_path: Path) -> None:
    tiny = TinyDeepseek4(ratios=(0, 4, 128, 4), n_experts=16, n_used=3)
    shape = shape_of(open_model(write_deepseek4(tmp_path / "model.gguf", tiny)[0]))
    assert (shape.architecture, shape.n_layers, shape.moe_layers) == ("deepseek4", 4, (0, 1, 2, 3))
    assert (shape.n_embd, shape.n_vocab, shape.n_heads, shape.n_kv_heads) == (tiny.n_embd, tiny.vocab, tiny.n_heads, 1)
    assert (shape.head_dim, shape.value_dim) == (tiny.head_dim, tiny.head_dim)
    assert (shape.n_experts, shape.n_used, shape.n_ff, shape.n_shared) == (16, 3, tiny.n_ff, 1)
    assert (shape.window, shape.ratios) == (128, tiny.ratios)
    assert (shape.index_heads, shape.index_dim, shape.index_top_k) == (tiny.index_heads, tiny.index_dim, tiny.top_k)
    assert (shape.n_hash_layers, shape.q_rank, shape.o_groups, shape.o_rank) == (1, tiny.q_rank, 2, tiny.o_rank)
    assert shape.n_streams == 4


def test_numbers_per_layer_stand_for_their_largest() -> None:
    metadata: dict[str, object] = {
        "general.architecture": "other",
        "other.block_count": 3,
        "other.attention.head_count": [0, 8, 4],
        "other.attention.head_count_kv": np.array([0, 2, 1]),
        "other.embedding_length": 256,
        "other.expert_used_count": "many",
    }
    shape = read_shape(metadata, moe_layers=[1], n_experts=4, n_ff=32, n_vocab=100)
    assert (shape.n_heads, shape.n_kv_heads, shape.head_dim, shape.value_dim) == (8, 2, 32, 32)
    assert (shape.n_vocab, shape.n_used, shape.ratios, shape.clamp_limits) == (100, 0, (), {})


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, {}), (7.0, {0: 7.0, 2: 7.0}), ([5.0, 6.0, 0.0], {0: 5.0}), (1e-6, {})],
    ids=["none", "one for all", "one each", "too small to clamp"],
)
def test_clamp_limits_are_those_of_the_layers_with_experts(value: Any, expected: dict[int, float]) -> None:
    assert clamp_limits(value, [0, 2]) == expected
