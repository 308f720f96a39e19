"""OpenAI's Chat Completions: `POST /v1/chat/completions`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from localrun.engine.process.process import GenerateEvent
from localrun.engine.process.protocol import Delta, Finished, ToolCall, ToolCallBegun
from localrun.server import asks
from localrun.server.asks import Ask, Defaults
from localrun.server.choices import Choice, total_usage
from localrun.server.faults import ApiError, invalid, unsupported
from localrun.server.http import Writer, sse
from localrun.server.openai_common import (
    error_object,
    logprob,
    refuse_moderation,
    response_schema,
    sampling,
    tool_choice,
)

Json = Any

API = "chat"


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class ChatRequest(msgspec.Struct, kw_only=True):
    """The supported fields: OpenAI's first, then other vendors' additions."""

    messages: list[dict[str, Any]]
    model: str = ""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    tools: list[dict[str, Any]] | None = None
    functions: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    function_call: Any = None
    parallel_tool_calls: bool | None = None
    response_format: Any = None
    reasoning_effort: str | None = None
    modalities: list[str] | None = None
    audio: Any = None
    web_search_options: Any = None
    moderation: Any = None
    prompt_cache_key: str | None = None
    # DeepSeek's own service, vLLM, llama.cpp
    thinking: dict[str, Any] | bool | None = None
    enable_thinking: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    thinking_budget: int | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    repeat_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None


_HARMLESS = (
    "user",
    "store",
    "metadata",
    "service_tier",
    "safety_identifier",
    "prediction",
    "verbosity",
    "prompt_cache_options",
    "prompt_cache_retention",
)
_KNOWN = (*ChatRequest.__struct_fields__, *_HARMLESS)


def read(body: Mapping[str, Json], defaults: Defaults) -> tuple[Ask, str | None]:
    """(the request, a hint identifying the client's session). Raises ApiError."""
    asks.note_unknown(API, body, _KNOWN)
    request: ChatRequest = asks.convert(body, ChatRequest)
    _refuse(request)
    if len(request.messages) > defaults.limits.messages:
        raise invalid("messages", f"{len(request.messages)} messages > {defaults.limits.messages} maximum")
    if not request.messages:
        raise invalid("messages", "must not be empty")
    old = _is_old(body)
    tools = asks.check_tools(_functions(request), "functions" if old else "tools", defaults.limits)
    wanted, param = _wanted_call(request)
    chosen, allowed = tool_choice(wanted, {(None, name): name for name in (str(t["name"]) for t in tools)}, param)
    schema, shown = response_schema(request.response_format, "response_format", defaults.limits)
    messages = tuple(_message(message, i) for i, message in enumerate(request.messages))
    return (
        Ask(
            model=request.model or defaults.model,
            messages=messages,
            think=_think(request, defaults),
            think_budget=request.thinking_budget,
            sampling=sampling(request, defaults),
            max_tokens=_bound(request),
            # Continuing an answer means omitting its end token.
            min_tokens=defaults.n_ctx if request.ignore_eos else request.min_tokens or 0,
            stop=asks.check_stop(request.stop, "stop", defaults.limits),
            tools=tools,
            tool_choice=chosen,
            tool_names=allowed,
            one_call=old or request.parallel_tool_calls is False,
            schema=schema,
            show_schema=shown,
            logprobs=_logprobs(request),
            n=_choices(request.n, defaults),
            resume=messages[-1]["role"] == "assistant",
            stream=bool(request.stream),
        ),
        request.prompt_cache_key,
    )


def writer(body: Mapping[str, Json], ask: Ask) -> Writer:
    """What writes the answer to a request that `read` has accepted."""
    options = body.get("stream_options")
    include_usage = isinstance(options, Mapping) and bool(options.get("include_usage"))
    return (OldChatWriter if _is_old(body) else ChatWriter)(ask, include_usage=include_usage)


def _is_old(body: Mapping[str, Json]) -> bool:
    """Whether a request offers `functions`, as before there were tools: its client reads `function_call`, one an answer."""
    return bool(body.get("functions")) and not body.get("tools")


def _refuse(request: ChatRequest) -> None:
    if request.audio is not None or "audio" in (request.modalities or ()):
        raise unsupported("modalities", "the model writes text only, not audio")
    if request.web_search_options is not None:
        raise unsupported("web_search_options", "this server has no web search")
    refuse_moderation(request.moderation)
    for i, tool in enumerate(request.tools or ()):
        if (kind := tool.get("type", "function")) != "function":
            raise unsupported(f"tools[{i}].type", f"unsupported tool type {kind!r:.40}; only functions are supported")


def _functions(request: ChatRequest) -> list[Mapping[str, Json]]:
    functions: list[tuple[str, Mapping[str, Json]]] = []
    for i, tool in enumerate(request.tools or ()):
        inner = tool.get("function")
        if not isinstance(inner, Mapping):
            raise invalid(f"tools[{i}].function", "must be an object", code="invalid_type")
        functions.append((f"tools[{i}].function", inner))
    functions += ((f"functions[{i}]", function) for i, function in enumerate(request.functions or ()))
    shown: list[Mapping[str, Json]] = []
    for where, inner in functions:
        if not isinstance(inner.get("name"), str):
            raise invalid(f"{where}.name", "must be a string", code="invalid_type")
        shown.append({key: value for key, value in inner.items() if key != "strict" or value})
    return shown


def _wanted_call(request: ChatRequest) -> tuple[Json, str]:
    """(`tool_choice`, or what was there before it: a name without a type; the field that it is from)."""
    old = request.function_call
    if request.tool_choice is not None or old is None:
        return request.tool_choice, "tool_choice"
    return {**old, "type": "function"} if isinstance(old, Mapping) else old, "function_call"


def _bound(request: ChatRequest) -> int | None:
    name = "max_completion_tokens" if request.max_completion_tokens is not None else "max_tokens"
    bound: int | None = getattr(request, name)
    if bound is not None and bound < 1 and bound != -1:
        raise invalid(name, "must be at least 1", code="invalid_value")
    return None if bound == -1 else bound


def _choices(n: int | None, defaults: Defaults) -> int:
    if n is not None and not 1 <= n <= defaults.limits.choices:
        raise invalid("n", f"must be between 1 and {defaults.limits.choices}", code="invalid_value")
    return n or 1


def _logprobs(request: ChatRequest) -> int | None:
    if request.top_logprobs is not None and not 0 <= request.top_logprobs <= 20:
        raise invalid("top_logprobs", "must be between 0 and 20", code="invalid_value")
    if request.top_logprobs and not request.logprobs:
        raise invalid("top_logprobs", "needs logprobs: true", code="invalid_value")
    return (request.top_logprobs or 0) if request.logprobs else None


def _think(request: ChatRequest, defaults: Defaults) -> str:
    modes = defaults.think_modes
    if request.reasoning_effort is not None:
        return asks.think_mode(request.reasoning_effort, modes, "reasoning_effort")
    template = request.chat_template_kwargs or {}
    switch: Json = request.enable_thinking
    for name in ("enable_thinking", "thinking"):
        switch = template.get(name, switch)
    if isinstance(request.thinking, Mapping):
        kind = request.thinking.get("type")
        switch = {"enabled": True, "adaptive": True, "disabled": False}.get(str(kind), switch)
    elif request.thinking is not None:
        switch = request.thinking
    if switch is None:
        return defaults.think
    if not switch:
        return "off"
    return defaults.think if defaults.think != "off" else asks.think_mode("high", modes, "thinking")


def _message(message: Mapping[str, Json], i: int) -> dict[str, Json]:
    """A message in the shape that `chat/messages.py` reads: only what the prompt format has a place for."""
    where = f"messages[{i}]"
    role = message.get("role")
    content = message.get("content")
    match role:
        case "system" | "developer":
            return {"role": "system", "content": asks.text_of(content, f"{where}.content")}
        case "user":
            return {"role": "user", "content": asks.text_of(content, f"{where}.content")}
        case "tool" | "function":
            call_id = message.get("tool_call_id")
            return {
                "role": "tool",
                "content": asks.text_of(content, f"{where}.content"),
                "tool_call_id": call_id if isinstance(call_id, str) else "",
            }
        case "assistant":
            return _assistant(message, where)
    raise invalid(
        f"{where}.role", f"{role!r:.40} is not one of system, developer, user, assistant, tool", code="invalid_value"
    )


def _assistant(message: Mapping[str, Json], where: str) -> dict[str, Json]:
    if message.get("audio") is not None:
        raise unsupported(f"{where}.audio", "the model reads text only, not audio")
    result: dict[str, Json] = {"role": "assistant", "content": asks.text_of(message.get("content"), f"{where}.content")}
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    if isinstance(reasoning, str) and reasoning:
        result["reasoning_content"] = reasoning
    calls = message.get("tool_calls")
    if calls is not None and not isinstance(calls, list):
        raise invalid(f"{where}.tool_calls", "must be a list", code="invalid_type")
    shown = [_replayed_call(call, f"{where}.tool_calls[{k}]") for k, call in enumerate(calls or ())]
    if isinstance(old := message.get("function_call"), Mapping):
        shown.append(_replayed_call({"id": "", "function": old}, f"{where}.function_call"))
    if shown:
        result["tool_calls"] = shown
    return result


def _replayed_call(call: Json, where: str) -> dict[str, Json]:
    if not isinstance(call, Mapping):
        raise invalid(where, "must be an object", code="invalid_type")
    inner = call.get("function")
    if not isinstance(inner, Mapping) or not isinstance(name := inner.get("name"), str):
        raise invalid(f"{where}.function.name", "is missing", code="missing_required_parameter")
    arguments = inner.get("arguments")
    if isinstance(arguments, Mapping):
        arguments = msgspec.json.encode(arguments).decode()
    if not isinstance(arguments, str | None):
        raise invalid(f"{where}.function.arguments", "must be a string", code="invalid_type")
    call_id = call.get("id")
    return {
        "id": call_id if isinstance(call_id, str) else "",
        "type": "function",
        "function": {"name": name, "arguments": arguments or "{}"},
    }


class ChatWriter(Writer):
    """Chunks of a chat completion, or the whole of it."""

    def __init__(self, ask: Ask, *, include_usage: bool) -> None:
        super().__init__(ask)
        self._include_usage = include_usage
        self._id = asks.new_id("chatcmpl-")
        self._created = int(time.time())

    def opening(self) -> bytes:
        return b"".join(self._chunk(i, {"role": "assistant", "content": ""}) for i in range(self.ask.n))

    def event(self, choice: int, event: GenerateEvent) -> bytes:
        answer = self.choices[choice]
        match event:
            case Delta(kind="thinking") if event.text:
                return self._chunk(choice, {"reasoning_content": event.text})
            case Delta(kind="text") if event.text or event.logprobs:
                logprobs = self._logprobs(event.logprobs)
                return self._chunk(choice, {"content": event.text}, logprobs=logprobs)
            case Delta(kind="tool") if event.text and answer.calls:
                return self._chunk(choice, self._continued(answer, event.text))
            case ToolCallBegun():
                return self._chunk(choice, self._begun(answer, event.id, event.name))
            case ToolCall() if event.name and answer.calls and not answer.calls[-1].ended:
                return b""
            case Finished(reason="stopped"):
                return b""  # the job's last item says what happened
            case Finished():
                return self._chunk(choice, {}, finish=self._finish(answer))
        return b""

    def _begun(self, answer: Choice, call_id: str, name: str) -> dict[str, Json]:
        """A call's first delta."""
        function = {"name": name, "arguments": ""}
        call = {"index": len(answer.calls) - 1, "id": call_id, "type": "function", "function": function}
        return {"tool_calls": [call]}

    def _continued(self, answer: Choice, arguments: str) -> dict[str, Json]:
        """A call's later deltas."""
        return {"tool_calls": [{"index": len(answer.calls) - 1, "function": {"arguments": arguments}}]}

    def _calls(self, answer: Choice) -> dict[str, Json]:
        """The calls of a whole message that has any."""
        calls = [
            {"id": c.call_id, "type": "function", "function": {"name": c.name, "arguments": c.text}}
            for c in answer.calls
        ]
        return {"tool_calls": calls}

    def _finish(self, answer: Choice) -> str:
        return answer.finish

    def keep_alive(self, waiting: Mapping[str, Json]) -> bytes:
        return self._chunk(0, {}, localrun=waiting)

    def error(self, error: ApiError) -> bytes:
        return sse({"error": error_object(error)})

    def closing(self) -> bytes:
        usage = b""
        if self._include_usage:
            usage = sse({**self._base("chat.completion.chunk"), "choices": [], "usage": usage_of(self.choices)})
        return usage + b"data: [DONE]\n\n"

    def whole(self) -> dict[str, Json]:
        choices = []
        for i, answer in enumerate(self.choices):
            text, reasoning = answer.joined("text"), answer.joined("thinking")
            message: dict[str, Json] = {
                "role": "assistant",
                "content": text or (None if answer.calls else ""),
                "refusal": None,
            }
            if reasoning:
                message["reasoning_content"] = reasoning
            if answer.calls:
                message |= self._calls(answer)
            logprobs = self._logprobs(answer.logprobs)
            choices.append(
                {"index": i, "message": message, "logprobs": logprobs, "finish_reason": self._finish(answer)}
            )
        return {**self._base("chat.completion"), "choices": choices, "usage": usage_of(self.choices)}

    def _logprobs(self, tokens: Sequence[Any]) -> dict[str, Json] | None:
        if self.ask.logprobs is None:
            return None
        return {"content": [logprob(token) for token in tokens], "refusal": None}

    def _base(self, kind: str) -> dict[str, Json]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self.ask.model,
        }

    def _chunk(
        self,
        choice: int,
        delta: Mapping[str, Json],
        *,
        finish: str | None = None,
        logprobs: Json = None,
        localrun: Json = None,
    ) -> bytes:
        shown = {"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        chunk = {**self._base("chat.completion.chunk"), "choices": [shown]}
        if self._include_usage:
            chunk["usage"] = None
        if localrun is not None:
            chunk["localrun"] = localrun
        return sse(chunk)


class OldChatWriter(ChatWriter):
    """For a request that offered `functions`: one call, without an id, as `function_call`."""

    def _begun(self, answer: Choice, call_id: str, name: str) -> dict[str, Json]:
        return {"function_call": {"name": name, "arguments": ""}}

    def _continued(self, answer: Choice, arguments: str) -> dict[str, Json]:
        return {"function_call": {"arguments": arguments}}

    def _calls(self, answer: Choice) -> dict[str, Json]:
        call = answer.calls[0]
        return {"function_call": {"name": call.name, "arguments": call.text}}

    def _finish(self, answer: Choice) -> str:
        return "function_call" if answer.finish == "tool_calls" else answer.finish


def usage_of(answers: Sequence[Choice]) -> dict[str, Json]:
    """Usage in the words of Chat Completions."""
    prompt, cached, new, thinking = total_usage(answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": thinking},
    }
