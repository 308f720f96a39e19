"""Proof: with our device, answers are as close to transformers' as stock llama.cpp's, whichever way the weights lie on the disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as QT

from localrun.offload.model import OffloadOptions, open_offloaded
from localrun.quant.checkpoint.mapping import PlanOptions
from localrun.quant.convert.converter import MODEL_NAME, convert
from localrun.quant.open import open_model
from tests.offload.models import F32, logits
from tests.reference import (
    NAMES,
    Oracle,
    agreement,
    kl,
    read_safetensors,
    stock_logits,
    unpack,
    write_f32,
    write_safetensors,
)


def our_logits(path: Path, oracle: Oracle, math: str, batch: int = 256) -> F32:
    options = OffloadOptions(n_threads=2, math=math)  # type: ignore[arg-type]
    with open_offloaded(open_model(path), options) as model:
        return logits(model, oracle.tokens, batch=batch, kv_type="f32")


def with_fp4_experts(oracle: Oracle, f32: Path, target: Path) -> None:
    """A checkpoint with the official FP4 experts and everything else in F32: what is left is the experts' arithmetic."""
    tensors = read_safetensors(f32 / "model.safetensors")
    for name, tensor in read_safetensors(oracle.path / "model.safetensors").items():
        if ".ffn.experts." in name:
            tensors[name] = tensor
    target.mkdir()
    (target / "config.json").write_bytes((f32 / "config.json").read_bytes())
    write_safetensors(target / "model.safetensors", tensors)


@pytest.mark.parametrize("name", NAMES)
def test_f32_arithmetic_is_as_close_to_transformers_as_llama_cpp_with_f32_experts(name: str, tmp_path: Path) -> None:
    oracle = unpack(name, tmp_path)
    write_f32(oracle.path, tmp_path / "f32")
    with_fp4_experts(oracle, tmp_path / "f32", tmp_path / "fp4")
    convert(tmp_path / "f32", tmp_path / "out")
    convert(tmp_path / "fp4", tmp_path / "packed")
    stock = stock_logits(tmp_path / "out" / MODEL_NAME, oracle.tokens)
    bound = 1.2 * kl(oracle.logits, stock).mean() + 1e-8
    for path in (tmp_path / "out", tmp_path / "packed"):  # experts stored as F32, and as MXFP4
        ours = our_logits(path, oracle, "f32")
        assert agreement(oracle.logits, ours) >= 0.99
        assert kl(oracle.logits, ours).mean() <= bound


@pytest.mark.parametrize("name", NAMES)
def test_eight_bit_arithmetic_is_as_close_to_transformers_as_llama_cpp_on_the_same_file(
    name: str, tmp_path: Path
) -> None:
    oracle = unpack(name, tmp_path)
    convert(oracle.path, tmp_path / "out")
    stock = stock_logits(tmp_path / "out" / MODEL_NAME, oracle.tokens)
    ours = our_logits(tmp_path / "out", oracle, "int8")
    assert kl(oracle.logits, ours).mean() <= 1.2 * kl(oracle.logits, stock).mean()


@pytest.mark.parametrize("name", ["flash-1", "pro-1"])
@pytest.mark.parametrize("math", ["f32", "int8"])
def test_directory_gguf_and_official_checkpoint_give_the_same_logits(name: str, math: str, tmp_path: Path) -> None:
    oracle = unpack(name, tmp_path)
    convert(oracle.path, tmp_path / "out", PlanOptions(QT.Q8_0))
    (tmp_path / "foreign").mkdir()
    foreign = tmp_path / "foreign" / "somebody-elses.gguf"
    foreign.write_bytes((tmp_path / "out" / MODEL_NAME).read_bytes())
    directory = our_logits(tmp_path / "out", oracle, math)
    np.testing.assert_array_equal(our_logits(foreign, oracle, math), directory)
    np.testing.assert_array_equal(our_logits(oracle.path, oracle, math), directory)
