"""Metadata that would make llama.cpp abort is refused by key; stacks of experts become layers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as QT
from gguf import GGUFValueType as T

from localrun.errors import FormatError, UnsupportedModelError
from localrun.quant.gguf.checks import KeyReader, check_common, check_dense_types, drop_next_token_layers, moe_layers
from localrun.quant.gguf.value import GgufValue
from localrun.quant.model.source import MoeLayer, TensorInfo

PATH = Path("m.gguf")
KEYS: Mapping[str, GgufValue] = {
    "general.architecture": GgufValue.string("a"),
    "a.block_count": GgufValue.uint32(2),
    "a.embedding_length": GgufValue.uint32(64),
    "a.context_length": GgufValue.uint32(128),
    "a.attention.head_count": GgufValue.array(T.INT32, [0, 4]),
    "a.expert_count": GgufValue.uint32(8),
    "a.expert_used_count": GgufValue.uint32(2),
    "tokenizer.ggml.model": GgufValue.string("gpt2"),
    "tokenizer.ggml.tokens": GgufValue.strings(["x", "", "y"]),
}


def stack(name: str, *shape: int, kind: QT = QT.F16) -> TensorInfo:
    n_bytes = 2
    for extent in shape:
        n_bytes *= extent
    return TensorInfo(name, shape, kind, n_bytes)


def by_name(*infos: TensorInfo) -> dict[str, TensorInfo]:
    return {info.name: info for info in infos}


def experts(layer: int) -> list[TensorInfo]:
    shapes = {"gate": (64, 32, 8), "up": (64, 32, 8), "down": (32, 64, 8)}
    return [stack(f"blk.{layer}.ffn_{name}_exps.weight", *shape) for name, shape in shapes.items()]


def test_what_all_architectures_say() -> None:
    common = check_common(PATH, KEYS, by_name(stack("token_embd.weight", 64, 3)))
    assert (common.arch, common.n_layers, common.n_vocab) == ("a", 2, 3)
    without = {**KEYS, "tokenizer.ggml.model": GgufValue.string("none"), "a.vocab_size": GgufValue.uint32(7)}
    assert check_common(PATH, without, {}).n_vocab == 7


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("a.block_count", None, "no key 'a.block_count'"),
        ("a.block_count", GgufValue.uint32(0), "a.block_count: 0 is not between 1 and 512"),
        ("a.block_count", GgufValue.scalar(T.UINT64, 2), "a.block_count: expected UINT32, got UINT64"),
        ("a.attention.head_count", GgufValue.array(T.INT32, [4]), "a.attention.head_count: 1 values for 2 layers"),
        ("a.attention.head_count", GgufValue.uint32(0), "a.attention.head_count: 0 heads"),
        ("a.attention.head_count", GgufValue.float32(4), "a.attention.head_count: expected UINT32, got FLOAT32"),
        ("a.expert_used_count", GgufValue.uint32(9), "a.expert_used_count: 9 of 8 experts"),
        ("a.expert_group_count", GgufValue.uint32(3), "a.expert_group_count: 3 groups of 8 experts"),
        ("a.rope.scaling.type", GgufValue.string("magic"), "a.rope.scaling.type: unknown scaling 'magic'"),
        ("tokenizer.ggml.tokens", GgufValue.strings(["", "[EMPTY_0]"]), "tokenizer.ggml.tokens: 1 tokens occur twice"),
        ("tokenizer.ggml.tokens", GgufValue.strings([]), "tokenizer.ggml.tokens: expected a list of strings"),
        ("tokenizer.ggml.scores", GgufValue.array(T.FLOAT32, [1]), "tokenizer.ggml.scores: expected 3 FLOAT32 values"),
    ],
)
def test_wrong_keys_are_named(key: str, value: GgufValue | None, message: str) -> None:
    keys = {name: known for name, known in {**KEYS, key: value}.items() if known is not None}
    with pytest.raises(FormatError) as caught:
        check_common(PATH, keys, {})
    assert str(caught.value) == f"m.gguf: {message}"


def test_a_vocabulary_must_fit_its_embedding() -> None:
    with pytest.raises(FormatError, match=r"token_embd\.weight: shape \(64, 4\) for a vocabulary of 3"):
        check_common(PATH, KEYS, by_name(stack("token_embd.weight", 64, 4)))


@pytest.mark.parametrize("count", [None, GgufValue.uint32(0)])
def test_a_model_without_experts_is_not_for_us(count: GgufValue | None) -> None:
    keys = {name: known for name, known in {**KEYS, "a.expert_count": count}.items() if known is not None}
    with pytest.raises(UnsupportedModelError, match="architecture 'a' without routed experts"):
        check_common(PATH, keys, {})


def test_numbers_that_all_layers_share() -> None:
    keys = KeyReader(PATH, {"k": GgufValue.array(T.UINT32, [5, 5]), "l": GgufValue.array(T.UINT32, [5, 6])})
    assert keys.uniform("k", 2) == 5
    with pytest.raises(FormatError, match=r"l: expected one positive number for all layers, got \[5, 6\]"):
        keys.uniform("l", 2)
    reals = KeyReader(PATH, {"r": GgufValue.float32(float("nan")), "s": GgufValue.float32(0.5)})
    assert reals.real("s", 0.5, 1) == 0.5
    with pytest.raises(FormatError, match="r: nan is not between 0 and 1"):
        reals.real("r", 0, 1)


def test_three_stacks_are_a_layer() -> None:
    layers = moe_layers(PATH, KEYS, by_name(*experts(1)), "a")
    assert layers == {1: MoeLayer(1, 8, 64, 32, (QT.F16,) * 3, 3 * 64 * 32 * 2)}


@pytest.mark.parametrize(
    ("infos", "error", "message"),
    [
        ([], UnsupportedModelError, "architecture 'a' without routed experts"),
        (experts(2), FormatError, "blk.2: the model has 2 layers"),
        (experts(0)[:2], UnsupportedModelError, "blk.0: experts without ffn_down_exps"),
        ([stack("blk.0.ffn_gate_up_exps.weight", 64, 64, 8)], UnsupportedModelError, "in one tensor of this form"),
        ([stack("blk.0.ffn_up.3.weight", 64, 32)], UnsupportedModelError, "llama.cpp's layout of 2023"),
        (
            [*experts(0)[:2], stack("blk.0.ffn_down_exps.weight", 64, 32, 8)],
            FormatError,
            "blk.0.ffn_down_exps.weight: shape (64, 32, 8), expected (32, 64, 8)",
        ),
        (
            [*experts(0)[:2], stack("blk.0.ffn_down_exps.weight", 32, 64, 8, kind=QT.Q8_K)],
            FormatError,
            "blk.0.ffn_down_exps.weight: type Q8_K is not a weight type",
        ),
    ],
)
def test_stacks_that_are_no_layer(infos: list[TensorInfo], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        moe_layers(PATH, KEYS, by_name(*infos), "a")
    assert message in str(caught.value)


def test_vectors_are_f32_and_matrices_what_can_be_multiplied() -> None:
    check_dense_types(PATH, by_name(stack("v", 64, 1, kind=QT.F32), stack("m", 64, 2, kind=QT.Q2_K)))
    for wrong in (stack("x", 64, kind=QT.F16), stack("x", 64, 2, kind=QT.Q8_K)):
        with pytest.raises(FormatError, match=rf"x: type {wrong.type.name} can't be used"):
            check_dense_types(PATH, by_name(wrong))


def test_blocks_that_predict_further_tokens_are_taken_out() -> None:
    keys = {**KEYS, "a.nextn_predict_layers": GgufValue.uint32(1), "a.other": GgufValue.array(T.INT32, [5, 6])}
    infos = by_name(stack("blk.0.attn_norm.weight", 64), stack("blk.1.nextn.eh_proj.weight", 64, 2), stack("out", 4))
    trunk, kept = drop_next_token_layers(PATH, keys, infos)
    assert trunk["a.block_count"] == GgufValue.uint32(1)
    assert trunk["a.other"] == GgufValue.array(T.INT32, [5])
    assert "a.nextn_predict_layers" not in trunk
    assert list(kept) == ["blk.0.attn_norm.weight", "out"]
    del infos["blk.0.attn_norm.weight"]
    with pytest.raises(UnsupportedModelError, match="holds only the next-token-prediction block"):
        drop_next_token_layers(PATH, keys, infos)


def test_a_count_of_blocks_that_are_not_there_is_left_out_alone() -> None:
    keys = {**KEYS, "a.nextn_predict_layers": GgufValue.uint32(1)}
    infos = by_name(stack("blk.0.attn_norm.weight", 64))
    assert drop_next_token_layers(PATH, keys, infos) == (dict(KEYS), infos)
    assert drop_next_token_layers(PATH, dict(KEYS), infos) == (dict(KEYS), infos)
