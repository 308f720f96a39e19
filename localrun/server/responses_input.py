"""OpenAI's Responses API: reads requests. `responses.py` writes the answers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from localrun.server import asks
from localrun.server.asks import Ask, Defaults
from localrun.server.faults import ApiError, invalid, unsupported
from localrun.server.openai_common import DROPPED_TOOLS, refuse_moderation, response_schema, tool_choice
from localrun.server.responses_store import ResponseStore
from localrun.server.signatures import Signer

Json = Any

API = "responses"


class ResponsesRequest(msgspec.Struct, kw_only=True):
    """The fields that mean something here."""

    input: str | list[dict[str, Any]] | None = None
    model: str = ""
    instructions: str | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    stream: bool | None = None
    store: bool | None = None
    background: bool | None = None
    include: list[str] | None = None
    max_output_tokens: int | None = None
    max_tool_calls: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    seed: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    reasoning: dict[str, Any] | None = None
    text: dict[str, Any] | None = None
    prompt: Any = None
    prompt_cache_key: str | None = None
    metadata: dict[str, Any] | None = None
    truncation: str | None = None
    context_management: Any = None
    moderation: Any = None


_HARMLESS = (
    "user",
    "service_tier",
    "safety_identifier",
    "client_metadata",
    "stream_options",
    "prompt_cache_options",
    "prompt_cache_retention",
)
_KNOWN = (*ResponsesRequest.__struct_fields__, *_HARMLESS)

MOST_GRAMMAR_CHARS = 100_000


@dataclass(frozen=True, slots=True)
class Offered:
    """How a tool, known to the model by one name, is represented in this API."""

    name: str
    kind: str = "function"  # or custom
    namespace: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedRequest:
    """A parsed request.

    Attributes:
        tools: the model's name for a tool -> the client's.
        items: the whole conversation as items, for `previous_response_id`.
        echo: fields of the request that the response repeats.
    """

    ask: Ask
    tools: Mapping[str, Offered]
    items: Sequence[Mapping[str, Json]]
    echo: Mapping[str, Json]
    store: bool
    session: str | None = None


def read(body: Mapping[str, Json], defaults: Defaults, signer: Signer, store: ResponseStore) -> ParsedRequest:
    """Raises ApiError."""
    asks.note_unknown(API, body, _KNOWN)
    request: ResponsesRequest = asks.convert(body, ResponsesRequest)
    _refuse(request)
    before = _earlier(request.previous_response_id, store)
    new = _as_items(request.input)
    items = [*before, *new]
    if len(items) > defaults.limits.messages:
        raise invalid("input", f"{len(items)} items > {defaults.limits.messages} maximum")
    tools, functions = _tools(request.tools or ())
    offered = asks.check_tools(functions, "tools", defaults.limits)
    names = {(tool.namespace, tool.name): model_name for model_name, tool in tools.items()}
    chosen, allowed = tool_choice(request.tool_choice, names)
    schema, shown = response_schema((request.text or {}).get("format"), "text.format", defaults.limits)
    messages = _messages(items, request.instructions, signer, names)
    if not messages:
        raise invalid("input", "must not be empty", code="missing_required_parameter")
    include = request.include or ()
    ask = Ask(
        model=request.model or defaults.model,
        messages=tuple(messages),
        think=_think(request, defaults),
        sampling=_sampling(request, defaults),
        max_tokens=_bound(request),
        tools=offered,
        tool_choice=chosen,
        tool_names=allowed,
        one_call=request.parallel_tool_calls is False,
        schema=schema,
        show_schema=shown,
        logprobs=(request.top_logprobs or 0)
        if "message.output_text.logprobs" in include or request.top_logprobs
        else None,
        resume=messages[-1]["role"] == "assistant",
        stream=bool(request.stream),
    )
    return ParsedRequest(
        ask=ask,
        tools=tools,
        items=items,
        echo=_echo(request, body, ask),
        store=request.store is not False,
        session=request.prompt_cache_key,
    )


def _refuse(request: ResponsesRequest) -> None:
    if request.background:
        raise unsupported("background", "background responses are not supported")
    if request.conversation is not None:
        raise unsupported("conversation", "stored conversations are not supported; use previous_response_id")
    if request.prompt is not None:
        raise unsupported("prompt", "stored prompt templates are not supported")
    refuse_moderation(request.moderation)
    if request.context_management:
        asks.note_once(API, "context_management: a conversation that does not fit is refused, not compacted")
    if request.truncation not in (None, "disabled"):
        asks.note_once(
            API, f"truncation {request.truncation!r}: not supported; a conversation that does not fit is rejected"
        )
    if request.top_logprobs is not None and not 0 <= request.top_logprobs <= 20:
        raise invalid("top_logprobs", "must be between 0 and 20")


def _earlier(response_id: str | None, store: ResponseStore) -> Sequence[Mapping[str, Json]]:
    if response_id is None:
        return ()
    kept = store.get(response_id)
    if kept is None:
        raise ApiError(
            "not_found",
            f"previous_response_id: response {response_id[:80]!r} is not stored here",
            param="previous_response_id",
            code="previous_response_not_found",
        )
    return [*kept.items, *kept.output]


def _bound(request: ResponsesRequest) -> int | None:
    if request.max_output_tokens is not None and request.max_output_tokens < 1:
        raise invalid("max_output_tokens", "must be at least 1", code="invalid_value")
    return request.max_output_tokens


def _sampling(request: ResponsesRequest, defaults: Defaults) -> Any:
    seed = None if request.seed is None else request.seed % (2**32 - 1)
    values: dict[str, Any] = {"temperature": request.temperature, "top_p": request.top_p, "seed": seed}
    return dataclasses.replace(
        defaults.sampling, **{name: value for name, value in values.items() if value is not None}
    )


def _think(request: ResponsesRequest, defaults: Defaults) -> str:
    effort = (request.reasoning or {}).get("effort")
    if effort is None:
        return defaults.think
    if not isinstance(effort, str):
        raise invalid("reasoning.effort", "must be a string", code="invalid_type")
    return asks.think_mode(effort, defaults.think_modes, "reasoning.effort")


def _echo(request: ResponsesRequest, body: Mapping[str, Json], ask: Ask) -> dict[str, Json]:
    return {
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "metadata": request.metadata or {},
        "model": ask.model,
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": request.previous_response_id,
        "prompt_cache_key": request.prompt_cache_key,
        "reasoning": {"effort": (request.reasoning or {}).get("effort"), "summary": None},
        "store": request.store is not False,
        "temperature": ask.sampling.temperature,
        "text": request.text or {"format": {"type": "text"}},
        "tool_choice": request.tool_choice if request.tool_choice is not None else "auto",
        "tools": [_echoed_tool(tool) for tool in request.tools or () if tool.get("type") not in DROPPED_TOOLS],
        "top_logprobs": ask.logprobs or 0,
        "top_p": ask.sampling.top_p,
        "truncation": "disabled",
    }


def _echoed_tool(tool: Mapping[str, Json]) -> Mapping[str, Json]:
    if tool.get("type") == "function":
        return {"parameters": None, "strict": None, **tool}
    return tool


# --- tools ----------------------------------------------------------------------------------------------------------


def _tools(tools: Sequence[Mapping[str, Json]]) -> tuple[dict[str, Offered], list[Mapping[str, Json]]]:
    names: dict[str, Offered] = {}
    functions: list[Mapping[str, Json]] = []

    def offer(tool: Mapping[str, Json], where: str, namespace: str | None) -> None:
        name = tool.get("name")
        if not isinstance(name, str):
            raise invalid(f"{where}.name", "must be a string", code="invalid_type")
        kind = str(tool.get("type", "function"))
        model_name = f"{namespace}.{name}" if namespace else name
        names[model_name] = Offered(name, kind, namespace)
        parameters = tool.get("parameters")
        if kind == "custom":
            parameters = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}
        description = tool.get("description")
        if not isinstance(description, str | None):
            raise invalid(f"{where}.description", "must be a string", code="invalid_type")
        grammar = None
        if kind == "custom":
            description, grammar = _with_format(description, tool, where)
        strict = tool.get("strict") is True or grammar is not None
        function = asks.function(model_name, description, parameters, strict=strict)
        functions.append(function if grammar is None else {**function, "grammar": grammar})

    for i, tool in enumerate(tools):
        kind, where = tool.get("type"), f"tools[{i}]"
        if kind in ("function", "custom"):
            offer(tool, where, None)
        elif kind == "namespace":
            inner = tool.get("tools")
            for k, each in enumerate(inner if isinstance(inner, list) else ()):
                if isinstance(each, Mapping) and each.get("type", "function") in ("function", "custom"):
                    offer(each, f"{where}.tools[{k}]", str(tool.get("name") or ""))
        elif kind in DROPPED_TOOLS:
            asks.note_once(API, f"tool of type {kind}")
        else:
            raise unsupported(f"{where}.type", f"tools of type {kind!r:.40} are run by OpenAI, not here")
    return names, functions


def _with_format(
    description: str | None, tool: Mapping[str, Json], where: str
) -> tuple[str | None, Mapping[str, str] | None]:
    """(a custom tool's description followed by its grammar, the grammar that the sampler enforces)."""
    wanted = tool.get("format")
    if wanted is None:
        return description, None
    if not isinstance(wanted, Mapping):
        raise invalid(f"{where}.format", "must be an object", code="invalid_type")
    kind = wanted.get("type")
    if kind == "text":
        return description, None
    if kind != "grammar":
        raise unsupported(f"{where}.format.type", f"{kind!r:.40} is not one of text, grammar")
    syntax, definition = wanted.get("syntax"), wanted.get("definition")
    if syntax not in ("lark", "regex"):
        raise unsupported(f"{where}.format.syntax", f"{syntax!r:.40} is not one of lark, regex")
    if not isinstance(definition, str):
        raise invalid(f"{where}.format.definition", "must be a string", code="invalid_type")
    if len(definition) > MOST_GRAMMAR_CHARS:
        raise invalid(f"{where}.format.definition", f"longer than {MOST_GRAMMAR_CHARS} characters")
    shown = "\n\n".join(filter(None, (description, f"Its input follows this grammar ({syntax}):\n{definition}")))
    return shown, {"syntax": syntax, "definition": definition}


# --- items ----------------------------------------------------------------------------------------------------------


def _as_items(value: str | Sequence[Mapping[str, Json]] | None) -> list[Mapping[str, Json]]:
    if value is None:
        return []
    return [{"type": "message", "role": "user", "content": value}] if isinstance(value, str) else list(value)


def _messages(
    items: Sequence[Mapping[str, Json]],
    instructions: str | None,
    signer: Signer,
    names: Mapping[tuple[str | None, str], str],
) -> list[dict[str, Json]]:
    """Items as messages: reasoning, text and calls of one answer are one message."""
    reader = _Reader(signer, names)
    if instructions:
        reader.messages.append({"role": "system", "content": instructions})
    for i, item in enumerate(items):
        reader.read(item, f"input[{i}]")
    reader.end_answer()
    return reader.messages


@dataclass(slots=True)
class _Reader:
    signer: Signer
    names: Mapping[tuple[str | None, str], str]
    messages: list[dict[str, Json]] = field(default_factory=list)
    answer: dict[str, Json] | None = None

    def read(self, item: Mapping[str, Json], where: str) -> None:
        kind = item.get("type", "message" if "role" in item else None)
        match kind:
            case "message":
                self._message(item, where)
            case "reasoning":
                self._reasoning(item)
            case "function_call" | "custom_tool_call":
                self._call(item, where)
            case "function_call_output" | "custom_tool_call_output" | "local_shell_call_output":
                self._output(item, where)
            case "item_reference":
                raise unsupported(where, "items are not stored by id; send them in full, or use previous_response_id")
            case "local_shell_call" | "web_search_call" | "compaction" | "additional_tools" | "tool_search_call":
                asks.note_once(API, f"item of type {kind}")
            case str():
                raise unsupported(f"{where}.type", f"unsupported item type {kind!r:.40}")
            case _:
                raise invalid(f"{where}.type", "must be a string", code="invalid_type")

    def _message(self, item: Mapping[str, Json], where: str) -> None:
        role = item.get("role")
        text = asks.text_of(item.get("content"), f"{where}.content", joint="" if role == "assistant" else "\n\n")
        if role == "assistant":
            if self.answer is not None and "tool_calls" in self.answer:
                self.end_answer()  # text after calls: the next answer
            self._open()["content"] += text
            return
        if role not in ("user", "system", "developer"):
            raise invalid(f"{where}.role", f"{role!r:.40} is not one of user, assistant, system, developer")
        self.end_answer()
        self.messages.append({"role": "user" if role == "user" else "system", "content": text})

    def _reasoning(self, item: Mapping[str, Json]) -> None:
        """Our own signed reasoning, or the item's readable text. Another server's signed reasoning is useless."""
        text = self.signer.unseal(item.get("encrypted_content"))
        if text is None:
            for name in ("content", "summary"):
                parts = item.get(name)
                texts = (
                    [str(p.get("text") or "") for p in parts if isinstance(p, Mapping)]
                    if isinstance(parts, list)
                    else []
                )
                if text := "".join(texts):
                    break
        if self.answer is not None and (self.answer["content"] or "tool_calls" in self.answer):
            self.end_answer()
        if text:
            answer = self._open()
            answer["reasoning_content"] = answer.get("reasoning_content", "") + text

    def _call(self, item: Mapping[str, Json], where: str) -> None:
        name, call_id = item.get("name"), item.get("call_id")
        if not isinstance(name, str):
            raise invalid(f"{where}.name", "is missing", code="missing_required_parameter")
        namespace = item.get("namespace")
        namespace = namespace if isinstance(namespace, str) else None
        arguments: Json = item.get("arguments", "")
        if item.get("type") == "custom_tool_call":
            arguments = json.dumps({"input": str(item.get("input") or "")}, ensure_ascii=False)
        if not isinstance(arguments, str):
            raise invalid(f"{where}.arguments", "must be a string", code="invalid_type")
        model_name = self.names.get((namespace, name)) or (f"{namespace}.{name}" if namespace else name)
        call = {
            "id": call_id if isinstance(call_id, str) else "",
            "type": "function",
            "function": {"name": model_name, "arguments": arguments or "{}"},
        }
        self._open().setdefault("tool_calls", []).append(call)

    def _output(self, item: Mapping[str, Json], where: str) -> None:
        self.end_answer()
        output = item.get("output")
        text = output if isinstance(output, str) else asks.text_of(output, f"{where}.output")
        call_id = item.get("call_id")
        self.messages.append(
            {"role": "tool", "content": text, "tool_call_id": call_id if isinstance(call_id, str) else ""}
        )

    def _open(self) -> dict[str, Json]:
        if self.answer is None:
            self.answer = {"role": "assistant", "content": ""}
        return self.answer

    def end_answer(self) -> None:
        if self.answer is not None:
            self.messages.append(self.answer)
            self.answer = None
