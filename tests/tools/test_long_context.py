"""The tool for long contexts: what it says of a position is what a session there does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from localrun.engine.engine import Engine
from localrun.engine.options import EngineOptions
from localrun.options import OWN_KV_TYPES
from tests.gguf_models import TinyDeepseek4, write_deepseek4
from tools import long_context


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return write_deepseek4(folder / "model.gguf", TinyDeepseek4(ratios=(0, 4, 128, 4), n_experts=8, n_used=2))[0]


@pytest.mark.parametrize("kv_type", OWN_KV_TYPES)
def test_a_session_far_into_a_context_sees_as_many_rows_as_one_that_read_them(model: Path, kv_type: str) -> None:
    with Engine.open(model, EngineOptions(n_ctx=512, gpu="none"), learn=False) as engine:
        faked = long_context.Faked(engine, kv_type, np.random.default_rng(0))
        faked.move_to(400)
        assert faked.session.position == 400 + long_context._SETTLE
        assert np.isfinite(faked.session.logits).all()
        faked.move_to(100)
        assert faked.session.position == 100 + long_context._SETTLE
        faked.session.close()


@pytest.mark.parametrize("kv_type", OWN_KV_TYPES)
def test_every_indexer_has_random_keys(model: Path, kv_type: str) -> None:
    """The state has one row of keys per 4 tokens and CSA layer, one after the other; those below were not fed."""
    with Engine.open(model, EngineOptions(n_ctx=512, gpu="none"), learn=False) as engine:
        assert engine.plan is not None
        keys = long_context.random_keys(kv_type, engine.plan.sizes.shape.index_dim, np.random.default_rng(0))
        faked = long_context.Faked(engine, kv_type, np.random.default_rng(0))
        faked.move_to(400)
        state, n_filled, n_rows = bytes(faked.session.snapshot()), 400 // 4, 256  # llama.cpp pads 128
        random = np.resize(keys, (2 * n_rows, keys.shape[1]))
        for layer in range(2):
            assert random[layer * n_rows : layer * n_rows + n_filled - 1].tobytes() in state
        faked.session.close()


def test_every_position_has_a_line(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = ["--positions", "8,300", "--batches", "0", "--batch", "64", "--new-tokens", "2"]
    long_context.main([str(model), *places, "--kv", "f16,q8_0"])
    lines = [line for line in capsys.readouterr().out.splitlines() if "ms/token" in line]
    assert [line.split(":")[0].split()[-2:] for line in lines] == [
        [position, kv] for position in ("8", "300", "0") for kv in ("f16", "q8_0")
    ]


def test_states_are_saved_and_restored(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long_context.main(
        [str(model), "--positions", "8,300", "--rounds", "0", "--kv", "f16,q8_0", "--states", str(tmp_path)]
    )
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("state at")]
    assert len(lines) == 4
    assert all(line.endswith("next tokens equal") for line in lines)
    assert not list(tmp_path.iterdir())
