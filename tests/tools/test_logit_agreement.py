"""Rounding is told from faults: in numbers, and in a random model of the official format whose experts are damaged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from localrun.quant.checkpoint.mapping import ConversionOptions
from localrun.quant.convert.converter import convert
from localrun.quant.gguf.source import GgufSource
from localrun.quant.open import open_model
from tools import engine_run
from tools.logit_agreement import Agreement, compare
from tools.make_checkpoint import write_checkpoint
from tools.synthetic_config import CheckpointSpec, scaled_config

MIN_AGREEMENT = 0.9
N_LAYERS = 10
MXFP4_BLOCK = 17
"""Bytes: the exponent of the scale, then 32 weights."""


def drawn(noise: float, other: float, *, n_vocab: int = 20_000) -> Agreement:
    rng = np.random.default_rng(0)
    shape = (17, n_vocab)
    first = rng.standard_normal(shape)
    return compare(first, first + noise * rng.standard_normal(shape), first + other * rng.standard_normal(shape) + 3.0)


def test_near_ties_within_the_noise_are_no_fault() -> None:
    """Whole Flash with random weights: a margin of 0.2 between the best logits, noise of 0.19."""
    found = drawn(0.19, 0.19)
    assert found.argmax_share < 0.7
    assert found.noise_argmax_share < 0.7
    assert found.decided < 6
    assert found.difference == pytest.approx(0.19, rel=0.02)
    assert found.typical_kl == pytest.approx(0.19**2 / 2, rel=0.1)
    assert found.fault(MIN_AGREEMENT) is None


def test_a_difference_beyond_the_noise_is_a_fault_even_where_few_positions_are_decided() -> None:
    assert "typical KL" in str(drawn(0.19, 0.6).fault(MIN_AGREEMENT))
    assert "typical KL" in str(drawn(0.0, 0.05).fault(MIN_AGREEMENT))


def test_programs_as_far_apart_as_strangers_prove_nothing() -> None:
    assert "hides any fault" in str(drawn(1.0, 1.0).fault(MIN_AGREEMENT))


def test_another_best_token_where_rounding_cant_change_it_is_a_fault() -> None:
    first = np.zeros((4, 50))
    first[:, 7] = 5.0
    other = first.copy()
    assert compare(first, first + 1e-4 * np.cos(np.arange(50)), other).fault(MIN_AGREEMENT) is None
    found = replace(compare(first, first, other), decided_share=0.75)
    assert "decided" in str(found.fault(MIN_AGREEMENT))
    other[0, [7, 8]] = other[0, [8, 7]]
    found = compare(first, first + 1e-4 * np.cos(np.arange(50)), other)
    assert (found.decided, found.decided_share) == (4, 0.75)


def test_logits_that_are_no_numbers_are_a_fault() -> None:
    first = np.random.default_rng(0).standard_normal((3, 50))
    assert compare(first, first, np.full_like(first, np.nan)).fault(MIN_AGREEMENT) == "logits are not finite"


# -- with both programs -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(folder / "official", CheckpointSpec(scaled_config("tiny", layers=N_LAYERS, vocab=2048)))
    convert(folder / "official", folder / "converted", ConversionOptions())
    return Path(open_model(folder / "converted").files[0])


def logits(engine: engine_run.EngineName, gguf: Path, model: Path, folder: Path) -> dict[str, np.ndarray]:
    task = engine_run.Task(
        engine=engine,
        variant="none",
        gguf=str(gguf),
        model=str(model),
        prompt_tokens=40,
        new_tokens=16,
        seed=0,
        threads=1,
        ram_bytes=None,
        warm_rounds=0,
        warm_up=0,
        again=engine == "llama.cpp",
        group=None,
    )
    engine_run.child(task, folder / "logits.npz")
    with np.load(folder / "logits.npz") as saved:
        return dict(saved)


@pytest.fixture(scope="module")
def reference(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    return logits("llama.cpp", gguf, gguf, tmp_path_factory.mktemp("reference"))


def verdict(reference: dict[str, np.ndarray], ours: dict[str, np.ndarray]) -> str | None:
    n = len(reference["again"])
    found = compare(reference["logits"][-n:], reference["again"], ours["logits"][-n:])
    assert found.positions == 17
    return found.fault(MIN_AGREEMENT)


def damaged(gguf: Path, folder: Path, layers: range, fault: str) -> Path:
    """A copy of the file in which the experts of some layers have changed places, or half of their size."""
    copy = folder / "damaged.gguf"
    copy.write_bytes(gguf.read_bytes())
    source = open_model(gguf)
    assert isinstance(source, GgufSource)
    with copy.open("r+b") as file:
        for layer in layers:
            for expert in range(0, source.moe_layers[layer].n_experts, 2):
                pairs = zip(source.base_expert(layer, expert), source.base_expert(layer, expert + 1), strict=True)
                extents = [(a.extents[0], b.extents[0]) for a, b in pairs]
                if fault == "halved":
                    extents = extents[-1:]  # down alone
                for a, b in extents:
                    contents = []
                    for extent in (a, b):
                        file.seek(extent.offset)
                        contents.append(bytearray(file.read(extent.n_bytes)))
                    if fault == "halved":
                        for content in contents:
                            content[::MXFP4_BLOCK] = bytes(e - 1 for e in content[::MXFP4_BLOCK])
                    else:
                        contents.reverse()
                    for extent, content in zip((a, b), contents, strict=True):
                        file.seek(extent.offset)
                        file.write(content)
    return copy


def test_the_same_model_is_found_to_be_the_same(gguf: Path, reference: dict[str, np.ndarray], tmp_path: Path) -> None:
    assert verdict(reference, logits("localrun", gguf, gguf, tmp_path)) is None


@pytest.mark.parametrize("fault", ["swapped", "halved"])
@pytest.mark.parametrize("layers", [range(5, 6), range(N_LAYERS)], ids=["one layer", "all layers"])
def test_wrong_experts_and_wrong_scales_are_noticed(
    gguf: Path, reference: dict[str, np.ndarray], tmp_path: Path, layers: range, fault: str
) -> None:
    ours = logits("localrun", gguf, damaged(gguf, tmp_path, layers, fault), tmp_path)
    assert "typical KL" in str(verdict(reference, ours))
