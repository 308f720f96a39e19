"""Conversion from the interface: a real process, watched to its end, stopped, and failing in words."""

from __future__ import annotations

import threading
from pathlib import Path

from textual.widgets import Button, Input, RichLog

from localrun.quant.open import open_model
from localrun.tui.conversion import Conversion, ConversionNews
from localrun.tui.screens.convert import ConvertScreen
from tests.checkpoints import write_small
from tests.tui.support import Setup

PATIENCE_S = 120.0


def run(source: Path, target: Path) -> list[ConversionNews]:
    """All news of one conversion."""
    news: list[ConversionNews] = []
    ended = threading.Event()

    def take(item: ConversionNews) -> None:
        news.append(item)
        if item.ended:
            ended.set()

    Conversion(source, target, ["--dense", "bf16"], take)
    assert ended.wait(PATIENCE_S)
    return news


def test_a_conversion_tells_its_plan_and_progress_and_leaves_a_model(tmp_path: Path) -> None:
    write_small(tmp_path / "src")
    news = run(tmp_path / "src", tmp_path / "dst")
    assert news[-1].error == ""
    assert any("output:" in item.note for item in news)
    assert any(item.total and item.done == item.total for item in news)
    assert open_model(tmp_path / "dst").moe_layers


def test_a_conversion_that_fails_says_why(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    news = run(tmp_path / "empty", tmp_path / "dst")
    assert news[-1].ended
    assert "empty" in news[-1].error


async def test_a_conversion_is_started_watched_and_its_result_loaded(setup: Setup, tmp_path: Path) -> None:
    write_small(tmp_path / "src")
    setup.size = (120, 40)
    async with setup.start() as talk:
        await talk.type(f"/convert {tmp_path / 'src'} {tmp_path / 'dst'}")
        screen = talk.app.screen
        assert isinstance(screen, ConvertScreen)
        assert screen.query_one("#source", Input).value == str(tmp_path / "src")
        await talk.pilot.click("#convert-start")
        assert talk.screen.conversion is not None
        assert talk.screen.conversion_status().startswith("converting")
        await talk.until(lambda: not screen.query_one("#convert-load", Button).disabled)
        assert any("wrote" in line.text for line in screen.query_one(RichLog).lines)
        await talk.pilot.click("#convert-load")
        await talk.until(lambda: len(talk.engine.loads) == 2)
        assert talk.engine.loads[-1][0] == str(tmp_path / "dst")


async def test_a_hidden_conversion_reports_its_failure_as_a_panel(setup: Setup, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    setup.size = (120, 40)
    async with setup.start() as talk:
        await talk.type(f"/convert {tmp_path / 'empty'} {tmp_path / 'dst'}")
        await talk.pilot.click("#convert-start")
        await talk.pilot.click("#convert-hide")
        await talk.until(lambda: talk.errors)
        assert "empty" in talk.errors[0]
        assert talk.screen.conversion_status() == ""
