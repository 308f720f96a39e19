"""The tool for long contexts: what it says of a position is what a session there does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from localrun.engine.engine import Engine
from localrun.engine.options import EngineOptions
from tests.gguf_models import TinyDeepseek4, write_deepseek4
from tools import long_context


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return write_deepseek4(folder / "model.gguf", TinyDeepseek4(ratios=(0, 4, 128), n_experts=8, n_used=2))[0]


def test_a_session_far_into_a_context_sees_as_many_rows_as_one_that_read_them(model: Path) -> None:
    with Engine.open(model, EngineOptions(n_ctx=512, gpu="none"), learn=False) as engine:
        session = long_context.session_at(engine, 400, np.random.default_rng(0))
        assert session.position == 406
        assert np.isfinite(session.logits).all()


def test_every_position_has_a_line(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long_context.main([str(model), "--positions", "8,300", "--batches", "0", "--new-tokens", "4"])
    lines = [line for line in capsys.readouterr().out.splitlines() if "ms/token" in line]
    assert [line.split(":")[0].split()[-1] for line in lines] == ["8", "300", "0"]
