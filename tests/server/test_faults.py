"""What a client learns of an engine's error: whose fault it is, and nothing about the server's folders."""

from __future__ import annotations

import logging
from typing import Any

import anthropic
import openai
import pytest

from localrun import errors
from localrun.engine.process.protocol import Generate
from localrun.server.faults import from_engine
from tests.server.raw import Reply, post
from tests.server.running import Running, serving
from tests.server.scripted import ScriptedEngine

HI: list[Any] = [{"role": "user", "content": "Hi"}]
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")

REQUEST = ("UsageError", "MessageError", "ContextFullError")
RESOURCES = ("BudgetError", "GpuMemoryError", "DiskSpaceError", "HostError")
FILES = (
    "LocalrunError",
    "FormatError",
    "CheckpointError",
    "UnsupportedModelError",
    "StoreError",
    "ChecksumError",
    "DecodeError",
    "IncompatibleLibraryError",
)
STATUS = {
    **dict.fromkeys(REQUEST, 400),
    **dict.fromkeys((*RESOURCES, "EngineDiedError", "StoppedError"), 503),
    **dict.fromkeys(FILES, 500),
}


def test_every_class_of_error_is_tested() -> None:
    classes = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert classes == set(STATUS)


def ask(running: Running, path: str) -> Reply:
    body: dict[str, Any] = {"messages": HI, "max_tokens": 9}
    if path == "/v1/completions":
        body = {"prompt": "Hi"}
    elif path == "/v1/responses":
        body = {"input": "Hi"}
    return post(running, path, body)


@pytest.mark.parametrize("path", PATHS)
def test_errors_in_an_answer_have_the_status_of_whose_fault_they_are(
    running: Running, engine: ScriptedEngine, path: str
) -> None:
    found = {}
    for name in STATUS:
        error = getattr(errors, name)("told", hint="way out")
        engine.play = lambda command, error=error: iter([error])  # type: ignore[misc]
        reply = ask(running, path)
        found[name] = reply.status
        kinds = {400: "invalid_request_error", 500: "server_error", 503: "server_error"}
        if path == "/v1/messages":
            kinds |= {500: "api_error", 503: "overloaded_error"}
        assert reply.json["error"]["type"] == kinds[reply.status]
        assert ("retry-after" in reply.headers) == (reply.status == 503)
        if name != "StoppedError":
            assert reply.json["error"]["message"].endswith("told (way out)")
    assert found == STATUS


class Unloadable(ScriptedEngine):
    """An engine whose process died, and whose model can't be loaded again."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def generate(self, command: Generate) -> Any:
        self.facts = None
        raise self.error
        yield from ()


@pytest.mark.parametrize("name", [*REQUEST[:2], *RESOURCES, *FILES])
def test_model_that_can_not_be_loaded_is_never_the_requests_fault(name: str) -> None:
    error = getattr(errors, name)("/models/V4 Flash/v4.gguf: no such file", hint="see ~/.config/localrun/config.toml")
    with serving(Unloadable(error)) as running:
        for path in PATHS:
            reply = ask(running, path)
            message = "the model can't be loaded: v4.gguf: no such file (see config.toml)"
            assert (reply.status, reply.json["error"]["message"]) == (503, message)
            assert reply.headers["retry-after"] == "5"


def test_sdks_try_again_what_is_not_the_requests_fault(running: Running, engine: ScriptedEngine) -> None:
    n_tries = 0

    def recover(command: Generate) -> Any:
        nonlocal n_tries
        n_tries += 1
        return iter([errors.StoreError("short read")]) if n_tries % 2 else iter(["fine"])

    engine.play = recover
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="any", max_retries=1) as client:
        answer = client.chat.completions.create(model="m", messages=HI)
    assert (answer.choices[0].message.content, n_tries) == ("fine", 2)
    with anthropic.Anthropic(base_url=running.url, api_key="any", max_retries=1) as other:
        message = other.messages.create(model="m", messages=HI, max_tokens=9)
    assert (message.content[0].to_dict()["text"], n_tries) == ("fine", 4)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/al/models/v4.gguf: row of 1000", "v4.gguf: row of 1000"),
        ("/home/al/My Models/v4 flash.gguf: row 3/4", "v4 flash.gguf: row 3/4"),
        ("~/models/v4.gguf: short", "v4.gguf: short"),
        ("/srv/a:b/v4.gguf:blk.3: short", "v4.gguf:blk.3: short"),
        ("copy '/a/b c/d' to '/e/f'", "copy 'd' to 'f'"),
        ("read 3/4 of blk.3, 12 GB/s; and/or", "read 3/4 of blk.3, 12 GB/s; and/or"),
        ("http://127.0.0.1:80/v1: gone", "http://127.0.0.1:80/v1: gone"),
    ],
)
def test_paths_are_told_without_their_folders_and_logged_with_them(
    caplog: pytest.LogCaptureFixture, text: str, shown: str
) -> None:
    with caplog.at_level(logging.ERROR, logger="localrun.server.faults"):
        fault = from_engine(errors.FormatError(text, hint="localrun verify /srv/models"))
    assert fault.message == f"{shown} (localrun verify models)"
    assert caplog.messages == [f"FormatError: {text} (localrun verify /srv/models)"]


def test_request_s_own_text_is_told_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    fault = from_engine(errors.UsageError("the schema can't be enforced: /properties/a/b: no type"))
    assert fault.message == "the schema can't be enforced: /properties/a/b: no type"
    assert caplog.messages == []


def test_bug_of_ours_is_logged_with_its_traceback_and_told_without(caplog: pytest.LogCaptureFixture) -> None:
    fault = from_engine(ZeroDivisionError("/home/al/secret"))
    assert (fault.status, fault.message) == (500, "internal error; the server's log says more")
    (record,) = caplog.records
    assert record.exc_info is not None
    assert str(record.exc_info[1]) == "/home/al/secret"
