"""The common form of requests: every API's requests become an `Ask`, and an `Ask` becomes `Generate` commands.

Defines, for all APIs, the meaning of efforts and tool choices, and which parts of a prompt change insignificantly between
requests.
"""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import msgspec

from localrun.engine.chat.messages import tools_from_json
from localrun.engine.options import SamplingOptions
from localrun.engine.process.protocol import CountTokens, Generate
from localrun.errors import LocalrunError
from localrun.server.faults import invalid, unsupported
from localrun.server.limits import ServerLimits, check_schema

log = logging.getLogger(__name__)

Json = Any

ToolChoice = Literal["auto", "none", "required"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A request for one or several answers.

    Attributes:
        model: the name that the client used, to echo.
        messages: as `chat/messages.py` reads them.
        tools: OpenAI `function` objects.
        tool_names: only these tools may be called, though the model is shown all; None: all.
        one_call: at most one tool call (`parallel_tool_calls: false`).
        schema: a JSON schema that the answer must follow, shown to the model and enforced; `{"type": "object"}` for any object.
        show_schema: mention the schema in the prompt.
        text: a raw prompt instead of messages (`/v1/completions`).
        logprobs: number of alternatives to report for each token; None: no log probabilities.
        n: number of answers.
        resume: the last message is the beginning of the answer.
    """

    model: str
    messages: tuple[Mapping[str, Json], ...] = ()
    text: str | None = None
    tokens: tuple[int, ...] | None = None
    think: str = "off"
    think_budget: int | None = None
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    tools: tuple[Mapping[str, Json], ...] = ()
    tool_choice: ToolChoice = "auto"
    tool_names: tuple[str, ...] | None = None
    one_call: bool = False
    schema: Mapping[str, Json] | None = None
    show_schema: bool = True
    logprobs: int | None = None
    n: int = 1
    resume: bool = False
    stream: bool = False
    ignore_eos: bool = False

    def command(self) -> Generate:
        """The command for the engine."""
        return Generate(
            messages=self.messages,
            text=self.text,
            tokens=self.tokens,
            think=self.think,
            think_budget=self.think_budget,
            sampling=self.sampling,
            max_tokens=self.max_tokens,
            min_tokens=self.min_tokens,
            stop=self.stop,
            tools=self.tools,
            tool_choice=self.tool_choice,
            tool_names=self.tool_names,
            max_tool_calls=1 if self.one_call else None,
            response_format=self.schema if self.show_schema else None,
            json_schema=self.schema,
            logprobs=self.logprobs,
            resume=self.resume,
            ignore_eos=self.ignore_eos,
        )

    def n_chars(self) -> int:
        """Characters of text in the prompt, tools left out."""
        if self.text is not None:
            return len(self.text)
        return sum(len(str(message.get("content", ""))) for message in self.messages)

    def count_command(self) -> CountTokens | None:
        """What asks the engine for the prompt's length; None if that is known without."""
        if self.tokens is not None:
            return None
        if self.text is not None:
            return CountTokens(text=self.text)
        return CountTokens(
            messages=self.messages,
            think=self.think,
            tools=self.tools,
            response_format=self.schema if self.show_schema else None,
            resume=self.resume,
        )

    def commands(self, room: int | None) -> tuple[Generate, ...]:
        """One command for each choice.

        Args:
            room: tokens left after the prompt, which limits the answer. None: unknown.
        """
        command = self.command()
        if room is not None:
            command = msgspec.structs.replace(command, max_tokens=max(1, min(room, command.max_tokens or room)))
        if self.n == 1 or self.sampling.seed is None:
            return (command,) * self.n
        # The same seed for all would give the same answer n times.
        seeds = [(self.sampling.seed + i) % (2**32 - 1) for i in range(self.n)]
        options = [replace(self.sampling, seed=seed) for seed in seeds]
        return tuple(msgspec.structs.replace(command, sampling=sampling) for sampling in options)


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """Defaults for requests, from the user's settings.

    Attributes:
        model: the name to list the model under.
        think: thinking mode if the request does not choose one.
        think_modes: the model's modes, least first.
        n_ctx: context size, for prompt and answer together.
        max_tokens: limit for answers if the request has none.
    """

    model: str
    think: str
    think_modes: tuple[str, ...]
    n_ctx: int
    sampling: SamplingOptions
    limits: ServerLimits
    max_tokens: int | None = None


# --- thinking -------------------------------------------------------------------------------------------------------


def think_mode(effort: str, modes: Sequence[str], param: str) -> str:
    """The model's mode for an effort: none and minimal turn thinking off, xhigh and max select the highest mode, `high` the
    model's own if it has one, and anything lower its first.

    Raises:
        ApiError: an unknown effort.
    """
    thinking = [mode for mode in modes if mode != "off"]
    if effort in ("none", "minimal", "off") or not thinking:
        if effort not in EFFORTS:
            raise _unknown_effort(effort, param)
        return "off"
    if effort in ("xhigh", "max", "ultra"):
        return thinking[-1]
    if effort in ("low", "medium"):
        return thinking[0]
    if effort == "high":
        return "high" if "high" in thinking else thinking[0]
    raise _unknown_effort(effort, param)


EFFORTS = ("none", "off", "minimal", "low", "medium", "high", "xhigh", "max", "ultra")


def _unknown_effort(effort: str, param: str) -> Exception:
    return invalid(param, f"{effort!r:.40} is not one of {', '.join(EFFORTS)}", code="invalid_value")


# --- fields ---------------------------------------------------------------------------------------------------------

_noted: set[tuple[str, str]] = set()


def note_once(api: str, what: str, fate: str = "ignored") -> None:
    """Logs what of a request has no effect, the first time it is seen; a client sends it with every request."""
    key = (api, what[:100])
    if key not in _noted and len(_noted) < 1000:
        _noted.add(key)
        log.info("%s: %s: %s", api, fate, what[:100])


def note_unknown(api: str, body: Mapping[str, Json], known: Sequence[str]) -> None:
    """Logs unknown fields."""
    for name in body:
        if name not in known:
            note_once(api, f"field {name!r}")


_PATH = re.compile(r" - at `\$\.?(?P<path>[^`]*)`$")


def convert(body: Json, kind: type[Any]) -> Any:
    """`body` as a typed request. Raises ApiError that names the field."""
    try:
        return msgspec.convert(body, kind, strict=True)
    except msgspec.ValidationError as error:
        message = str(error)
        match = _PATH.search(message)
        param = match["path"] if match else None
        raise invalid(param or None, message[: match.start()] if match else message, code="invalid_type") from None


def new_id(prefix: str) -> str:
    """An id that no other object has."""
    return prefix + secrets.token_hex(12)


def check_stop(stop: str | Sequence[str] | None, param: str, limits: ServerLimits) -> tuple[str, ...]:
    """Stop strings. Raises ApiError."""
    words = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(words) > limits.stop_strings:
        raise invalid(param, f"more than {limits.stop_strings} stop strings")
    if any(len(word) > limits.stop_string_chars for word in words):
        raise invalid(param, f"a stop string of more than {limits.stop_string_chars} characters")
    return tuple(word for word in words if word)


def check_logit_bias(bias: Mapping[str, float] | None, param: str) -> tuple[tuple[int, float], ...]:
    """Pairs of token id and bias. Raises ApiError."""
    pairs = []
    for key, value in (bias or {}).items():
        if not key.isdecimal() or not -100 <= value <= 100:
            raise invalid(param, f"{key!r:.20}: expected a token id and a number from -100 to 100")
        pairs.append((int(key), float(value)))
    return tuple(pairs)


def check_tools(
    functions: Sequence[Mapping[str, Json]], param: str, limits: ServerLimits
) -> tuple[Mapping[str, Json], ...]:
    """OpenAI `function` objects, checked. Raises ApiError."""
    if len(functions) > limits.tools:
        raise invalid(param, f"{len(functions)} tools > {limits.tools} maximum")
    for i, function in enumerate(functions):
        if (parameters := function.get("parameters")) is not None:
            check_schema(parameters, f"{param}[{i}].parameters", limits, len(msgspec.json.encode(parameters)))
    try:
        tools_from_json([dict(function) for function in functions], where=param)
    except LocalrunError as error:
        raise invalid(None, str(error)) from None
    return tuple(functions)


def function(name: str, description: str | None, parameters: Json, *, strict: bool | None = None) -> dict[str, Json]:
    """A tool as the model is shown it. `strict` is for the engine: it is not part of the prompt."""
    shown: dict[str, Json] = {"name": name}
    if description is not None:
        shown["description"] = description
    if parameters is not None:
        shown["parameters"] = parameters
    if strict:
        shown["strict"] = True
    return shown


# --- text -----------------------------------------------------------------------------------------------------------

_BILLING = re.compile(r"\s*x-anthropic-billing-header:")


def is_billing_line(text: str) -> bool:
    """A system text of Claude Code that changes with every request and tells the model nothing."""
    return _BILLING.match(text) is not None


_NOT_TEXT = {
    "image": "images",
    "image_url": "images",
    "input_image": "images",
    "input_audio": "audio",
    "audio": "audio",
    "file": "files",
    "input_file": "files",
    "document": "documents that are not plain text",
    "video_url": "videos",
}


def text_of(content: Json, param: str, *, joint: str = "\n\n") -> str:
    """The text of a message's content: a string, null, or a list of text parts.

    A list with one part equals the plain string, because clients alternate between the two.

    Raises:
        ApiError: a part that is not text; the message names it.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid(param, "must be a string or a list of parts", code="invalid_type")
    texts = []
    for i, part in enumerate(content):
        if isinstance(part, str):
            texts.append(part)
            continue
        if not isinstance(part, Mapping):
            raise invalid(f"{param}[{i}]", "must be an object with a type", code="invalid_type")
        text = part_text(part, f"{param}[{i}]")
        if text is not None:
            texts.append(text)
    return joint.join(texts)


def part_text(part: Mapping[str, Json], param: str) -> str | None:
    """The text of one part; None for parts that are irrelevant to the model. Raises ApiError."""
    kind = part.get("type")
    if kind in ("text", "input_text", "output_text", "summary_text", "reasoning_text"):
        text = part.get("text")
        if not isinstance(text, str):
            raise invalid(f"{param}.text", "must be a string", code="invalid_type")
        return text
    if kind == "refusal":
        return str(part.get("refusal") or "")
    if kind == "document" and isinstance(source := part.get("source"), Mapping) and source.get("type") == "text":
        return str(source.get("data") or "")
    if isinstance(kind, str) and kind in _NOT_TEXT:
        raise unsupported(f"{param}.type", f"the model reads text only, not {_NOT_TEXT[kind]} ({kind})")
    if not isinstance(kind, str):
        raise invalid(f"{param}.type", "must be a string", code="invalid_type")
    raise unsupported(f"{param}.type", f"unsupported part type {kind!r:.40}")
