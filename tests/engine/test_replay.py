"""Answers that come back enter the prompt as the ids that were sampled."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from localrun.engine import replay
from localrun.engine.chat.format import ENCODERS
from localrun.engine.chat.messages import (
    AssistantMessage,
    Message,
    MessageToolCall,
    SampledAnswer,
    ToolMessage,
    ToolSchema,
    UserMessage,
)
from localrun.engine.chat.parts import Sampled
from localrun.engine.replay import AnswerMemory

QUESTION = [UserMessage("Read it.")]
CALL = MessageToolCall("read", '{"path": "a.txt", "n": [1, 2]}', "call_1")
ANSWER = AssistantMessage("I look.", "Let me see.", (CALL,))
IDS = SampledAnswer((10, 11), (20, 21, 22), "I look.")


def remembering(path: Path | None = None) -> AnswerMemory:
    memory = AnswerMemory(path)
    memory.remember(QUESTION, ANSWER, IDS)
    return memory


def recalled(
    memory: AnswerMemory, answer: AssistantMessage, question: list[Message] | None = None
) -> SampledAnswer | None:
    before: list[Message] = [*QUESTION] if question is None else question
    message = memory.recall([*before, answer, ToolMessage("x", "call_1")])[len(before)]
    assert isinstance(message, AssistantMessage)
    return message.sampled


def test_call_serialised_anew_without_reasoning_is_known_by_its_id() -> None:
    again = AssistantMessage(" I look. ", "", (MessageToolCall("read", '{"n":[1,2],"path":"a.txt"}', "call_1"),))
    assert recalled(remembering(), again, [UserMessage("another beginning")]) == IDS


def test_changed_arguments_names_and_texts_are_the_clients_own() -> None:
    memory = remembering()
    for call in (
        MessageToolCall("read", '{"path": "b.txt"}', "call_1"),
        MessageToolCall("write", CALL.arguments, "call_1"),
    ):
        assert recalled(memory, AssistantMessage("I look.", "", (call,))) is None
    assert recalled(memory, AssistantMessage("I look away.", "", (CALL,))) is None
    assert (
        recalled(memory, AssistantMessage("I look.", "", (MessageToolCall("read", CALL.arguments, "call_9"),))) is None
    )


def test_plain_answer_is_known_by_the_conversation_before_it() -> None:
    memory = AnswerMemory(None)
    memory.remember(QUESTION, AssistantMessage("Done."), IDS)
    assert recalled(memory, AssistantMessage("Done.")) == IDS
    assert recalled(memory, AssistantMessage("Done."), [UserMessage("Another question.")]) is None
    assert recalled(memory, AssistantMessage("Not done.")) is None


def test_file_outlives_the_program_and_damaged_lines_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "answers" / "x.jsonl"
    remembering(path)
    with path.open("ab") as file:
        file.write(b'{"keys": ["call_2"], "content"\n\xff\n')
    assert recalled(AnswerMemory(path), ANSWER) == IDS
    assert path.stat().st_mode & 0o077 == 0
    (line,) = [json.loads(text) for text in path.read_bytes().splitlines()[:1]]
    assert line["rest"] == [20, 21, 22]


def test_bounded_memory_forgets_the_oldest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(replay, "MAX_ANSWERS", 3)
    path = tmp_path / "x.jsonl"
    memory = AnswerMemory(path)
    for i in range(10):
        memory.remember(QUESTION, AssistantMessage("", "", (MessageToolCall("read", "{}", f"c{i}"),)), IDS)
    known = [
        i for i in range(10) if recalled(memory, AssistantMessage("", "", (MessageToolCall("read", "{}", f"c{i}"),)))
    ]
    assert known == [7, 8, 9]
    assert len(path.read_bytes().splitlines()) <= 7


def test_ids_are_bounded_too_however_few_the_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MAX_IDS", 2 * len(IDS))
    memory = AnswerMemory(None)
    calls = [MessageToolCall("read", "{}", f"c{i}") for i in range(4)]
    for call in calls:
        memory.remember(QUESTION, AssistantMessage("", "", (call,)), IDS)
        memory.remember(QUESTION, AssistantMessage("", "", (call,)), IDS)  # again: counted once
    known = [call.id for call in calls if recalled(memory, AssistantMessage("", "", (call,)))]
    assert known == ["c2", "c3"]


def test_ids_stand_in_the_prompt_where_the_text_would() -> None:
    encoder = ENCODERS["v4"]
    known = AssistantMessage("I look.", "Let me see.", (CALL,), sampled=IDS)
    tools = (ToolSchema({"name": "read"}),)  # with tools no reasoning is dropped
    conversation: list[Message] = [*QUESTION, known, ToolMessage("content", "call_1")]
    parts = encoder.encode_prompt(conversation, mode="high", tools=tools).parts
    assert [part.ids for part in parts if isinstance(part, Sampled)] == [(10, 11), (20, 21, 22)]
    off = encoder.encode_prompt(conversation, mode="off").parts
    assert [part.ids for part in off if isinstance(part, Sampled)] == [(20, 21, 22)]
