"""Keys, names and origins."""

from __future__ import annotations

from collections.abc import Iterator

import anthropic
import openai
import pytest

from tests.server.raw import post, send
from tests.server.running import Running, serving
from tests.server.scripted import ScriptedEngine

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture(scope="module")
def locked() -> Iterator[Running]:
    with serving(ScriptedEngine(), keys=("secret-1", "secret-2"), origins=("https://good.example",)) as running:
        yield running


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"authorization": "Bearer secret-1"}, 200),
        ({"authorization": "bearer secret-2"}, 200),
        ({"x-api-key": "secret-1"}, 200),
        ({"authorization": "Bearer wrong", "x-api-key": "secret-2"}, 200),
        ({"authorization": "Bearer secret"}, 401),
        ({"authorization": "secret-1"}, 401),
        ({"x-api-key": "ä"}, 401),
    ],
)
def test_key_opens(locked: Running, headers: dict[str, str], status: int) -> None:
    headers = {name: value.encode().decode("latin-1") for name, value in headers.items()}
    assert post(locked, "/v1/chat/completions", CHAT, headers).status == status


def test_health_needs_no_key_and_the_rest_does(locked: Running) -> None:
    assert send(locked, "GET", "/health").status == 200
    assert send(locked, "HEAD", "/").status == 200
    for path in ("/metrics", "/v1/models", "/anything"):
        assert send(locked, "GET", path).status == 401


def test_missing_key_is_the_sdks_exception(locked: Running) -> None:
    client = openai.OpenAI(base_url=f"{locked.url}/v1", api_key="wrong", max_retries=0)
    with client, pytest.raises(openai.AuthenticationError):
        client.models.list()
    claude = anthropic.Anthropic(base_url=locked.url, api_key="wrong", max_retries=0)
    with claude, pytest.raises(anthropic.AuthenticationError):
        claude.messages.create(model="m", max_tokens=5, messages=[{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8080", 200),
        ("localhost", 200),
        ("[::1]:8080", 200),
        ("192.168.1.5", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.evil.example:80", 403),
        ("", 403),
        ("[", 403),
    ],
)
def test_names_of_strangers_are_refused(running: Running, host: str, status: int) -> None:
    assert send(running, "GET", "/v1/models", headers={"host": host}).status == status


@pytest.mark.parametrize(
    ("origin", "status"),
    [("https://good.example", 200), ("https://evil.example", 403), ("null", 403), ("vscode-webview://x", 200)],
)
def test_pages_may_ask_only_if_named(locked: Running, origin: str, status: int) -> None:
    headers = {"origin": origin, "x-api-key": "secret-1"}
    reply = post(locked, "/v1/chat/completions", CHAT, headers)
    assert reply.status == status
    if origin == "https://good.example":
        assert reply.headers["access-control-allow-origin"] == origin
        assert send(locked, "OPTIONS", "/v1/chat/completions", headers={"origin": origin}).status == 204


def test_no_page_may_ask_unless_one_is_named(running: Running) -> None:
    reply = post(running, "/v1/chat/completions", CHAT, {"origin": "https://good.example"})
    assert reply.status == 403
    assert "access-control-allow-origin" not in reply.headers
