"""The architecture's tensors: all that llama.cpp creates, each in its shape and a type that can be computed with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as QT

from localrun.errors import FormatError
from localrun.quant.gguf.checks import check_common
from localrun.quant.gguf.deepseek4 import TensorUse, check_deepseek4, expected_tensors, read_deepseek4
from localrun.quant.gguf.file import read_gguf
from localrun.quant.gguf.value import GgufValue
from localrun.quant.model.shape import ModelShape
from localrun.quant.model.source import TensorInfo
from tests.gguf_models import TinyDeepseek4, write_deepseek4

TINY = TinyDeepseek4(ratios=(0, 4, 128, 4))


class Header:
    """What a sound file says, for tests to change."""

    def __init__(self, path: Path) -> None:
        file = read_gguf(path)
        self.path, self.metadata = path, dict(file.metadata)
        self.tensors = {name: tensor.info for name, tensor in file.tensors.items()}

    def check(self) -> ModelShape:
        return check_deepseek4(
            self.path, self.metadata, self.tensors, check_common(self.path, self.metadata, self.tensors)
        )


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_deepseek4(tmp_path_factory.mktemp("model") / "m.gguf", TINY)[0]


@pytest.fixture
def header(path: Path) -> Header:
    return Header(path)


def test_a_sound_file_has_exactly_what_is_expected(header: Header) -> None:
    shape = header.check()
    assert shape.ratios[: shape.n_layers] == TINY.ratios
    assert expected_tensors(shape).keys() == header.tensors.keys()


def test_layers_have_what_their_kind_needs(header: Header) -> None:
    shape = read_deepseek4(header.path, header.metadata, check_common(header.path, header.metadata, header.tensors))
    names = expected_tensors(shape)
    compressed = [f"blk.{layer}.attn_compressor_kv.weight" in names for layer in range(4)]
    indexed = [f"blk.{layer}.indexer.proj.weight" in names for layer in range(4)]
    assert (compressed, indexed) == ([False, True, True, True], [False, True, False, True])
    width = {layer: names[f"blk.{layer}.attn_compressor_kv.weight"].shape[1] for layer in (1, 2)}
    assert width == {1: 2 * shape.head_dim, 2: shape.head_dim}
    hashed = [f"blk.{layer}.ffn_gate_tid2eid.weight" in names for layer in range(4)]
    assert hashed == [layer < shape.n_hash_layers for layer in range(4)]
    assert [f"blk.{layer}.exp_probs_b.bias" in names for layer in range(4)] == [not is_hashed for is_hashed in hashed]


def test_each_missing_tensor_is_named(header: Header) -> None:
    for name in list(header.tensors):
        info = header.tensors.pop(name)
        with pytest.raises(
            FormatError, match="token_embd|vocab" if name == "token_embd.weight" else f"no tensor '{name}'"
        ):
            header.check()
        header.tensors[name] = info


def longer(info: TensorInfo) -> TensorInfo:
    return replace(info, shape=(*info.shape[:-1], info.shape[-1] + 1))


CHANGES: dict[str, tuple[str, Callable[[TensorInfo], TensorInfo], str]] = {
    "another shape": ("blk.1.attn_q_a.weight", longer, r"blk\.1\.attn_q_a\.weight: shape .* expected"),
    "a vector that is quantized": (
        "output_norm.weight",
        lambda info: replace(info, type=QT.F16),
        r"output_norm\.weight: type F16 can't be used for a vector",
    ),
    "ids that are floats": (
        "blk.0.ffn_gate_tid2eid.weight",
        lambda info: replace(info, type=QT.F32),
        "type F32 can't be used for a table of ids",
    ),
    "a matrix of integers": (
        "blk.1.attn_kv.weight",
        lambda info: replace(info, type=QT.I32),
        "type I32 can't be used for a matrix",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_llama_cpp_can_not_compute_with_is_refused(change: str, header: Header) -> None:
    name, changed, says = CHANGES[change]
    header.tensors[name] = changed(header.tensors[name])
    with pytest.raises(FormatError, match=says):
        header.check()


def test_dimensions_of_one_at_the_end_and_split_groups_are_the_same(header: Header) -> None:
    norm, grouped = "output_norm.weight", "blk.0.attn_output_a.weight"
    shape = header.check()
    header.tensors[norm] = replace(header.tensors[norm], shape=(*header.tensors[norm].shape, 1, 1))
    n_in = header.tensors[grouped].shape[0]
    header.tensors[grouped] = replace(header.tensors[grouped], shape=(n_in, shape.o_rank, shape.o_groups))
    assert header.check() == shape


def test_the_router_s_bias_for_images_may_be_there_and_nothing_else(header: Header) -> None:
    name, n_experts = "blk.1.exp_probs_b_vl.bias", TINY.n_experts
    header.tensors[name] = TensorInfo(name, (n_experts,), QT.F32, 4 * n_experts)
    header.check()
    header.tensors[name] = TensorInfo(name, (n_experts,), QT.F16, 2 * n_experts)
    with pytest.raises(FormatError, match=rf"expected F32 \({n_experts},\)"):
        header.check()
    del header.tensors[name]
    for unknown in ("blk.9.exp_probs_b_vl.bias", "blk.0.extra.weight"):
        header.tensors[unknown] = TensorInfo(unknown, (n_experts,), QT.F32, 4 * n_experts)
        with pytest.raises(FormatError, match=f"unexpected tensor '{unknown}'"):
            header.check()
        del header.tensors[unknown]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.value_length", 8),
        ("rope.dimension_count", 3),
        ("hyper_connection.count", 3),
        ("attention.sliding_window", 0),
        ("hash_layer_count", 99),
    ],
)
def test_keys_out_of_their_bounds_are_named(key: str, value: int, header: Header) -> None:
    header.metadata[f"deepseek4.{key}"] = GgufValue.uint32(value)
    with pytest.raises(FormatError, match=key.replace(".", r"\.")):
        header.check()


def test_uses_allow_what_ggml_computes_with() -> None:
    assert [use for use in TensorUse if use.allows(QT.F32)] == [TensorUse.MATRIX, TensorUse.VECTOR]
    assert [use for use in TensorUse if use.allows(QT.Q4_K)] == [TensorUse.MATRIX]
    assert [use for use in TensorUse if use.allows(QT.I32)] == [TensorUse.IDS]
