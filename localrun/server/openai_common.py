"""Shared by the OpenAI APIs: errors, tool choices, response formats, log probabilities."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import msgspec

from localrun.engine.options import SamplingOptions
from localrun.engine.process.protocol import TokenLogprob
from localrun.server.asks import Defaults, ToolChoice, check_logit_bias, note_once
from localrun.server.faults import ApiError, Kind, invalid, unsupported
from localrun.server.limits import ServerLimits, check_schema

Json = Any

_TYPES: Mapping[Kind, str] = {
    "invalid": "invalid_request_error",
    "context": "invalid_request_error",
    "too_large": "invalid_request_error",
    "unauthorized": "authentication_error",
    "forbidden": "permission_error",
    "not_found": "invalid_request_error",
    "overloaded": "rate_limit_error",
    "unavailable": "server_error",
    "internal": "server_error",
}

DROPPED_TOOLS = (
    "web_search",
    "web_search_preview",
    "web_search_2025_08_26",
    "local_shell",
    "image_generation",
    "tool_search",
)
"""Tools that agents offer with every request, but don't need."""

_CODES: Mapping[Kind, str] = {"unauthorized": "invalid_api_key", "not_found": "not_found"}


def error_object(error: ApiError) -> dict[str, Json]:
    """The object under `error`."""
    return {
        "message": error.message,
        "type": _TYPES[error.kind],
        "param": error.param,
        "code": error.code or _CODES.get(error.kind),
    }


class OpenAi:
    """Errors of OpenAI's APIs."""

    def __init__(self, name: str = "openai") -> None:
        self.name = name

    def error(self, error: ApiError) -> tuple[int, dict[str, Json]]:
        return error.status, {"error": error_object(error)}


Names = Mapping[tuple[str | None, str], str]
"""Offered tools: (namespace, client's name) -> model's name."""


def tool_choice(value: Json, names: Names, param: str = "tool_choice") -> tuple[ToolChoice, tuple[str, ...] | None]:
    """The choice and the model's names of the tools that may be called (None: all).

    Raises:
        ApiError: an unknown word, or a tool that is not offered.
    """
    if value is None or value == "auto":
        return "auto", None
    if value in ("none", "required"):
        if value == "required" and not names:
            raise invalid(param, "'required' without tools")
        return value, None
    if not isinstance(value, Mapping):
        raise invalid(param, f"{value!r:.40} is not one of none, auto, required", code="invalid_value")
    if value.get("type") == "allowed_tools":
        inner = "allowed_tools" in value  # Chat's form; in Responses' the fields stand beside the type
        return _allowed_tools(value.get("allowed_tools", value), names, f"{param}.allowed_tools" if inner else param)
    return "required", (_chosen_tool(value, names, param),)


def _allowed_tools(value: Json, names: Names, param: str) -> tuple[ToolChoice, tuple[str, ...] | None]:
    mode = value.get("mode", "auto") if isinstance(value, Mapping) else None
    if mode not in ("auto", "required"):
        raise invalid(f"{param}.mode", f"{mode!r:.40} is not one of auto, required", code="invalid_value")
    tools = value.get("tools")
    if not isinstance(tools, list):
        raise invalid(f"{param}.tools", "must be a list", code="invalid_type")
    allowed = []
    for i, tool in enumerate(tools):
        where = f"{param}.tools[{i}]"
        if not isinstance(tool, Mapping):
            raise invalid(where, "must be an object", code="invalid_type")
        if isinstance(kind := tool.get("type"), str) and kind in DROPPED_TOOLS:
            note_once("openai", f"{where}: tool of type {kind}")
        else:
            allowed.append(_chosen_tool(tool, names, where))
    if allowed:
        return mode, tuple(allowed)
    if mode == "required":
        raise invalid(f"{param}.tools", "'required' without tools")
    return "none", None


def _chosen_tool(value: Mapping[str, Json], names: Names, param: str) -> str:
    """The model's name for a tool given by type and name; without a namespace, the tool outside of all, else the only one."""
    kind = value.get("type")
    if kind not in ("function", "custom"):
        raise unsupported(f"{param}.type", f"unsupported tool type {kind!r:.40}")
    inner = value.get(kind, value)
    name = inner.get("name") if isinstance(inner, Mapping) else None
    where = f"{param}.{kind}.name" if kind in value else f"{param}.name"
    namespace = value.get("namespace")
    if not isinstance(namespace, str | None):
        raise invalid(f"{param}.namespace", "must be a string", code="invalid_type")
    spaces = {space: model_name for (space, each), model_name in names.items() if each == name}
    if namespace in spaces:
        return spaces[namespace]
    if namespace is not None:
        raise invalid(where, f"{name!r:.60} is not among the tools of namespace {namespace!r:.60}")
    if len(spaces) > 1:
        several = ", ".join(str(space) for space in spaces)
        raise invalid(f"{param}.namespace", f"{name!r:.60} is in several namespaces ({several:.200}): name one")
    for model_name in spaces.values():
        return model_name
    raise invalid(where, f"{name!r:.60} is not among the tools")


def refuse_moderation(value: Json) -> None:
    """Raises ApiError: OpenAI would judge the text, and the client relies on it."""
    if value is not None:
        raise unsupported("moderation", "nothing is judged here, neither prompts nor answers")


def response_schema(value: Json, param: str, limits: ServerLimits) -> tuple[Mapping[str, Json] | None, bool]:
    """(schema that the answer must follow, whether the model is shown it) of a response format. Raises ApiError."""
    if value is None:
        return None, False
    if not isinstance(value, Mapping):
        raise invalid(param, "must be an object", code="invalid_type")
    kind = value.get("type")
    if kind in (None, "text"):
        return None, False
    if kind == "json_object":
        return {"type": "object"}, False
    if kind == "json_schema":
        where = f"{param}.json_schema" if "json_schema" in value else param
        inner = value.get("json_schema", value)
        schema = inner.get("schema") if isinstance(inner, Mapping) else None
        if schema is None:
            raise invalid(f"{where}.schema", "is missing", code="missing_required_parameter")
        return check_schema(schema, f"{where}.schema", limits, len(msgspec.json.encode(schema))), True
    raise unsupported(f"{param}.type", f"{kind!r:.40} is not one of text, json_object, json_schema")


def logprob(token: TokenLogprob, *, alternatives: bool = True, data: bool = True) -> dict[str, Json]:
    """One token's log probability, with the alternatives; with its bytes unless `data` is false."""
    shown: dict[str, Json] = {
        "token": bytes(token.data).decode("utf-8", "replace"),
        "logprob": max(token.logprob, -9999.0),
    }
    if data:
        shown["bytes"] = list(token.data)
    if alternatives:
        shown["top_logprobs"] = [logprob(other, alternatives=False, data=data) for other in token.top]
    return shown


def sampling(request: Any, defaults: Defaults) -> SamplingOptions:
    """Sampling options of a Chat or Completions request, over the user's own."""
    repeat = request.repetition_penalty if request.repetition_penalty is not None else request.repeat_penalty
    values = {
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": None if request.top_k is None else max(0, request.top_k),  # -1 is "all" elsewhere
        "min_p": request.min_p,
        "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty,
        "repeat_penalty": repeat,
        "logit_bias": check_logit_bias(request.logit_bias, "logit_bias") or None,
        "seed": None if request.seed is None else request.seed % (2**32 - 1),
    }
    return dataclasses.replace(
        defaults.sampling, **{name: value for name, value in values.items() if value is not None}
    )
