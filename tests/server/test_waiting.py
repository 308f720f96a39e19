"""Clients that wait, leave, read slowly, or never finish: signs of life, and nothing held for those who are gone."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from localrun.engine.process.protocol import Generate
from localrun.server.limits import ServerLimits
from tests.server.raw import Stream, post, send
from tests.server.running import PATIENCE_S, Running, serving, wait_until
from tests.server.scripted import ScriptedEngine, hello

HI = [{"role": "user", "content": "Hi"}]
REQUESTS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": HI, "stream": True}),
    ("/v1/completions", {"prompt": "Hi", "stream": True}),
    ("/v1/responses", {"input": "Hi", "stream": True}),
    ("/v1/messages", {"messages": HI, "max_tokens": 50, "stream": True}),
]


class Gate:
    """An engine whose answers wait until they are let go."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.engine = ScriptedEngine(self._play)

    def _play(self, command: Generate) -> Iterator[str]:
        while not self.open.wait(0.01) and not self.engine._stopping.is_set():
            pass
        yield from hello(command)


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open.set()


@pytest.mark.parametrize(("path", "body"), REQUESTS)
def test_waiting_client_gets_headers_at_once_its_place_and_its_progress(path: str, body: Any, gate: Gate) -> None:
    with serving(gate.engine, keep_alive_s=0.02) as running:
        first = Stream(running, path, body)
        first.until("text/event-stream")
        wait_until(gate.engine.running.is_set)
        second = Stream(running, path, body)
        second.until('"state":"queued"', '"requests_ahead":1')
        first.until('"state":"prompt"', '"prompt_done":')
        gate.open.set()
        for stream in (first, second):
            stream.until("0\r\n\r\n")  # the end of a chunked body
            assert "Hello" in stream.text
            stream.close()


@pytest.mark.parametrize(("path", "body"), REQUESTS)
def test_signs_of_life_are_of_the_kind_that_clients_count(path: str, body: Any, gate: Gate) -> None:
    with serving(gate.engine, keep_alive_s=0.02) as running:
        stream = Stream(running, path, body)
        kind = {"/v1/messages": '"message_delta"', "/v1/responses": '"response.in_progress"'}.get(path, '"choices"')
        stream.until('"localrun"')
        line = next(line for line in stream.text.splitlines() if '"localrun"' in line)
        assert kind in line
        gate.open.set()
        stream.until("0\r\n\r\n")
        stream.close()


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(("path", "body"), REQUESTS)
def test_client_that_leaves_is_forgotten_waiting_or_running(path: str, body: Any, stream: bool, gate: Gate) -> None:
    with serving(gate.engine) as running:
        running_one = Stream(running, path, {**body, "stream": stream})
        wait_until(gate.engine.running.is_set)
        waiting_one = Stream(running, path, {**body, "stream": stream})
        wait_until(lambda: running.dispatcher.n_waiting == 1)
        waiting_one.close()
        wait_until(lambda: running.dispatcher.n_waiting == 0)
        running_one.close()
        wait_until(lambda: not gate.engine.running.is_set())
        wait_until(lambda: [line.outcome for line in running.lines] == ["left", "left"])
        waited, begun = (line.prompt_tokens for line in running.lines)
        gate.open.set()
        assert post(running, path, {**body, "stream": False}).status == 200
        wait_until(lambda: len(running.lines) == 3)
        assert (waited, begun) == (0, running.lines[-1].prompt_tokens)
        assert begun > 0
    assert len(gate.engine.commands) == 2  # the one that waited was never begun


def test_full_queue_is_each_apis_own_refusal(gate: Gate) -> None:
    with serving(gate.engine, limits=ServerLimits(queue=1)) as running:
        streams = [Stream(running, *REQUESTS[0])]
        wait_until(gate.engine.running.is_set)
        streams.append(Stream(running, *REQUESTS[0]))
        wait_until(lambda: running.dispatcher.n_waiting == 1)
        for path, body in REQUESTS:
            reply = post(running, path, body)
            assert reply.status == (529 if path == "/v1/messages" else 429)
            assert int(reply.headers["retry-after"]) >= 1
        claude = post(running, *REQUESTS[3]).json
        assert claude["error"]["type"] == "overloaded_error"
        for stream in streams:
            stream.close()


def test_sdks_try_again_when_the_queue_is_full(gate: Gate) -> None:
    with serving(gate.engine, limits=ServerLimits(queue=1)) as running:
        running.dispatcher._mean_s = 0.1  # else they wait for what an answer usually takes
        streams = [Stream(running, *REQUESTS[0])]
        wait_until(gate.engine.running.is_set)
        streams.append(Stream(running, *REQUESTS[0]))
        wait_until(lambda: running.dispatcher.n_waiting == 1)
        with (
            openai.OpenAI(base_url=f"{running.url}/v1", api_key="x", max_retries=3) as client,
            ThreadPoolExecutor(1) as pool,
        ):
            answer = pool.submit(client.chat.completions.create, model="m", messages=HI)  # type: ignore[arg-type]
            wait_until(lambda: 'localrun_requests_total{api="chat",outcome="overloaded"}' in _metrics(running))
            gate.open.set()
            assert answer.result().choices[0].message.content == "Hello! How can I help you?"
        for stream in streams:
            stream.close()


def _metrics(running: Running) -> str:
    return send(running, "GET", "/metrics").body.decode()


def test_timeout_of_an_sdk_leaves_nothing_behind(gate: Gate) -> None:
    with serving(gate.engine) as running:
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="x", max_retries=0, timeout=0.3)
        with client, pytest.raises(openai.APITimeoutError):
            client.chat.completions.create(model="m", messages=HI)  # type: ignore[arg-type]
        wait_until(lambda: not gate.engine.running.is_set())


def test_slow_reader_does_not_hold_the_engine() -> None:
    long = ScriptedEngine(lambda command: ["word " * 200] * 400)
    with serving(long, limits=ServerLimits(write_s=0.5)) as running:
        lazy = Stream(running, *REQUESTS[0])  # never reads
        wait_until(lambda: long.commands and not long.running.is_set())
        assert post(running, "/v1/chat/completions", {"messages": HI, "max_tokens": 1}).status == 200
        wait_until(lambda: len(running.lines) == 2)
        lazy.close()


def test_half_open_connections_are_closed() -> None:
    with serving(ScriptedEngine(), limits=ServerLimits(read_s=0.3)) as running:
        for text in (b"", b"POST /v1/chat/completions HTTP/1.1\r\nHost: loc", b"GET /health HTTP/1.1\r\n"):
            with (
                socket.create_connection(("127.0.0.1", running.port), timeout=PATIENCE_S) as sock,
                contextlib.suppress(ConnectionError),  # closed before this machine came to write
            ):
                sock.sendall(text)
                assert sock.recv(1000) == b""
        wait_until(lambda: _told_without_a_body(running).startswith(b"HTTP/1.1 400 "))


def _told_without_a_body(running: Running) -> bytes:
    """What comes back for headers without their body; nothing if this machine was slower with the headers than it may."""
    with socket.create_connection(("127.0.0.1", running.port), timeout=PATIENCE_S) as sock:
        try:
            sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
            return sock.recv(1000)
        except ConnectionError:
            return b""


def test_stop_ends_the_running_answer_in_the_apis_own_way(gate: Gate) -> None:
    with serving(gate.engine, patience_s=0.1, keep_alive_s=0.02) as running:
        answering = Stream(running, *REQUESTS[3])
        wait_until(gate.engine.running.is_set)
        waiting = Stream(running, *REQUESTS[2])
        wait_until(lambda: running.dispatcher.n_waiting == 1)
        running.server.stop()
        waiting.until("response.failed", "stopping")
        answering.until("event: error", "stopping")


def test_stop_lets_a_running_answer_end(gate: Gate) -> None:
    with serving(gate.engine, patience_s=PATIENCE_S) as running:
        answering = Stream(running, *REQUESTS[0])
        wait_until(gate.engine.running.is_set)
        running.server.stop()
        wait_until(lambda: running.dispatcher.closing)
        gate.open.set()
        answering.until("[DONE]")
        assert '"finish_reason":"stop"' in answering.text


def test_crowd_with_aborts_gets_its_own_answers() -> None:
    """Forty clients at once, every third leaves: no answer is mixed up, nothing stays behind."""
    engine = ScriptedEngine(lambda command: [str(command.messages[-1]["content"]), " ", "done"], delay_s=0.001)
    with serving(engine) as running:
        threads_before = _threads()

        def ask(i: int) -> str | None:
            body = {"messages": [{"role": "user", "content": f"number {i}"}], "stream": i % 2 == 0}
            if i % 3 == 0:
                stream = Stream(running, "/v1/chat/completions", body)
                time.sleep(0.001 * (i % 7))
                stream.close()
                return None
            reply = post(running, "/v1/chat/completions", body)
            assert reply.status == 200
            if not body["stream"]:
                return str(reply.json["choices"][0]["message"]["content"])
            deltas = [data["choices"][0]["delta"] for _, data in reply.events if data != "[DONE]"]
            return "".join(delta.get("content", "") for delta in deltas)

        with ThreadPoolExecutor(40) as pool:
            answers = list(pool.map(ask, range(40)))
        assert all(text in (None, f"number {i} done") for i, text in enumerate(answers))
        wait_until(lambda: len(running.lines) >= sum(text is not None for text in answers))
        wait_until(lambda: running.dispatcher.n_waiting == 0 and not running.dispatcher.busy)
        assert _threads() <= threads_before


def _threads() -> set[threading.Thread]:
    """All but those of asyncio's pool, which stay for the next question: how many they are depends on the cores."""
    return {thread for thread in threading.enumerate() if not thread.name.startswith("asyncio_")}
