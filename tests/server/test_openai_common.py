"""What OpenAI's APIs share, by the word."""

from __future__ import annotations

from typing import Any

import pytest

from localrun.engine.process.protocol import TokenLogprob
from localrun.server.faults import STATUS, ApiError
from localrun.server.limits import ServerLimits
from localrun.server.openai_common import OpenAi, logprob, response_schema, tool_choice

F = {"type": "function", "name": "f"}


@pytest.mark.parametrize(
    ("kind", "status", "word", "code"),
    [
        ("invalid", 400, "invalid_request_error", None),
        ("context", 400, "invalid_request_error", None),
        ("too_large", 413, "invalid_request_error", None),
        ("unauthorized", 401, "authentication_error", "invalid_api_key"),
        ("forbidden", 403, "permission_error", None),
        ("not_found", 404, "invalid_request_error", "not_found"),
        ("overloaded", 429, "rate_limit_error", None),
        ("unavailable", 503, "server_error", None),
        ("internal", 500, "server_error", None),
    ],
)
def test_errors_have_openai_s_words(kind: Any, status: int, word: str, code: str | None) -> None:
    assert OpenAi().error(ApiError(kind, "no", param="p")) == (
        status,
        {"error": {"message": "no", "type": word, "param": "p", "code": code}},
    )
    assert OpenAi().error(ApiError(kind, "no", code="own"))[1]["error"]["code"] == "own"


def test_every_kind_of_fault_is_tested_above() -> None:
    assert len(STATUS) == 9


@pytest.mark.parametrize(
    ("value", "choice"),
    [
        (None, ("auto", None)),
        ("auto", ("auto", None)),
        ("none", ("none", None)),
        ("required", ("required", None)),
        ({"type": "function", "function": {"name": "f"}}, ("required", ("f",))),
        ({"type": "function", "name": "f"}, ("required", ("f",))),
        ({"type": "custom", "custom": {"name": "f"}}, ("required", ("f",))),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [F]}}, ("required", ("f",))),
        ({"type": "allowed_tools", "mode": "auto", "tools": [F]}, ("auto", ("f",))),
        ({"type": "allowed_tools", "mode": "auto", "tools": []}, ("none", None)),
    ],
)
def test_tool_choices(value: Any, choice: tuple[str, Any]) -> None:
    assert tool_choice(value, {(None, "f"): "f"}) == choice


@pytest.mark.parametrize(
    ("value", "names", "param"),
    [
        ("required", [], "tool_choice"),
        ("any", ["f"], "tool_choice"),
        ({"type": "web_search"}, ["f"], "tool_choice.type"),
        ({"type": "function", "function": {"name": "g"}}, ["f"], "tool_choice.function.name"),
        ({"type": "custom", "custom": {"name": "g"}}, ["f"], "tool_choice.custom.name"),
        ({"type": "function", "name": "g"}, ["f"], "tool_choice.name"),
        ({"type": "function", "name": "f", "namespace": ["a"]}, ["f"], "tool_choice.namespace"),
        ({"type": "allowed_tools", "mode": "auto"}, ["f"], "tool_choice.tools"),
        ({"type": "allowed_tools", "mode": "any", "tools": [F]}, ["f"], "tool_choice.mode"),
        ({"type": "allowed_tools", "mode": "auto", "tools": [F, 1]}, ["f"], "tool_choice.tools[1]"),
        ({"type": "allowed_tools", "mode": "auto", "tools": [F]}, ["g"], "tool_choice.tools[0].name"),
        ({"type": "allowed_tools", "allowed_tools": {"mode": "auto"}}, ["f"], "tool_choice.allowed_tools.tools"),
        ({"type": "allowed_tools", "allowed_tools": 1}, ["f"], "tool_choice.allowed_tools.mode"),
    ],
)
def test_choices_that_can_t_be_made_name_the_field(value: Any, names: list[str], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        tool_choice(value, {(None, name): name for name in names})
    assert (caught.value.kind, caught.value.param) == ("invalid", param)


SPACES: dict[tuple[str | None, str], str] = {("a", "f"): "a.f", ("b", "f"): "b.f", ("b", "g"): "b.g"}


@pytest.mark.parametrize(
    ("namespace", "name", "names", "chosen"),
    [
        (None, "f", {**SPACES, (None, "f"): "f"}, "f"),
        (None, "g", SPACES, "b.g"),
        ("b", "f", SPACES, "b.f"),
        ("a", "f", {(None, "f"): "f", **SPACES}, "a.f"),
    ],
)
def test_tool_of_no_namespace_goes_before_one_of_any(namespace: str | None, name: str, names: Any, chosen: str) -> None:
    value = {"type": "function", "name": name, "namespace": namespace}
    assert tool_choice(value, names) == ("required", (chosen,))


@pytest.mark.parametrize(
    ("namespace", "param", "message"),
    [
        (None, "tool_choice.namespace", "'f' is in several namespaces (a, b): name one"),
        ("c", "tool_choice.name", "'f' is not among the tools of namespace 'c'"),
    ],
)
def test_namespace_that_does_not_decide_is_refused(namespace: str | None, param: str, message: str) -> None:
    with pytest.raises(ApiError) as caught:
        tool_choice({"type": "function", "name": "f", "namespace": namespace}, SPACES)
    assert (caught.value.kind, caught.value.param, caught.value.message) == ("invalid", param, f"{param}: {message}")


SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}


@pytest.mark.parametrize(
    ("value", "schema", "shown"),
    [
        (None, None, False),
        ({"type": "text"}, None, False),
        ({"type": "json_object"}, {"type": "object"}, False),
        ({"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}, SCHEMA, True),
        ({"type": "json_schema", "name": "n", "schema": SCHEMA}, SCHEMA, True),
    ],
)
def test_response_formats(value: Any, schema: Any, shown: bool) -> None:
    assert response_schema(value, "f", ServerLimits()) == (schema, shown)


@pytest.mark.parametrize(
    ("value", "param"),
    [
        ("json", "f"),
        ({"type": "json_schema", "json_schema": {"name": "n"}}, "f.json_schema.schema"),
        ({"type": "json_schema"}, "f.schema"),
        ({"type": "grammar"}, "f.type"),
    ],
)
def test_formats_that_are_none_name_the_field(value: Any, param: str) -> None:
    with pytest.raises(ApiError) as caught:
        response_schema(value, "f", ServerLimits())
    assert caught.value.param == param


def test_half_a_character_is_shown_as_bytes_and_minus_infinity_as_a_number() -> None:
    other = TokenLogprob(token=2, data=(98,), logprob=float("-inf"))
    token = TokenLogprob(token=1, data=(0xC3,), logprob=-0.5, top=(other,))
    assert logprob(token) == {
        "token": "\N{REPLACEMENT CHARACTER}",
        "logprob": -0.5,
        "bytes": [0xC3],
        "top_logprobs": [{"token": "b", "logprob": -9999.0, "bytes": [98]}],
    }
