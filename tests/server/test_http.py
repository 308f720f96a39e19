"""Bodies and answers, without a socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest
from starlette.requests import Request

from localrun.server.faults import ApiError
from localrun.server.http import encode_json, error_response, parse_json, read_json, sse
from localrun.server.limits import ServerLimits
from localrun.server.openai_common import OpenAi

LIMITS = ServerLimits(body_bytes=100, depth=3)


def test_events_are_lines_that_end_with_an_empty_one() -> None:
    assert sse({"a": 1}) == b'data: {"a":1}\n\n'
    assert sse("[DONE]", event="end") == b'event: end\ndata: "[DONE]"\n\n'
    assert b"\n" not in sse({"text": "two\nlines\r\n"})[:-2]


def test_half_a_character_is_sent_as_an_escape() -> None:
    assert encode_json({"a": "é"}) == '{"a":"é"}'.encode()
    assert json.loads(encode_json({"a": "\ud83d"})) == {"a": "\ud83d"}


@pytest.mark.parametrize(
    ("body", "value"),
    [
        (b'{"a": "\xf0\x9f\x98\x80"}', {"a": "😀"}),
        (b'{"a": "\\ud83d!"}', {"a": "?!"}),
        (b'\xef\xbb\xbf{"a": 1}', {"a": 1}),
        (b'{"a": "\xff"}', {"a": "�"}),
    ],
)
def test_json_as_clients_send_it(body: bytes, value: Any) -> None:
    assert parse_json(body) == value


@pytest.mark.parametrize("body", [b"", b"{", b"{'a': 1}", b"[" * 100_000, b'{"a": 1} x'])
def test_what_is_no_json_is_refused(body: bytes) -> None:
    with pytest.raises(ApiError, match="the body is not JSON: ") as caught:
        parse_json(body)
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")


def read(chunks: Sequence[bytes], headers: dict[str, str] | None = None) -> dict[str, Any]:
    """What `read_json` makes of a body that comes in these pieces."""
    left = list(chunks)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

    scope = {
        "type": "http",
        "method": "POST",
        "headers": [(name.encode(), value.encode()) for name, value in (headers or {}).items()],
    }
    return asyncio.run(read_json(Request(scope, receive), LIMITS))


def test_a_body_is_put_together_from_its_pieces() -> None:
    assert read([b'{"a"', b": [1,", b" {}]}"]) == {"a": [1, {}]}


@pytest.mark.parametrize(
    ("chunks", "headers", "kind", "says"),
    [
        ([b"[1]"], {}, "invalid", "must be a JSON object"),
        ([b'{"a": [[[1]]]}'], {}, "invalid", "nested deeper than 3"),
        ([b"x" * 60, b"y" * 60], {}, "too_large", "larger than 100 bytes"),
        ([b"x" * 1000], {}, "too_large", "larger than 100 bytes"),
        ([b"{}"], {"content-length": "101", "expect": "100-Continue"}, "too_large", "larger than 100 bytes"),
        ([b"{}"], {"content-encoding": "gzip"}, "invalid", "content-encoding 'gzip'"),
    ],
)
def test_bodies_beyond_a_limit_are_refused(chunks: list[bytes], headers: dict[str, str], kind: str, says: str) -> None:
    with pytest.raises(ApiError, match=says) as caught:
        read(chunks, headers)
    assert caught.value.kind == kind


def test_an_error_says_when_to_try_again_and_how_to_identify_oneself() -> None:
    dialect = OpenAi("chat")
    busy = error_response(dialect, ApiError("overloaded", "full", code="rate_limit_exceeded", retry_after_s=7))
    assert (busy.status_code, busy.headers["retry-after"]) == (429, "7")
    assert json.loads(bytes(busy.body))["error"]["message"] == "full"
    assert "www-authenticate" not in busy.headers
    locked = error_response(dialect, ApiError("unauthorized", "no key"))
    assert (locked.status_code, locked.headers["www-authenticate"]) == (401, "Bearer")
    assert "retry-after" not in locked.headers
    assert busy.headers["request-id"] != locked.headers["request-id"]
