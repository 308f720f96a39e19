"""The date and `git status` of a system prompt stand behind the tools, and what was read before stays as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from localrun.server.reminders import MOST_BLOCK_CHARS, Reminders
from tests.server.raw import post
from tests.server.running import Running
from tests.server.scripted import ScriptedEngine, hello

GIT = "gitStatus: This is the git status at the start of the conversation.\n\n{}\n\nRecent commits:\n1234567 Start\n"
TOOL = {"type": "function", "function": {"name": "read", "description": "d" * 4000, "parameters": {"type": "object"}}}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def shown(messages: Sequence[Any]) -> list[str]:
    return [f"{message['role']}: {message['content']}" for message in messages]


@pytest.mark.parametrize(
    ("text", "left", "moved"),
    [
        (
            "Hi.\n<env>\n  Today's date: Mon Jan 05 2026\n</env>\n",
            "Hi.\n<env>\n</env>\n",
            "Today's date: Mon Jan 05 2026",
        ),
        ("Hi.\nCurrent date: 2026-01-05", "Hi.\n", "Current date: 2026-01-05"),
        (f"Hi.\n\n{GIT.format('Status:')}Rest.", "Hi.\n\nRest.", GIT.format("Status:").strip()),
        (f"{GIT.format('Current date: today')}Rest.", "Rest.", GIT.format("Current date: today").strip()),
        ('A\n<context name="gitStatus">M a</context>\nB', "A\nB", '<context name="gitStatus">M a</context>'),
    ],
)
def test_known_lines_stand_behind_the_system_prompt(text: str, left: str, moved: str) -> None:
    arranged = Reminders().arranged([system(text), system("More."), user("Hello.")])
    assert arranged == (system(left), system("More."), {"role": "latest_reminder", "content": moved}, user("Hello."))


@pytest.mark.parametrize(
    "text",
    ["Say Today's date: now and then.", GIT.format("x" * MOST_BLOCK_CHARS), "gitStatus: This is the git status."],
)
def test_other_lines_stay(text: str) -> None:
    messages = (system(text), user("Today's date: 2026-01-05"), system("Today's date: 2026-01-06"))
    assert Reminders().arranged(messages) == messages


def test_a_new_date_stands_behind_the_last_answer_and_stays_there() -> None:
    reminders = Reminders()
    head = [user("Hello."), assistant("Hi."), user("What day is it?")]

    def ask(day: str, messages: Sequence[Any], *, learn: bool = True) -> list[str]:
        return shown(reminders.arranged([system(f"A\nCurrent date: {day}"), *messages], learn=learn))

    assert ask("1", head[:1]) == ["system: A\n", "latest_reminder: Current date: 1", "user: Hello."]
    first = ask("1", head)
    counted = ask("2", head, learn=False)
    second = ask("2", head)
    assert counted == second
    assert second == [*first[:4], "latest_reminder: Current date: 2", first[4]]
    later = [*head, assistant("Tuesday."), user("And now?")]
    assert ask("2", later) == [*second, "assistant: Tuesday.", "user: And now?"]
    # The same first words on another day are another conversation, which does not disturb this one.
    assert ask("3", head[:1])[1] == "latest_reminder: Current date: 3"
    assert ask("2", later)[: len(second)] == second


def test_what_is_remembered_is_bounded() -> None:
    reminders = Reminders(most=10, most_chars=2000)
    for i in range(50):
        reminders.arranged([system("Current date: 1"), user(str(i))])
    assert reminders.size == (10, 10 * len("Current date: 1"))
    for i in range(50):
        reminders.arranged([system(GIT.format("x" * 700)), user(str(i))])
    n_kept, n_chars = reminders.size
    assert n_kept == 2
    assert n_chars <= 2000


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses"])
def test_another_day_costs_no_tools(path: str, running: Running, engine: ScriptedEngine) -> None:
    engine.play = hello

    def ask(day: str) -> None:
        text, question = f"You help.\nToday's date: {day}\nBe brief.", [user("Hello.")]
        tool: dict[str, Any] = TOOL
        body: dict[str, Any] = {"messages": [system(text), *question]}
        if path.endswith("messages"):
            tool = {"name": "read", "description": "d" * 4000, "input_schema": {"type": "object"}}
            body = {"system": text, "messages": question, "max_tokens": 100}
        elif path.endswith("responses"):
            tool, body = {"type": "function", **TOOL["function"]}, {"instructions": text, "input": question}  # type: ignore[dict-item]
        assert post(running, path, {**body, "tools": [tool]}).status == 200

    ask("Monday")
    ask("Tuesday")
    line = running.lines[-1]
    assert line.prompt_tokens > 1000
    assert line.prompt_tokens - line.cached_tokens < 20


def test_the_prompt_stays_as_sent_without_tools_and_if_the_user_says_so(
    running: Running, engine: ScriptedEngine
) -> None:
    seen: list[Any] = []
    engine.play = lambda command: seen.append(command.messages) or hello(command)  # type: ignore[func-returns-value]
    body = {"messages": [system("You help.\nToday's date: Monday\n"), user("Hello.")]}
    post(running, "/v1/chat/completions", body)
    running.service.reminders = None
    post(running, "/v1/chat/completions", {**body, "tools": [TOOL]})
    assert [[dict(message) for message in messages] for messages in seen] == [body["messages"]] * 2
