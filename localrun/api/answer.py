"""A complete answer, assembled from its events."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from localrun.engine.facts import FinishReason, Timings
from localrun.engine.process.process import GenerateEvent
from localrun.engine.process.protocol import Delta, Finished, ToolCall


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a model answered. `str(answer)` is its text.

    Attributes:
        text: the answer.
        thinking: the reasoning that preceded it.
        tool_calls: calls that the model requests; `arguments` is a JSON object as text, `usable` tells whether it is complete.
        finish_reason: `eos`: the model ended it; `length`: `max_tokens` reached; `context`: the context is full; `stopped`: by
            the user; `stop`: a stop string was found.
        seed: gives the same answer again.
        timings: tokens and seconds.
        problems: names of formal defects of the answer.
        warning: one line for the user, or None.
    """

    text: str
    thinking: str
    tool_calls: tuple[ToolCall, ...]
    finish_reason: FinishReason
    seed: int
    timings: Timings
    problems: tuple[str, ...] = ()
    warning: str | None = None

    def __str__(self) -> str:
        return self.text

    @property
    def message(self) -> dict[str, Any]:
        """The answer as the next message of the conversation."""
        message: dict[str, Any] = {"role": "assistant", "content": self.text}
        if self.thinking:
            message["reasoning_content"] = self.thinking
        if self.tool_calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in self.tool_calls
            ]
        return message


class Gathered:
    """Collects the events of one answer, in their order."""

    def __init__(self) -> None:
        self._texts: dict[str, list[str]] = {"thinking": [], "text": [], "tool": []}
        self._finished: Finished | None = None
        self.tool_calls: list[ToolCall] = []

    def take(self, event: GenerateEvent) -> None:
        """Takes the next event; those of loading and of the prompt add nothing."""
        if isinstance(event, Delta):
            self._texts[event.kind].append(event.text)
        elif isinstance(event, ToolCall):
            self.tool_calls.append(event)
        elif isinstance(event, Finished):
            self._finished = event

    @property
    def text(self) -> str:
        """As far as it is written."""
        return "".join(self._texts["text"])

    @property
    def thinking(self) -> str:
        """As far as it is written."""
        return "".join(self._texts["thinking"])

    def answer(self) -> Answer:
        """The whole answer, after the last event."""
        end = self._finished
        assert end is not None
        return Answer(
            text=self.text,
            thinking=self.thinking,
            tool_calls=tuple(self.tool_calls),
            finish_reason=end.reason,
            seed=end.seed,
            timings=end.timings,
            problems=end.problems,
            warning=end.warning,
        )
