"""Anthropic's Messages API: reads requests. `messages.py` writes the answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from localrun.engine.chat.dsml import to_json
from localrun.server import asks
from localrun.server.asks import Ask, Defaults, ToolChoice
from localrun.server.faults import ApiError, invalid, unsupported
from localrun.server.limits import check_schema
from localrun.server.messages import API, THREADS_UNSUPPORTED
from localrun.server.signatures import Signer

Json = Any

MIN_BUDGET = 1
"""Tokens of thinking; Anthropic's own minimum is 1024."""


class MessagesRequest(msgspec.Struct, kw_only=True):
    """The fields that mean something here."""

    messages: list[dict[str, Any]]
    model: str = ""
    max_tokens: int | None = None
    system: str | list[dict[str, Any]] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: list[str] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None
    output_format: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None
    container: Any = None
    mcp_servers: list[Any] | None = None
    compaction: Any = None
    thread: Any = None


_HARMLESS = (
    "context_management",
    "betas",
    "service_tier",
    "inference_geo",
    "cache_control",
    "speed",
    "user_profile_id",
    "billing_policy",
    "diagnostics",
    "fallback_credit_token",
    "fallbacks",
    "workspace_id",
)
_ELSEWHERE = {
    "container": "this server runs no code",
    "compaction": "conversations are not summarized here",
}
"""Fields that ask for what only Anthropic's service has."""

_KNOWN = (*MessagesRequest.__struct_fields__, *_HARMLESS)


def read(body: Mapping[str, Json], defaults: Defaults, signer: Signer) -> tuple[Ask, str | None]:
    """(the request, a hint identifying the client's session). Raises ApiError."""
    asks.note_unknown(API, body, _KNOWN)
    request: MessagesRequest = asks.convert(body, MessagesRequest)
    _refuse(request)
    if len(request.messages) > defaults.limits.messages:
        raise invalid("messages", f"{len(request.messages)} messages > {defaults.limits.messages} maximum")
    if not request.messages:
        raise invalid("messages", "must not be empty")
    if request.max_tokens is not None and request.max_tokens < 1:
        raise invalid("max_tokens", "must be at least 1")
    deferred, functions = _tools(request.tools or ())
    tools = asks.check_tools(functions, "tools", defaults.limits)
    choice, name, one_call = _tool_choice(request.tool_choice, [*(str(tool["name"]) for tool in tools), *deferred])
    reader = _Reader(signer, deferred)
    messages = [
        *_system(request.system),
        *(m for i, message in enumerate(request.messages) for m in reader.read(message, i)),
    ]
    schema = _schema(request, defaults)
    think, budget = _think(request, defaults)
    user = (request.metadata or {}).get("user_id")
    return (
        Ask(
            model=request.model or defaults.model,
            messages=tuple(messages),
            think=think,
            think_budget=budget,
            sampling=_sampling(request, defaults),
            max_tokens=request.max_tokens,
            stop=asks.check_stop(request.stop_sequences, "stop_sequences", defaults.limits),
            tools=tools,
            tool_choice=choice,
            tool_names=None if name is None else (name,),
            one_call=one_call,
            schema=schema,
            resume=messages[-1]["role"] == "assistant",
            stream=bool(request.stream),
        ),
        user if isinstance(user, str) else None,
    )


def _refuse(request: MessagesRequest) -> None:
    if request.mcp_servers:
        raise unsupported("mcp_servers", "this server does not connect to other servers")
    for name, why in _ELSEWHERE.items():
        if getattr(request, name) is not None:
            raise unsupported(name, why)
    if request.thread is not None:
        # By this code Anthropic's SDK knows to send the whole conversation instead.
        what = "thread: conversations are not kept here; send all messages"
        raise ApiError("invalid", what, param="thread", code=THREADS_UNSUPPORTED)


def _sampling(request: MessagesRequest, defaults: Defaults) -> Any:
    values: dict[str, Any] = {"temperature": request.temperature, "top_p": request.top_p, "top_k": request.top_k}
    return dataclasses.replace(
        defaults.sampling, **{name: value for name, value in values.items() if value is not None}
    )


def _schema(request: MessagesRequest, defaults: Defaults) -> Mapping[str, Json] | None:
    for param, value in (
        ("output_config.format", (request.output_config or {}).get("format")),
        ("output_format", request.output_format),
    ):
        if isinstance(value, Mapping):
            if value.get("type") != "json_schema":
                raise unsupported(f"{param}.type", f"{value.get('type')!r:.40} is not json_schema")
            schema = value.get("schema")
            return check_schema(schema, f"{param}.schema", defaults.limits, len(msgspec.json.encode(schema)))
    return None


def _think(request: MessagesRequest, defaults: Defaults) -> tuple[str, int | None]:
    """(mode, most tokens of thinking). Without `thinking` the model does not think, as in Anthropic's API."""
    modes = defaults.think_modes
    thinking = request.thinking or {"type": "disabled"}
    kind = thinking.get("type")
    if kind == "disabled":
        return "off", None
    if kind not in ("enabled", "adaptive"):
        raise invalid("thinking.type", f"{kind!r:.40} is not one of disabled, enabled, adaptive")
    budget = thinking.get("budget_tokens")
    if budget is not None and (not isinstance(budget, int) or isinstance(budget, bool) or budget < MIN_BUDGET):
        raise invalid("thinking.budget_tokens", f"must be a number not below {MIN_BUDGET}")
    effort = (request.output_config or {}).get("effort")
    if effort is None:
        effort = "high"
    if not isinstance(effort, str):
        raise invalid("output_config.effort", "must be a string")
    return asks.think_mode(effort, modes, "output_config.effort"), budget


def _system(system: str | Sequence[Mapping[str, Json]] | None) -> list[dict[str, Json]]:
    """The system prompt, without the line that changes with every request."""
    if isinstance(system, str):
        system = [{"type": "text", "text": system}]
    texts = []
    for i, block in enumerate(system or ()):
        text = asks.part_text(block, f"system[{i}]")
        if text and not asks.is_billing_line(text):
            texts.append(text)
    return [{"role": "system", "content": "\n\n".join(texts)}] if texts else []


# --- tools ----------------------------------------------------------------------------------------------------------


def _tools(tools: Sequence[Mapping[str, Json]]) -> tuple[dict[str, Mapping[str, Json]], list[Mapping[str, Json]]]:
    """(tools shown once a search finds them, tools offered from the start).

    Listing a deferred tool among the others would change the start of the prompt when a client adds it later.
    """
    deferred: dict[str, Mapping[str, Json]] = {}
    offered: list[Mapping[str, Json]] = []
    for i, tool in enumerate(tools):
        kind = tool.get("type")
        if kind not in (None, "custom"):
            raise unsupported(f"tools[{i}].type", f"{kind!r:.60} is run by Anthropic's service, not here")
        name = tool.get("name")
        if not isinstance(name, str):
            raise invalid(f"tools[{i}].name", "must be a string")
        description = tool.get("description")
        if not isinstance(description, str | None):
            raise invalid(f"tools[{i}].description", "must be a string")
        shown = asks.function(name, description, tool.get("input_schema"), strict=bool(tool.get("strict")))
        if tool.get("defer_loading"):
            deferred[name] = shown
        else:
            offered.append(shown)
    return deferred, offered


def _tool_choice(value: Mapping[str, Json] | None, names: Sequence[str]) -> tuple[ToolChoice, str | None, bool]:
    """(choice, name, at most one call)."""
    if value is None:
        return "auto", None, False
    one_call = bool(value.get("disable_parallel_tool_use"))
    kind = value.get("type")
    if kind in ("auto", "none"):
        return kind, None, one_call
    if kind == "any":
        if not names:
            raise invalid("tool_choice", "'any' without tools")
        return "required", None, one_call
    if kind == "tool":
        if (name := value.get("name")) not in names:
            raise invalid("tool_choice.name", f"{name!r:.60} is not among the tools")
        return "required", name, one_call
    raise invalid("tool_choice.type", f"{kind!r:.40} is not one of auto, any, tool, none")


# --- messages -------------------------------------------------------------------------------------------------------


class _Reader:
    """Turns Anthropic's messages into ours: one of theirs may hold several tool results and texts."""

    def __init__(self, signer: Signer, deferred: Mapping[str, Mapping[str, Json]]) -> None:
        self._signer, self._deferred = signer, deferred

    def read(self, message: Mapping[str, Json], i: int) -> Iterator[dict[str, Json]]:
        where, role, content = f"messages[{i}]", message.get("role"), message.get("content")
        if role == "system":  # a reminder: it stays in place, or the saved states after it become useless
            yield {"role": "system", "content": asks.text_of(content, f"{where}.content")}
        elif role == "user":
            yield from self._user(content, f"{where}.content")
        elif role == "assistant":
            yield self._assistant(content, f"{where}.content")
        else:
            raise invalid(f"{where}.role", f"{role!r:.40} is not one of user, assistant, system")

    def _user(self, content: Json, where: str) -> Iterator[dict[str, Json]]:
        texts: list[str] = []
        n_results = 0
        if isinstance(content, str) or content is None:
            content = [{"type": "text", "text": content or ""}]
        for block, here in _blocks(content, where):
            if block.get("type") != "tool_result":
                texts.append(self._text(block, here))
                continue
            if texts:
                yield {"role": "user", "content": "\n\n".join(texts)}
                texts = []
            n_results += 1
            call_id = block.get("tool_use_id")
            yield {
                "role": "tool",
                "content": self._result(block, here),
                "tool_call_id": call_id if isinstance(call_id, str) else "",
            }
        if texts or not n_results:
            yield {"role": "user", "content": "\n\n".join(texts)}

    def _result(self, block: Mapping[str, Json], where: str) -> str:
        content = block.get("content")
        if content is None or isinstance(content, str):
            return content or ""
        return "\n\n".join(self._text(inner, here) for inner, here in _blocks(content, f"{where}.content"))

    def _text(self, block: Mapping[str, Json], where: str) -> str:
        if block.get("type") == "tool_reference":
            name = str(block.get("tool_name"))
            return to_json(dict(self._deferred.get(name, {"name": name})))
        if block.get("type") == "search_result":
            return asks.text_of(block.get("content"), f"{where}.content")
        return asks.part_text(block, where) or ""

    def _assistant(self, content: Json, where: str) -> dict[str, Json]:
        if isinstance(content, str) or content is None:
            return {"role": "assistant", "content": content or ""}
        thoughts: list[str] = []
        texts: list[str] = []
        calls: list[dict[str, Json]] = []
        for block, here in _blocks(content, where):
            kind = block.get("type")
            if kind == "thinking":
                thought = block.get("thinking")
                if not isinstance(thought, str):
                    raise invalid(f"{here}.thinking", "must be a string")
                if self._signer.is_ours(thought, block.get("signature")):
                    thoughts.append(thought)
                else:
                    asks.note_once(API, "thinking with another server's signature")
            elif kind == "redacted_thinking":
                asks.note_once(API, "redacted thinking")
            elif kind == "tool_use":
                calls.append(_call(block, here))
            else:
                texts.append(asks.part_text(block, here) or "")
        result: dict[str, Json] = {"role": "assistant", "content": "".join(texts)}
        if thoughts:
            result["reasoning_content"] = "".join(thoughts)
        if calls:
            result["tool_calls"] = calls
        return result


def _blocks(content: Json, where: str) -> Iterator[tuple[Mapping[str, Json], str]]:
    if not isinstance(content, list):
        raise invalid(where, "must be a string or a list of blocks")
    for i, block in enumerate(content):
        if not isinstance(block, Mapping):
            raise invalid(f"{where}[{i}]", "must be an object with a type")
        yield block, f"{where}[{i}]"


def _call(block: Mapping[str, Json], where: str) -> dict[str, Json]:
    name, call_id, value = block.get("name"), block.get("id"), block.get("input")
    if not isinstance(name, str):
        raise invalid(f"{where}.name", "must be a string")
    if not isinstance(call_id, str | None):
        raise invalid(f"{where}.id", "must be a string")
    arguments = to_json(value if value is not None else {})
    return {"id": call_id or "", "type": "function", "function": {"name": name, "arguments": arguments}}
