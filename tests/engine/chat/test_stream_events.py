"""Events of an answer, collected into a message."""

from __future__ import annotations

import pytest

from localrun.engine.chat.messages import AssistantMessage, MessageToolCall
from localrun.engine.chat.stream_events import (
    End,
    MessageBuilder,
    Problem,
    TextDelta,
    ThinkingDelta,
    ToolCallDelta,
    ToolCallEnd,
    ToolCallStart,
)


def test_an_answer_is_what_its_events_say_in_their_order() -> None:
    answer = MessageBuilder()
    answer.add([ThinkingDelta("hm"), ThinkingDelta("!"), TextDelta("a"), TextDelta("b")])
    answer.add([ToolCallStart(0, "f"), ToolCallDelta(0, "{}"), ToolCallEnd(0, "f", "{}", "id", ("odd_tag",))])
    answer.add([End("eos", ("other_markup", "odd_tag"))])
    assert answer.message() == AssistantMessage("ab", "hm!", (MessageToolCall("f", "{}", "id"),))
    assert answer.problems == ("other_markup", "odd_tag"), "each once, those of calls last"
    assert answer.end == End("eos", ("other_markup", "odd_tag"))


@pytest.mark.parametrize("problem", ["truncated", "no_name", "bad_name"])
def test_a_call_that_must_not_be_run_is_left_out(problem: Problem) -> None:
    answer = MessageBuilder()
    answer.add([TextDelta("x"), ToolCallEnd(0, "f", "{}", "id", (problem,)), End("eos")])
    assert not answer.calls[0].usable
    assert answer.message() == AssistantMessage("x")
    assert answer.problems == (problem,)


def test_a_call_whose_name_no_tool_can_have_is_left_out() -> None:
    answer = MessageBuilder()
    answer.add([ToolCallEnd(0, "", "{}", "id"), End("eos")])
    assert answer.message().tool_calls == ()


def test_reasoning_that_was_cut_off_stays_open_unless_something_followed() -> None:
    for more, is_open in ([], True), ([TextDelta("x")], False):
        answer = MessageBuilder()
        answer.add([ThinkingDelta("hm"), *more, End("length", ("unclosed_think",))])
        assert answer.message().thinking_open is is_open
