"""What a program reads of a conversion: lines of JSON, not too many, and a last one that says how it ended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from localrun.commands.convert_output import ConvertOutput
from localrun.errors import LocalrunError
from localrun.quant.convert.writing import ConversionProgress


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, for the test to set."""
    time = [100.0]
    monkeypatch.setattr("localrun.commands.convert_output.time.monotonic", lambda: time[0])
    return time


def events(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_people_get_no_events(capsys: pytest.CaptureFixture[str]) -> None:
    out = ConvertOutput(as_json=False)
    out.note("a note")
    out.step("calibrating", 1, 2)
    out.finished(None)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "a note" in captured.err


def test_steps_are_told_five_times_a_second_at_most_and_the_last_always(
    now: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    out = ConvertOutput(as_json=True)
    for done in range(5):
        now[0] += 0.125
        out.step("calibrating", done, 5)
    out.step("calibrating", 5, 5)
    out.step("measuring", 0, 3)
    found = events(capsys)
    assert {event["event"] for event in found} == {"step"}
    assert [(event["step"], event["done"]) for event in found] == [
        ("calibrating", 0),
        ("calibrating", 2),
        ("calibrating", 4),
        ("calibrating", 5),
        ("measuring", 0),
    ]


def test_progress_has_bytes_rate_and_time_left(now: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    out = ConvertOutput(as_json=True)
    take = out.progress("base")
    take(ConversionProgress(0, 4000, 0, 0.0))
    now[0] += 1
    take(ConversionProgress(1500, 4000, 500, 10.0))
    now[0] += 0.1
    take(ConversionProgress(1600, 4000, 500, 10.1))
    take(ConversionProgress(4000, 4000, 500, 35.0))
    assert events(capsys) == [
        {
            "event": "progress",
            "step": "base",
            "done_bytes": done,
            "total_bytes": 4000,
            "bytes_per_s": rate,
            "remaining_s": s,
        }
        for done, rate, s in ((0, 0, None), (1500, 100, 25.0), (4000, 100, 0.0))
    ]


def test_the_last_event_says_how_it_ended(capsys: pytest.CaptureFixture[str]) -> None:
    out = ConvertOutput(as_json=True)
    out.finished(Path("/models/x"))
    out.finished(None)
    out.failed(LocalrunError("the drive is full", hint="free some space"))
    assert events(capsys) == [
        {"event": "finished", "path": "/models/x"},
        {"event": "finished", "path": None},
        {"event": "failed", "message": "the drive is full", "hint": "free some space"},
    ]
