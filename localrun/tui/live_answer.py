"""One answer in progress: text so far, thinking, rates, and the remaining prefill.

Pure state, updated by the engine's events and read by widgets. The clock is injectable for tests.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from localrun.engine.conversations import Message, MessageState
from localrun.engine.conversations.attachments import with_attachments
from localrun.engine.conversations.export import fenced
from localrun.engine.process.process import GenerateEvent
from localrun.engine.process.protocol import Delta, Finished, PromptProgress, ToolCall
from localrun.errors import LocalrunError

_STATES: Mapping[str, MessageState] = {
    "eos": "complete",
    "length": "length",
    "context": "context",
    "stopped": "stopped",
}


class LiveAnswer:
    """The received part of one answer.

    Attributes:
        message: the stored message as last written.
        progress: latest progress of the prefill; None before it and once decoding has begun.
        finished: the closing event.
        error: why it ended without one.
    """

    def __init__(self, message: Message, clock: Callable[[], float] = time.monotonic) -> None:
        self.message = message
        self.progress: PromptProgress | None = None
        self.finished: Finished | None = None
        self.error: LocalrunError | None = None
        self.n_tokens = 0
        self.context_used = 0
        self._clock = clock
        self._text: list[str] = []
        self._thinking: list[str] = []
        self._thinking_began: float | None = None
        self._thinking_ended: float | None = None
        self._decode_began: float | None = None
        self._last_token: float | None = None
        self._prompt_tokens_per_s: float | None = None

    @property
    def text(self) -> str:
        return "".join(self._text)

    @property
    def thinking(self) -> str:
        return "".join(self._thinking)

    @property
    def is_thinking(self) -> bool:
        """Reasoning has begun and the text has not."""
        return self._thinking_began is not None and self._thinking_ended is None

    @property
    def thinking_s(self) -> float | None:
        if self._thinking_began is None:
            return None
        return (self._thinking_ended or self._clock()) - self._thinking_began

    @property
    def decode_tokens_per_s(self) -> float | None:
        """So far; the engine's own figure once it has finished."""
        if self.finished is not None:
            return self.finished.timings.decode_tokens_per_s
        if self._decode_began is None or self._last_token is None or self.n_tokens < 2:
            return None
        seconds = self._last_token - self._decode_began
        return (self.n_tokens - 1) / seconds if seconds > 0 else None

    @property
    def prompt_tokens_per_s(self) -> float | None:
        if self.finished is not None:
            return self.finished.timings.prompt_tokens_per_s
        return self._prompt_tokens_per_s

    @property
    def state(self) -> MessageState:
        if self.error is not None:
            return "failed"
        return "writing" if self.finished is None else _STATES[self.finished.reason]

    @property
    def details(self) -> dict[str, Any]:
        """For the store."""
        result: dict[str, Any] = {}
        if (seconds := self.thinking_s) is not None:
            result["thinking_s"] = round(seconds, 1)
        if self.finished is not None:
            result |= {"timings": asdict(self.finished.timings), "seed": self.finished.seed}
            if self.finished.warning:
                result["warning"] = self.finished.warning
        if self.error is not None:
            result["error"] = {"message": str(self.error), "hint": self.error.hint}
        return result

    def apply(self, events: Iterable[GenerateEvent]) -> None:
        """Takes news in."""
        for event in events:
            if isinstance(event, PromptProgress):
                self.progress = event
                self.context_used = event.done
                self._prompt_tokens_per_s = prompt_tokens_per_s(event)
            elif isinstance(event, Delta):
                self._count(event.tokens)
                self._add(event)
            elif isinstance(event, ToolCall):
                self._count(event.tokens)
                self._end_thinking()
                self._text.append(f"\n\nTool call `{event.name}`:\n\n{fenced(event.arguments, 'json')}\n")
            elif isinstance(event, Finished):
                self._end_thinking()
                self.finished = event
                self.context_used = event.timings.context_used

    def fail(self, error: LocalrunError) -> None:
        """The answer ended without a closing event."""
        self._end_thinking()
        self.error = error

    def _count(self, tokens: Sequence[int]) -> None:
        now = self._clock()
        if self._decode_began is None:
            self._decode_began = now
            self.progress = None
        if tokens:
            self.n_tokens += len(tokens)
            self.context_used += len(tokens)
            self._last_token = now

    def _add(self, delta: Delta) -> None:
        if delta.kind == "thinking":
            if self._thinking_began is None:
                self._thinking_began = self._clock()
            self._thinking.append(delta.text)
        elif delta.text:
            self._end_thinking()
            self._text.append(delta.text)

    def _end_thinking(self) -> None:
        if self._thinking_began is not None and self._thinking_ended is None:
            self._thinking_ended = self._clock()


def prompt_tokens_per_s(progress: PromptProgress) -> float | None:
    """Tokens per second of the prefill so far."""
    n_read = progress.done - progress.reused
    return n_read / progress.elapsed_s if n_read > 0 and progress.elapsed_s > 0 else None


def prompt_time_left(progress: PromptProgress) -> float | None:
    """Seconds."""
    rate = prompt_tokens_per_s(progress)
    return (progress.total - progress.done) / rate if rate else None


def prompt_messages(branch: Sequence[Message], system: str = "") -> tuple[dict[str, Any], ...]:
    """A branch as messages for the engine. Attachments precede the text; answers that never began are omitted."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system.strip() else []
    for message in branch:
        if message.role == "assistant":
            if message.content or message.reasoning:
                body = {"role": "assistant", "content": message.content}
                if message.reasoning:
                    body["reasoning_content"] = message.reasoning
                messages.append(body)
            continue
        messages.append({"role": message.role, "content": with_attachments(message.attachments, message.content)})
    return tuple(messages)


def last_turns(branch: Sequence[Message], n_turns: int) -> list[Message]:
    """The end of a branch that begins with the `n_turns`-th question from the end."""
    questions = [i for i, message in enumerate(branch) if message.role == "user"]
    return list(branch[questions[-n_turns] :]) if questions and n_turns > 0 else []
