"""OpenAI's legacy Completions: `POST /v1/completions` continues a raw prompt."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import msgspec

from localrun.engine.process.process import GenerateEvent
from localrun.engine.process.protocol import Delta, Finished
from localrun.server import asks
from localrun.server.asks import Ask, Defaults
from localrun.server.chat_completions import StreamOptions, usage_of
from localrun.server.choices import Choice
from localrun.server.faults import ApiError, invalid, unsupported
from localrun.server.http import Writer, sse
from localrun.server.openai_common import error_object, sampling

Json = Any

API = "completions"


class CompletionsRequest(msgspec.Struct, kw_only=True):
    """The fields that mean something here."""

    prompt: Any = None
    model: str = ""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    n: int | None = None
    best_of: int | None = None
    echo: bool | None = None
    suffix: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    repeat_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    logprobs: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None


_KNOWN = (*CompletionsRequest.__struct_fields__, "user")

DEFAULT_TOKENS = 16
"""OpenAI's own."""


def read(body: Mapping[str, Json], defaults: Defaults) -> Ask:
    """Raises ApiError."""
    asks.note_unknown(API, body, _KNOWN)
    request: CompletionsRequest = asks.convert(body, CompletionsRequest)
    limits = defaults.limits
    if request.suffix:
        raise unsupported("suffix", "fill-in-the-middle is not supported")
    if request.echo:
        raise unsupported("echo", "echoing the prompt is not supported")
    if (request.best_of or 1) > (request.n or 1):
        raise unsupported("best_of", "choosing among several answers is not supported; use n")
    if request.n is not None and not 1 <= request.n <= limits.choices:
        raise invalid("n", f"must be between 1 and {limits.choices}", code="invalid_value")
    if request.max_tokens is not None and request.max_tokens < 1:
        raise invalid("max_tokens", "must be at least 1", code="invalid_value")
    if request.logprobs is not None and not 0 <= request.logprobs <= 20:
        raise invalid("logprobs", "must be between 0 and 20", code="invalid_value")
    text, tokens = _prompt(request.prompt)
    return Ask(
        model=request.model or defaults.model,
        text=text,
        tokens=tokens,
        sampling=sampling(request, defaults),
        max_tokens=request.max_tokens or DEFAULT_TOKENS,
        min_tokens=request.min_tokens or 0,
        stop=asks.check_stop(request.stop, "stop", limits),
        logprobs=request.logprobs,
        n=request.n or 1,
        stream=bool(request.stream),
        ignore_eos=bool(request.ignore_eos),
    )


def _prompt(value: Json) -> tuple[str | None, tuple[int, ...] | None]:
    """(text, token ids): one of them. A list of one prompt is that prompt."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]
    if isinstance(value, str):
        return value, None
    if isinstance(value, list) and value and all(type(token) is int for token in value):
        return None, tuple(value)
    if isinstance(value, list) and value:
        raise unsupported("prompt", "one prompt per request")
    raise invalid("prompt", "must be a string or a list of token ids", code="missing_required_parameter")


def writer(body: Mapping[str, Json], ask: Ask) -> Writer:
    """What writes the answer to a request that `read` has accepted."""
    options = body.get("stream_options")
    return CompletionsWriter(ask, include_usage=isinstance(options, Mapping) and bool(options.get("include_usage")))


class CompletionsWriter(Writer):
    """Chunks of a completion, or the whole of it."""

    def __init__(self, ask: Ask, *, include_usage: bool) -> None:
        super().__init__(ask)
        self._include_usage = include_usage
        self._id = asks.new_id("cmpl-")
        self._created = int(time.time())
        self._offsets = [0] * ask.n

    def event(self, choice: int, event: GenerateEvent) -> bytes:
        match event:
            case Delta() if event.text or event.logprobs:
                logprobs = self._logprobs(event.logprobs, self._offsets[choice])
                self._offsets[choice] += len(event.text)
                return self._chunk(choice, event.text, logprobs=logprobs)
            case Finished(reason="stopped"):
                return b""
            case Finished():
                return self._chunk(choice, "", finish=_finish(self.choices[choice]))
        return b""

    def keep_alive(self, waiting: Mapping[str, Json]) -> bytes:
        return self._chunk(0, "", localrun=waiting)

    def error(self, error: ApiError) -> bytes:
        return sse({"error": error_object(error)})

    def closing(self) -> bytes:
        usage = b""
        if self._include_usage:
            usage = sse({**self._base(), "choices": [], "usage": usage_of(self.choices)})
        return usage + b"data: [DONE]\n\n"

    def whole(self) -> dict[str, Json]:
        choices = []
        for i, answer in enumerate(self.choices):
            text = "".join(block.text for block in answer.blocks)
            logprobs = self._logprobs(answer.logprobs, 0)
            choices.append({"index": i, "text": text, "logprobs": logprobs, "finish_reason": _finish(answer)})
        return {**self._base(), "choices": choices, "usage": usage_of(self.choices)}

    def _logprobs(self, tokens: Any, offset: int) -> dict[str, Json] | None:
        if self.ask.logprobs is None:
            return None
        shown: dict[str, list[Json]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in tokens:
            text = bytes(token.data).decode("utf-8", "replace")
            shown["tokens"].append(text)
            shown["token_logprobs"].append(max(token.logprob, -9999.0))
            top = {bytes(other.data).decode("utf-8", "replace"): max(other.logprob, -9999.0) for other in token.top}
            shown["top_logprobs"].append(top)
            shown["text_offset"].append(offset)
            offset += len(text)
        return shown

    def _base(self) -> dict[str, Json]:
        return {"id": self._id, "object": "text_completion", "created": self._created, "model": self.ask.model}

    def _chunk(
        self, choice: int, text: str, *, finish: str | None = None, logprobs: Json = None, localrun: Json = None
    ) -> bytes:
        shown = {"index": choice, "text": text, "logprobs": logprobs, "finish_reason": finish}
        chunk = {**self._base(), "choices": [shown]}
        if self._include_usage:
            chunk["usage"] = None
        if localrun is not None:
            chunk["localrun"] = localrun
        return sse(chunk)


def _finish(answer: Choice) -> str:
    return "length" if answer.finish == "length" else "stop"
