"""Recorded agents are replayed: texts of the recorded lengths, answers in their places, lines that change."""

from __future__ import annotations

from typing import Any

import pytest

from tools.serve_reuse import OVERNIGHT, RUNS, Cost, filled, made_up, replay_all, tool_of

CALL = {"id": "call_1", "type": "function", "function": {"name": "read", "arguments": '{"path":"a.txt"}'}}
TOOL = {"name": "read", "type": "function", "bytes": 900, "keys": ["function.name", "function.parameters"]}
CHAT: list[Any] = [
    {"role": "system", "content": "<str 4000>"},
    {"role": "user", "content": [{"type": "text", "text": "<str 400>"}]},
]
CHAT_LATER = [
    {"role": "assistant", "content": "", "reasoning_content": "Let me think.", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "hello"},
]
THOUGHT = {"type": "thinking", "thinking": "Let me think.", "signature": "c2ln"}
USE = {"type": "tool_use", "id": "t1", "name": "read", "input": {"path": "a.txt"}}
MESSAGES: list[Any] = [{"role": "user", "content": [{"type": "text", "text": "<str 300>"}]}]
MESSAGES_LATER: list[Any] = [
    {"role": "assistant", "content": [THOUGHT, USE]},
    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "hello"}]},
]
SYSTEM = [
    {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.197.abe; cc_entrypoint=sdk-cli;"},
    {"type": "text", "text": "<str 3000>"},
]


def recording(client: str, path: str, field: str, turns: list[list[Any]], tool: Any, **fields: Any) -> dict[str, Any]:
    requests = [
        {"path": path, "headers": {"x-session-id": "s"}, "body": {"model": "m", **fields, field: turn}, "tools": [tool]}
        for turn in turns
    ]
    return {"client": client, "runs": {"base": {"requests": [{"path": "/", "method": "HEAD"}, *requests]}}}


def new_tokens(costs: list[Cost]) -> list[list[int]]:
    """Of each run, the new tokens of each request."""
    return [[cost.new for cost in costs if cost.run == run + 1] for run in range(len(RUNS))]


def test_a_line_in_the_first_message_costs_what_is_behind_it() -> None:
    turns = [CHAT, [*CHAT, *CHAT_LATER]]
    costs = replay_all([recording("qwen", "/v1/chat/completions", "messages", turns, TOOL)])
    first, same_day, other_day = new_tokens(costs)
    assert costs[0].reused == 0
    assert costs[0].prompt > (4000 + 400 + 900) / 4
    assert first[1] < 40
    assert same_day[0] == 1
    assert 60 < other_day[0] < 120
    assert other_day[1] < 40


def test_a_date_before_the_tools_costs_no_tools() -> None:
    turns = [CHAT, [*CHAT, *CHAT_LATER]]
    costs = replay_all([recording("opencode", "/v1/chat/completions", "messages", turns, TOOL)])
    _, _, other_day = new_tokens(costs)
    assert max(other_day) < 140  # the question has 100
    overnight = [cost for cost in costs if cost.run == OVERNIGHT]
    assert len(overnight) == 1
    assert overnight[0].new < 60


def test_the_billing_line_costs_nothing() -> None:
    tool = {"name": "read", "type": None, "bytes": 900, "keys": ["description", "input_schema", "name"]}
    turns = [MESSAGES, [*MESSAGES, *MESSAGES_LATER]]
    fields = {"system": SYSTEM, "max_tokens": 100, "thinking": {"type": "adaptive"}}
    first, same_day, _ = new_tokens(
        replay_all([recording("claude", "/v1/messages", "messages", turns, tool, **fields)])
    )
    assert first[1] < 40
    assert same_day[0] == 1


def test_texts_and_tools_have_their_recorded_sizes() -> None:
    assert len(made_up(1234, "a")) == 1234
    assert made_up(500, "a") != made_up(500, "b")
    assert filled({"x": ["<str 100>", "<str>"]}, "any", *RUNS[0]) == {"x": [made_up(100, "x[0]"), "<str>"]}
    one, other = (filled([{"content": "<str 400>"}], "opencode", day, "x", "messages") for day, _ in RUNS[1:])
    assert one != other
    assert len(one[0]["content"]) == len(other[0]["content"]) == 400
    for kind, keys in ((None, ["input_schema"]), ("function", ["parameters"]), ("namespace", ["tools"])):
        tool = tool_of({"name": "t", "type": kind, "bytes": 700, "keys": keys, "sub": ["a", "b"]})
        assert len(str(tool)) == pytest.approx(700, abs=40)
