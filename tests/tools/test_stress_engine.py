"""A short run of the engine's stress test; `python -m tools.stress_engine` has the long ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.models import write_chat_model
from tools.stress_engine import Stress

pytestmark = pytest.mark.engine_process


def test_random_commands_from_several_threads_lose_nothing(tmp_path: Path) -> None:
    model = write_chat_model(tmp_path / "chat.gguf")
    report = Stress(model, tmp_path, n_steps=80, seed=3, n_threads=3).run()
    assert report.problems == []
    assert sum(report.done.values()) == 80
    assert {"generate", "abandon", "count", "stats", "stop", "snapshot", "restore"} <= set(report.done)
