"""An answer in progress: accumulates the engine's events in the order the model wrote them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from localrun.engine.facts import Timings
from localrun.engine.process.process import GenerateEvent
from localrun.engine.process.protocol import (
    Delta,
    Finished,
    PromptProgress,
    TokenLogprob,
    ToolCall,
    ToolCallBegun,
)

Finish = Literal["stop", "length", "tool_calls"]


@dataclass(slots=True)
class Block:
    """A block of one kind: reasoning, text, or one tool call.

    Attributes:
        text: for a tool call, its arguments as JSON, complete once `ended`.
        call_id, name: of a tool call.
    """

    kind: Literal["thinking", "text", "tool"]
    text: str = ""
    call_id: str = ""
    name: str = ""
    ended: bool = False


@dataclass(slots=True)
class Choice:
    """One choice. `add` takes the engine's events in their order.

    Attributes:
        prompt: progress of the prompt.
        n_thinking: tokens of reasoning.
    """

    blocks: list[Block] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt: PromptProgress | None = None
    finished: Finished | None = None
    n_thinking: int = 0
    n_tokens: int = 0

    def add(self, event: GenerateEvent) -> None:
        match event:
            case PromptProgress():
                self.prompt = event
            case Delta(kind="tool"):
                if self.blocks and self.blocks[-1].kind == "tool" and not self.blocks[-1].ended:
                    self.blocks[-1].text += event.text
                self.n_tokens += len(event.tokens)
            case Delta(kind="thinking" | "text" as kind):
                if event.text:
                    self._run_of(kind).text += event.text
                if kind == "thinking":
                    self.n_thinking += len(event.tokens)
                else:
                    self.logprobs += event.logprobs
                self.n_tokens += len(event.tokens)
            case ToolCallBegun():
                self._end_run()
                self.blocks.append(Block("tool", call_id=event.id, name=event.name))
            case ToolCall():
                self._end_call(event)
                self.n_tokens += len(event.tokens)
            case Finished():
                self.finished = event
                self._end_run()

    def _run_of(self, kind: Literal["thinking", "text"]) -> Block:
        if not self.blocks or self.blocks[-1].kind != kind or self.blocks[-1].ended:
            self._end_run()
            self.blocks.append(Block(kind))
        return self.blocks[-1]

    def _end_run(self) -> None:
        if self.blocks:
            self.blocks[-1].ended = True

    def _end_call(self, event: ToolCall) -> None:
        if not event.name:
            return  # nothing that a client could do with it
        block = next((p for p in reversed(self.blocks) if p.kind == "tool" and p.call_id == event.id), None)
        if block is None:
            block = Block("tool", call_id=event.id, name=event.name)
            self.blocks.append(block)
        block.text, block.ended = event.arguments, True

    # --- sums

    def joined(self, kind: Literal["thinking", "text"]) -> str:
        return "".join(block.text for block in self.blocks if block.kind == kind)

    @property
    def calls(self) -> Sequence[Block]:
        return [block for block in self.blocks if block.kind == "tool"]

    @property
    def finish(self) -> Finish:
        """OpenAI's finish reason; `stop` if there is none yet."""
        reason = self.finished.reason if self.finished else "eos"
        if reason in ("length", "context"):
            return "length"
        return "tool_calls" if self.calls else "stop"

    @property
    def timings(self) -> Timings:
        return self.finished.timings if self.finished else Timings()


def total_usage(answers: Sequence[Choice]) -> tuple[int, int, int, int]:
    """(prompt tokens, of those read from a saved state, answer tokens, of those reasoning) of all choices; the prompt counts
    once, as it was for the first."""
    first = answers[0].timings
    n_new = sum(answer.timings.new_tokens for answer in answers)
    return first.prompt_tokens, first.reused_tokens, n_new, sum(answer.n_thinking for answer in answers)
