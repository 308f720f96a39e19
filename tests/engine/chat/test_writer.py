"""Messages become turns: who answers whom, in which order results come, and what is left out later."""

from __future__ import annotations

import pytest

from localrun.engine.chat.messages import (
    AssistantMessage,
    DeveloperMessage,
    Message,
    MessageError,
    MessageToolCall,
    SystemMessage,
    ToolMessage,
    UserMessage,
)
from localrun.engine.chat.writer import PromptWriter, drop_old_developers, merge_turns, order_tool_results


def calls(*ids: str) -> AssistantMessage:
    return AssistantMessage(tool_calls=tuple(MessageToolCall(name="f", arguments="{}", id=id) for id in ids))


def turns(*messages: Message) -> list[tuple[str, list[str], int]]:
    return [
        (turn.role, [message.content for message in turn.messages], turn.last)
        for turn in order_tool_results(merge_turns(messages))
    ]


def test_results_and_texts_between_two_answers_are_one_turn_of_the_user() -> None:
    found = turns(
        SystemMessage("s"), UserMessage("a"), UserMessage("b"), calls("1"), ToolMessage("r", "1"), UserMessage("c")
    )
    assert found == [("system", ["s"], 0), ("user", ["a", "b"], 2), ("assistant", [""], 3), ("user", ["r", "c"], 5)]


def test_results_come_in_the_order_of_their_calls_and_texts_stay() -> None:
    found = turns(
        UserMessage("q"), calls("1", "2", "3"), ToolMessage("third", "3"), UserMessage("text"), ToolMessage("first", "1"),
        ToolMessage("second", "2"),
    )  # fmt: skip
    assert found[-1][1] == ["first", "text", "second", "third"]


def test_results_of_earlier_calls_are_not_sorted_by_later_ones() -> None:
    found = turns(
        UserMessage("q"), calls("1", "2"), ToolMessage("b", "2"), ToolMessage("a", "1"), calls("2", "1"), ToolMessage("c", "1"),
        ToolMessage("d", "2"),
    )  # fmt: skip
    assert [contents for role, contents, _ in found if role == "user"] == [["q"], ["a", "b"], ["d", "c"]]


def test_a_task_ends_its_turn_for_texts_and_may_not_continue_one() -> None:
    task = UserMessage("find", task="query")
    assert [turn.task for turn in merge_turns([task, UserMessage("more")])] == ["query", None]
    assert len(merge_turns([task, ToolMessage("r")])) == 1
    with pytest.raises(MessageError, match="query on a user message that continues"):
        merge_turns([UserMessage("a"), task])


def test_only_the_last_developer_stays() -> None:
    messages = [DeveloperMessage("old"), AssistantMessage("x"), DeveloperMessage("new"), AssistantMessage("y")]
    kept = [turn.messages[0].content for turn in drop_old_developers(merge_turns(messages))]
    assert kept == ["x", "new", "y"]
    answered = [*messages, UserMessage("q")]
    assert [turn.role for turn in drop_old_developers(merge_turns(answered))] == ["assistant", "assistant", "user"]


def test_an_open_question_asks_for_an_answer_and_an_answered_one_does_not() -> None:
    def written(*messages: Message, thinking: bool = False) -> str | None:
        writer = PromptWriter(merge_turns(messages), thinking=thinking, drop=False, resume=False)
        return writer.write("", 0).completion

    assert written(UserMessage("q")) == "content"
    assert written(UserMessage("q"), thinking=True) == "thinking"
    assert written(UserMessage("q"), AssistantMessage("a")) is None
