"""The interface with a real engine process: a tiny random model that understands text, and a kill in the middle."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from localrun.engine.options import EngineOptions
from localrun.engine.process.protocol import Stats
from localrun.tui.app import Launch, LocalrunApp
from localrun.tui.controllers.monitor import Monitor
from localrun.tui.options import ChatOptions
from tests.engine.models import write_chat_model
from tests.tui.fake_engine import FakeEngine
from tests.tui.support import Talk

pytestmark = pytest.mark.engine_process

N_CTX = 32768
"""More than an unlimited answer reaches before a busy machine shows its first words."""


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("model") / "chat.gguf")


async def test_a_real_engine_answers_is_killed_and_answers_again(
    chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[Stats] = []
    show = Monitor.show
    monkeypatch.setattr(Monitor, "show", lambda monitor, event: (looks.append(event.stats), show(monitor, event))[1])
    launch = Launch(model=chat_model, options=EngineOptions(n_ctx=N_CTX), chat=replace(ChatOptions(), max_tokens=12))
    app = LocalrunApp(launch, store_path=tmp_path / "c.sqlite3")
    async with app.run_test(size=(100, 30)) as pilot:
        talk = Talk(app, pilot, FakeEngine(lambda error: None))
        await talk.until(lambda: app.chat is not None and app.chat.is_mounted)
        await talk.until(lambda: talk.screen.model.facts or talk.errors)
        assert talk.errors == []
        await talk.ask("Hello")
        assert talk.errors == []
        answer = talk.screen.chat.entries[-1].message
        n_new = answer.details["timings"]["new_tokens"]
        assert n_new > 0
        assert answer.state == ("length" if n_new == 12 else "complete")
        n_looks = len(looks)
        talk.screen.monitor.look()
        await talk.until(lambda: len(looks) > n_looks and looks[-1].telemetry["tokens"], "a look after the answer")
        found = [look.telemetry["hits"] for look in looks]
        asked = [hits + look.telemetry["misses"] for hits, look in zip(found, looks, strict=True)]
        steps = [step for step in zip(np.diff(found, prepend=0), np.diff(asked, prepend=0), strict=True) if step[1]]
        assert talk.screen.monitor.status().hit_rate == steps[-1][0] / steps[-1][1]

        talk.screen.current.set_options(replace(talk.screen.current.options, max_tokens=None))
        await talk.type("Go on for long")
        await talk.until(
            lambda: talk.screen.asking.answering.answer and talk.screen.asking.answering.answer.n_tokens > 3
        )
        pid = talk.screen.model.link.engine.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await talk.until(lambda: talk.errors and not talk.screen.asking.answering.running)
        assert "SIGKILL" in talk.errors[0]
        partial = talk.screen.chat.entries[-1].message
        assert partial.state == "failed"
        assert partial.content

        await talk.until(lambda: talk.screen.model.link.engine.pid not in (None, pid), "another process")
        await talk.until(lambda: talk.screen.model.facts is not None and not talk.screen.model.loading)
        await talk.ask(
            "/new"
        )  # how far the partial answer came is up to the machine, and so is whether it fits with another
        talk.screen.current.set_options(replace(talk.screen.current.options, max_tokens=8))
        await talk.ask("And now?")
        answer = talk.screen.chat.entries[-1].message
        assert answer.state == ("length" if answer.details["timings"]["new_tokens"] == 8 else "complete")
        engine = talk.screen.model.link.engine
        assert engine.count_tokens("Hello there") > 0
    assert not engine.alive
