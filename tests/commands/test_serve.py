"""`localrun serve` as a user runs it: a process, signals, and what stands on its two streams."""

from __future__ import annotations

import http.client
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from localrun.cli import main
from localrun.commands.output import Output
from localrun.commands.serve import _log_lines, model_name
from localrun.server.client_config import CLIENTS
from tests.engine.models import write_chat_model

PATIENCE_S = 300.0
"""A first load may have to compile kernels."""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--host", "0.0.0.0"], "no API key"),
        (["--host", "example.com"], "no API key"),
        (["--api-key", " "], "empty"),
        (["--queue", "0"], "--queue"),
    ],
)
def test_wrong_usage_is_told_before_anything_is_loaded(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_port_that_is_taken_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", "--port", str(taken.getsockname()[1])]) == 1
    assert "can't listen" in capsys.readouterr().err


@pytest.mark.parametrize("client", CLIENTS)
def test_configurations_name_the_address_and_can_be_piped(
    client: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# mine\nsecret-key\n")
    arguments = ["serve", "--print-config", client, "--port", "9001", "--model-name", "v4", "--api-key-file", str(keys)]
    assert main(arguments) == 0
    text, hint = capsys.readouterr()
    assert "http://127.0.0.1:9001" in text
    assert "v4" in text + hint
    assert ("secret-key" in text + hint) == (client != "zed"), "Zed keeps keys elsewhere"
    if text.startswith("{"):
        json.loads(text)


def test_names_of_models_are_one_word() -> None:
    assert model_name("DeepSeek V4 (Flash)") == "DeepSeek-V4-Flash"
    assert model_name("<>") == "model"


class Serve:
    """A running `localrun serve`; its notes are collected."""

    def __init__(self, model: Path, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "localrun.cli", "serve", str(model), "--port", "0", "--threads", "1", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        self.notes: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()
        self.port = int(self.until(r"127\.0\.0\.1:(\d+)"))

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.notes.append(line)

    def until(self, pattern: str) -> str:
        """The first group of the first note that matches."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            for line in list(self.notes):
                if match := re.search(pattern, line):
                    return match[1] if match.groups() else match[0]
            assert self.process.poll() is None, "".join(self.notes)
            time.sleep(0.02)
        raise AssertionError(f"no {pattern}: {''.join(self.notes)}")

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)


def until_it_answers(response: http.client.HTTPResponse) -> None:
    """Before its first words, a request may still wait."""
    while not re.search(rb'"content":"[^"]', response.readline()):
        pass


@pytest.mark.engine_process
def test_a_server_answers_logs_without_prompts_and_stops_in_order(tmp_path: Path) -> None:
    serve = Serve(write_chat_model(tmp_path / "chat.gguf"), "--context", "512", "--stop-after", "300")
    connection = serve.connection()
    body = {"messages": [{"role": "user", "content": "PRIVATE"}], "max_tokens": 3}
    connection.request("POST", "/v1/chat/completions", json.dumps(body))
    assert json.loads(connection.getresponse().read())["usage"]["completion_tokens"] <= 3
    serve.until(r"chat ok: prompt \d+")
    body = {**body, "max_tokens": 400, "min_tokens": 400, "stream": True}
    connection.request("POST", "/v1/chat/completions", json.dumps(body))
    response = connection.getresponse()
    until_it_answers(response)
    serve.process.send_signal(signal.SIGTERM)
    assert response.read().rstrip().endswith(b"[DONE]")  # the running answer may end
    assert serve.process.wait(PATIENCE_S) == 0
    assert "stopping" in "".join(serve.notes)
    assert "PRIVATE" not in "".join(serve.notes)
    assert serve.process.stdout is not None
    assert serve.process.stdout.read() == ""


@pytest.mark.engine_process
def test_second_signal_ends_the_answer_too(tmp_path: Path) -> None:
    serve = Serve(write_chat_model(tmp_path / "chat.gguf"), "--context", "32768", "--log-prompts")
    connection = serve.connection()
    body = {"messages": [{"role": "user", "content": "SHOWN"}], "max_tokens": 30000, "min_tokens": 30000}
    body["stream"] = True
    connection.request("POST", "/v1/chat/completions", json.dumps(body))
    response = connection.getresponse()
    until_it_answers(response)
    serve.until("SHOWN")
    serve.process.send_signal(signal.SIGINT)
    serve.until("Ctrl-C again")
    serve.process.send_signal(signal.SIGINT)
    assert b"server_stopping" in response.read()
    assert serve.process.wait(PATIENCE_S) == 0


def test_logging_is_as_it_was_after_the_server() -> None:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    with _log_lines(Output()):
        assert [type(handler).__name__ for handler in root.handlers] == ["_Notes"]
    assert (root.handlers, root.level) == before
