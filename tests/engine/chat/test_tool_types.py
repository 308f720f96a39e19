"""What a tool's schema says about its parameters."""

from __future__ import annotations

from typing import Any

import pytest

from localrun.engine.chat.messages import ToolSchema
from localrun.engine.chat.tool_types import ALL_TYPES, ToolTypes, fits


def types_of(**parameters: Any) -> ToolTypes:
    return ToolTypes.of(ToolSchema({"name": "f", "parameters": {"type": "object", **parameters}}))


@pytest.mark.parametrize(
    ("schema", "types"),
    [
        ({"type": "string"}, {"string"}),
        ({"type": ["integer", "null"]}, {"integer", "null"}),
        ({"enum": ["a", 1, None]}, {"string", "integer", "null"}),
        ({"const": 1.5}, {"number"}),
        ({"const": 2.0}, {"integer"}),
        ({"anyOf": [{"type": "string"}, {"const": True}]}, {"string", "boolean"}),
        ({"type": ["string", "null"], "oneOf": [{"type": "string"}, {"type": "array"}]}, {"string"}),
        ({"allOf": [{"type": ["string", "number"]}, {"type": ["number", "null"]}]}, {"number"}),
        ({"const": {"a": 1}}, {"object"}),
        ({"const": [1]}, {"array"}),
    ],
)
def test_types_follow_from_a_few_keywords(schema: dict[str, Any], types: set[str]) -> None:
    assert types_of(properties={"p": schema}).types == {"p": frozenset(types)}


@pytest.mark.parametrize(
    "schema", [{}, {"type": "thing"}, {"type": "string", "const": 1}, {"$ref": "#/x"}, True, {"enum": []}]
)
def test_a_schema_that_does_not_say_allows_all(schema: Any) -> None:
    found = types_of(properties={"p": schema})
    assert found.types == {}
    assert found.names == {"p"}


@pytest.mark.parametrize(("depth", "types"), [(8, {"p": {"string"}}), (9, {})])
def test_a_schema_that_goes_too_deep_is_given_up(depth: int, types: dict[str, set[str]]) -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"anyOf": [schema]}
    assert types_of(properties={"p": schema}).types == types


def test_calls_are_accepted_by_their_parameters_names() -> None:
    found = types_of(properties={"a": {}, "b": {}}, required=["a", 7])
    assert found.required == {"a"}
    assert found.accepts(["a"])
    assert found.accepts(["b", "a"])
    assert not found.accepts(["b"])
    assert not found.accepts(["a", "c"])


@pytest.mark.parametrize("parameters", [{}, {"properties": {"a": {}}, "additionalProperties": True}])
def test_open_schemas_accept_nothing_in_particular(parameters: dict[str, Any]) -> None:
    found = types_of(**parameters)
    assert found.names is None
    assert not found.accepts(["a"])


def test_a_tool_without_parameters_says_nothing() -> None:
    found = ToolTypes.of(ToolSchema({"name": "f"}))
    assert (found.types, found.names, found.required) == ({}, None, frozenset())


@pytest.mark.parametrize(
    ("value", "types"),
    [
        (None, {"null"}),
        (True, {"boolean"}),
        (1, {"integer", "number"}),
        (1.0, {"integer", "number"}),
        (1.5, {"number"}),
        ("", {"string"}),
        ([], {"array"}),
        ({}, {"object"}),
    ],
)
def test_values_fit_their_types_and_no_others(value: Any, types: set[str]) -> None:
    assert {name for name in ALL_TYPES if fits(value, frozenset({name}))} == types
