"""`--dense TYPE`: an official checkpoint's dense matrices, converted while it is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as QT

from localrun import cli
from localrun.engine.engine import Engine
from localrun.engine.options import EngineOptions
from localrun.engine.planner.sizes import sizes_of
from localrun.errors import UsageError
from localrun.quant.checkpoint.mapping import ConversionOptions
from localrun.quant.convert.converter import convert
from tests.checkpoints import write_small
from tests.quant.convert.test_quantized_base import WIDE

TOKENS = np.random.default_rng(7).integers(0, 64, 40).tolist()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("source") / "small", **WIDE)


def logits(path: Path, dense: str | None = None) -> tuple[np.ndarray[tuple[int], np.dtype[np.float32]], int]:
    """After a text, and the bytes that the plan of the load had for the dense part."""
    options = EngineOptions(n_ctx=256, n_threads=2, ram_bytes=64 << 20, gpu="none", dense=dense)
    plans: list[Any] = []
    with Engine.open(path, options, announce=plans.append, learn=False) as engine, engine.session() as session:
        session.feed(TOKENS)
        return session.logits, plans[0].placement.dense_bytes


def test_answers_are_those_of_a_model_converted_to_the_type(checkpoint: Path, tmp_path: Path) -> None:
    convert(checkpoint, tmp_path / "out", ConversionOptions(QT.Q4_K))
    converted, n_bytes = logits(tmp_path / "out")
    loaded, loaded_bytes = logits(checkpoint, "q4_k")
    np.testing.assert_array_equal(loaded, converted)
    usual, usual_bytes = logits(checkpoint)
    assert not np.array_equal(loaded, usual)
    assert n_bytes == loaded_bytes < usual_bytes


def test_a_plan_counts_what_such_a_load_takes(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {}
    for dense in ("q4_k", "q8_0", "bf16"):
        assert cli.main(["plan", str(checkpoint), "--dense", dense, "--json"]) == 0
        sizes[dense] = json.loads(capsys.readouterr().out)["model"]["dense_bytes"]
        assert sizes[dense] == sizes_of(checkpoint, dense=QT[dense.upper()]).dense_bytes
    assert sizes["q4_k"] < sizes["q8_0"] < sizes["bf16"]


def test_flash_at_four_bits_is_planned_without_a_file() -> None:
    assert sizes_of("flash", dense=QT.Q4_K).dense_bytes < 0.7 * sizes_of("flash").dense_bytes, "embeddings stay in BF16"


def test_a_converted_model_refuses_another_type(checkpoint: Path, tmp_path: Path) -> None:
    convert(checkpoint, tmp_path / "out")
    with pytest.raises(UsageError, match="already converted") as caught:
        logits(tmp_path / "out", "q4_k")
    assert caught.value.hint == "leave out --dense, or pass the official checkpoint"


def test_a_second_copy_of_the_checkpoint_is_read_alike(checkpoint: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    options = EngineOptions(n_ctx=256, n_threads=2, ram_bytes=64 << 20, gpu="none", dense="q4_k", mirror=str(copy))
    with Engine.open(checkpoint, options, learn=False) as engine, engine.session() as session:
        session.feed(TOKENS)
        np.testing.assert_array_equal(session.logits, logits(checkpoint, "q4_k")[0])
