"""Chat Completions as OpenAI's SDK uses them, and every chunk against the SDK's own types."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

from localrun.engine.process.protocol import Generate
from tests.server.raw import post
from tests.server.running import Running, serving
from tests.server.scripted import ScriptedEngine, call_text, calls_text, words

HI: list[Any] = [{"role": "user", "content": "Hi"}]
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def _allowed(mode: str, *names: str) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


@pytest.fixture
def client(running: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def chunks_of(running: Running, **body: Any) -> list[dict[str, Any]]:
    """A stream's chunks, each checked strictly; the end is there."""
    events = post(running, "/v1/chat/completions", {"messages": HI, "stream": True, **body}).events
    assert events[-1] == (None, "[DONE]")
    chunks = [data for _, data in events[:-1]]
    for chunk in chunks:
        ChatCompletionChunk.model_validate_json(json.dumps(chunk), strict=True)
    return [chunk for chunk in chunks if "localrun" not in chunk]


def test_whole_answer_has_the_shape_of_the_sdks_types(running: Running) -> None:
    reply = post(running, "/v1/chat/completions", {"model": "any-name", "messages": HI})
    answer = ChatCompletion.model_validate_json(reply.body, strict=True)
    assert answer.model == "any-name"
    assert answer.choices[0].message.content == "Hello! How can I help you?"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 6
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 6


def test_stream_has_role_text_finish_and_usage(running: Running) -> None:
    chunks = chunks_of(running, stream_options={"include_usage": True})
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks[:-1]) == "Hello! How can I help you?"
    assert [c["choices"][0]["finish_reason"] for c in chunks[:-1]][-1] == "stop"
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 6
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_streaming_helper_collects_the_answer(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="m", messages=HI) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert "content.delta" in kinds
    assert final.choices[0].message.content == "Hello! How can I help you?"


@pytest.mark.parametrize(
    ("body", "mode"),
    [
        ({}, "off"),
        ({"reasoning_effort": "none"}, "off"),
        ({"reasoning_effort": "minimal"}, "off"),
        ({"reasoning_effort": "low"}, "high"),
        ({"reasoning_effort": "high"}, "high"),
        ({"reasoning_effort": "xhigh"}, "max"),
        ({"thinking": {"type": "enabled"}}, "high"),
        ({"thinking": {"type": "disabled"}}, "off"),
        ({"enable_thinking": True}, "high"),
        ({"chat_template_kwargs": {"thinking": True}}, "high"),
    ],
)
def test_efforts_are_the_models_modes(running: Running, engine: ScriptedEngine, body: Any, mode: str) -> None:
    assert post(running, "/v1/chat/completions", {"messages": HI, **body}).status == 200
    assert engine.commands[-1].think == mode


def test_reasoning_arrives_as_reasoning_content(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="m", messages=HI, reasoning_effort="high")
    message = answer.choices[0].message
    assert message.model_extra is not None
    assert message.model_extra["reasoning_content"] == "The user greets. I greet back."
    assert message.content == "Hello! How can I help you?"
    assert answer.usage is not None
    assert answer.usage.completion_tokens_details is not None
    assert (answer.usage.completion_tokens_details.reasoning_tokens or 0) > 0


def test_tool_calls_stream_with_ids_and_indices(running: Running, engine: ScriptedEngine) -> None:
    engine.play = lambda command: [
        *words("I will look."),
        *calls_text(call_text("get_weather", city="Oslo"), call_text("get_weather", city="Rome", days=3)),
    ]
    chunks = chunks_of(running, tools=[WEATHER])
    deltas = [call for c in chunks for call in c["choices"][0]["delta"].get("tool_calls", ())]
    begun = [call for call in deltas if "id" in call]
    assert [(call["index"], call["type"], call["function"]["name"]) for call in begun] == [
        (0, "function", "get_weather"),
        (1, "function", "get_weather"),
    ]
    assert len({call["id"] for call in begun}) == 2
    arguments = ["".join(d["function"]["arguments"] for d in deltas if d["index"] == i) for i in (0, 1)]
    assert [json.loads(text) for text in arguments] == [{"city": "Oslo"}, {"city": "Rome", "days": 3}]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_conversation_with_tools_reaches_the_model_whole(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    engine.play = lambda command: (
        calls_text(call_text("get_weather", city="Oslo"))
        if command.messages[-1]["role"] == "user"
        else words("It rains in Oslo.")
    )
    first = client.chat.completions.create(model="m", messages=HI, tools=[WEATHER])  # type: ignore[list-item]
    message = first.choices[0].message
    assert message.tool_calls is not None
    results = [
        {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": [{"type": "text", "text": "rain"}]}
    ]
    second = client.chat.completions.create(
        model="m",
        messages=[*HI, message.model_dump(exclude_none=True), *results],  # type: ignore[list-item]
        tools=[WEATHER],  # type: ignore[list-item]
    )
    assert second.choices[0].message.content == "It rains in Oslo."
    assert [m["role"] for m in engine.commands[-1].messages] == ["user", "assistant", "tool"]
    assert engine.commands[-1].messages[2]["content"] == "rain"


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("none", ("none", None)),
        ("auto", ("auto", None)),
        ("required", ("required", None)),
        ({"type": "function", "function": {"name": "get_weather"}}, ("required", ("get_weather",))),
        (_allowed("auto", "get_weather"), ("auto", ("get_weather",))),
        (_allowed("required", "get_weather"), ("required", ("get_weather",))),
        (_allowed("auto"), ("none", None)),
    ],
)
def test_tool_choice_reaches_the_engine(
    running: Running, engine: ScriptedEngine, choice: Any, expected: tuple[str, Any]
) -> None:
    body = {"messages": HI, "tools": [WEATHER], "tool_choice": choice, "parallel_tool_calls": False}
    assert post(running, "/v1/chat/completions", body).status == 200
    command = engine.commands[-1]
    assert (command.tool_choice, command.tool_names) == expected
    assert command.max_tool_calls == 1
    assert len(command.tools) == 1  # shown also where none may be called: the prompt stays the same


def test_old_choice_of_a_function_is_a_choice_of_a_tool(running: Running, engine: ScriptedEngine) -> None:
    body = {"messages": HI, "functions": [WEATHER["function"]], "function_call": {"name": "get_weather"}}
    assert post(running, "/v1/chat/completions", body).status == 200
    assert (engine.commands[-1].tool_choice, engine.commands[-1].tool_names) == ("required", ("get_weather",))


def test_old_functions_are_answered_with_one_call_of_their_form(
    client: openai.OpenAI, running: Running, engine: ScriptedEngine
) -> None:
    oslo, rome = (call_text("get_weather", city=city) for city in ("Oslo", "Rome"))
    engine.play = lambda command: calls_text(oslo, rome)
    body: dict[str, Any] = {"messages": HI, "functions": [WEATHER["function"]]}
    choice = post(running, "/v1/chat/completions", body).json["choices"][0]
    assert choice["finish_reason"] == "function_call"
    called = {"name": "get_weather", "arguments": '{"city": "Oslo"}'}
    assert choice["message"] == {"role": "assistant", "content": None, "refusal": None, "function_call": called}
    assert engine.commands[-1].max_tool_calls == 1

    chunks = [c.choices[0] for c in client.chat.completions.create(model="m", stream=True, **body)]
    calls = [chunk.delta.function_call for chunk in chunks if chunk.delta.function_call]
    assert (calls[0].name, "".join(call.arguments or "" for call in calls)) == ("get_weather", '{"city": "Oslo"}')
    assert all(chunk.delta.tool_calls is None for chunk in chunks)
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["function_call"]

    result = {"role": "function", "name": "get_weather", "content": "3 degrees"}
    engine.play = lambda command: ["Cold."]
    again = post(running, "/v1/chat/completions", {**body, "messages": [*HI, choice["message"], result]}).json
    assert again["choices"][0]["message"]["content"] == "Cold."
    assert again["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"functions": [{"name": "f"}, {}]}, "functions[1].name"),
        ({"tools": [WEATHER, {"function": {}}]}, "tools[1].function.name"),
        ({"functions": [{"name": "f"}], "function_call": {"name": "g"}}, "function_call.name"),
        ({"functions": [{"name": "f"}], "function_call": "any"}, "function_call"),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice.function.name",
        ),
    ],
)
def test_errors_of_tools_name_the_field_of_the_form_used(running: Running, body: Any, param: str) -> None:
    reply = post(running, "/v1/chat/completions", {"messages": HI, **body})
    assert (reply.status, reply.json["error"]["param"]) == (400, param)


def test_parsing_helper_gives_an_object(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    class Answer(BaseModel):
        city: str
        degrees: int

    engine.play = lambda command: words('{"city": "Oslo", "degrees": 3}')
    parsed = client.chat.completions.parse(model="m", messages=HI, response_format=Answer)
    assert parsed.choices[0].message.parsed == Answer(city="Oslo", degrees=3)
    schema = engine.commands[-1].json_schema
    assert schema is not None
    assert set(schema["properties"]) == {"city", "degrees"}
    assert engine.commands[-1].response_format == schema


def test_json_object_is_enforced_without_being_shown(running: Running, engine: ScriptedEngine) -> None:
    post(running, "/v1/chat/completions", {"messages": HI, "response_format": {"type": "json_object"}})
    assert engine.commands[-1].json_schema == {"type": "object"}
    assert engine.commands[-1].response_format is None


def test_sampling_options_reach_the_engine(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    client.chat.completions.create(
        model="m",
        messages=HI,
        temperature=0.5,
        top_p=0.9,
        presence_penalty=0.25,
        frequency_penalty=0.5,
        seed=42,
        max_completion_tokens=3,
        stop=["How"],
        logit_bias={"5": -100},
        extra_body={"top_k": 20, "min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 1},
    )
    command = engine.commands[-1]
    sampling = command.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 20, 0.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repeat_penalty) == (0.25, 0.5, 1.1)
    assert (sampling.seed, sampling.logit_bias) == (42, ((5, -100.0),))
    assert (command.max_tokens, command.min_tokens, command.stop) == (3, 1, ("How",))


def test_stop_string_ends_the_answer_and_is_left_out(running: Running) -> None:
    answer = post(running, "/v1/chat/completions", {"messages": HI, "stop": "can"}).json
    assert answer["choices"][0]["message"]["content"] == "Hello! How "
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_bound_ends_the_answer_with_length(running: Running) -> None:
    answer = post(running, "/v1/chat/completions", {"messages": HI, "max_tokens": 2}).json
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 2


def test_log_probabilities(client: openai.OpenAI, running: Running) -> None:
    answer = client.chat.completions.create(model="m", messages=HI, logprobs=True, top_logprobs=1)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert "".join(token.token for token in logprobs.content) == "Hello! How can I help you?"
    assert logprobs.content[0].top_logprobs[0].token == "x"
    chunks = chunks_of(running, logprobs=True)
    tokens = [t["token"] for c in chunks if (found := c["choices"][0]["logprobs"]) for t in found["content"]]
    assert "".join(tokens) == "Hello! How can I help you?"


def test_several_choices(client: openai.OpenAI, running: Running, engine: ScriptedEngine) -> None:
    answer = client.chat.completions.create(model="m", messages=HI, n=2, seed=7)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert [command.sampling.seed for command in engine.commands] == [7, 8]
    indices = {chunk["choices"][0]["index"] for chunk in chunks_of(running, n=2)}
    assert indices == {0, 1}


def test_beginning_of_an_answer_is_continued(running: Running, engine: ScriptedEngine) -> None:
    post(running, "/v1/chat/completions", {"messages": [*HI, {"role": "assistant", "content": "Hel"}]})
    assert engine.commands[-1].resume


def test_developer_and_system_are_system_where_they_stand(running: Running, engine: ScriptedEngine) -> None:
    messages = [
        {"role": "developer", "content": "A"},
        *HI,
        {"role": "system", "content": [{"type": "text", "text": "B"}]},
    ]
    post(running, "/v1/chat/completions", {"messages": messages})
    assert [(m["role"], m["content"]) for m in engine.commands[-1].messages] == [
        ("system", "A"),
        ("user", "Hi"),
        ("system", "B"),
    ]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0].type",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0].content[0].type"),
        ({"messages": HI, "max_tokens": 0}, "max_tokens"),
        ({"messages": HI, "max_tokens": "many"}, "max_tokens"),
        ({"messages": HI, "n": 1000}, "n"),
        ({"messages": HI, "tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"messages": HI, "tools": [{"type": "custom", "custom": {"name": "patch"}}]}, "tools[0].type"),
        ({"messages": HI, "tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"messages": HI, "tool_choice": "required"}, "tool_choice"),
        (
            {"messages": HI, "tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice.function.name",
        ),
        (
            {"messages": HI, "tools": [WEATHER], "tool_choice": _allowed("auto", "x")},
            "tool_choice.allowed_tools.tools[0].function.name",
        ),
        ({"messages": HI, "tools": [WEATHER], "tool_choice": _allowed("never")}, "tool_choice.allowed_tools.mode"),
        (
            {"messages": HI, "tools": [WEATHER], "tool_choice": _allowed("required")},
            "tool_choice.allowed_tools.tools",
        ),
        ({"messages": HI, "tools": [WEATHER], "tool_choice": {"type": "web_search"}}, "tool_choice.type"),
        ({"messages": HI, "modalities": ["audio"]}, "modalities"),
        ({"messages": HI, "reasoning_effort": "enormous"}, "reasoning_effort"),
        ({"messages": HI, "response_format": {"type": "yaml"}}, "response_format.type"),
        (
            {"messages": HI, "response_format": {"type": "json_schema", "json_schema": {"schema": []}}},
            "response_format.json_schema.schema",
        ),
        ({"messages": HI, "top_logprobs": 5}, "top_logprobs"),
        ({"messages": HI, "logit_bias": {"x": 1}}, "logit_bias"),
        ({"messages": HI, "stop": ["x"] * 100}, "stop"),
    ],
)
def test_what_can_not_be_done_is_refused_by_name(running: Running, body: Any, param: str) -> None:
    reply = post(running, "/v1/chat/completions", body)
    assert reply.status == 400
    assert reply.json["error"]["param"] == param
    assert reply.json["error"]["type"] == "invalid_request_error"


def test_unknown_fields_are_no_reason_to_refuse(running: Running) -> None:
    body = {"messages": HI, "user": "me", "store": False, "some_new_field": {"a": 1}}
    assert post(running, "/v1/chat/completions", body).status == 200


def test_errors_are_the_sdks_exceptions(running: Running) -> None:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="any", max_retries=0) as client:
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="m", messages=[])
        assert caught.value.param == "messages"
        with pytest.raises(openai.NotFoundError):
            client.embeddings.create(model="m", input="x")


def test_prompt_that_does_not_fit_is_told_before_the_stream() -> None:
    with serving(ScriptedEngine(n_ctx=20)) as running:
        body = {"messages": [{"role": "user", "content": "word " * 100}], "stream": True}
        reply = post(running, "/v1/chat/completions", body)
    assert reply.status == 400
    assert reply.json["error"]["code"] == "context_length_exceeded"
    assert "maximum" in reply.json["error"]["message"]


def test_answer_is_bounded_by_what_fits(running: Running, engine: ScriptedEngine) -> None:
    post(running, "/v1/chat/completions", {"messages": HI, "max_tokens": 10_000_000})
    bound = engine.commands[-1].max_tokens
    assert bound is not None
    assert bound < 200_000


def test_error_in_the_middle_of_a_stream_is_an_error_event(running: Running, engine: ScriptedEngine) -> None:
    def die(command: Generate) -> Iterator[str]:
        yield "Hel"
        engine.kill()
        yield "lo"

    engine.play = die
    events = post(running, "/v1/chat/completions", {"messages": HI, "stream": True}).events
    assert events[-1][1]["error"]["code"] == "engine_died"
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="any", max_retries=0) as client:
        with pytest.raises(openai.APIError, match="engine"):
            list(client.chat.completions.create(model="m", messages=HI, stream=True))
        engine.play = lambda command: ["fine"]
        assert client.chat.completions.create(model="m", messages=HI).choices[0].message.content == "fine"


def test_what_openais_schema_calls_a_string_is_never_null(running: Running) -> None:
    whole = post(running, "/v1/chat/completions", {"messages": HI}).json
    assert all(isinstance(whole[name], str) for name in ("id", "object", "model"))
    assert "system_fingerprint" not in whole
