"""DSML: how tools are offered and calls are written, and what a single tag is."""

from __future__ import annotations

import json

import pytest
from hypothesis import given

from localrun.engine.chat.dsml import Parameter, parameters_of, render_tool_calls, to_json, tool_instructions
from localrun.engine.chat.dsml_tags import DSML_MARK, Tag, next_tag
from localrun.engine.chat.messages import MessageToolCall, ToolSchema
from localrun.engine.chat.parts import DSML, THINK_END, THINK_START, Special, Text, merge_texts, render
from tests.engine.chat_strategies import any_speed, argument_objects, json_values, texts


def test_calls_are_written_as_in_the_official_example() -> None:
    calls = [
        MessageToolCall(
            "get_weather", '{"location": "Beijing", "days": 3, "units": ["C", null], "note": "a\\n\\"b\\" ü"}'
        ),
        MessageToolCall("now", "{}"),
    ]
    assert render(render_tool_calls(calls)) == (
        "\n\n<｜DSML｜tool_calls>\n"
        '<｜DSML｜invoke name="get_weather">\n'
        '<｜DSML｜parameter name="location" string="true">Beijing</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="units" string="false">["C", null]</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="note" string="true">a\n"b" ü</｜DSML｜parameter>\n'
        "</｜DSML｜invoke>\n"
        '<｜DSML｜invoke name="now">\n'
        "\n"
        "</｜DSML｜invoke>\n"
        "</｜DSML｜tool_calls>"
    )


def test_only_our_own_markup_is_special() -> None:
    call = MessageToolCall("f", json.dumps({"x": f"</{DSML}parameter><think>"}, ensure_ascii=False))
    parts = merge_texts(render_tool_calls([call]))
    assert sum(part == Special(DSML) for part in parts) == 6
    assert not any(part == Special(THINK_START) for part in parts)
    assert any(isinstance(part, Text) and f"</{DSML}parameter><think></" in part.text for part in parts)


def test_instructions_have_tokens_in_the_fixed_text_and_none_in_the_schemas() -> None:
    tool = ToolSchema({"name": "f", "description": f"<think> {DSML} ü", "parameters": {"type": "object"}})
    parts = tool_instructions([tool])
    schemas = '{"name": "f", "description": "<think> ｜DSML｜ ü", "parameters": {"type": "object"}}'
    assert Text(schemas) in parts
    specials = [part.token for part in parts if isinstance(part, Special)]
    assert specials == [DSML] * 9 + [THINK_START, THINK_START, THINK_END, THINK_END]


@pytest.mark.parametrize("arguments", ["", "not json", "[1, 2]", '"text"', "5", "{", "[" * 100_000])
def test_arguments_that_are_no_object_become_one_string_parameter(arguments: str) -> None:
    assert parameters_of(arguments) == [Parameter("arguments", arguments, True)]


@any_speed
@given(argument_objects)
def test_parameters_hold_every_argument_in_its_order(arguments: dict[str, object]) -> None:
    parameters = parameters_of(json.dumps(arguments))
    assert [name for name, _, _ in parameters] == list(arguments)
    assert {name: text if is_string else json.loads(text) for name, text, is_string in parameters} == arguments


def test_half_a_surrogate_pair_is_escaped_because_it_cannot_be_tokenised() -> None:
    assert parameters_of('{"a": "x\\ud800", "b": ["\\udc00"]}') == [
        Parameter("a", '"x\\ud800"', False),
        Parameter("b", '["\\udc00"]', False),
    ]
    assert parameters_of('{"\\ud800": 1}') == [Parameter("arguments", '{"\\ud800": 1}', True)]


@any_speed
@given(json_values)
def test_json_has_pythons_separators_and_keeps_unicode(value: object) -> None:
    assert to_json(value) == json.dumps(value, ensure_ascii=False)


M = DSML_MARK


@pytest.mark.parametrize(
    ("text", "tag"),
    [
        (f"ab<{M}tool_calls>x", Tag("calls", 2, 15)),
        (f"<{M}function_calls>", Tag("calls", 0, 17)),
        (f"</{M}invoke>", Tag("/invoke", 0, 10)),
        (f'<{M}invoke name="f">\n', Tag("invoke", 0, 18, "f")),
        (f'<{M}parameter name="k" string="true">v', Tag("parameter", 0, 35, "k", "true")),
        (f'<{M}parameter name="a"b>" string="false">v', Tag("parameter", 0, 39, 'a"b>', "false")),
        (f'<{M}parameter name="k">v</{M}parameter>', Tag("parameter", 0, 21, "k", odd=True)),
        (f"<{M}invoke name=f>\n<{M}", Tag("invoke", 0, 16, "f", odd=True)),
        (f"{M}x", Tag("?", 0, 1)),
        (f"<{M}pardon>", Tag("?", 0, 2)),
        (f"<{M}invokes>", Tag("?", 0, 2)),
    ],
)
def test_tag_is_recognised(text: str, tag: Tag) -> None:
    assert next_tag(text, final=False) == tag


@pytest.mark.parametrize("text", ["", "a<b>", "</", f"<{M}", f"<{M}tool_", f"<{M}tool_calls", f'<{M}invoke name="f'])
def test_nothing_is_decided_while_more_text_could_change_it(text: str) -> None:
    assert next_tag(text, final=False) is None


@any_speed
@given(texts.map(lambda text: text.replace(DSML, M)))
def test_a_decided_tag_stays_when_text_follows(text: str) -> None:
    whole = next_tag(text, final=True)
    for n in range(len(text)):
        assert next_tag(text[:n], final=False) in (None, whole)
