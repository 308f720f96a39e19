"""GGUFs that lie beside models are told from models, by keys and tensor names."""

from __future__ import annotations

from pathlib import Path

import pytest

from localrun.quant.gguf.relatives import MOE_ARCHITECTURES, relative_of
from localrun.quant.gguf.value import GgufValue


@pytest.mark.parametrize(
    ("keys", "tensors", "kind"),
    [
        ({"general.architecture": "clip"}, [], "image encoder"),
        ({"general.architecture": "llama", "general.type": "mmproj"}, [], "image encoder"),
        ({"general.type": "imatrix"}, [], "importance matrix"),
        ({}, ["blk.0.ffn_down.weight.in_sum2"], "importance matrix"),
        ({"general.architecture": "deepseek4", "general.type": "adapter"}, [], "adapter"),
        ({"general.architecture": "deepseek4"}, ["blk.0.attn_q.weight.lora_a"], "adapter"),
        ({"general.architecture": "deepseek4", "general.type": "vocab"}, [], "vocabulary"),
        ({"general.architecture": "deepseek4.1"}, [], "other"),
        ({"general.architecture": "deepseek_v41"}, [], "other"),
        ({"general.architecture": "qwen3-dflash"}, [], "drafter"),
        ({"general.architecture": "eagle3"}, [], "drafter"),
        ({"general.architecture": "deepseek4_mtp"}, [], "drafter"),
        ({"general.architecture": "deepseek4"}, ["markov_w1.weight"], "drafter"),
        ({"general.architecture": "bert"}, [], "other"),
    ],
)
def test_companions_are_recognised(keys: dict[str, str], tensors: list[str], kind: str) -> None:
    found = relative_of({key: GgufValue.string(text) for key, text in keys.items()}, tensors)
    assert found is not None
    assert found.kind == kind
    error = found.error(Path("x.gguf"))
    assert str(error) == f"x.gguf: {found.what}"
    assert error.hint == found.hint


@pytest.mark.parametrize("architecture", sorted(MOE_ARCHITECTURES))
def test_models_of_known_architectures_are_no_companions(architecture: str) -> None:
    assert relative_of({"general.architecture": GgufValue.string(architecture)}, ["token_embd.weight"]) is None


def test_a_file_that_names_no_architecture_may_be_a_model() -> None:
    assert relative_of({}, ["token_embd.weight"]) is None
    assert relative_of({"general.architecture": GgufValue.uint32(4)}, []) is None
