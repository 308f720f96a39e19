"""Messages as Anthropic's SDK and Claude Code use them, and every event against the SDK's own types."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from anthropic import beta_tool
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import BaseModel, TypeAdapter

from localrun.engine.process.protocol import Generate
from tests.server.raw import post
from tests.server.running import Running
from tests.server.scripted import ScriptedEngine, call_text, calls_text, words

EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
HI: list[Any] = [{"role": "user", "content": "Hi"}]
TOOL: dict[str, Any] = {
    "name": "read",
    "description": "Reads a file",
    "input_schema": {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]},
}


@pytest.fixture
def client(running: Running) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=running.url, api_key="any", max_retries=0) as client:
        yield client


def events_of(running: Running, **body: Any) -> list[dict[str, Any]]:
    """A stream's events, each checked strictly: names, blocks opened and closed in order, one start and one end."""
    events = post(running, "/v1/messages", {"messages": HI, "max_tokens": 100, "stream": True, **body}).events
    assert all(name == data["type"] for name, data in events)
    found = [data for _, data in events]
    for event in found:
        EVENT.validate_json(json.dumps(event), strict=True)
    assert found[0]["type"] == "message_start"
    assert found[-1]["type"] == "message_stop"
    n_open, n_blocks = 0, 0
    for event in found:
        if event["type"] == "content_block_start":
            assert (event["index"], n_open) == (n_blocks, 0)
            n_open, n_blocks = 1, n_blocks + 1
        elif event["type"] == "content_block_stop":
            n_open = 0
        elif event["type"] == "content_block_delta":
            assert (event["index"], n_open) == (n_blocks - 1, 1)
    return [event for event in found if "localrun" not in event]


def test_whole_message_has_the_shape_of_the_sdks_types(running: Running) -> None:
    body = {
        "model": "claude-x",
        "messages": HI,
        "max_tokens": 100,
        "thinking": {"type": "enabled", "budget_tokens": 2000},
    }
    message = Message.model_validate_json(post(running, "/v1/messages", body).body, strict=True)
    assert message.model == "claude-x"
    assert [block.type for block in message.content] == ["thinking", "text"]
    assert message.stop_reason == "end_turn"
    assert message.usage.output_tokens == 13


def test_stream_of_thoughts_and_text(running: Running) -> None:
    events = events_of(running, thinking={"type": "adaptive"})
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    assert "".join(d.get("thinking", "") for d in deltas) == "The user greets. I greet back."
    assert "".join(d.get("text", "") for d in deltas) == "Hello! How can I help you?"
    assert [d["type"] for d in deltas].count("signature_delta") == 1
    assert events[-2]["delta"]["stop_reason"] == "end_turn"
    assert events[-2]["usage"]["output_tokens"] == 13


def test_streaming_helper_collects_the_message(client: anthropic.Anthropic) -> None:
    with client.messages.stream(model="m", messages=HI, max_tokens=100) as stream:
        assert "".join(stream.text_stream) == "Hello! How can I help you?"
        final = stream.get_final_message()
    assert final.stop_reason == "end_turn"


def test_thoughts_come_back_if_their_signature_is_ours(client: anthropic.Anthropic, engine: ScriptedEngine) -> None:
    first = client.messages.create(model="m", messages=HI, max_tokens=100, thinking={"type": "adaptive"})
    own: Any = [block.model_dump(exclude_none=True) for block in first.content]
    altered: Any = [{**own[0], "thinking": "Something else."}, own[1]]
    foreign: Any = [{"type": "thinking", "thinking": "T", "signature": "c2ln"}, own[1]]
    for content, expected in ((own, "The user greets. I greet back."), (altered, None), (foreign, None)):
        messages: Any = [*HI, {"role": "assistant", "content": content}, {"role": "user", "content": "Again"}]
        client.messages.create(model="m", messages=messages, max_tokens=100)
        assert engine.commands[-1].messages[1].get("reasoning_content") == expected
        assert engine.commands[-1].messages[1]["content"] == "Hello! How can I help you?"


@pytest.mark.parametrize(
    ("body", "mode", "budget"),
    [
        ({}, "off", None),
        ({"thinking": {"type": "disabled"}}, "off", None),
        ({"thinking": {"type": "enabled", "budget_tokens": 4000}}, "high", 4000),
        ({"thinking": {"type": "adaptive"}}, "high", None),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "max"}}, "max", None),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}}, "high", None),
    ],
)
def test_modes_of_thinking(running: Running, engine: ScriptedEngine, body: Any, mode: str, budget: int | None) -> None:
    assert post(running, "/v1/messages", {"messages": HI, "max_tokens": 10, **body}).status == 200
    assert (engine.commands[-1].think, engine.commands[-1].think_budget) == (mode, budget)


def test_tool_use_streams_its_input(running: Running, engine: ScriptedEngine) -> None:
    engine.play = lambda command: [
        *words("I will look."),
        *calls_text(call_text("read", path="a.txt"), call_text("read", path="b.txt")),
    ]
    events = events_of(running, tools=[TOOL])
    blocks = [event["content_block"] for event in events if event["type"] == "content_block_start"]
    assert [block["type"] for block in blocks] == ["text", "tool_use", "tool_use"]
    assert len({block["id"] for block in blocks[1:]}) == 2
    inputs = [
        "".join(
            e["delta"].get("partial_json", "") for e in events if e["type"] == "content_block_delta" and e["index"] == i
        )
        for i in (1, 2)
    ]
    assert [json.loads(text) for text in inputs] == [{"path": "a.txt"}, {"path": "b.txt"}]
    assert events[-2]["delta"]["stop_reason"] == "tool_use"


def test_tool_runner_of_the_sdk(client: anthropic.Anthropic, engine: ScriptedEngine) -> None:
    @beta_tool
    def add(a: int, b: int) -> str:
        """Adds two numbers."""
        return str(a + b)

    engine.play = lambda command: (
        calls_text(call_text("add", a=2, b=3))
        if command.messages[-1]["role"] == "user"
        else words(f"The sum is {command.messages[-1]['content']}.")
    )
    runner = client.beta.messages.tool_runner(model="m", max_tokens=100, tools=[add], messages=HI)
    final = runner.until_done()
    assert final.content[0].type == "text"
    assert final.content[0].text == "The sum is 5."
    # The SDK would leave all but the newest messages to a server that keeps conversations.
    assert [m["role"] for m in engine.commands[-1].messages] == ["user", "assistant", "tool"]


def test_structured_output_of_the_sdk(client: anthropic.Anthropic, engine: ScriptedEngine) -> None:
    class Answer(BaseModel):
        city: str

    engine.play = lambda command: words('{"city": "Oslo"}')
    parsed = client.messages.parse(model="m", messages=HI, max_tokens=100, output_format=Answer)
    assert parsed.parsed_output == Answer(city="Oslo")
    assert engine.commands[-1].json_schema is not None


def test_stop_sequence_is_told(client: anthropic.Anthropic) -> None:
    message = client.messages.create(model="m", messages=HI, max_tokens=100, stop_sequences=["can"])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "can")
    assert message.content[0].type == "text"
    assert message.content[0].text == "Hello! How "


def test_bound_is_told(client: anthropic.Anthropic) -> None:
    assert client.messages.create(model="m", messages=HI, max_tokens=2).stop_reason == "max_tokens"


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"type": "auto"}, ("auto", None, None)),
        ({"type": "none"}, ("none", None, None)),
        ({"type": "any"}, ("required", None, None)),
        ({"type": "tool", "name": "read", "disable_parallel_tool_use": True}, ("required", ("read",), 1)),
    ],
)
def test_tool_choice_reaches_the_engine(running: Running, engine: ScriptedEngine, choice: Any, expected: Any) -> None:
    post(running, "/v1/messages", {"messages": HI, "max_tokens": 10, "tools": [TOOL], "tool_choice": choice})
    command = engine.commands[-1]
    assert (command.tool_choice, command.tool_names, command.max_tool_calls) == expected


def test_what_claude_code_sends(running: Running, engine: ScriptedEngine) -> None:
    body = {
        "model": "claude-opus",
        "max_tokens": 64000,
        "system": [
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.abe; cc_entrypoint=sdk-cli;"},
            {"type": "text", "text": "You are an agent.", "cache_control": {"type": "ephemeral"}},
            {"type": "text", "text": "More.", "cache_control": {"type": "ephemeral"}},
        ],
        "metadata": {"user_id": "u"},
        "thinking": {"type": "adaptive"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "high"},
        "tools": [
            TOOL,
            {"name": "later", "description": "L", "input_schema": {"type": "object"}, "defer_loading": True},
            {**TOOL, "name": "write"},
        ],
        "messages": [
            {
                "role": "user",
                "content": [{"type": "text", "text": "A"}, {"type": "text", "text": "B", "cache_control": {}}],
            },
            {"role": "system", "content": "A reminder."},
            {
                "role": "assistant",
                "content": [
                    {"type": "text", "text": "Look."},
                    {"type": "tool_use", "id": "t1", "name": "read", "input": {"path": "a"}},
                    {"type": "tool_use", "id": "t2", "name": "later", "input": {}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "t1", "content": "1\thello"},
                    {
                        "type": "tool_result",
                        "tool_use_id": "t2",
                        "content": [{"type": "tool_reference", "tool_name": "later"}],
                    },
                    {"type": "text", "text": "Go on."},
                ],
            },
        ],
    }
    events_of(running, **body)
    command = engine.commands[-1]
    assert [tool["name"] for tool in command.tools] == ["read", "write"]
    assert [m["role"] for m in command.messages] == ["system", "user", "system", "assistant", "tool", "tool", "user"]
    assert command.messages[0]["content"] == "You are an agent.\n\nMore."
    assert '"name": "later"' in command.messages[5]["content"]


def test_billing_line_does_not_change_the_prompt(running: Running, engine: ScriptedEngine) -> None:
    for version in ("abc", "def"):
        system = [{"type": "text", "text": f"x-anthropic-billing-header: cc={version};"}, {"type": "text", "text": "S"}]
        post(running, "/v1/messages", {"messages": HI, "max_tokens": 10, "system": system})
    assert engine.commands[0].messages == engine.commands[1].messages


def test_cached_tokens_are_counted_apart(client: anthropic.Anthropic) -> None:
    text = "word " * 200
    first = client.messages.create(model="m", messages=[{"role": "user", "content": text}], max_tokens=10)
    again = client.messages.create(model="m", messages=[{"role": "user", "content": text}], max_tokens=10)
    assert first.usage.cache_read_input_tokens == 0
    assert again.usage.cache_read_input_tokens is not None
    assert again.usage.cache_read_input_tokens > 200
    assert again.usage.input_tokens + again.usage.cache_read_input_tokens == first.usage.input_tokens


def test_tokens_are_counted_without_an_answer(client: anthropic.Anthropic, engine: ScriptedEngine) -> None:
    small = client.messages.count_tokens(model="m", messages=HI)
    large = client.messages.count_tokens(model="m", messages=HI, tools=[TOOL], system="Be brief.")  # type: ignore[list-item]
    assert 0 < small.input_tokens < large.input_tokens
    assert engine.commands == []


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "images"),
        (
            {"messages": [{"role": "user", "content": [{"type": "document", "source": {"type": "base64"}}]}]},
            "documents",
        ),
        ({"messages": [{"role": "king", "content": "x"}]}, "king"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "web_search_20250305"),
        ({"tool_choice": {"type": "tool", "name": "x"}}, "tool_choice"),
        ({"mcp_servers": [{"url": "http://x"}]}, "mcp_servers"),
        ({"thinking": {"type": "enabled", "budget_tokens": "x"}}, "budget_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_what_can_not_be_done_is_refused_by_name(running: Running, body: Any, says: str) -> None:
    reply = post(running, "/v1/messages", {"messages": HI, "max_tokens": 10, **body})
    assert reply.status == 400
    assert reply.json["type"] == "error"
    assert reply.json["error"]["type"] == "invalid_request_error"
    assert says in reply.json["error"]["message"]


def test_errors_are_the_sdks_exceptions(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError):
        client.messages.create(model="m", messages=[], max_tokens=10)


def test_death_of_the_engine_is_an_error_event(
    running: Running, client: anthropic.Anthropic, engine: ScriptedEngine
) -> None:
    def die(command: Generate) -> Iterator[str]:
        yield "Hel"
        engine.kill()
        yield "lo"

    engine.play = die
    body = {"messages": HI, "max_tokens": 10, "stream": True}
    name, data = post(running, "/v1/messages", body).events[-1]
    assert (name, data["type"], data["error"]["type"]) == ("error", "error", "overloaded_error")
    with pytest.raises(anthropic.APIError), client.messages.stream(model="m", messages=HI, max_tokens=10) as stream:
        stream.get_final_message()
    engine.play = lambda command: ["fine"]
    assert client.messages.create(model="m", messages=HI, max_tokens=10).stop_reason == "end_turn"


def test_models_in_both_dialects(running: Running, client: anthropic.Anthropic) -> None:
    assert [model.id for model in client.models.list()] == ["test-model"]
    assert client.models.retrieve("claude-x").id == "claude-x"
