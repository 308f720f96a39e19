"""Conversion from the interface: a real process, watched to its end, stopped, and failing in words."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import threading
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from textual.widgets import Button, Input, RichLog, Select, Static

from localrun.commands.convert import add_arguments
from localrun.quant.open import open_model
from localrun.tui.controllers.conversions import Conversions
from localrun.tui.converter_process import ConversionNews, ConverterProcess, news_of
from localrun.tui.screens.convert import ConvertScreen
from tests.checkpoints import write_small
from tests.tui.support import Setup

PATIENCE_S = 300.0


def run(source: Path, target: Path) -> list[ConversionNews]:
    """All news of one conversion."""
    news: list[ConversionNews] = []
    ended = threading.Event()

    def take(item: ConversionNews) -> None:
        news.append(item)
        if item.ended:
            ended.set()

    ConverterProcess(source, target, ["--dense", "bf16"], take)
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


@pytest.mark.parametrize("size", [(80, 24), (160, 50)])
async def test_a_conversion_is_started_watched_and_its_result_loaded(
    setup: Setup, tmp_path: Path, size: tuple[int, int]
) -> None:
    write_small(tmp_path / "src")
    setup.size = size
    async with setup.start() as talk:
        await talk.type(f"/convert {tmp_path / 'src'} {tmp_path / 'dst'}")
        screen = talk.app.screen
        assert isinstance(screen, ConvertScreen)
        assert screen.query_one("#source", Input).value == str(tmp_path / "src")
        await talk.click("#convert-start")
        conversions = talk.screen.conversions
        await talk.until(lambda: conversions.running is not None and conversions.status.startswith("converting"))
        await talk.until(lambda: not screen.query_one("#convert-load", Button).disabled)
        assert any("wrote" in line.text for line in screen.query_one(RichLog).lines)
        await talk.settled()
        rows = [
            screen.query_one(name).region
            for name in ("#convert-form", "#convert-rate", "#convert-bar", "#convert-load")
        ]
        assert all(above.bottom <= below.y for above, below in pairwise(rows)), "nothing covers how far it is"
        assert str(screen.query_one("#convert-rate", Static).render()) == "finished"
        await talk.click("#convert-load")
        await talk.until(lambda: len(talk.engine.loads) == 2)
        assert talk.engine.loads[-1][0] == str(tmp_path / "dst")


async def test_the_dialog_can_be_filled_and_started_by_keys_alone_in_a_small_terminal(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[Path, Path, list[str]]] = []

    def start(self: Conversions, source: Path, target: Path, options: list[str]) -> Any:
        started.append((source, target, options))
        return SimpleNamespace(running=True, last=ConversionNews(), source=source, target=target)

    monkeypatch.setattr(Conversions, "_start", start)
    async with setup.start() as talk:
        await talk.type("/convert ")
        screen = talk.app.screen
        await talk.press(*"src", "tab", *"dst", "enter")
        assert started == [(Path("src"), Path("dst"), [])]
    async with setup.start() as talk:
        await talk.type("/convert src dst")
        screen = talk.app.screen
        assert isinstance(screen, ConvertScreen)
        screen.query_one("#recipe", Select).value = "ram-64"
        screen.query_one("#base", Select).value = "q2_k"
        screen.query_one("#hot", Input).value = "mxfp4:12GiB, q8_0:1GiB"
        screen.query_one("#for-box", Input).value = "24GiB-vram,64GiB-ram"
        screen.query_one("#dense", Select).value = "q6_k"
        for field in screen.query("Input, Select"):
            field.focus()
            await talk.settled()
            assert screen.query_one("#dialog").region.contains_region(field.region), field.id
            for button in screen.query(Button):
                assert screen.region.contains_region(button.region), "buttons stay in view"
        await talk.focus(screen.query_one("#hot", Input))
        await talk.press("enter")
        words = started[-1][2]
        assert words == [
            *("--recipe", "ram-64", "--base", "q2_k", "--dense", "q6_k"),
            *("--hot", "mxfp4:12GiB", "--hot", "q8_0:1GiB", "--target", "24GiB-vram,64GiB-ram"),
        ]
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        parser.parse_args([*words, "src", "dst"])


WAITS = """
import os, signal, sys

def wait():
    os.kill(os.getpid(), signal.SIGSTOP)
    for _ in range(1000):  # here the interrupt is noticed
        pass

class Dying:
    def __del__(self):
        wait()

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            {where}()

sys.meta_path.insert(0, Finder())
"""


async def test_a_hidden_conversion_reports_its_failure_as_a_panel(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails once it is hidden: before, the dialog says so."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "sitecustomize.py").write_text(WAITS.format(module="localrun.quant.convert.converter", where="wait"))
    async with setup.start() as talk:
        await talk.type(f"/convert {tmp_path / 'empty'} {tmp_path / 'dst'}")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        await talk.click("#convert-start")
        await talk.until(lambda: talk.screen.conversions.running)
        process = talk.screen.conversions.running
        assert process is not None
        await asyncio.to_thread(os.waitid, os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        await talk.click("#convert-hide")
        await talk.until(lambda: not isinstance(talk.app.screen, ConvertScreen))
        os.kill(process.pid, signal.SIGCONT)
        await talk.until(lambda: talk.errors)
        assert "empty" in talk.errors[0]
        assert talk.screen.conversions.status == ""


@pytest.mark.parametrize(
    ("module", "where", "tells"),
    [("localrun.quant.convert.converter", "wait", True), ("localrun.interrupts", "Dying", False)],
    ids=["at work", "while the program is being imported"],
)
@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN], ids=["", "in the background"])
def test_a_conversion_that_is_stopped_says_so_and_what_it_is_good_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, where: str, tells: bool, handler: Any
) -> None:
    """Before the program can say so itself, it ends without a word, even where Python drops what an interrupt raises."""
    write_small(tmp_path / "src")
    (tmp_path / "sitecustomize.py").write_text(WAITS.format(module=module, where=where))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    news: list[ConversionNews] = []
    ended = threading.Event()

    def take(item: ConversionNews) -> None:
        news.append(item)
        if item.ended:
            ended.set()

    usual = signal.signal(signal.SIGINT, handler)
    try:
        process = ConverterProcess(tmp_path / "src", tmp_path / "dst", [], take)
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, usual)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
    process.stop()
    os.kill(process.pid, signal.SIGCONT)
    assert ended.wait(PATIENCE_S)
    assert news[-1].error == "stopped"
    assert news[-1].hint == "start it again to resume"
    assert any(item.note.startswith("interrupted") for item in news) == tells
    assert news_of({"event": "interrupted"}, ConversionNews()) == news[-1]
