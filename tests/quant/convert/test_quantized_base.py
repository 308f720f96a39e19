"""Bases of every type: stock llama.cpp runs them, importance counts, and a killed run goes on to the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from gguf import LlamaFileType

from localrun.errors import UsageError
from localrun.quant.checkpoint.mapping import BASE_TYPES, DENSE_TYPES, ConversionOptions
from localrun.quant.convert.converter import MODEL_NAME, convert
from localrun.quant.convert.integrity import verify
from localrun.quant.gguf.file import read_gguf
from localrun.quant.model.manifest import MANIFEST_NAME, read_manifest
from localrun.quant.open import open_model
from tests.checkpoints import write_small
from tests.paired import median
from tests.reference import kl, stock_logits

WIDE = {"hidden_size": 256, "moe_intermediate_size": 256}
"""Rows that every type can hold."""

TOKENS = list(range(40))


class Importance:
    """Random importance, different for each matrix; nothing is known about expert 3."""

    def __init__(self, seed: int = 0) -> None:
        self.digest = f"seed {seed}"
        self._seed = seed

    def weights(self, layer: int, expert: int, projection: int) -> npt.NDArray[np.float32] | None:
        rng = np.random.default_rng([self._seed, layer, expert, projection])
        return None if expert == 3 else rng.lognormal(0, 1.5, 256).astype(np.float32)

    def dense_weights(self, name: str) -> npt.NDArray[np.float32] | None:
        return None


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("source") / "small", **WIDE)


@pytest.fixture(scope="module")
def exact(source: Path, tmp_path_factory: pytest.TempPathFactory) -> npt.NDArray[np.float32]:
    target = tmp_path_factory.mktemp("exact") / "out"
    convert(source, target, ConversionOptions(DENSE_TYPES["f32"], BASE_TYPES["f32"]))
    return stock_logits(target / MODEL_NAME, TOKENS)


FILE_TYPES = {
    "mxfp4": "MXFP4_MOE",
    "q4_k": "Q4_K_S",
    "q3_k": "Q3_K_S",
}


@pytest.mark.parametrize(
    "base", ["mxfp4", "q8_0", "q6_k", "q4_k", "iq4_xs", "q3_k", "iq3_xxs", "q2_k", "iq2_xxs", "bf16"]
)
def test_stock_llama_cpp_runs_every_base(
    base: str, source: Path, exact: npt.NDArray[np.float32], tmp_path: Path
) -> None:
    result = convert(
        source, tmp_path / "out", ConversionOptions(DENSE_TYPES.get(base, DENSE_TYPES["q8_0"]), BASE_TYPES[base])
    )
    metadata = read_gguf(tmp_path / "out" / MODEL_NAME).metadata
    assert metadata["general.file_type"].value == LlamaFileType["MOSTLY_" + FILE_TYPES.get(base, base.upper())]
    assert metadata["general.quantization_version"].value == 2
    assert all(0 < loss.relative_rms < 0.5 for loss in result.losses.values())
    # [m] 1e-5 (bf16) to 0.03 (iq2_xxs). Random weights of a tiny model are far more sensitive than trained ones.
    assert median(kl(exact, stock_logits(tmp_path / "out" / MODEL_NAME, TOKENS))) < 0.1


def test_importance_lowers_the_error_that_it_weighs_and_is_named(source: Path, tmp_path: Path) -> None:
    importance = Importance()
    convert(source, tmp_path / "plain", ConversionOptions(base=BASE_TYPES["q2_k"]))
    convert(source, tmp_path / "weighed", ConversionOptions(base=BASE_TYPES["q2_k"], importance=importance))
    manifest = read_manifest(tmp_path / "weighed" / MANIFEST_NAME)
    assert manifest.options == {"dense": "q8_0", "base": "q2_k", "imatrix": "seed 0"}
    plain, weighed = read_manifest(tmp_path / "plain" / MANIFEST_NAME), manifest
    for plain_sums, sums in zip(plain.experts[1], weighed.experts[1], strict=True):
        assert [a == b for a, b in zip(plain_sums, sums, strict=True)] == [False, False, False, True]
    source_model = open_model(tmp_path / "weighed")
    assert verify(source_model, manifest) == []  # type: ignore[arg-type]


CHILD = """
import os, signal, sys
from pathlib import Path
from localrun.quant.convert import converter as module
from localrun.quant.convert.journal import Journal
from localrun.quant.checkpoint.mapping import BASE_TYPES, ConversionOptions
from tests.quant.convert.in_step import in_step
from tests.quant.convert.test_quantized_base import Importance

in_step()
append = Journal.append
def append_and_die(self, results):
    append(self, results)
    os.kill(os.getpid(), signal.SIGKILL)
Journal.append = append_and_die
module.convert(Path(sys.argv[1]), Path(sys.argv[2]), ConversionOptions(base=BASE_TYPES["iq3_xxs"], importance=Importance()), jobs=2)
"""


def test_a_killed_run_goes_on_with_the_same_importance_only_and_ends_with_the_same_bytes(
    source: Path, tmp_path: Path
) -> None:
    options = ConversionOptions(base=BASE_TYPES["iq3_xxs"], importance=Importance())
    convert(source, tmp_path / "whole", options)
    child = subprocess.run(
        [sys.executable, "-c", CHILD, source, tmp_path / "out"], capture_output=True, text=True, env=os.environ
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    with pytest.raises(UsageError, match="--imatrix was seed 0 and is now seed 1"):
        convert(source, tmp_path / "out", ConversionOptions(base=BASE_TYPES["iq3_xxs"], importance=Importance(1)))
    with pytest.raises(UsageError, match="--imatrix was seed 0 and is now not given"):
        convert(source, tmp_path / "out", ConversionOptions(base=BASE_TYPES["iq3_xxs"]))
    result = convert(source, tmp_path / "out", options)
    assert 0 < result.written_bytes < result.file_bytes * 0.95
    for name in (MODEL_NAME, MANIFEST_NAME):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
