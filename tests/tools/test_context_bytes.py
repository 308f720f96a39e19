"""The tool that compares contexts with the plan: what it counts is what was allocated."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gguf_models import TinyDeepseek4, write_deepseek4
from tools import context_bytes


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return write_deepseek4(folder / "model.gguf", TinyDeepseek4(ratios=(0, 4, 128), n_experts=8, n_used=2))[0]


def test_every_context_has_a_row_and_its_cache_is_as_planned(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    context_bytes.main([str(model), "--contexts", "4096,131072", "--batch", "64", "--feed"])
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [(row[0].strip(), row[1].strip()) for row in rows] == [
        (n_ctx, kv_type) for n_ctx in ("4096", "131072") for kv_type in ("f16", "q8_0")
    ]
    for row in rows:
        planned, allocated, _resident = (float(mib) for mib in row[2:5])
        assert allocated == pytest.approx(planned, rel=0.03, abs=0.1)
        assert float(row[7]) > 0, "buffers"
