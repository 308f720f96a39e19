"""Anthropic's Messages API: writes answers to `POST /v1/messages`. `messages_input.py` reads the requests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from localrun.engine.process.process import GenerateEvent
from localrun.engine.process.protocol import Delta, Finished, PromptProgress, ToolCall, ToolCallBegun
from localrun.server import asks
from localrun.server.asks import Ask
from localrun.server.choices import Block, Choice
from localrun.server.faults import ApiError, Kind
from localrun.server.http import Writer, sse
from localrun.server.signatures import Signer

Json = Any

API = "messages"

_TYPES: Mapping[Kind, str] = {
    "invalid": "invalid_request_error",
    "context": "invalid_request_error",
    "too_large": "request_too_large",
    "unauthorized": "authentication_error",
    "forbidden": "permission_error",
    "not_found": "not_found_error",
    "overloaded": "overloaded_error",
    "unavailable": "overloaded_error",
    "internal": "api_error",
}

OVERLOADED = 529
"""Anthropic's status for a full queue; its clients wait for `Retry-After` and try again."""


THREADS_UNSUPPORTED = "thread_unsupported_request"
"""Anthropic's own code for a request whose conversation its service can't keep."""


def error_body(error: ApiError) -> dict[str, Json]:
    shown: dict[str, Json] = {"type": _TYPES[error.kind], "message": error.message}
    if error.code == THREADS_UNSUPPORTED:
        shown["details"] = {"error_code": error.code, "unsupported": [error.param]}
    return {"type": "error", "error": shown, "request_id": None}


class Anthropic:
    """Errors of Anthropic's API."""

    name = API

    def error(self, error: ApiError) -> tuple[int, dict[str, Json]]:
        return OVERLOADED if error.kind == "overloaded" else error.status, error_body(error)


class MessagesWriter(Writer):
    """Writes a message as events, or complete.

    `message_start` is sent with the prompt's first progress, when the number of reused tokens is known, or before the first
    keep-alive. Clients only accept data as keep-alives, so those are empty deltas of an open block or of the message.
    """

    def __init__(self, ask: Ask, signer: Signer, *, prompt_tokens: int = 0) -> None:
        super().__init__(ask)
        self._signer = signer
        self._id = asks.new_id("msg_")
        self._prompt_tokens = prompt_tokens
        self._started = False
        self._n_blocks = 0
        self._open: Block | None = None

    @property
    def _choice(self) -> Choice:
        return self.choices[0]

    # --- streaming

    def event(self, choice: int, event: GenerateEvent) -> bytes:
        if isinstance(event, PromptProgress):
            return self._start()
        if not isinstance(event, Delta | ToolCallBegun | ToolCall | Finished):
            return b""
        data = self._start()
        match event:
            case Delta() if event.text and self._choice.blocks:
                block = self._choice.blocks[-1]
                if (block.kind == "tool") != (event.kind == "tool"):
                    return data  # of a call that can't be shown
                data += self._block(block) + self._delta(block, event.text)
            case ToolCallBegun():
                data += self._block(self._choice.blocks[-1])
            case Finished(reason="stopped"):
                pass
            case Finished():
                data += self._close_block() + self._end()
        return data

    def _start(self) -> bytes:
        if self._started:
            return b""
        self._started = True
        message = {**self._base(), "content": [], "stop_reason": None, "stop_sequence": None, "usage": self._usage(0)}
        return _event({"type": "message_start", "message": message})

    def _block(self, block: Block) -> bytes:
        """Opens the block if it is not open."""
        if self._open is block:
            return b""
        data = self._close_block()
        self._open = block
        start: dict[str, Json] = {"type": "text", "text": ""}
        if block.kind == "thinking":
            start = {"type": "thinking", "thinking": "", "signature": ""}
        elif block.kind == "tool":
            start = {"type": "tool_use", "id": block.call_id, "name": block.name, "input": {}}
        data += _event({"type": "content_block_start", "index": self._n_blocks, "content_block": start})
        self._n_blocks += 1
        return data

    def _delta(self, block: Block, text: str) -> bytes:
        field = {"thinking": "thinking", "text": "text", "tool": "partial_json"}[block.kind]
        kind = {"thinking": "thinking_delta", "text": "text_delta", "tool": "input_json_delta"}[block.kind]
        delta = {"type": kind, field: text}
        return _event({"type": "content_block_delta", "index": self._n_blocks - 1, "delta": delta})

    def _close_block(self) -> bytes:
        block, self._open = self._open, None
        if block is None:
            return b""
        data = b""
        if block.kind == "thinking":
            delta = {"type": "signature_delta", "signature": self._signer.sign(block.text)}
            data = _event({"type": "content_block_delta", "index": self._n_blocks - 1, "delta": delta})
        return data + _event({"type": "content_block_stop", "index": self._n_blocks - 1})

    def _end(self) -> bytes:
        delta = {"stop_reason": self._stop_reason(), "stop_sequence": self._stop_sequence()}
        return _event({"type": "message_delta", "delta": delta, "usage": self._usage(self._choice.timings.new_tokens)})

    def keep_alive(self, waiting: Mapping[str, Json]) -> bytes:
        if self._open is not None:
            return self._start() + self._delta(self._open, "")
        delta = {"stop_reason": None, "stop_sequence": None}
        usage = {"output_tokens": 0}
        return self._start() + _event({"type": "message_delta", "delta": delta, "usage": usage, "localrun": waiting})

    def error(self, error: ApiError) -> bytes:
        return _event(error_body(error))

    def closing(self) -> bytes:
        return _event({"type": "message_stop"})

    # --- whole

    def whole(self) -> dict[str, Json]:
        return {
            **self._base(),
            "content": [self._whole_block(block) for block in self._choice.blocks],
            "stop_reason": self._stop_reason(),
            "stop_sequence": self._stop_sequence(),
            "usage": self._usage(self._choice.timings.new_tokens),
        }

    def _whole_block(self, block: Block) -> dict[str, Json]:
        if block.kind == "thinking":
            return {"type": "thinking", "thinking": block.text, "signature": self._signer.sign(block.text)}
        if block.kind == "text":
            return {"type": "text", "text": block.text, "citations": None}
        try:
            value = msgspec.json.decode(block.text or "{}")
        except (msgspec.DecodeError, RecursionError):
            value = {"arguments": block.text}  # cut off
        return {"type": "tool_use", "id": block.call_id, "name": block.name, "input": value}

    # --- both

    def _base(self) -> dict[str, Json]:
        return {"id": self._id, "type": "message", "role": "assistant", "model": self.ask.model}

    def _usage(self, n_new: int) -> dict[str, Json]:
        """`input_tokens` excludes reused tokens, which are counted separately."""
        timings, progress = self._choice.timings, self._choice.prompt
        total, reused = self._prompt_tokens, 0
        if self._choice.finished is not None:
            total, reused = timings.prompt_tokens, timings.reused_tokens
        elif progress is not None:
            total, reused = progress.total, progress.reused
        return {
            "input_tokens": total - reused,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": reused,
            "output_tokens": n_new,
        }

    def _stop_reason(self) -> str:
        finished = self._choice.finished
        if finished is not None and finished.reason == "stop":
            return "stop_sequence"
        if finished is not None and finished.reason == "context":
            return "model_context_window_exceeded"
        return {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}[self._choice.finish]

    def _stop_sequence(self) -> str | None:
        finished = self._choice.finished
        return finished.stop_string if finished is not None and finished.reason == "stop" else None


def _event(data: dict[str, Json]) -> bytes:
    return sse(data, event=data["type"])
