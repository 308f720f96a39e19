"""Sessions in the shapes that clients send: the second request reads only what is new.

Shapes as recorded of Claude Code 2.1, Codex 0.169, opencode 1.18, Qwen Code 0.15; texts are made up, of the recorded lengths.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from localrun.engine.process.protocol import Generate
from tests.server.raw import post
from tests.server.running import Running
from tests.server.scripted import ScriptedEngine, call_text, calls_text, words


def text(n_chars: int, seed: str) -> str:
    """Prose of a given length, the same each time."""
    line = f"Rule of {seed}: keep answers short, read before you write, and say what you did. "
    return (line * (n_chars // len(line) + 1))[:n_chars]


def schema(name: str, n_chars: int) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"path": {"type": "string", "description": text(n_chars, name)}},
        "required": ["path"],
    }


def play(command: Generate) -> list[str]:
    """Thinks if it may, calls the first tool, then ends."""
    thoughts = [*words("Let me think."), "</think>"] if command.think != "off" else []
    if command.messages[-1]["role"] == "tool" or not command.tools:
        return [*thoughts, *words("It says hello.")]
    return [*thoughts, *words("I look."), *calls_text(call_text(command.tools[0]["name"], path="hello.txt", n=[1, 2]))]


def compact(arguments: str) -> str:
    """As AI-SDK and Qwen serialise arguments anew."""
    return json.dumps(json.loads(arguments), separators=(",", ":"))


def claude_code(running: Running) -> None:
    """Billing line, reminders of role system, caching marks that move, thinking with its signature."""
    tools = [
        {"name": f"Tool{i}", "description": text(900, str(i)), "input_schema": schema(str(i), 1700)} for i in range(24)
    ]
    question: list[Any] = [{"type": "text", "text": text(306, "date")}, {"type": "text", "text": "Read hello.txt."}]
    reminder = {"role": "system", "content": text(6062, "reminder")}

    def ask(messages: list[Any], billing: str) -> Any:
        system = [
            {
                "type": "text",
                "text": f"x-anthropic-billing-header: cc_version=2.1.197.{billing}; cc_entrypoint=sdk-cli;",
            },
            {"type": "text", "text": "You are an agent.", "cache_control": {"type": "ephemeral"}},
            {"type": "text", "text": text(6005, "system"), "cache_control": {"type": "ephemeral"}},
        ]
        body = {
            "model": "claude-x",
            "max_tokens": 64000,
            "thinking": {"type": "adaptive"},
            "system": system,
            "tools": tools,
        }
        return post(running, "/v1/messages?beta=true", {**body, "messages": messages}).json

    marked = [question[0], {**question[1], "cache_control": {"type": "ephemeral"}}]
    first = ask([{"role": "user", "content": marked}, reminder], "abe")
    call = first["content"][-1]
    result = {"type": "tool_result", "tool_use_id": call["id"], "content": "1\thello", "cache_control": {}}
    later = [{"role": "assistant", "content": first["content"]}, {"role": "user", "content": [result]}]
    ask([{"role": "user", "content": question}, reminder, *later], "c0d")


def codex(running: Running) -> None:
    """Developer messages, item ids that change, reasoning as a sealed item."""
    tools = [{"type": "function", "name": f"tool{i}", "parameters": schema(str(i), 1900)} for i in range(9)]
    items: list[Any] = [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": text(16979, "a")}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Read hello.txt."}]},
    ]

    def ask(items: list[Any]) -> Any:
        include = {"store": False, "include": ["reasoning.encrypted_content"], "reasoning": {"effort": "high"}}
        return post(running, "/v1/responses", {"model": "m", "input": items, "tools": tools, **include}).json

    first = ask([{**item, "id": f"msg_{i}"} for i, item in enumerate(items)])
    call = first["output"][-1]
    output = {"type": "function_call_output", "call_id": call["call_id"], "output": "hello"}
    ask([{**item, "id": f"msg_9{i}"} for i, item in enumerate([*items, *first["output"], output])])


def _chat(running: Running, *, as_list: bool) -> None:
    tools = [
        {
            "type": "function",
            "function": {"name": f"tool{i}", "description": text(1500, str(i)), "parameters": schema("x", 500)},
        }
        for i in range(10)
    ]

    def content(words: str) -> Any:
        return [{"type": "text", "text": words}] if as_list else words

    messages: list[Any] = [
        {"role": "system", "content": text(9585, "s")},
        {"role": "user", "content": "Read hello.txt."},
    ]

    def ask(messages: list[Any]) -> Any:
        body = {"model": "m", "messages": messages, "tools": tools, "reasoning_effort": "high"}
        return post(running, "/v1/chat/completions", body).json["choices"][0]["message"]

    answer = ask(messages)
    (call,) = answer["tool_calls"]
    replayed = {**call, "function": {**call["function"], "arguments": compact(call["function"]["arguments"])}}
    reasoning = answer["reasoning_content"].strip()
    messages[1]["content"] = content(messages[1]["content"])
    ask(
        [
            *messages,
            {
                "role": "assistant",
                "content": answer["content"],
                "reasoning_content": reasoning,
                "tool_calls": [replayed],
            },
            {"role": "tool", "tool_call_id": call["id"], "content": content("hello")},
        ]
    )


def opencode(running: Running) -> None:
    _chat(running, as_list=False)


def qwen(running: Running) -> None:
    _chat(running, as_list=True)


@pytest.mark.parametrize("client", [claude_code, codex, opencode, qwen], ids=lambda client: client.__name__)
def test_second_request_of_a_session_reads_only_what_is_new(
    client: Callable[[Running], None], running: Running, engine: ScriptedEngine
) -> None:
    engine.play = play
    client(running)
    wait = [line for line in running.lines if line.outcome == "ok"]
    assert [line.outcome for line in running.lines] == ["ok", "ok"]
    first, second = wait
    assert first.cached_tokens == 0
    assert first.prompt_tokens > 4000
    assert second.prompt_tokens - second.cached_tokens < 200, (second.prompt_tokens, second.cached_tokens)
