"""Counts tool calls that stay valid when a model's experts get smaller.

    python -m tools.tool_calls MODEL [MODEL ...]

Every model answers the same questions, greedily, with three tools; a call is required, so the grammar is enforced as the server
does it. A call is valid if its tool exists and its arguments have the names and types that the tool asks for; what the limit of
tokens cuts off does not count, because a small model may never end a string or go on calling. The last column says how many first
calls are those of the first model, to the letter.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

import localrun


def _tool(name: str, about: str, **parameters: Any) -> dict[str, Any]:
    """A function whose parameters have a type (`integer`) or one of some values. No free text, which a small model never ends."""
    properties = {
        key: {"type": kind} if isinstance(kind, str) else {"type": "string", "enum": list(kind)}
        for key, kind in parameters.items()
    }
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": about, "parameters": schema}}


LANDS, ROOMS = ("France", "Japan", "Egypt", "Peru", "Norway", "Kenya"), ("kitchen", "hall", "garden")
TOOLS = (
    _tool("add", "Adds two numbers.", first="integer", second="integer"),
    _tool("capital", "Looks a capital up.", country=LANDS),
    _tool("set_light", "Switches a light.", room=ROOMS, on="boolean", brightness=("low", "high")),
)
QUESTIONS = (
    *(f"What is {a} plus {b}?" for a, b in ((3, 4), (12, 30), (7, 7), (40, 2), (9, 16), (5, 21))),
    *(f"What is the capital of {land}?" for land in LANDS),
    *(f"Switch the light in the {room} {way}." for room in ROOMS for way in ("on", "off")),
)
_TYPES: Mapping[str, type] = {"integer": int, "string": str, "boolean": bool}


def is_valid(name: str, arguments: str) -> bool:
    """Whether a call follows its tool's schema."""
    schema = next((t["function"]["parameters"] for t in TOOLS if t["function"]["name"] == name), None)
    try:
        values = json.loads(arguments)
    except ValueError:
        return False
    if schema is None or not isinstance(values, dict) or values.keys() != schema["properties"].keys():
        return False
    for key, wanted in schema["properties"].items():
        if type(values[key]) is not _TYPES[wanted["type"]] or values[key] not in wanted.get("enum", [values[key]]):
            return False
    return True


def calls_of(model: str, max_tokens: int) -> list[list[tuple[str, str]]]:
    """By question the complete calls: name and arguments."""
    answers = []
    with localrun.load(model) as loaded:
        for question in QUESTIONS:
            answer = loaded.ask(
                question, tools=TOOLS, tool_choice="required", temperature=0, think="off", max_tokens=max_tokens
            )
            answers.append([(call.name, call.arguments) for call in answer.tool_calls if call.usable])
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--max-tokens", type=int, default=200)
    args = parser.parse_args()
    first: list[list[tuple[str, str]]] | None = None
    for model in args.models:
        answers = calls_of(model, args.max_tokens)
        first = first or answers
        calls = [call for made in answers for call in made]
        n_valid, n_called = sum(is_valid(*call) for call in calls), sum(bool(made) for made in answers)
        n_same = sum(made[:1] == other[:1] for made, other in zip(answers, first, strict=True) if made)
        print(
            f"{model:40} {n_valid:3} of {len(calls):3} calls valid, {n_called} of {len(answers)} answers with a call,"
            f" {n_same} begin with the same",
            flush=True,
        )


if __name__ == "__main__":
    main()
