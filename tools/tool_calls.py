"""Counts tool calls that stay valid when a model's experts get smaller.

    python -m tools.tool_calls MODEL [MODEL ...]

Every model answers the same questions, greedily, with three tools; a call is required, so the grammar is enforced as the server
does it. A call is valid if the engine has parsed it, its tool exists, and its arguments have the names and types that the tool
asks for. The last column is how many calls are those of the first model, to the letter.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

import localrun


def _tool(name: str, about: str, **parameters: str) -> dict[str, Any]:
    properties = {key: {"type": kind} for key, kind in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": about, "parameters": schema}}


TOOLS = (
    _tool("add", "Adds two numbers.", first="integer", second="integer"),
    _tool("look_up", "Looks something up in the encyclopedia.", subject="string"),
    _tool("set_light", "Switches a light.", room="string", on="boolean", brightness="number"),
)
QUESTIONS = (
    *(f"What is {a} plus {b}?" for a, b in ((3, 4), (12, 30), (7, 7), (40, 2), (9, 16), (5, 21))),
    *(f"What is the capital of {land}?" for land in ("France", "Japan", "Egypt", "Peru", "Norway", "Kenya")),
    *(f"Switch the light in the {room} {way}." for room in ("kitchen", "hall", "garden") for way in ("on", "off")),
)
_TYPES: Mapping[str, tuple[type, ...]] = {
    "integer": (int,),
    "string": (str,),
    "boolean": (bool,),
    "number": (int, float),
}


def is_valid(name: str, arguments: str) -> bool:
    """Whether a call follows its tool's schema."""
    schema = next((t["function"]["parameters"] for t in TOOLS if t["function"]["name"] == name), None)
    try:
        values = json.loads(arguments)
    except ValueError:
        return False
    if schema is None or not isinstance(values, dict) or values.keys() != schema["properties"].keys():
        return False
    kinds = {key: _TYPES[value["type"]] for key, value in schema["properties"].items()}
    return all(
        isinstance(values[key], kind) and (bool in kind or not isinstance(values[key], bool))
        for key, kind in kinds.items()
    )


def calls_of(model: str) -> list[list[tuple[str, str]]]:
    """By question the calls: name and arguments."""
    answers = []
    with localrun.load(model) as loaded:
        for question in QUESTIONS:
            answer = loaded.ask(
                question, tools=TOOLS, tool_choice="required", temperature=0, think="off", max_tokens=200
            )
            answers.append([(call.name, call.arguments) for call in answer.tool_calls])
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    args = parser.parse_args()
    first: list[list[tuple[str, str]]] | None = None
    for model in args.models:
        calls = calls_of(model)
        first = first or calls
        valid = sum(bool(made) and all(is_valid(*call) for call in made) for made in calls)
        same = sum(made == other for made, other in zip(calls, first, strict=True))
        print(f"{model:40} {valid:3} of {len(calls)} valid, {same:3} the same", flush=True)


if __name__ == "__main__":
    main()
