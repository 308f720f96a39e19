"""Responses as OpenAI's SDK and Codex use them, and every event against the SDK's own types."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from localrun.engine.process.protocol import Generate
from tests.server.raw import post, send
from tests.server.running import Running
from tests.server.scripted import ScriptedEngine, call_text, calls_text, words

EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
TOOL: dict[str, Any] = {
    "type": "function",
    "name": "exec",
    "description": "Runs a command",
    "strict": False,
    "parameters": {"type": "object", "properties": {"cmd": {"type": "string"}}, "required": ["cmd"]},
}


def _text(text: str) -> dict[str, str]:
    return {"type": "input_text", "text": text}


@pytest.fixture
def client(running: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def events_of(running: Running, **body: Any) -> list[dict[str, Any]]:
    """A stream's events, each checked strictly: names, order numbers, beginning and end."""
    events = post(running, "/v1/responses", {"input": "Hi", "stream": True, **body}).events
    assert all(name == data["type"] for name, data in events)
    found = [data for _, data in events]
    for event in found:
        EVENT.validate_json(json.dumps(event), strict=True)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    assert [event["type"] for event in found[:2]] == ["response.created", "response.in_progress"]
    return [event for event in found if "localrun" not in event]


def test_whole_response_has_the_shape_of_the_sdks_types(running: Running) -> None:
    reply = post(running, "/v1/responses", {"model": "any-name", "input": "Hi", "tools": [TOOL]})
    response = Response.model_validate_json(reply.body, strict=True)
    assert response.model == "any-name"
    assert response.output_text == "Hello! How can I help you?"
    assert response.status == "completed"
    assert response.usage is not None
    assert response.usage.output_tokens == 6


def test_stream_of_thoughts_and_text(running: Running) -> None:
    events = events_of(running, reasoning={"effort": "high"})
    kinds = [event["type"] for event in events]
    added = [event for event in events if event["type"] == "response.output_item.added"]
    assert [event["item"]["type"] for event in added] == ["reasoning", "message"]
    assert [event["output_index"] for event in added] == [0, 1]
    assert kinds.count("response.output_item.done") == 2
    text = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    assert text == "Hello! How can I help you?"
    final = events[-1]["response"]
    assert events[-1]["type"] == "response.completed"
    assert [item["type"] for item in final["output"]] == ["reasoning", "message"]
    assert final["output"][0]["summary"][0]["text"] == "The user greets. I greet back."
    assert final["output"][1]["content"][0]["text"] == text
    assert final["usage"]["output_tokens_details"]["reasoning_tokens"] > 0


def test_streaming_helper_collects_the_response(client: openai.OpenAI) -> None:
    with client.responses.stream(model="m", input="Hi", reasoning={"effort": "high"}) as stream:
        for _ in stream:
            pass
        final = stream.get_final_response()
    assert final.output_text == "Hello! How can I help you?"


def test_function_calls_and_their_outputs(client: openai.OpenAI, running: Running, engine: ScriptedEngine) -> None:
    engine.play = lambda command: (
        [*words("Looking."), *calls_text(call_text("exec", cmd="ls"))]
        if command.messages[-1]["role"] == "user"
        else words("Two files.")
    )
    events = events_of(running, tools=[TOOL])
    done = [event for event in events if event["type"] == "response.function_call_arguments.done"]
    assert json.loads(done[0]["arguments"]) == {"cmd": "ls"}
    first = client.responses.create(model="m", input="Hi", tools=[TOOL], store=False)  # type: ignore[list-item]
    call = first.output[-1]
    assert call.type == "function_call"
    items: list[Any] = [
        {"role": "user", "content": "Hi"},
        *(item.model_dump(exclude_none=True) for item in first.output),
        {"type": "function_call_output", "call_id": call.call_id, "output": "a b"},
    ]
    second = client.responses.create(model="m", input=items, tools=[TOOL], store=False)  # type: ignore[list-item]
    assert second.output_text == "Two files."
    messages = engine.commands[-1].messages
    assert [m["role"] for m in messages] == ["user", "assistant", "tool"]
    assert messages[1]["content"] == "Looking."
    assert messages[1]["tool_calls"][0]["function"]["name"] == "exec"


def test_earlier_response_is_continued(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    first = client.responses.create(model="m", input="Hi", instructions="Be brief.")
    second = client.responses.create(model="m", input="And now?", previous_response_id=first.id)
    assert [(m["role"], m["content"]) for m in engine.commands[-1].messages] == [
        ("user", "Hi"),
        ("assistant", "Hello! How can I help you?"),
        ("user", "And now?"),
    ]
    assert client.responses.retrieve(second.id).output_text == "Hello! How can I help you?"
    client.responses.delete(second.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(second.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="m", input="x", previous_response_id="resp_unknown")


def test_what_is_not_to_be_stored_is_not(client: openai.OpenAI) -> None:
    first = client.responses.create(model="m", input="Hi", store=False)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)


def test_own_thoughts_come_back_and_foreign_ones_are_read_if_readable(
    client: openai.OpenAI, engine: ScriptedEngine
) -> None:
    first = client.responses.create(model="m", input="Hi", reasoning={"effort": "high"}, store=False)
    sealed = [item.model_dump(exclude_none=True) for item in first.output]
    sealed[0]["summary"] = []
    foreign: dict[str, Any] = {
        "type": "reasoning",
        "id": "rs_1",
        "encrypted_content": "abc",
        "content": None,
        "summary": [],
    }
    readable = {"type": "reasoning", "id": "rs_2", "summary": [{"type": "summary_text", "text": "So be it."}]}
    items: list[Any] = [
        {"role": "user", "content": "Hi"},
        *sealed,
        {"role": "user", "content": "Again"},
        foreign,
        {"role": "assistant", "content": "One."},
        {"role": "user", "content": "Again"},
        readable,
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Again"},
    ]
    client.responses.create(model="m", input=items, store=False)
    answers = [m for m in engine.commands[-1].messages if m["role"] == "assistant"]
    assert [m.get("reasoning_content") for m in answers] == ["The user greets. I greet back.", None, "So be it."]


def test_what_codex_sends(running: Running, engine: ScriptedEngine) -> None:
    engine.play = lambda command: calls_text(
        call_text("agents.spawn", task="x"), call_text("apply_patch", input="*** Begin Patch")
    )
    body = {
        "instructions": None,
        "store": False,
        "include": ["reasoning.encrypted_content"],
        "reasoning": {"summary": "auto"},
        "prompt_cache_key": "k",
        "client_metadata": {"thread_id": "t"},
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [
            TOOL,
            {
                "type": "namespace",
                "name": "agents",
                "description": "d",
                "tools": [
                    {
                        "type": "function",
                        "name": "spawn",
                        "parameters": {"type": "object", "properties": {"task": {"type": "string"}}},
                    }
                ],
            },
            {"type": "custom", "name": "apply_patch", "description": "d"},
            {"type": "web_search", "external_web_access": False},
        ],
        "input": [
            {"role": "developer", "content": [_text("A"), _text("B")]},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
            {
                "type": "reasoning",
                "id": "rs",
                "summary": [{"type": "summary_text", "text": "T"}],
                "content": None,
                "encrypted_content": "ZW5j",
            },
            {
                "type": "function_call",
                "id": "fc",
                "name": "spawn",
                "namespace": "agents",
                "arguments": '{"task": "y"}',
                "call_id": "c1",
            },
            {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "ok"}]},
            {"type": "custom_tool_call", "call_id": "c2", "name": "apply_patch", "input": "***"},
            {"type": "custom_tool_call_output", "call_id": "c2", "output": "done"},
        ],
    }
    events = events_of(running, **body)
    command = engine.commands[-1]
    assert [tool["name"] for tool in command.tools] == ["exec", "agents.spawn", "apply_patch"]
    assert [m["role"] for m in command.messages] == ["system", "user", "assistant", "tool", "assistant", "tool"]
    assert command.messages[0]["content"] == "A\n\nB"
    assert command.messages[2]["tool_calls"][0]["function"]["name"] == "agents.spawn"
    spawn, patch = events[-1]["response"]["output"]
    assert (spawn["type"], spawn["name"], spawn["namespace"]) == ("function_call", "spawn", "agents")
    assert (patch["type"], patch["name"], patch["input"]) == ("custom_tool_call", "apply_patch", "*** Begin Patch")


def test_grammar_of_a_custom_tool_is_shown_and_given_to_the_sampler(running: Running, engine: ScriptedEngine) -> None:
    grammar = {"type": "grammar", "syntax": "lark", "definition": 'start: "x"'}
    tool = {"type": "custom", "name": "apply_patch", "description": "Edits files.", "format": grammar}
    assert post(running, "/v1/responses", {"input": "Hi", "tools": [tool]}).status == 200
    (shown,) = engine.commands[-1].tools
    assert shown["description"].startswith("Edits files.")
    assert shown["description"].endswith('start: "x"')
    assert shown["grammar"] == {"syntax": "lark", "definition": 'start: "x"'}
    assert shown["strict"] is True


@pytest.mark.parametrize(
    ("wanted", "param"),
    [
        ("text", "tools[0].format"),
        ({"type": "xml"}, "tools[0].format.type"),
        ({"type": "grammar", "syntax": "gbnf", "definition": "x"}, "tools[0].format.syntax"),
        ({"type": "grammar", "syntax": "regex"}, "tools[0].format.definition"),
        ({"type": "grammar", "syntax": "regex", "definition": "x" * 100_001}, "tools[0].format.definition"),
    ],
)
def test_formats_of_custom_tools_that_are_unknown_are_refused(running: Running, wanted: Any, param: str) -> None:
    tool = {"type": "custom", "name": "t", "format": wanted}
    reply = post(running, "/v1/responses", {"input": "Hi", "tools": [tool]})
    assert reply.status == 400
    assert reply.json["error"]["param"] == param


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"type": "function", "name": "exec"}, ("required", ("exec",))),
        ({"type": "function", "name": "spawn"}, ("required", ("agents.spawn",))),
        ({"type": "custom", "name": "patch"}, ("required", ("patch",))),
        (
            {
                "type": "allowed_tools",
                "mode": "auto",
                "tools": [
                    {"type": "custom", "name": "patch"},
                    {"type": "function", "name": "spawn", "namespace": "agents"},
                    {"type": "web_search"},
                ],
            },
            ("auto", ("patch", "agents.spawn")),
        ),
        ({"type": "allowed_tools", "mode": "auto", "tools": [{"type": "web_search"}]}, ("none", None)),
    ],
)
def test_choice_of_tools_reaches_the_engine_in_the_models_names(
    running: Running, engine: ScriptedEngine, choice: Any, expected: Any
) -> None:
    inner = {"type": "function", "name": "spawn", "parameters": {"type": "object"}}
    tools = [
        TOOL,
        {"type": "custom", "name": "patch"},
        {"type": "namespace", "name": "agents", "description": "d", "tools": [inner]},
    ]
    reply = post(running, "/v1/responses", {"input": "Hi", "tools": tools, "tool_choice": choice})
    assert reply.json["tool_choice"] == choice
    assert (engine.commands[-1].tool_choice, engine.commands[-1].tool_names) == expected
    assert len(engine.commands[-1].tools) == 3


@pytest.mark.parametrize(
    ("choice", "param"),
    [
        ({"type": "function", "name": "nothing"}, "tool_choice.name"),
        ({"type": "function", "name": "exec", "namespace": "agents"}, "tool_choice.name"),
        ({"type": "file_search"}, "tool_choice.type"),
        ({"type": "mcp", "server_label": "s"}, "tool_choice.type"),
        ({"type": "apply_patch"}, "tool_choice.type"),
        (
            {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "mcp"}]},
            "tool_choice.tools[0].type",
        ),
        ({"type": "allowed_tools", "mode": "auto", "tools": "exec"}, "tool_choice.tools"),
        ({"type": "allowed_tools", "mode": "auto", "tools": ["exec"]}, "tool_choice.tools[0]"),
    ],
)
def test_choices_of_tools_that_are_not_here_are_refused(running: Running, choice: Any, param: str) -> None:
    reply = post(running, "/v1/responses", {"input": "Hi", "tools": [TOOL], "tool_choice": choice})
    assert reply.status == 400
    assert reply.json["error"]["param"] == param


def test_parsing_helper_gives_an_object(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    class Answer(BaseModel):
        city: str

    engine.play = lambda command: words('{"city": "Oslo"}')
    assert client.responses.parse(model="m", input="Hi", text_format=Answer).output_parsed == Answer(city="Oslo")
    assert engine.commands[-1].json_schema is not None


def test_bound_makes_it_incomplete(running: Running) -> None:
    events = events_of(running, max_output_tokens=2)
    assert events[-1]["type"] == "response.incomplete"
    assert events[-1]["response"]["incomplete_details"] == {"reason": "max_output_tokens"}


def test_log_probabilities(running: Running) -> None:
    events = events_of(running, include=["message.output_text.logprobs"], top_logprobs=1)
    tokens = [
        t["token"] for event in events if event["type"] == "response.output_text.delta" for t in event["logprobs"]
    ]
    assert "".join(tokens) == "Hello! How can I help you?"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"background": True}, "background"),
        ({"conversation": "c"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"tools": [{"type": "file_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "code_interpreter"}]}, "tools[0].type"),
        (
            {"input": [{"type": "message", "role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0].type",
        ),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
        ({"input": []}, "input"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
    ],
)
def test_what_can_not_be_done_is_refused_by_name(running: Running, body: Any, param: str) -> None:
    reply = post(running, "/v1/responses", {"input": "Hi", **body})
    assert reply.status == 400
    assert reply.json["error"]["param"] == param


def test_death_of_the_engine_is_a_failed_response(running: Running, engine: ScriptedEngine) -> None:
    def die(command: Generate) -> Iterator[str]:
        yield "Hel"
        engine.kill()
        yield "lo"

    engine.play = die
    events = events_of(running)
    assert events[-1]["type"] == "response.failed"
    assert events[-1]["response"]["error"]["code"] == "server_error"
    engine.play = lambda command: ["fine"]
    assert events_of(running)[-1]["type"] == "response.completed"


def test_paths_work_without_the_version(running: Running) -> None:
    assert post(running, "/responses", {"input": "Hi"}).status == 200
    assert send(running, "HEAD", "/").status == 200
