"""Proof: with our device, answers are as close to transformers' as stock llama.cpp's, whichever way the weights lie on the disk."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGMLQuantizationType as QT

from localrun.offload.model import OffloadedModel, OffloadOptions, open_offloaded
from localrun.quant.checkpoint.mapping import ConversionOptions
from localrun.quant.convert.converter import MODEL_NAME, convert
from localrun.quant.open import open_model
from tests.offload.models import F32, logits
from tests.paired import compare, median
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
from tests.stock_llama import decode_whole, stock_model

N_TEXTS: Final = int(os.environ.get("LOCALRUN_TEST_TEXTS", "8"))
"""More give narrower intervals."""


def opened(path: Path, math: str) -> OffloadedModel:
    return open_offloaded(open_model(path), OffloadOptions(n_threads=2, math=math))  # type: ignore[arg-type]


def our_logits(path: Path, oracle: Oracle, math: str) -> F32:
    with opened(path, math) as model:
        return logits(model, oracle.tokens, batch=256, kv_type="f32")


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
    found = [
        our_logits(path, oracle, "f32") for path in (tmp_path / "out", tmp_path / "packed")
    ]  # F32 experts, and MXFP4
    for other in (stock_logits(tmp_path / "out" / MODEL_NAME, oracle.tokens), *found):
        assert agreement(oracle.logits, other) >= 0.99
        # Rounding of F32 sums: 1e-7. 8-bit arithmetic has 2e-3.
        assert median(kl(oracle.logits, other)) < 1e-6


@dataclass(frozen=True)
class Measured:
    """A fixture's model and texts: transformers' stored one, and random ones of the same length.

    Attributes:
        exact: logits per text of the same weights in F32, by llama.cpp, which agrees with transformers there (above).
        stock: (N_TEXTS, T) divergences of llama.cpp's 8-bit arithmetic.
    """

    path: Path
    texts: list[list[int]]
    exact: list[F32]
    stock: npt.NDArray[np.float64]

    def ours(self, math: str) -> npt.NDArray[np.float64]:
        """(N_TEXTS, T) divergences of ours."""
        with opened(self.path, math) as model:
            return divergences(self.exact, [logits(model, text, batch=256, kv_type="f32") for text in self.texts])

    def with_f16_cache(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """(N_TEXTS, T) divergences of ours and of llama.cpp's 8-bit arithmetic with the usual cache."""
        with opened(self.path, "int8") as model:
            ours = [logits(model, text, batch=256, kv_type="f16") for text in self.texts]
        with stock_model(self.path / MODEL_NAME) as model:
            stock = [decode_whole(model, text, kv_type="f16") for text in self.texts]
        return divergences(self.exact, ours), divergences(self.exact, stock)


def divergences(exact: list[F32], others: list[F32]) -> npt.NDArray[np.float64]:
    return np.stack([kl(*pair) for pair in zip(exact, others, strict=True)])


@pytest.fixture(scope="module")
def measured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    folder = tmp_path_factory.mktemp(request.param)
    oracle = unpack(request.param, folder)
    write_f32(oracle.path, folder / "f32")
    convert(folder / "f32", folder / "exact")
    convert(oracle.path, folder / "out")
    rng, (n_positions, n_vocab) = np.random.default_rng(17), oracle.logits.shape
    texts = [oracle.tokens, *(rng.integers(0, n_vocab, (N_TEXTS - 1, n_positions)).tolist())]
    with stock_model(folder / "exact" / MODEL_NAME) as model:
        exact = [decode_whole(model, text) for text in texts]
    with stock_model(folder / "out" / MODEL_NAME) as model:
        stock = divergences(exact, [decode_whole(model, text) for text in texts])
    return Measured(folder / "out", texts, exact, stock)


@pytest.mark.parametrize("measured", NAMES, indirect=True)
def test_eight_bit_arithmetic_is_as_exact_as_llama_cpps_on_the_same_file(measured: Measured, kernel_level: str) -> None:
    comparison = compare(measured.ours("int8"), measured.stock)
    print(f"\n{measured.path.parent.name} {kernel_level}: {comparison.median}, pairs {comparison.pairs}")
    assert not comparison.is_worse, comparison


@pytest.mark.parametrize("measured", [name for name in NAMES if not name.startswith("other")], indirect=True)
def test_with_an_f16_cache_attention_is_ours_and_all_is_as_exact_as_llama_cpps(measured: Measured) -> None:
    comparison = compare(*measured.with_f16_cache())
    print(f"\n{measured.path.parent.name} f16 cache: {comparison.median}, pairs {comparison.pairs}")
    assert not comparison.is_worse, comparison
    with opened(measured.path.parent / "exact", "f32") as model:
        found = logits(model, measured.texts[0], batch=256, kv_type="f16")
    # Rounding of F32 sums: 6e-11. Probabilities in F16 would cost a thousand times as much.
    assert median(kl(measured.exact[0], found)) < 1e-8


@pytest.mark.parametrize("measured", ["pro-1", "pro-2"], indirect=True)
def test_the_comparison_sees_what_rounding_experts_activations_costs(measured: Measured) -> None:
    comparison = compare(measured.ours("f32"), measured.stock)
    assert comparison.is_better, comparison
    assert compare(measured.stock, measured.ours("f32")).is_worse


@pytest.mark.parametrize("name", ["flash-1", "pro-1"])
@pytest.mark.parametrize("math", ["f32", "int8"])
def test_directory_gguf_and_official_checkpoint_give_the_same_logits(name: str, math: str, tmp_path: Path) -> None:
    oracle = unpack(name, tmp_path)
    convert(oracle.path, tmp_path / "out", ConversionOptions(QT.Q8_0))
    (tmp_path / "foreign").mkdir()
    foreign = tmp_path / "foreign" / "somebody-elses.gguf"
    foreign.write_bytes((tmp_path / "out" / MODEL_NAME).read_bytes())
    directory = our_logits(tmp_path / "out", oracle, math)
    np.testing.assert_array_equal(our_logits(foreign, oracle, math), directory)
    np.testing.assert_array_equal(our_logits(oracle.path, oracle, math), directory)
