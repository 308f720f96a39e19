"""`localrun bench --against llama.cpp`: the same phases by llama.cpp itself, and a refusal where it could not be the same model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from localrun import cli
from localrun.engine.engine import Engine
from localrun.engine.measure.stock import ALL_LAYERS, best_repacking, open_stock
from localrun.ggml.devices import choose_gpus
from tests.engine.conftest import OPTIONS
from tests.gguf_models import TinyDeepseek4, write_deepseek4
from tests.reference import kl, unpack
from tests.rpc_server import rpc_server

SHORT = [
    "--prompt-tokens",
    "16",
    "--new-tokens",
    "2",
    "--frontiers",
    "0,16",
    "--warm-up",
    "2",
    "--threads",
    "1",
    "--no-probe",
]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.gguf"
    return write_deepseek4(path, TinyDeepseek4(ratios=(0, 4, 128), n_experts=8, n_used=2))[0]


def test_both_are_measured_on_the_same_phases(model_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", str(model_path), *SHORT, "--gpu", "none", "--against", "llama.cpp", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    ours, theirs = (
        [(phase["kind"], phase["context"]) for phase in part["phases"]] for part in (value, value["llama_cpp"])
    )
    assert ours == theirs
    assert all(phase["tokens_per_s"] > 0 for phase in value["llama_cpp"]["phases"])
    assert cli.main(["bench", str(model_path), *SHORT, "--gpu", "none", "--against", "llama.cpp"]) == 0
    out = capsys.readouterr().out
    assert "llama.cpp, decode at 16: " in out
    assert "times as fast" in out


def test_a_checkpoint_is_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    oracle = unpack("flash-1", tmp_path)
    assert cli.main(["bench", str(oracle.path), *SHORT, "--gpu", "none", "--against", "llama.cpp"]) == 2
    assert "is not a GGUF" in capsys.readouterr().err


def test_the_dense_model_or_layers_of_it_may_be_on_a_gpu(model_path: Path) -> None:
    tokens = [1, 2, 3, 4]
    options = replace(OPTIONS, gpu="none")
    with Engine.open(model_path, options) as engine:
        session = engine.session()
        session.feed(tokens)
        expected = session.logits
    with rpc_server() as (endpoint, _):
        gpu = next(device for device in choose_gpus("auto", [endpoint]) if device.description == endpoint)
        for n_gpu_layers in (ALL_LAYERS, 2):
            with open_stock(model_path, options, gpu=gpu.address, n_gpu_layers=n_gpu_layers) as engine:
                session = engine.session()
                session.feed(tokens)
                assert np.isfinite(session.logits).all()
                assert kl(expected, session.logits) < 0.1


def test_experts_are_repacked_only_where_file_and_copy_fit() -> None:
    assert best_repacking(10, 21) == "experts"
    assert best_repacking(10, 20) == "none"
    assert best_repacking(10, None) == "none"
