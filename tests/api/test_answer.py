"""An answer is put together from its events, and is a message."""

from __future__ import annotations

from localrun.api.answer import Gathered
from localrun.engine.facts import Timings
from localrun.engine.process.protocol import Delta, Finished, PromptProgress, ToolCall

CALL = ToolCall(request=1, index=0, name="f", arguments='{"a": 1}', id="call_1")
END = Finished(request=1, reason="eos", timings=Timings(new_tokens=5), seed=7, problems=("p",), warning="w")


def gathered(*events: Delta | Finished | PromptProgress | ToolCall) -> Gathered:
    found = Gathered()
    for event in events:
        found.take(event)
    return found


def test_pieces_are_joined_by_kind() -> None:
    found = gathered(
        PromptProgress(request=1, done=1, total=1, reused=0, elapsed_s=0.0),
        Delta(request=1, kind="thinking", text="H"),
        Delta(request=1, kind="text", text="a"),
        Delta(request=1, kind="thinking", text="m"),
        Delta(request=1, kind="tool", text='{"a'),
        Delta(request=1, kind="text", text="b"),
    )
    assert (found.text, found.thinking) == ("ab", "Hm")


def test_a_whole_answer_says_how_it_ended() -> None:
    answer = gathered(Delta(request=1, kind="text", text="yes"), CALL, END).answer()
    assert str(answer) == answer.text == "yes"
    assert answer.tool_calls == (CALL,)
    assert (answer.finish_reason, answer.seed, answer.timings) == ("eos", 7, Timings(new_tokens=5))
    assert (answer.problems, answer.warning) == (("p",), "w")


def test_the_next_message_holds_what_there_is() -> None:
    assert gathered(Delta(request=1, kind="text", text="yes"), END).answer().message == {
        "role": "assistant",
        "content": "yes",
    }
    assert gathered(Delta(request=1, kind="thinking", text="Hm"), CALL, END).answer().message == {
        "role": "assistant",
        "content": "",
        "reasoning_content": "Hm",
        "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}],
    }
