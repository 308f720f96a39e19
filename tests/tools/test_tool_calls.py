"""Calls are counted by their tools' schemas. The answers are given; `tests/test_api.py` has real ones."""

from __future__ import annotations

import sys

import pytest

from tools import tool_calls
from tools.tool_calls import QUESTIONS, is_valid


@pytest.mark.parametrize(
    ("name", "arguments", "valid"),
    [
        ("add", '{"first": 3, "second": 4}', True),
        ("add", '{"second": 4, "first": 3}', True),
        ("add", '{"first": 3}', False),
        ("add", '{"first": 3, "second": 4, "third": 5}', False),
        ("add", '{"first": 3, "second": "4"}', False),
        ("add", '{"first": true, "second": 4}', False),  # a bool is an int in Python only
        ("add", '{"first": 3.0, "second": 4}', False),
        ("capital", '{"country": "Peru"}', True),
        ("capital", '{"country": "Atlantis"}', False),
        ("set_light", '{"room": "hall", "on": false, "brightness": "low"}', True),
        ("set_light", '{"room": "hall", "on": 0, "brightness": "low"}', False),
        ("multiply", '{"first": 3, "second": 4}', False),
        ("add", '{"first": 3, "sec', False),
        ("add", "[3, 4]", False),
        ("add", "null", False),
    ],
)
def test_a_call_follows_its_tools_schema_or_is_not_valid(name: str, arguments: str, valid: bool) -> None:
    assert is_valid(name, arguments) is valid


def test_each_model_gets_a_line_and_is_compared_with_the_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right, wrong = ("capital", '{"country": "Peru"}'), ("capital", '{"country": "Atlantis"}')
    n = len(QUESTIONS)
    answers = {"whole": [[right]] * n, "small": [[right, wrong], [wrong], [], *[[right]] * (n - 3)]}
    monkeypatch.setattr(tool_calls, "calls_of", lambda model, max_tokens: answers[model])
    monkeypatch.setattr(sys, "argv", ["tool_calls", "whole", "small"])
    tool_calls.main()
    whole, small = (line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines())
    assert whole == f"{n} of  {n} calls valid, {n} of {n} answers with a call, {n} begin with the same"
    assert small == f"{n - 2} of  {n} calls valid, {n - 1} of {n} answers with a call, {n - 2} begin with the same"
