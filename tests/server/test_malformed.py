"""Thousands of requests that are wrong in every way: never a 500, never a dead engine."""

from __future__ import annotations

import copy
import json
import random
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from localrun.server.limits import ServerLimits
from tests.server.raw import post, send
from tests.server.running import PATIENCE_S, Running, serving
from tests.server.scripted import ScriptedEngine

SMALL = ServerLimits(body_bytes=20_000, depth=50, messages=50, tools=10, schema_bytes=5000, schema_depth=20)
TOOL = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}},
}
GOOD: list[tuple[str, dict[str, Any]]] = [
    (
        "/v1/chat/completions",
        {
            "model": "m",
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": [{"type": "text", "text": "t"}]},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
                },
                {"role": "tool", "tool_call_id": "c", "content": "r"},
            ],
            "tools": [TOOL],
            "tool_choice": {"type": "function", "function": {"name": "f"}},
            "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}},
            "stop": ["a"],
            "logit_bias": {"1": 1.5},
            "logprobs": True,
            "top_logprobs": 2,
            "n": 1,
            "stream_options": {"include_usage": True},
        },
    ),
    (
        "/v1/messages",
        {
            "model": "m",
            "max_tokens": 10,
            "system": [{"type": "text", "text": "s"}],
            "messages": [
                {"role": "user", "content": "q"},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": "t", "signature": "s"},
                        {"type": "tool_use", "id": "c", "name": "f", "input": {}},
                    ],
                },
                {
                    "role": "user",
                    "content": [
                        {"type": "tool_result", "tool_use_id": "c", "content": [{"type": "text", "text": "r"}]}
                    ],
                },
            ],
            "tools": [{"name": "f", "input_schema": {"type": "object"}}],
            "tool_choice": {"type": "auto"},
            "thinking": {"type": "enabled", "budget_tokens": 1024},
            "output_config": {"effort": "high", "format": {"type": "json_schema", "schema": {"type": "object"}}},
        },
    ),
    (
        "/v1/responses",
        {
            "model": "m",
            "input": [
                {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "t"}]},
                {
                    "type": "reasoning",
                    "id": "r",
                    "summary": [{"type": "summary_text", "text": "t"}],
                    "encrypted_content": "x",
                },
                {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c", "output": "o"},
            ],
            "tools": [
                {"type": "function", "name": "f", "parameters": {"type": "object"}},
                {"type": "namespace", "name": "n", "tools": []},
                {
                    "type": "custom",
                    "name": "p",
                    "format": {"type": "grammar", "syntax": "lark", "definition": "start: A"},
                },
            ],
            "reasoning": {"effort": "low"},
            "text": {"format": {"type": "text"}},
            "include": ["reasoning.encrypted_content"],
        },
    ),
    ("/v1/completions", {"prompt": "p", "max_tokens": 3, "logprobs": 1}),
    ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "q"}]}),
    ("/tokenize", {"content": "text"}),
]
JUNK: list[Any] = [
    *(
        None,
        True,
        0,
        -1,
        1.5,
        10**30,
        1e308,
        "",
        "x",
        "\ud83d",
        "\x00",
        "<｜User｜>",
        [],
        {},
        [None],
        [[]],
        [{}],
        {"type": None},
    ),
    *(
        {"type": "image"},
        {"type": "text"},
        {"type": "text", "text": 5},
        {"role": "user"},
        [{"type": "x"}],
        {"a": {"b": [1]}},
        -(2**63),
    ),
]
ROUNDS = 120
"""For each endpoint; `tools/serve_load.py --malformed N` does more."""


@pytest.fixture(scope="module")
def small() -> Iterator[Running]:
    with serving(ScriptedEngine(), limits=SMALL) as running:
        yield running


def spoil(value: Any, draw: random.Random) -> Any:
    """A copy with one place changed, taken away or doubled."""
    value = copy.deepcopy(value)
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        for key in keys:
            places.append((node, key))
            walk(node[key])

    walk(value)
    node, key = draw.choice(places)
    what = draw.random()
    if what < 0.7:
        node[key] = draw.choice(JUNK)
    elif what < 0.85:
        del node[key]
    elif isinstance(node, list):
        node.append(node[key])
    else:
        node[str(key) + "s"] = node[key]
    return value


@pytest.mark.parametrize(("path", "good"), GOOD, ids=[path for path, _ in GOOD])
def test_spoiled_requests_are_answered_or_refused(small: Running, path: str, good: dict[str, Any]) -> None:
    draw = random.Random(path)
    assert post(small, path, good).status == 200
    for _ in range(ROUNDS):
        body = spoil(good, draw)
        if draw.random() < 0.3:
            body = spoil(body, draw) if body else body
        reply = post(small, path, body)
        assert reply.status in (200, 400, 404, 413), (reply.status, reply.body, body)
        if reply.status != 200:
            assert reply.json["error"]["message"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b"null", 400),
        (b'"x"', 400),
        (b"\xff\xfe", 400),
        (b'{"messages": NaN}', 400),
        (b"[" * 10_000, 400),
        (b'{"a":' * 60 + b"1" + b"}" * 60, 400),
        (b" " * 30_000, 413),
        (b'{"messages": [{"role": "user", "content": "cut \\ud83d"}]}', 200),
        (b'\xef\xbb\xbf{"messages": [{"role": "user", "content": "x"}]}', 200),
    ],
)
def test_bodies_that_are_no_requests(small: Running, body: bytes, status: int) -> None:
    assert post(small, "/v1/chat/completions", body).status == status


def test_limits_are_named(small: Running) -> None:
    hi = {"role": "user", "content": "x"}
    deep: dict[str, Any] = {"type": "object"}
    for _ in range(SMALL.schema_depth):
        deep = {"type": "object", "properties": {"a": deep}}
    wide = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(300)}}
    for body, says in (
        ({"messages": [hi] * 60}, "50 maximum"),
        ({"messages": [hi], "tools": [TOOL] * 20}, "10 maximum"),
        ({"messages": [hi], "tools": [TOOL, TOOL]}, "duplicate tool"),
        ({"messages": [hi], "tools": [{"type": "function", "function": {"name": "f", "parameters": wide}}]}, "bytes"),
        ({"messages": [hi], "response_format": {"type": "json_schema", "json_schema": {"schema": deep}}}, "deeper"),
    ):
        reply = post(small, "/v1/chat/completions", body)
        assert reply.status == 400
        assert says in reply.json["error"]["message"]


@pytest.mark.parametrize(
    "text",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\nHost: x\r\n\r\n",
        b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
        b"GET /" + b"\xff" * 50 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
)
def test_what_is_no_http_is_no_harm(small: Running, text: bytes) -> None:
    with socket.create_connection(("127.0.0.1", small.port), timeout=PATIENCE_S) as sock:
        sock.sendall(text)
        sock.shutdown(socket.SHUT_WR)
        reply = b""
        try:
            while data := sock.recv(65536):
                reply += data
        except ConnectionResetError:
            pass  # it did not want to read all that
    assert not reply.startswith(b"HTTP/1.1 5")
    assert send(small, "GET", "/health").status == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/v1/embeddings", 404),
        ("PUT", "/", 405),
        ("GET", "/../etc/passwd", 404),
        ("POST", "/v1/audio/speech", 404),
    ],
)
def test_what_is_not_served_says_so(small: Running, method: str, path: str, status: int) -> None:
    reply = send(small, method, path)
    assert reply.status == status
    assert json.loads(reply.body)["error"]["message"]


def test_text_that_can_not_fit_is_refused_without_counting_it() -> None:
    with serving(ScriptedEngine(n_ctx=1000)) as running:
        reply = post(
            running, "/v1/messages", {"messages": [{"role": "user", "content": "x" * 1_000_000}], "max_tokens": 5}
        )
    assert reply.status == 400
    assert "prompt is too long: 31250 tokens > 1000 maximum" in reply.json["error"]["message"]
