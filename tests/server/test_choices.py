"""What the engine's events amount to: blocks in their order, calls, reasons and sums."""

from __future__ import annotations

import pytest

from localrun.engine.facts import FinishReason, Timings
from localrun.engine.process.process import GenerateEvent
from localrun.engine.process.protocol import Delta, Finished, PromptProgress, TokenLogprob, ToolCall, ToolCallBegun
from localrun.server.choices import Block, Choice, total_usage


def answer(*events: GenerateEvent) -> Choice:
    made = Choice()
    for event in events:
        made.add(event)
    return made


def delta(kind: str, text: str, *tokens: int) -> Delta:
    return Delta(request=1, kind=kind, text=text, tokens=tokens)


def finished(reason: FinishReason = "eos", **timings: int) -> Finished:
    return Finished(request=1, reason=reason, timings=Timings(**timings), seed=1)


def begun(name: str, call_id: str) -> ToolCallBegun:
    return ToolCallBegun(request=1, index=0, name=name, id=call_id)


def called(name: str, call_id: str, arguments: str, *tokens: int) -> ToolCall:
    return ToolCall(request=1, index=0, name=name, arguments=arguments, id=call_id, tokens=tokens)


def test_runs_of_one_kind_are_parts_in_their_order() -> None:
    made = answer(
        PromptProgress(request=1, done=5, total=9, reused=0, elapsed_s=1.0),
        delta("thinking", "h", 1),
        delta("thinking", "m", 2, 3),
        delta("text", "a", 4),
        begun("f", "c1"),
        delta("tool", '{"x"', 5),
        called("f", "c1", '{"x": 1}', 6),
        delta("text", "b", 7),
        delta("text", "", 8),
        finished(),
    )
    assert made.blocks == [
        Block("thinking", "hm", ended=True),
        Block("text", "a", ended=True),
        Block("tool", '{"x": 1}', "c1", "f", ended=True),
        Block("text", "b", ended=True),
    ]
    assert (made.joined("thinking"), made.joined("text")) == ("hm", "ab")
    assert (made.n_thinking, made.n_tokens, made.finish) == (3, 8, "tool_calls")
    assert made.prompt is not None
    assert made.prompt.done == 5


def test_a_call_without_a_beginning_counts_and_one_without_a_name_does_not() -> None:
    made = answer(called("f", "c1", "{}"), called("", "c2", "{}"))
    assert made.blocks == [Block("tool", "{}", "c1", "f", ended=True)]
    assert answer(delta("tool", "lost")).blocks == []


@pytest.mark.parametrize(
    ("reason", "finish"),
    [("eos", "stop"), ("stop", "stop"), ("stopped", "stop"), ("length", "length"), ("context", "length")],
)
def test_reasons_in_openais_words(reason: FinishReason, finish: str) -> None:
    assert answer(finished(reason)).finish == finish
    assert answer().finish == "stop"


def test_log_probabilities_are_those_of_the_text() -> None:
    logprob = TokenLogprob(token=1, data=(97,), logprob=-0.5)
    made = answer(
        Delta(request=1, kind="thinking", text="h", logprobs=(logprob,)),
        Delta(request=1, kind="text", text="a", logprobs=(logprob,)),
    )
    assert made.logprobs == [logprob]


def test_the_prompt_of_several_choices_counts_once_and_reasoning_of_all() -> None:
    first = answer(delta("thinking", "h", 1, 2), finished(prompt_tokens=10, reused_tokens=4, new_tokens=7))
    second = answer(delta("thinking", "h", 1), finished(prompt_tokens=10, reused_tokens=10, new_tokens=5))
    assert total_usage([first, second]) == (10, 4, 12, 3)
    assert total_usage([answer()]) == (0, 0, 0, 0)
