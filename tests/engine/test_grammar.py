"""Grammars over V4's own vocabulary: a sampler that knows nothing writes what the schema says, and only that."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest

from localrun.engine.chat.parts import EOS, THINK_END, Special
from localrun.engine.chat.stream_parser import parse_completion
from localrun.engine.grammar import Grammars
from localrun.engine.steering import Steering
from localrun.engine.tokenizer import Tokenizer
from localrun.errors import UsageError
from tests.engine.models import VOCAB_SIZE

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Oslo", "Rome"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = {"name": "get_weather", "parameters": SCHEMA}
NOW = {"name": "now"}
MOST_TOKENS = 400


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer, VOCAB_SIZE, [tokenizer.special(Special(EOS))])


def written(tokenizer: Tokenizer, matcher: Any, seed: int, *, likes: str = "", thinking: bool = False) -> str:
    """What random logits write under a grammar; `likes`: characters that are a little more likely."""
    draw = np.random.default_rng(seed)
    end = tokenizer.special(Special(EOS))
    steering = Steering(
        thinking=thinking, think_end=tokenizer.special(Special(THINK_END)), ends=[end], matcher=matcher, think_budget=5
    )
    base = draw.standard_normal(VOCAB_SIZE).astype(np.float32)
    for text in likes:
        for token in tokenizer.encode(text):
            base[token] += 6
    base[end] += 4
    ids: list[int] = []
    while len(ids) < MOST_TOKENS:
        logits = base + draw.standard_normal(VOCAB_SIZE).astype(np.float32)
        steering.allow(logits)
        token = int(np.argmax(logits))
        assert np.isfinite(logits[token])
        steering.accept(token)
        if token == end:
            return tokenizer.decode(ids)
        ids.append(token)
    pytest.fail("it did not come to an end: " + tokenizer.decode(ids)[-200:])


@pytest.mark.parametrize("seed", range(4))
def test_noise_writes_json_that_follows_the_schema(tokenizer: Tokenizer, grammars: Grammars, seed: int) -> None:
    value = json.loads(written(tokenizer, grammars.of_schema(SCHEMA), seed, likes='"},]'))
    assert set(value) <= {"city", "days", "tags"}
    assert value["city"] in ("Oslo", "Rome")
    assert 1 <= value["days"] <= 9
    assert all(isinstance(tag, bool) for tag in value.get("tags", []))


@pytest.mark.parametrize("seed", range(3))
def test_noise_writes_a_call_that_follows_the_tools_schema(tokenizer: Tokenizer, grammars: Grammars, seed: int) -> None:
    matcher = grammars.of_calls([WEATHER, NOW], required=True, most=2)
    answer = parse_completion(written(tokenizer, matcher, seed, likes="</]"))
    assert 1 <= len(answer.calls) <= 2
    for call in answer.calls:
        arguments = json.loads(call.arguments)
        assert call.problems == ()
        assert call.name in ("get_weather", "now")
        if call.name == "get_weather":
            assert arguments["city"] in ("Oslo", "Rome")
            assert isinstance(arguments["days"], int)


def test_a_tool_without_parameters_is_called(tokenizer: Tokenizer, grammars: Grammars) -> None:
    matcher = grammars.of_calls([NOW], required=True, most=1)
    (call,) = parse_completion(written(tokenizer, matcher, 1)).calls
    assert (call.name, call.arguments) == ("now", "{}")


def test_text_before_a_call_is_free(tokenizer: Tokenizer, grammars: Grammars) -> None:
    matcher = grammars.of_calls([WEATHER], required=False)
    from localrun.engine.chat.parts import split_protocol_text

    text = 'I look < at it.\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="get_weather">\n'
    for token in tokenizer.encode_parts(split_protocol_text(text)):
        assert matcher.consume_token(token), tokenizer.decode([token])
    assert not matcher.consume_token(tokenizer.encode("nonsense")[0])


def test_free_string_may_hold_anything_but_special_tokens(tokenizer: Tokenizer, grammars: Grammars) -> None:
    from localrun.engine.chat.parts import split_protocol_text

    tool = {"name": "write", "parameters": {"properties": {"text": {"type": "string"}}, "required": ["text"]}}
    call = (
        '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="write">\n<｜DSML｜parameter name="text" string="true">'
        '</b> < x\n\n{"a": "ü"}</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>'
    )
    matcher = grammars.of_calls([tool], required=True)
    for token in tokenizer.encode_parts(split_protocol_text(call)):
        assert matcher.consume_token(token), tokenizer.decode([token])
    assert matcher.is_accepting()


LARK = """\
start: "*** Begin Patch" LF line+ "*** End Patch"
line: "+" /[^\\n]{0,20}/ LF
%import common.LF
"""
TEXTS = [
    ("lark", LARK, r"\*\*\* Begin Patch\n(\+[^\n]{0,20}\n)+\*\*\* End Patch"),
    ("lark", "start: /a.{0,30}/", r"a[^\n]{0,30}"),  # a terminal that would take `</` with it
    ("regex", r"[0-9]{2}</b>|<[a-c]{1,30}", r"[0-9]{2}</b>|<[a-c]{1,30}"),
]


def custom(syntax: str, definition: str) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}
    return {"name": "patch", "parameters": parameters, "grammar": {"syntax": syntax, "definition": definition}}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("syntax", "definition", "expected"), TEXTS)
def test_noise_writes_texts_of_custom_tools_by_their_grammars(
    tokenizer: Tokenizer, grammars: Grammars, syntax: str, definition: str, expected: str, seed: int
) -> None:
    matcher = grammars.of_calls([custom(syntax, definition)], required=True, most=2)
    answer = parse_completion(written(tokenizer, matcher, seed, likes="</+>*ab\n"))
    assert answer.calls
    for call in answer.calls:
        assert re.fullmatch(expected, json.loads(call.arguments)["input"])


@pytest.mark.parametrize(("syntax", "definition"), [("lark", "start: nothing"), ("regex", "(")])
def test_grammar_of_a_custom_tool_that_is_none_is_refused(grammars: Grammars, syntax: str, definition: str) -> None:
    with pytest.raises(UsageError, match=f"'patch': its {syntax} grammar"):
        grammars.of_calls([custom(syntax, definition)], required=False)


def test_reasoning_is_free_and_ends_within_its_budget(tokenizer: Tokenizer, grammars: Grammars) -> None:
    text = written(tokenizer, grammars.of_schema(SCHEMA), 3, likes='"},]', thinking=True)
    thoughts, _, answer = text.partition(THINK_END)
    assert thoughts
    assert json.loads(answer)["city"] in ("Oslo", "Rome")


@pytest.mark.parametrize(
    "schema", [{"type": "nonsense"}, {"$ref": "#/$defs/missing"}, {"type": "string", "pattern": "("}]
)
def test_schema_that_can_not_be_enforced_is_refused(grammars: Grammars, schema: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="schema"):
        grammars.of_schema(schema)


def test_keywords_that_agents_send_are_known(tokenizer: Tokenizer, grammars: Grammars) -> None:
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {
            "a": {"anyOf": [{"type": "string", "minLength": 1, "maxLength": 5}, {"type": "null"}]},
            "b": {"const": "x"},
            "c": {"type": "number", "exclusiveMinimum": 0},
            "d": {"type": "object", "propertyNames": {"type": "string"}, "additionalProperties": {"type": "string"}},
            "e": {"type": "string", "format": "date"},
            "f": {"type": "string", "pattern": "^[a-z]+$"},
            "g": {"$ref": "#/$defs/g"},
        },
        "required": ["a"],
        "$defs": {"g": {"type": "array", "items": {"type": "integer"}}},
    }
    value = json.loads(written(tokenizer, grammars.of_schema(schema), 1, likes='"},]'))
    assert value["a"] is None or 1 <= len(value["a"]) <= 5
    matcher = grammars.of_calls([{"name": "t", "parameters": schema}], required=True)
    (call,) = parse_completion(written(tokenizer, matcher, 1, likes="</]")).calls
    assert (call.name, call.problems) == ("t", ())
