"""Messages as JSON: the inverse of `message_from_json`."""

from __future__ import annotations

from dataclasses import fields

from localrun.engine.chat.messages import Json, Message, MessageToolCall, role_of, tool_to_json


def message_to_json(message: Message) -> dict[str, Json]:
    """Fields with their default values are left out, content excepted."""
    body: dict[str, Json] = {"role": role_of(message), "content": message.content}
    for name in [field.name for field in fields(message) if field.name not in ("content", "sampled")]:
        value = getattr(message, name)
        if name == "tools":
            value = [tool_to_json(tool) for tool in value]
        elif name == "tool_calls":
            value = [_tool_call_to_json(call) for call in value]
        # An empty response_format is a value; an empty list or text is not.
        if value or (name == "response_format" and value is not None):
            body["reasoning_content" if name == "reasoning" else name] = value
    return body


def _tool_call_to_json(call: MessageToolCall) -> dict[str, Json]:
    return {
        **({"id": call.id} if call.id else {}),
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }
