"""The tool's figures and verdicts; that a real model keeps to its plan is in docs/reliability.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import write_small
from tools import memory_promise
from tools.memory_promise import deviation


@pytest.mark.parametrize(
    ("most", "least", "expected"), [(103, 99, 0.03), (101, 95, -0.05), (101, None, 0.01), (90, None, 0.0)]
)
def test_the_furthest_from_the_plan(most: int, least: int | None, expected: float) -> None:
    line: dict[str, Any] = {"planned": 100, "most_resident": most, "least_resident": least}
    assert deviation(line) == pytest.approx(expected)


def test_a_line_per_fifty_tokens_and_a_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_small(tmp_path)
    run = [str(model), "--tokens", "120", "--context", "64", "--neighbour", "1MiB", "--hold", "0.05", "--pause", "0.05"]
    assert memory_promise.main([*run, "--tolerance", "1000"]) == 0
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["tokens"] for line in lines] == [50, 100, 120]
    for line in lines:
        assert line["most_resident"] >= line["resident"] > 0
        assert 0 < line["least_available"] <= line["available"]
        assert line["slot_bytes"] > 0
    assert "120 tokens in" in err
    monkeypatch.setattr(memory_promise, "planned_bytes", lambda plan: 1000)
    assert memory_promise.main(run) == 1


def test_a_model_that_is_not_there_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert memory_promise.main([str(tmp_path / "none")]) == 1
    assert "error: " in capsys.readouterr().err
