"""What the parser of an answer is told about its question."""

from __future__ import annotations

from typing import Literal

import pytest

from localrun.engine.chat.messages import SystemMessage, ToolSchema, UserMessage
from localrun.engine.process.answering import known_tools
from localrun.engine.process.protocol import Generate


@pytest.mark.parametrize(
    ("choice", "names"), [("auto", ["beside", "inside"]), ("required", ["beside", "inside"]), ("none", [])]
)
def test_tools_are_known_beside_the_messages_and_in_them_unless_calls_are_forbidden(
    choice: Literal["auto", "required", "none"], names: list[str]
) -> None:
    command = Generate(request=1, tools=({"name": "beside", "strict": True},), tool_choice=choice)
    messages = [SystemMessage("s", (ToolSchema({"name": "inside"}),)), UserMessage("q")]
    assert [tool.name for tool in known_tools(command, messages)] == names
    assert [tool.name for tool in known_tools(command, None)] == names[:1]


def test_tools_that_may_not_be_called_are_not_known() -> None:
    tools = ({"name": "read"}, {"name": "write"})
    assert [t.name for t in known_tools(Generate(request=1, tools=tools, tool_names=("write",)), None)] == ["write"]
