"""Thousands of conversations that are the same on every machine and Python, to be rendered by several encoders.

Random numbers come from `random.random`, the one function of that module whose sequence is guaranteed to stay.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")

N_CONVERSATIONS = 3000

_TEXTS = (
    *(
        "Hi",
        "",
        "Zwei\n\nZeilen",
        "漢字 🙂 é",
        "1 < 2 & \"three\" \\ 'four'",
        "<tool_result>x</tool_result>",
        "\n",
        " a ",
        "\t",
    ),
    *(
        "<think>",
        "</think>",
        "<｜User｜>",
        "<｜end▁of▁sentence｜>",
        "</｜DSML｜parameter>",
        "x" * 40,
        "{}",
        "</tool_result>",
        "null",
    ),
)
_VALUES: tuple[Any, ...] = (
    *(
        "plain",
        "",
        'quo"te',
        "a\nb",
        "ü",
        1,
        0,
        -2.5,
        1e300,
        True,
        False,
        None,
        [],
        [1, "a", None],
        {},
        {"a": {"b": ["ü"]}},
    ),
    *("</｜DSML｜parameter>", 10**20, {"": ""}, "<think>"),
)
_TASKS = ("action", "query", "authority", "domain", "title", "read_url")
_IDS = ("call_0", "call_1", "call_2", "other", "")


@dataclass(frozen=True)
class Generated:
    """A conversation as JSON in the official encoder's shape, with the options that it takes."""

    messages: list[dict[str, Any]]
    thinking: bool
    effort: str | None
    drop_thinking: bool


EFFORTS: dict[str, tuple[str | None, ...]] = {"v4": (None, "high", "max"), "v4-0731": (None, "low", "high", "max")}
"""What each generation's encoder takes; None is its default."""

SEEDS = {"v4": 20260424, "v4-0731": 20260731}


def generated_conversations(
    generation: str = "v4", count: int = N_CONVERSATIONS, seed: int | None = None
) -> Iterator[Generated]:
    """`count` conversations for the encoder of this name in `localrun.engine.chat.format.ENCODERS`."""
    rng = random.Random(SEEDS[generation] if seed is None else seed)
    for _ in range(count):
        yield _conversation(_Dice(rng), EFFORTS[generation])


class _Dice:
    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def chance(self, share: float) -> bool:
        return self._rng.random() < share

    def number(self, low: int, high: int) -> int:
        return low + int(self._rng.random() * (high + 1 - low))

    def pick(self, choices: Sequence[T]) -> T:
        return choices[self.number(0, len(choices) - 1)]

    def text(self) -> str:
        return "".join(self.pick(_TEXTS) for _ in range(self.number(1, 3)))


def _conversation(dice: _Dice, efforts: Sequence[str | None]) -> Generated:
    thinking = dice.chance(0.7)
    # Half of them have the usual order; in the others any role follows any.
    ordinary = dice.chance(0.5)
    messages: list[dict[str, Any]] = []
    if ordinary:
        if dice.chance(0.6):
            messages.append(_with_extras(dice, {"role": "system", "content": dice.text()}))
        for _ in range(dice.number(1, 4)):
            messages += _turn(dice)
        if dice.chance(0.5):
            messages.append(_question(dice))
    else:
        messages = [_any(dice) for _ in range(dice.number(1, 7))]
    return Generated(messages, thinking, dice.pick(efforts), dice.chance(0.7))


def _turn(dice: _Dice) -> list[dict[str, Any]]:
    turn = [_question(dice)]
    if dice.chance(0.15):
        turn.append({"role": "latest_reminder", "content": dice.text()})
    answer = _answer(dice)
    turn.append(answer)
    for call in answer.get("tool_calls", ()):
        if dice.chance(0.8):
            turn.append({"role": "tool", "content": dice.text(), "tool_call_id": dice.pick((call["id"], *_IDS))})
    if turn[-1]["role"] == "tool":
        if dice.chance(0.3):
            turn.append({"role": "user", "content": dice.text()})
        turn.append(_answer(dice))
    return turn


def _question(dice: _Dice) -> dict[str, Any]:
    if dice.chance(0.15):
        return _with_extras(dice, {"role": "developer", "content": dice.text() + "."})
    question: dict[str, Any] = {"role": "user", "content": dice.text()}
    if dice.chance(0.1):
        question["task"] = dice.pick(_TASKS)
    return question


def _answer(dice: _Dice) -> dict[str, Any]:
    answer: dict[str, Any] = {"role": "assistant", "content": dice.text()}
    if dice.chance(0.6):
        answer["reasoning_content"] = dice.text()
    if dice.chance(0.4):
        answer["tool_calls"] = [
            {
                "id": f"call_{i}",
                "type": "function",
                "function": {"name": dice.pick(("f", "get_x", "a.b-c")), "arguments": _arguments(dice)},
            }
            for i in range(dice.number(1, 3))
        ]
    if dice.chance(0.1):
        answer["wo_eos"] = True
    if dice.chance(0.05):
        answer["task"] = "title"
    return answer


def _arguments(dice: _Dice) -> str:
    if dice.chance(0.06):
        return dice.pick(("", "not json", "[1, 2]", "5", '"text"', "null", '{"a": '))
    names = ("path", "n", "ü", 'a"b', "x y", "")
    return json.dumps(
        {dice.pick(names): dice.pick(_VALUES) for _ in range(dice.number(0, 4))}, ensure_ascii=dice.chance(0.5)
    )


def _any(dice: _Dice) -> dict[str, Any]:
    role = dice.pick(("system", "latest_reminder", "tool", "question", "question", "answer", "answer"))
    match role:
        case "question":
            return _question(dice)
        case "answer":
            return _answer(dice)
        case "system":
            return _with_extras(dice, {"role": "system", "content": dice.text()})
        case "tool":
            return {"role": "tool", "content": dice.text(), "tool_call_id": dice.pick(_IDS)}
        case _:
            return {"role": role, "content": dice.text()}


def _with_extras(dice: _Dice, message: dict[str, Any]) -> dict[str, Any]:
    if dice.chance(0.25):
        message["tools"] = [
            {
                "type": "function",
                "function": {
                    "name": f"t{i}",
                    "description": dice.text(),
                    "parameters": {"type": "object", "x": dice.pick(_VALUES)},
                },
            }
            for i in range(dice.number(1, 2))
        ]
    if dice.chance(0.15):
        message["response_format"] = dice.pick(({"type": "object"}, {"a": ["ü", None, 1.5]}, "text", [1]))
    return message
