"""The engine's own messages over HTTP, as another program's bytes."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from localrun.engine.facts import Timings
from localrun.engine.process.protocol import Delta, Failed, Finished, Generate, Stats
from localrun.engine.process.wire import decode_event
from localrun.server.choices import Choice
from localrun.server.faults import ApiError
from localrun.server.native import PREFIX, NativeWriter
from tests.server.raw import Stream, post, send
from tests.server.running import PATIENCE_S, Running, serving
from tests.server.scripted import ScriptedEngine

HI = {"messages": [{"role": "user", "content": "Hi"}]}
END = Finished(request=1, reason="stopped", timings=Timings(), seed=7)


def test_an_answer_is_a_line_per_event(running: Running, engine: ScriptedEngine) -> None:
    reply = post(running, f"{PREFIX}/generate", HI)
    assert reply.headers["content-type"] == "application/x-ndjson"
    events = [decode_event(line) for line in reply.body.splitlines() if line]
    assert events == list(ScriptedEngine().generate(Generate(messages=HI["messages"])))
    assert "".join(event.text for event in events if isinstance(event, Delta)) == "Hello! How can I help you?"
    assert len(engine.commands) == 1


def test_empty_lines_come_while_nothing_happens() -> None:
    engine = ScriptedEngine(prompt_s=PATIENCE_S)  # that is, until it is stopped
    with serving(engine, keep_alive_s=0.02) as running:
        stream = Stream(running, f"{PREFIX}/generate", HI)
        stream.until('"PromptProgress"', "\r\n1\r\n\n\r\n")
        engine.stop()
        stream.until('"stopped"', "0\r\n\r\n")
        stream.close()


def test_what_an_interface_shows(running: Running, engine: ScriptedEngine) -> None:
    assert send(running, "GET", f"{PREFIX}/facts").json == json.loads(msgspec.json.encode(engine.facts))
    stats = decode_event(send(running, "GET", f"{PREFIX}/stats?expert_map=1").body)
    assert isinstance(stats, Stats)
    assert stats.telemetry["hit_rate"] == 0.5
    assert post(running, f"{PREFIX}/count", {"text": "x" * 40}).json == {"n_tokens": engine.tokenize("x" * 40)[-1] + 1}


def test_facts_are_not_there_before_the_model_is(running: Running, engine: ScriptedEngine) -> None:
    engine.kill()
    reply = send(running, "GET", f"{PREFIX}/facts")
    assert (reply.status, reply.headers["retry-after"]) == (503, "1")


@pytest.mark.parametrize("body", [{"messages": 3}, {"max_tokens": "x"}, {"sampling": {"temperature": []}}])
def test_a_field_of_another_kind_is_refused(running: Running, engine: ScriptedEngine, body: dict[str, Any]) -> None:
    assert post(running, f"{PREFIX}/generate", body).status == 400
    assert engine.commands == []


def test_a_command_is_what_its_address_says(running: Running, engine: ScriptedEngine) -> None:
    assert post(running, f"{PREFIX}/generate", {**HI, "type": "Close"}).status == 200
    assert [type(command) for command in engine.commands] == [Generate]


def test_an_error_is_the_last_event_unless_the_answer_has_ended() -> None:
    writer = NativeWriter()
    error = ApiError("internal", "the drive is gone")
    error.engine_kind = "StoreError"
    (line,) = writer.error(error).splitlines()
    assert decode_event(line) == Failed(request=0, kind="StoreError", message="the drive is gone")
    assert json.loads(writer.event(0, END))["reason"] == "stopped"
    writer.choices = [Choice(finished=END)]
    assert writer.error(error) == b""
    assert (writer.keep_alive({}), writer.closing()) == (b"\n", b"")
