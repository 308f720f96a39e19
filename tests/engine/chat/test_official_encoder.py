"""The prompt format against DeepSeek's own encoder: thousands of conversations, byte by byte.

`tools/record_prompts.py` rendered them with the `encoding_dsv4.py` of both generations; the fixtures hold digests of the results.
Where localrun differs, it is one of the deviations below, which docs/prompt-format.md explains.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from localrun.engine.chat.format import ENCODERS
from localrun.engine.chat.messages import MessageError, messages_from_json
from tests.engine.generated_conversations import Generated, generated_conversations
from tools.record_prompts import digest

FIXTURES = Path(__file__).parents[2] / "fixtures"


def ours(generation: str, conversation: Generated) -> str:
    mode = conversation.effort if conversation.thinking else "off"
    messages = messages_from_json(conversation.messages)
    encoder = ENCODERS[generation]
    return encoder.encode_prompt(messages, mode=mode, drop_thinking=conversation.drop_thinking).render()


def deviations(conversation: Generated) -> set[str]:
    """Names of the deviations that may show in this conversation."""
    found = set()
    previous: list[str] = []  # roles of the turns so far, merged
    dropped = _dropped(conversation)
    for i, message in enumerate(conversation.messages):
        role = "user" if message["role"] == "tool" else message["role"]
        for call in message.get("tool_calls", ()):
            if call["function"]["arguments"] in ("[1, 2]", "5", '"text"', "null"):
                found.add("arguments that are JSON but no object")
        if role == "user" and previous[-1:] == ["user"] and message.get("task"):
            found.add("a task in the middle of a turn")
        if i in dropped:
            continue
        if role == "assistant" and not _asked(previous):
            found.add("an answer without a question")
        if role == "system" and _is_open(previous):
            found.add("a system message behind the question")
        if role != "user" or previous[-1:] != ["user"]:
            previous.append(role)
    return found


def _dropped(conversation: Generated) -> set[int]:
    """Developer messages that go with old reasoning."""
    messages = conversation.messages
    if not (conversation.thinking and conversation.drop_thinking) or any(m.get("tools") for m in messages):
        return set()
    last = max((i for i, m in enumerate(messages) if m["role"] in ("user", "developer", "tool")), default=-1)
    return {i for i, m in enumerate(messages) if m["role"] == "developer" and i < last}


def _asked(previous: list[str]) -> bool:
    """Whether the official encoder has written `<｜Assistant｜>` for the answer that follows these turns."""
    while previous and previous[-1] == "latest_reminder":
        previous = previous[:-1]
    return bool(previous) and previous[-1] in ("user", "developer")


def _is_open(previous: list[str]) -> bool:
    """Whether a question among these turns has no answer yet."""
    speakers = [role for role in previous if role in ("user", "developer", "assistant")]
    return bool(speakers) and speakers[-1] != "assistant"


@pytest.mark.parametrize("generation", ENCODERS)
def test_prompts_are_the_official_encoders_byte_by_byte(generation: str) -> None:
    recorded = (FIXTURES / f"prompts-{generation}.txt").read_text(encoding="ascii").split()
    seen, n_same = Counter[str](), 0
    for i, (conversation, official) in enumerate(zip(generated_conversations(generation), recorded, strict=True)):
        try:
            rendered = digest(ours(generation, conversation))
        except MessageError:
            rendered = "refused"
        if rendered == official:
            n_same += 1
            continue
        explained = deviations(conversation)
        assert explained, f"conversation {i} differs: {conversation}"
        seen.update(explained)
    assert n_same > 0.6 * len(recorded)
    assert seen.keys() == {
        "arguments that are JSON but no object",
        "a task in the middle of a turn",
        "an answer without a question",
        "a system message behind the question",
    }
