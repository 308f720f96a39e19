"""Chat messages, tool schemas and tool calls: typed, validated, with JSON in the OpenAI API's format.

One class per role. Fields that the API lacks are named as in DeepSeek's official encoder (`reasoning_content`, `task`,
`wo_eos`). Parsing is strict: an unknown field, a wrong type or an image is an error that names the message; a null field counts
as absent. Round trips preserve messages.

Knows nothing about tokens and prompts (`format.py`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast, get_args

from localrun.errors import MessageError as MessageError  # part of this module's interface

Json: TypeAlias = Any
"""A JSON value: None, bool, int, float, str, a list or a str-keyed dict of such."""

Task = Literal["action", "query", "authority", "domain", "title", "read_url"]
"""Quick instructions: the model answers with a label, queries or a title instead of a reply."""

TASKS: tuple[Task, ...] = get_args(Task)

# A quote or a line break in a name would end the DSML attribute that carries it.
_TOOL_NAME = re.compile(r"[^\s\"<>｜]+")


def is_tool_name(name: str) -> bool:
    """Whether a tool can have this name."""
    return _TOOL_NAME.fullmatch(name) is not None


def _check_text(where: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise MessageError(f"{where}: half a surrogate pair at character {error.start}, not valid text") from None


@dataclass(frozen=True, slots=True)
class ToolSchema:
    """A tool that the model may call.

    Attributes:
        function: the OpenAI `function` object (`name`, `description`, `parameters`, ...). It is shown to the model unchanged,
            keys in order.
    """

    function: Mapping[str, Json]

    def __post_init__(self) -> None:
        name = self.function.get("name")
        if not isinstance(name, str) or not _TOOL_NAME.fullmatch(name):
            raise MessageError(f"tool: name {name!r:.80} must be one word without spaces, quotes or angle brackets")
        if not isinstance(self.function.get("parameters", {}), Mapping):
            raise MessageError(f"tool {name}: 'parameters' must be a JSON schema (an object)")
        try:
            _check_text(f"tool {name}", json.dumps(self.function, ensure_ascii=False))
        except (TypeError, ValueError, RecursionError) as error:
            if isinstance(error, MessageError):
                raise
            raise MessageError(f"tool {name}: not JSON: {error}") from None

    @property
    def name(self) -> str:
        return cast(str, self.function["name"])


@dataclass(frozen=True, slots=True)
class MessageToolCall:
    """A call that the assistant made.

    Attributes:
        arguments: a JSON object as text, as written by the model; other text is allowed but unusual.
        id: referenced by the tool's result; may be empty.
    """

    name: str
    arguments: str
    id: str = ""

    def __post_init__(self) -> None:
        if not _TOOL_NAME.fullmatch(self.name):
            raise MessageError(f"tool call: name {self.name!r:.80} must be one word without spaces, quotes or brackets")
        _check_text(f"tool call {self.name}", self.arguments + self.id)


@dataclass(frozen=True, slots=True)
class SystemMessage:
    """Instructions, without any marker in the prompt.

    Attributes:
        tools: tools on offer; if any are, reasoning is never dropped from the conversation.
        response_format: a JSON value (usually a schema) that replies must follow.
    """

    content: str = ""
    tools: tuple[ToolSchema, ...] = ()
    response_format: Json = None

    def __post_init__(self) -> None:
        _check_text("system message", self.content)


@dataclass(frozen=True, slots=True)
class DeveloperMessage:
    """DeepSeek's search pipeline: a user turn that can carry tools. Never empty."""

    content: str
    tools: tuple[ToolSchema, ...] = ()
    response_format: Json = None
    task: Task | None = None

    def __post_init__(self) -> None:
        if not self.content:
            raise MessageError("developer message: content must not be empty")
        _check_text("developer message", self.content)


@dataclass(frozen=True, slots=True)
class UserMessage:
    """What the user wrote.

    Attributes:
        task: ask for this quick instruction instead of a reply.
        extracted_url: for task `read_url`: the address in question.
    """

    content: str
    task: Task | None = None
    extracted_url: str = ""

    def __post_init__(self) -> None:
        _check_text("user message", self.content + self.extracted_url)
        if self.extracted_url and self.task != "read_url":
            raise MessageError("user message: extracted_url goes with task read_url only")


@dataclass(frozen=True, slots=True)
class SampledAnswer:
    """An answer as the ids that the model sampled; the same text may tokenize differently.

    Attributes:
        thinking: ids of the reasoning, without `<think>` and `</think>`; None: there was none.
        rest: ids of everything after it, including tool calls, without the end token.
        text: `rest` decoded, for people.
    """

    thinking: tuple[int, ...] | None
    rest: tuple[int, ...]
    text: str = ""

    def __len__(self) -> int:
        return len(self.thinking or ()) + len(self.rest)


@dataclass(frozen=True, slots=True)
class AssistantMessage:
    """What the model answered.

    Attributes:
        reasoning: text between `<think>` and `</think>`.
        wo_eos: omit the end token after it, wherever the message is (a switch of the official encoder).
        thinking_open: it was truncated inside the reasoning; matters only for continuing the message.
        task: `title` asks for a title of the conversation after this message.
        sampled: the exact tokens the model wrote; used in the prompt instead of the texts. Not part of the JSON.
    """

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[MessageToolCall, ...] = ()
    wo_eos: bool = False
    thinking_open: bool = False
    task: Task | None = None
    sampled: SampledAnswer | None = None

    def __post_init__(self) -> None:
        _check_text("assistant message", self.content + "\n" + self.reasoning)
        if self.thinking_open and (self.content or self.tool_calls):
            raise MessageError("assistant message: thinking_open, but there is content after the thinking")


@dataclass(frozen=True, slots=True)
class LatestReminderMessage:
    """Date, place and the like, kept near the end of the conversation."""

    content: str

    def __post_init__(self) -> None:
        _check_text("latest_reminder message", self.content)


@dataclass(frozen=True, slots=True)
class ToolMessage:
    """The result of a tool call, given back to the model inside a user turn."""

    content: str
    tool_call_id: str = ""

    def __post_init__(self) -> None:
        _check_text("tool message", self.content)


Message: TypeAlias = (
    SystemMessage | DeveloperMessage | UserMessage | AssistantMessage | LatestReminderMessage | ToolMessage
)

# --- reading JSON ---------------------------------------------------------------------------------------------------

_FIELDS: Mapping[str, tuple[str, ...]] = {
    "system": ("content", "tools", "response_format"),
    "developer": ("content", "tools", "response_format", "task"),
    "user": ("content", "task", "extracted_url"),
    "assistant": ("content", "reasoning_content", "tool_calls", "wo_eos", "thinking_open", "task"),
    "latest_reminder": ("content",),
    "tool": ("content", "tool_call_id"),
}
# A loss mask in DeepSeek's own examples, the speaker's name in the API: no part of the prompt.
_IGNORED = ("mask", "name")


def messages_from_json(value: Json | str | bytes) -> list[Message]:
    """A conversation from a JSON array, parsed or as text.

    Raises:
        MessageError: with the number of the message (from 0) and its field.
    """
    if isinstance(value, str | bytes):
        value = _parse_json(value, "messages")
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise MessageError(f"messages: expected a list, got {_kind(value)}")
    return [message_from_json(item, where=f"messages[{i}]") for i, item in enumerate(value)]


def message_from_json(value: Json, *, where: str = "message") -> Message:
    """One message from its JSON object. Raises MessageError, which begins with `where`."""
    if not isinstance(value, Mapping):
        raise MessageError(f"{where}: expected an object with role and content, got {_kind(value)}")
    role = value.get("role")
    if not isinstance(role, str) or role not in _FIELDS:
        raise MessageError(f"{where}: unknown role {role!r:.40}", hint="roles are " + ", ".join(_FIELDS))
    fields = {key: item for key, item in value.items() if item is not None and key not in ("role", *_IGNORED)}
    if unknown := fields.keys() - set(_FIELDS[role]):
        raise MessageError(f"{where}: a {role} message has no field {min(unknown)!r}")
    try:
        return _build(role, fields, where)
    except MessageError as error:
        if str(error).startswith(where):
            raise
        raise MessageError(f"{where}: {error}", hint=error.hint) from None


def _build(role: str, fields: Mapping[str, Json], where: str) -> Message:
    content = _content(fields.get("content", ""), where)
    task = cast("Task | None", _one_of(fields, "task", TASKS, where))
    match role:
        case "system":
            return SystemMessage(content, _tools(fields, where), fields.get("response_format"))
        case "developer":
            return DeveloperMessage(content, _tools(fields, where), fields.get("response_format"), task)
        case "user":
            return UserMessage(content, task, _string(fields, "extracted_url", where))
        case "assistant":
            calls = fields.get("tool_calls", ())
            if not isinstance(calls, Sequence) or isinstance(calls, str):
                raise MessageError(f"{where}.tool_calls: expected a list, got {_kind(calls)}")
            return AssistantMessage(
                content,
                _string(fields, "reasoning_content", where),
                tuple(_tool_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)),
                wo_eos=_flag(fields, "wo_eos", where),
                thinking_open=_flag(fields, "thinking_open", where),
                task=task,
            )
        case "latest_reminder":
            return LatestReminderMessage(content)
        case _:
            return ToolMessage(content, _string(fields, "tool_call_id", where))


def tools_from_json(value: Json | str | bytes, *, where: str = "tools") -> tuple[ToolSchema, ...]:
    """Tools from a JSON array: `{"type": "function", "function": {...}}` or the bare function objects.

    Raises:
        MessageError: names the tool; also for duplicate names.
    """
    if isinstance(value, str | bytes):
        value = _parse_json(value, where)
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise MessageError(f"{where}: expected a list, got {_kind(value)}")
    tools: dict[str, ToolSchema] = {}
    for i, item in enumerate(value):
        here = f"{where}[{i}]"
        if not isinstance(item, Mapping):
            raise MessageError(f"{here}: expected an object, got {_kind(item)}")
        item = {key: part for key, part in item.items() if part is not None}  # an optional null is absent
        if (kind := item.get("type", "function")) != "function":
            raise MessageError(f"{here}: unsupported tool type {kind!r:.40}", hint="only functions are supported")
        function = item.get("function", item if "name" in item else None)
        if not isinstance(function, Mapping):
            raise MessageError(f"{here}: 'function' must be an object with name, description and parameters")
        if function is item:
            function = {key: part for key, part in item.items() if key != "type"}
        function = {key: part for key, part in function.items() if part is not None}
        try:
            tool = ToolSchema(function)
        except MessageError as error:
            raise MessageError(f"{here}: {error}") from None
        if tool.name in tools:
            raise MessageError(f"{here}: duplicate tool name {tool.name}")
        tools[tool.name] = tool
    return tuple(tools.values())


def _tools(fields: Mapping[str, Json], where: str) -> tuple[ToolSchema, ...]:
    return tools_from_json(fields.get("tools") or [], where=f"{where}.tools")


def _tool_call(value: Json, where: str) -> MessageToolCall:
    if not isinstance(value, Mapping) or not isinstance(function := value.get("function"), Mapping):
        raise MessageError(f"{where}: expected an object with 'function'")
    if (kind := value.get("type") or "function") != "function":
        raise MessageError(f"{where}: unsupported call type {kind!r:.40}", hint="only functions are supported")
    arguments = function.get("arguments")
    if arguments is None:
        arguments = ""
    if isinstance(arguments, Mapping):
        arguments = json.dumps(arguments, ensure_ascii=False)
    name, call_id = function.get("name"), value.get("id") or function.get("id") or ""
    if not isinstance(name, str) or not isinstance(arguments, str) or not isinstance(call_id, str):
        raise MessageError(f"{where}: name, arguments and id must be strings")
    return MessageToolCall(name, arguments, call_id)


def _content(value: Json, where: str) -> str:
    """A string, or the API's list of text parts, joined as the official encoder joins those of a tool result."""
    if isinstance(value, str):
        return value
    if not isinstance(value, Sequence):
        raise MessageError(f"{where}.content: expected text, got {_kind(value)}")
    texts = []
    for i, part in enumerate(value):
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else _kind(part)
            raise MessageError(
                f"{where}.content[{i}]: unsupported part type {kind!r:.40}", hint="localrun reads text only"
            )
        texts.append(part["text"])
    return "\n\n".join(texts)


def _string(fields: Mapping[str, Json], key: str, where: str) -> str:
    value = fields.get(key, "")
    if not isinstance(value, str):
        raise MessageError(f"{where}.{key}: expected text, got {_kind(value)}")
    return value


def _flag(fields: Mapping[str, Json], key: str, where: str) -> bool:
    value = fields.get(key, False)
    if not isinstance(value, bool):
        raise MessageError(f"{where}.{key}: expected true or false, got {_kind(value)}")
    return value


def _one_of(fields: Mapping[str, Json], key: str, choices: Sequence[str], where: str) -> str | None:
    value = fields.get(key)
    if value is not None and value not in choices:
        raise MessageError(f"{where}.{key}: {value!r:.40} is not one of " + ", ".join(choices))
    return cast("str | None", value)


def _parse_json(text: str | bytes, where: str) -> Json:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MessageError(f"{where}: not JSON: {error}") from None


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__


# --- writing JSON ---------------------------------------------------------------------------------------------------

_ROLES: Mapping[type, str] = {
    SystemMessage: "system",
    DeveloperMessage: "developer",
    UserMessage: "user",
    AssistantMessage: "assistant",
    LatestReminderMessage: "latest_reminder",
    ToolMessage: "tool",
}


def role_of(message: Message) -> str:
    """The role's name in JSON."""
    return _ROLES[type(message)]


def tool_to_json(tool: ToolSchema) -> dict[str, Json]:
    """Inverse of `tools_from_json` for one tool."""
    return {"type": "function", "function": dict(tool.function)}
