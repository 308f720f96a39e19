"""Chat messages: strict reading with errors that name the place, and JSON there and back."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localrun.engine.chat.messages import (
    AssistantMessage,
    DeveloperMessage,
    Message,
    MessageError,
    MessageToolCall,
    SystemMessage,
    ToolMessage,
    ToolSchema,
    UserMessage,
    message_from_json,
    messages_from_json,
    tool_to_json,
    tools_from_json,
)
from tests.engine.chat.message_json import message_to_json
from tests.engine.chat_strategies import any_speed, conversations

WEATHER = {"name": "get_weather", "description": "Weather.", "parameters": {"type": "object", "properties": {}}}


@any_speed
@given(conversations())
def test_json_there_and_back_gives_equal_messages(messages: list[Message]) -> None:
    text = json.dumps([message_to_json(message) for message in messages])
    assert messages_from_json(text) == messages


@any_speed
@given(conversations().filter(bool), st.booleans())
def test_null_fields_count_as_absent(messages: list[Message], known: bool) -> None:
    body = message_to_json(messages[0])
    missing = [key for key in ("task", "refusal", "function_call") if key not in body]
    assert message_from_json({**dict.fromkeys(missing), **body}) == messages[0]


def test_openai_conversation_is_understood() -> None:
    messages = messages_from_json(
        [
            {"role": "system", "content": "Be brief.", "tools": [{"type": "function", "function": WEATHER}]},
            {
                "role": "user",
                "content": [{"type": "text", "text": "Oslo?"}, {"type": "text", "text": "Rome?"}],
                "name": "Eva",
            },
            {
                "role": "assistant",
                "content": None,
                "reasoning_content": "two calls",
                "tool_calls": [
                    {
                        "id": "a",
                        "type": "function",
                        "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'},
                    },
                    {"id": "b", "function": {"name": "get_weather", "arguments": {"city": "Rom", "ü": 1}}},
                ],
            },
            {"role": "tool", "tool_call_id": "a", "content": "rain"},
        ]
    )
    assert messages == [
        SystemMessage("Be brief.", (ToolSchema(WEATHER),)),
        UserMessage("Oslo?\n\nRome?"),
        AssistantMessage(
            "",
            "two calls",
            (
                MessageToolCall("get_weather", '{"city": "Oslo"}', "a"),
                MessageToolCall("get_weather", '{"city": "Rom", "ü": 1}', "b"),
            ),
        ),
        ToolMessage("rain", "a"),
    ]


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ("[{", "messages: not JSON"),
        ({"role": "user"}, "messages: expected a list, got dict"),
        (["hi"], r"messages\[0\]: expected an object"),
        ([{"role": "user", "content": "a"}, {"role": "robot"}], r"messages\[1\]: unknown role 'robot'"),
        ([{"content": "a"}], r"messages\[0\]: unknown role None"),
        ([{"role": "user", "content": "a", "images": []}], r"messages\[0\]: a user message has no field 'images'"),
        ([{"role": "user", "content": "a", "tool_calls": [1]}], "no field 'tool_calls'"),
        ([{"role": "user", "content": 5}], r"messages\[0\].content: expected text, got int"),
        (
            [{"role": "user", "content": [{"type": "image_url"}]}],
            r"messages\[0\].content\[0\]: unsupported part type 'image_url'",
        ),
        ([{"role": "user", "content": "a", "task": "dance"}], r"messages\[0\].task: 'dance' is not one of action"),
        ([{"role": "user", "content": "a", "extracted_url": "u"}], r"messages\[0\]: .*read_url"),
        ([{"role": "user", "content": "\ud800"}], r"messages\[0\]: .*surrogate"),
        ([{"role": "developer", "content": ""}], r"messages\[0\]: developer message: content must not be empty"),
        ([{"role": "assistant", "tool_calls": {}}], r"messages\[0\].tool_calls: expected a list"),
        ([{"role": "assistant", "tool_calls": [{"id": "x"}]}], r"tool_calls\[0\]: expected an object with 'function'"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": 1}}]}], "must be strings"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": 'a"b'}}]}], r"messages\[0\]: tool call: name"),
        ([{"role": "assistant", "wo_eos": 1}], r"messages\[0\].wo_eos: expected true or false"),
        ([{"role": "assistant", "content": "x", "thinking_open": True}], "thinking_open"),
        ([{"role": "tool", "content": "x", "tool_call_id": 7}], r"messages\[0\].tool_call_id: expected text"),
        (
            [{"role": "system", "tools": [{"type": "retrieval"}]}],
            r"messages\[0\].tools\[0\]: unsupported tool type 'retrieval'",
        ),
    ],
)
def test_error_names_the_message_and_what_is_wrong(value: object, complaint: str) -> None:
    with pytest.raises(MessageError, match=complaint):
        messages_from_json(value)


def test_tools_are_read_with_and_without_their_wrapper() -> None:
    wrapped = tools_from_json(json.dumps([{"type": "function", "function": WEATHER}]))
    assert wrapped == tools_from_json([WEATHER]) == tools_from_json([{"type": "function", **WEATHER}])
    assert wrapped[0].name == "get_weather"
    assert tools_from_json([tool_to_json(wrapped[0])]) == wrapped


@pytest.mark.parametrize(
    ("tools", "complaint"),
    [
        ("{}", "tools: expected a list"),
        ([5], r"tools\[0\]: expected an object"),
        ([{"type": "function"}], r"tools\[0\]: 'function' must be an object"),
        ([{"name": "two words"}], r"tools\[0\]: tool: name 'two words'"),
        ([{"name": ""}], r"tools\[0\]: tool: name ''"),
        ([{"name": "f", "parameters": []}], r"tools\[0\]: tool f: 'parameters' must be a JSON schema"),
        ([{"name": "f", "description": "\udc00"}], "surrogate"),
        ([{"name": "f", "default": {1, 2}}], "tool f: not JSON"),
        ([WEATHER, WEATHER], r"tools\[1\]: duplicate tool name get_weather"),
    ],
)
def test_bad_tool_is_refused_by_name(tools: object, complaint: str) -> None:
    with pytest.raises(MessageError, match=complaint):
        tools_from_json(tools)


def test_empty_developer_message_is_refused_also_when_built_in_code() -> None:
    with pytest.raises(MessageError):
        DeveloperMessage("")


def test_optional_nulls_are_absent() -> None:
    null = {"type": "function", "function": {"name": "now", "description": None, "parameters": None, "strict": None}}
    bare = {"type": None, "name": "now", "parameters": None}
    for tool in (null, bare):
        assert tools_from_json([tool]) == (ToolSchema({"name": "now"}),)
    call = {"id": None, "type": None, "function": {"name": "now", "arguments": None}}
    (message,) = messages_from_json([{"role": "assistant", "content": None, "tool_calls": [call]}])
    assert isinstance(message, AssistantMessage)
    assert [(made.name, made.arguments) for made in message.tool_calls] == [("now", "")]
