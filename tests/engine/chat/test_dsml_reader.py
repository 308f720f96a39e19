"""The arguments of one call, parameter by parameter: what streams, what waits for its end, what is guessed and flagged."""

from __future__ import annotations

import json
from typing import Any

import pytest

from localrun.engine.chat.dsml_reader import CallReader
from localrun.engine.chat.dsml_tags import Tag
from localrun.engine.chat.messages import ToolSchema
from localrun.engine.chat.tool_types import ToolTypes

TYPES = ToolTypes.of(
    ToolSchema(
        {
            "name": "f",
            "parameters": {
                "properties": {
                    "text": {"type": "string"},
                    "n": {"type": "integer"},
                    "on": {"type": "boolean"},
                    "any": {},
                },
                "required": ["text"],
            },
        }
    )
)


def parameter(reader: CallReader, name: str, value: str, mode: str = "true", **more: Any) -> list[str]:
    """What each step adds to the JSON; the value comes in two pieces."""
    half = len(value) // 2
    return [
        reader.open_value(Tag("parameter", 0, 0, name, mode, **more)),
        reader.add_value(value[:half]),
        reader.add_value(value[half:]),
        reader.close_value(),
    ]


def test_a_string_streams_and_everything_else_comes_at_its_end() -> None:
    reader = CallReader(0, "f", TYPES)
    assert parameter(reader, "text", 'a "b"') == ['{"text": "', "a ", '\\"b\\"', '"']
    assert parameter(reader, "n", "12", "false") == ["", "", "", ', "n": 12']
    assert reader.close() == "}"
    assert (json.loads(reader.arguments), reader.problems) == ({"text": 'a "b"', "n": 12}, [])
    assert reader.between_parameters
    assert reader.has_parameters


@pytest.mark.parametrize(
    ("name", "mode", "written", "value", "problems"),
    [
        ("n", "false", " 7 ", 7, []),
        ("n", "true", "7", 7, ["retyped"]),
        ("n", "false", "seven", "seven", ["bad_json"]),
        ("n", "false", '"x"', "x", []),  # the tool refuses it
        ("on", "false", "True", True, ["guessed_type"]),
        ("on", "", "false", False, []),
        ("text", "false", "7", "7", ["retyped"]),
        ("any", "true", "7", "7", []),
        ("any", "false", "[1, 2]", [1, 2], []),
        ("any", "", "[1, 2]", [1, 2], ["guessed_type"]),
        ("any", "", "no JSON", "no JSON", ["guessed_type"]),
        ("any", "false", "NaN", "NaN", ["bad_json"]),
    ],
)
def test_what_a_value_becomes(name: str, mode: str, written: str, value: object, problems: list[str]) -> None:
    reader = CallReader(0, "f", TYPES)
    parameter(reader, name, written, mode)
    reader.close()
    found = json.loads(reader.arguments)[name]
    assert (type(found), found) == (type(value), value)
    if (name, mode) != ("text", "false"):  # the schema says string: it streams where nothing declares another type
        assert reader.problems == problems


def test_the_first_of_two_parameters_of_one_name_counts() -> None:
    reader = CallReader(0, "f", TYPES)
    parameter(reader, "text", "one")
    assert parameter(reader, "text", "two") == ["", "", "", ""]
    reader.close()
    assert (reader.arguments, reader.problems) == ('{"text": "one"}', ["duplicate_parameter"])


def test_arguments_in_one_parameter_are_unwrapped_if_the_schema_knows_them() -> None:
    reader = CallReader(0, "f", TYPES)
    parameter(reader, "arguments", '{"text": "x", "n": 1}', "false")
    reader.close()
    assert (json.loads(reader.arguments), reader.problems) == ({"text": "x", "n": 1}, ["unwrapped"])
    unknown = CallReader(0, "f", TYPES)
    parameter(unknown, "arguments", '{"other": 1}', "false")
    unknown.close()
    assert json.loads(unknown.arguments) == {"arguments": {"other": 1}}


@pytest.mark.parametrize(
    ("body", "arguments", "problems"),
    [
        ("", {}, []),
        ('{"text": "x"}', {"text": "x"}, ["not_parameters"]),
        ('{"arguments": {"text": "x"}}', {"text": "x"}, ["not_parameters", "unwrapped"]),
        ("words", {"arguments": "words"}, ["not_parameters"]),
    ],
)
def test_a_body_without_parameters(body: str, arguments: object, problems: list[str]) -> None:
    reader = CallReader(0, "f", TYPES)
    reader.body.append(body)
    reader.close()
    assert (json.loads(reader.arguments), reader.problems) == (arguments, problems)


def test_text_between_parameters_and_impossible_names_are_flagged() -> None:
    reader = CallReader(0, "f")
    parameter(reader, "a<b", "x", odd=True)
    reader.body.append(" stray ")
    assert not reader.between_parameters
    reader.close()
    assert reader.problems == ["odd_tag", "bad_name", "stray_text"]
    assert CallReader(0, "").problems == ["no_name"]
