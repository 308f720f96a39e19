"""Answers and events against what OpenAI and Anthropic publish about their APIs.

OpenAI's OpenAPI document is applied strictly: a property that it does not know is a fault, too. Where an answer departs from it,
the departure stands here by name, with its reason, and nothing else may. Anthropic publishes its schemas as its SDKs' types; those
check answers in `test_messages.py`.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from anthropic.types.beta.message_create_params import MessageCreateParamsBase as BetaMessageParams
from anthropic.types.message_create_params import MessageCreateParamsBase as MessageParams

from localrun.engine.process.protocol import Generate
from localrun.server import chat_completions, completions, messages_input, responses_input
from tests.server.openai_schema import document, faults
from tests.server.raw import Stream, post, send
from tests.server.running import PATIENCE_S, Running, serving
from tests.server.scripted import ScriptedEngine, call_text, calls_text, words

Json = Any

HI: list[Any] = [{"role": "user", "content": "Hi"}]
PARAMETERS: dict[str, Any] = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FUNCTION: dict[str, Any] = {"name": "get_weather", "description": "Weather of a city", "parameters": PARAMETERS}
CHAT_TOOLS = [{"type": "function", "function": FUNCTION}]
TOOLS = [
    {"type": "function", **FUNCTION, "strict": True},
    {"type": "custom", "name": "patch", "format": {"type": "grammar", "syntax": "regex", "definition": "a+"}},
    {"type": "namespace", "name": "agents", "description": "d", "tools": [{"type": "function", **FUNCTION}]},
]

THOUGHTS = "reasoning_content: is not in the document"
"""DeepSeek's own extension, in which agents read and replay the reasoning."""

KEPT = "store: is not in the document"
"""The document's own examples have it, as OpenAI's SDK does; its schema has not."""

NO_USAGE = "response.usage: None is no object"
"""The document's own examples of `response.created` and `response.in_progress` have it."""

NO_END = "choices[].finish_reason: None is no string"
"""The document's own example of a Completions stream has it: there is one schema for streams and whole answers."""

WAITING = "localrun: is not in the document"
"""The field that says how far a waiting request is (docs/serve.md)."""

CONTEXT = {
    "data[].max_model_len: is not in the document",
    "data[].context_length: is not in the document",
}
"""How clients learn of vLLM and OpenRouter how much fits."""


def departures(value: Json, name: str) -> set[str]:
    """What keeps a value from being what the document calls `name`; indices are left out."""
    return {re.sub(r"\[\d+]", "[]", fault).removeprefix("$.") for fault in faults(value, name)}


def departures_of_stream(events: list[tuple[str | None, Json]], name: str) -> set[str]:
    found = [departures(data, name) for _, data in events if data != "[DONE]"]
    return set().union(*found) - {WAITING}  # a slow machine's events may have it at any time


def greet(command: Generate) -> Iterator[str]:
    yield from (*words("The user greets."), "</think>") if command.think != "off" else ()
    yield from words("Hello! How can I help you?")


def call(command: Generate) -> Iterator[str]:
    yield from (*words("The user asks."), "</think>") if command.think != "off" else ()
    yield from words("I will look.")
    calls = [
        call_text("get_weather", city="Oslo"),
        call_text("patch", input="aaa"),
        call_text("agents.get_weather", city="Rome"),
    ]
    offered = [tool["name"] for tool in command.tools]
    yield from calls_text(*(text for text in calls if any(f'"{name}"' in text for name in offered)))


CHAT = [
    ({}, set()),
    ({"max_tokens": 2, "stream_options": {"include_usage": True}, "stop": ["x"]}, set()),
    ({"reasoning_effort": "high"}, {THOUGHTS}),
    ({"logprobs": True, "top_logprobs": 2, "n": 2}, set()),
    ({"tools": CHAT_TOOLS}, set()),
    ({"functions": [FUNCTION], "function_call": "auto"}, set()),
    ({"tools": CHAT_TOOLS, "reasoning_effort": "max", "tool_choice": "auto"}, {THOUGHTS}),
]


@pytest.mark.parametrize(("body", "expected"), CHAT)
def test_chat_completions_are_as_published(
    running: Running, engine: ScriptedEngine, body: Json, expected: set[str]
) -> None:
    engine.play = call if "tools" in body or "functions" in body else greet
    whole = post(running, "/v1/chat/completions", {"messages": HI, **body})
    assert departures(whole.json, "CreateChatCompletionResponse") == {f"choices[].message.{each}" for each in expected}
    stream = post(running, "/v1/chat/completions", {"messages": HI, "stream": True, **body})
    found = departures_of_stream(stream.events, "CreateChatCompletionStreamResponse")
    assert found == {f"choices[].delta.{each}" for each in expected}


@pytest.mark.parametrize("body", [{}, {"max_tokens": 2}, {"logprobs": 2, "n": 2}])
def test_completions_are_as_published(running: Running, body: Json) -> None:
    whole = post(running, "/v1/completions", {"prompt": "Hi", **body})
    assert departures(whole.json, "CreateCompletionResponse") == set()
    stream = post(running, "/v1/completions", {"prompt": "Hi", "stream": True, **body})
    assert departures_of_stream(stream.events, "CreateCompletionResponse") == {NO_END}


RESPONSES = [
    {},
    {"max_output_tokens": 2, "instructions": "Be brief.", "metadata": {"a": "b"}},
    {"reasoning": {"effort": "high", "summary": "auto"}},
    {"include": ["message.output_text.logprobs"], "top_logprobs": 2},
    {"text": {"format": {"type": "json_schema", "name": "x", "schema": PARAMETERS, "strict": True}}},
    {"tools": TOOLS, "reasoning": {"effort": "xhigh"}, "prompt_cache_key": "k", "parallel_tool_calls": False},
    {"tools": TOOLS, "tool_choice": {"type": "function", "name": "get_weather"}},
    {
        "tools": TOOLS,
        "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "custom", "name": "patch"}]},
    },
    {"input": [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]}], "store": False},
]


@pytest.mark.parametrize("body", RESPONSES)
def test_responses_are_as_published(running: Running, engine: ScriptedEngine, body: Json) -> None:
    engine.play = call if "tools" in body else greet
    whole = post(running, "/v1/responses", {"input": "Hi", **body}).json
    assert departures(whole, "Response") == {KEPT}
    stream = post(running, "/v1/responses", {"input": "Hi", "stream": True, **body})
    assert departures_of_stream(stream.events, "ResponseStreamEvent") == {NO_USAGE, f"response.{KEPT}"}
    final = stream.events[-1][1]["response"]
    if whole["store"]:
        kept = send(running, "GET", f"/v1/responses/{final['id']}").json
        assert departures(kept, "Response") == {KEPT}
        assert kept == final


def test_failed_response_is_as_published(running: Running, engine: ScriptedEngine) -> None:
    engine.play = lambda command: iter([RuntimeError("no drive")])
    name, event = post(running, "/v1/responses", {"input": "Hi", "stream": True}).events[-1]
    assert name == event["type"] == "response.failed"
    assert departures(event, "ResponseStreamEvent") == {NO_USAGE, f"response.{KEPT}"}


def test_lists_of_models_are_as_published(running: Running) -> None:
    assert departures(send(running, "GET", "/v1/models").json, "ListModelsResponse") == CONTEXT
    found = departures(send(running, "GET", "/v1/models/any").json, "Model")
    assert found == {each.removeprefix("data[].") for each in CONTEXT}


@pytest.mark.parametrize(
    ("path", "status"),
    [("/v1/chat/completions", 400), ("/v1/completions", 400), ("/v1/responses", 400), ("/v1/nothing", 404)],
)
def test_errors_are_as_published(running: Running, path: str, status: int) -> None:
    reply = post(running, path, {})
    assert reply.status == status
    assert departures(reply.json, "ErrorResponse") == set()


@pytest.mark.parametrize(
    ("path", "body", "name", "expected"),
    [
        ("/v1/chat/completions", {"messages": HI}, "CreateChatCompletionStreamResponse", {WAITING}),
        ("/v1/completions", {"prompt": "Hi"}, "CreateCompletionResponse", {WAITING, NO_END}),
        ("/v1/responses", {"input": "Hi"}, "ResponseStreamEvent", {WAITING, NO_USAGE, f"response.{KEPT}"}),
    ],
)
def test_signs_of_life_are_as_published_but_for_the_field_that_says_why(
    path: str, body: Json, name: str, expected: set[str]
) -> None:
    engine = ScriptedEngine(prompt_s=PATIENCE_S)  # that is, until it is stopped
    with serving(engine, keep_alive_s=0.02) as running:
        stream = Stream(running, path, {"stream": True, **body})
        stream.until('"state":"prompt"', "\n\n")
        engine.stop()
        stream.until("0\r\n\r\n")
        stream.close()
    lines = [line.removeprefix("data: ") for line in stream.text.splitlines() if line.startswith("data: {")]
    signs = [data for data in map(json.loads, lines) if "localrun" in data]
    assert signs
    assert set().union(*(departures(sign, name) for sign in signs)) == expected


# --- the check itself


def leaves(value: Json, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of a value's texts, numbers and nulls."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield from leaves(each, (*path, key))
    elif isinstance(value, list):
        for i, each in enumerate(value):
            yield from leaves(each, (*path, i))
    else:
        yield path


def replaced(value: Json, path: tuple[Any, ...], new: Json) -> Json:
    value = copy.deepcopy(value)
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    return value


def test_no_value_of_an_answer_can_be_of_another_kind_unnoticed(running: Running, engine: ScriptedEngine) -> None:
    engine.play = call
    body = {"input": "Hi", "tools": TOOLS, "reasoning": {"effort": "high"}, "top_logprobs": 1}
    response = post(running, "/v1/responses", body).json
    expected = set(faults(response, "Response"))
    places = [path for path in leaves(response) if "parameters" not in path and path != ("store",)]
    assert len(places) > 60
    for path in places:
        assert set(faults(replaced(response, path, {"wrong": 1}), "Response")) - expected, path


def test_no_property_that_must_be_there_can_be_missing_unnoticed(running: Running) -> None:
    answer = post(running, "/v1/chat/completions", {"messages": HI}).json
    for name in ("id", "object", "created", "model", "choices"):
        rest = {key: value for key, value in answer.items() if key != name}
        assert faults(rest, "CreateChatCompletionResponse") == [f"$.{name}: is missing"]
    assert faults({**answer, "object": "text"}, "CreateChatCompletionResponse")
    assert faults({**answer, "new": 1}, "CreateChatCompletionResponse") == ["$.new: is not in the document"]


# --- requests


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("CreateChatCompletionRequest", chat_completions._KNOWN),
        ("CreateCompletionRequest", completions._KNOWN),
        ("CreateResponse", responses_input._KNOWN),
    ],
)
def test_every_published_field_of_openais_requests_is_known(name: str, known: tuple[str, ...]) -> None:
    assert set(document()["requests"][name]) - set(known) == set()


@pytest.mark.parametrize("params", [MessageParams, BetaMessageParams])
def test_every_published_field_of_anthropics_requests_is_known(params: Any) -> None:
    assert set(params.__annotations__) - set(messages_input._KNOWN) == set()


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/v1/chat/completions", {"messages": HI}, "moderation"),
        ("/v1/chat/completions", {"messages": HI}, "web_search_options"),
        ("/v1/responses", {"input": "Hi"}, "moderation"),
        ("/v1/responses", {"input": "Hi"}, "conversation"),
        ("/v1/messages", {"messages": HI, "max_tokens": 9}, "compaction"),
        ("/v1/messages", {"messages": HI, "max_tokens": 9}, "container"),
        ("/v1/messages", {"messages": HI, "max_tokens": 9}, "thread"),
    ],
)
def test_published_fields_that_only_their_makers_can_fill_are_refused_by_name(
    running: Running, path: str, body: Json, field: str
) -> None:
    reply = post(running, path, {**body, field: {}})
    assert reply.status == 400
    assert field in reply.json["error"]["message"] + json.dumps(reply.json["error"].get("param"))
    assert post(running, path, {**body, field: None}).status == 200
