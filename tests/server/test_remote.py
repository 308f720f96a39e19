"""A server as another program's engine: windows of `localrun chat --server` share one model."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from localrun.cli import main
from localrun.engine.process.protocol import Delta, Finished, Generate, Ready
from localrun.errors import ContextFullError, EngineDiedError, LocalrunError, UsageError
from localrun.server.remote import RemoteEngine
from tests.server.running import Running, serving, wait_until
from tests.server.scripted import ScriptedEngine, call_text, calls_text, hello

HI = Generate(messages=({"role": "user", "content": "Hi"},))


@pytest.fixture
def remote(running: Running) -> Iterator[RemoteEngine]:
    with RemoteEngine(running.url) as remote:
        (ready,) = remote.load()
        assert isinstance(ready, Ready)
        yield remote


def text_of(remote: RemoteEngine, command: Generate = HI) -> str:
    events = list(remote.generate(command))
    assert isinstance(events[-1], Finished)
    return "".join(event.text for event in events if isinstance(event, Delta) and event.kind == "text")


def test_events_are_the_engines_own(remote: RemoteEngine, engine: ScriptedEngine) -> None:
    assert remote.facts == engine.facts
    assert text_of(remote) == "Hello! How can I help you?"
    engine.play = lambda command: calls_text(call_text("now", n=1))
    far = [event for event in remote.generate(HI) if not isinstance(event, Finished)]
    near = [event for event in engine.generate(HI) if not isinstance(event, Finished)]
    assert [type(event) for event in far] == [type(event) for event in near]


def test_windows_share_the_model(running: Running, engine: ScriptedEngine) -> None:
    engine.delay_s = 0.005
    answers: list[str] = []

    def window() -> None:
        with RemoteEngine(running.url) as remote:
            answers.append(text_of(remote))

    threads = [threading.Thread(target=window) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert answers == ["Hello! How can I help you?"] * 3


def test_counters_and_lengths(remote: RemoteEngine, engine: ScriptedEngine) -> None:
    assert remote.stats() == engine.stats()
    assert remote.count_tokens("x" * 40) == 11


def test_stop_and_closed_iterators_stop_the_computing(
    remote: RemoteEngine, running: Running, engine: ScriptedEngine
) -> None:
    engine.play = lambda command: iter(lambda: "word ", None)
    for how in ("close", "stop"):
        events = remote.generate(HI)
        next(events)
        wait_until(engine.running.is_set)
        if how == "close":
            events.close()  # type: ignore[attr-defined]
        else:
            remote.stop()
            *_, last = events
            assert isinstance(last, Finished)
            assert last.reason == "stopped"
        wait_until(lambda: not engine.running.is_set())
    engine.play = hello
    assert text_of(remote) == "Hello! How can I help you?"


def test_errors_keep_their_kind(remote: RemoteEngine, engine: ScriptedEngine) -> None:
    engine.play = lambda command: [ContextFullError("full")]
    with pytest.raises(ContextFullError, match="full"):
        list(remote.generate(HI))
    with pytest.raises(LocalrunError, match="role"):
        list(remote.generate(Generate(messages=({"role": "king", "content": ""},))))


def test_server_that_has_gone_is_a_dead_engine(engine: ScriptedEngine) -> None:
    deaths: list[EngineDiedError] = []
    with serving(engine) as running:
        remote = RemoteEngine(running.url, on_death=deaths.append)
        list(remote.load())
    with pytest.raises(EngineDiedError, match="127"):
        list(remote.generate(HI))
    assert not remote.alive
    assert len(deaths) == 1


def test_key_is_needed_and_given(engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(engine, keys=("secret",)) as running:
        with pytest.raises(LocalrunError, match="key"):
            list(RemoteEngine(running.url).load())
        assert text_of(RemoteEngine(running.url, key="secret")).startswith("Hello")


@pytest.mark.parametrize("url", ["https://x", "ftp://x", "http://", "http://x:y"])
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(UsageError):
        RemoteEngine(url)


def test_chat_uses_a_server(running: Running, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "--server", running.url]) == 0
    out, err = capsys.readouterr()
    assert "Hello! How can I help you?" in out
    assert "Scripted V4" in err
    assert main(["chat", "--server", running.url, "some-model"]) == 2
    assert main(["chat", "--server", "http://127.0.0.1:9"]) == 1
    assert "localrun serve" in capsys.readouterr().err
