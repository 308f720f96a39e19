"""Conversations as data and as DeepSeek-V4 prompt text."""

from __future__ import annotations

from dataclasses import dataclass, field

from tools.demo_model.tokenizer import ASSISTANT, BOS, END_THINK, EOS, THINK, USER


@dataclass(frozen=True)
class Turn:
    """One question and its answer; `thought` None means thinking is off."""

    question: str
    answer: str
    thought: str | None = None


@dataclass
class Dialogue:
    """Turns in order, with an optional system text."""

    turns: list[Turn] = field(default_factory=list)
    system: str = ""

    def segments(self) -> list[tuple[str, bool]]:
        """Prompt text in pieces, each marked whether the model is to produce it.

        As V4's encoder does, the reasoning of all turns but the last is dropped.
        """
        pieces = [(BOS + self.system, False)]
        for i, turn in enumerate(self.turns):
            thinks = turn.thought is not None and i == len(self.turns) - 1
            pieces.append((USER + turn.question + ASSISTANT + (THINK if thinks else END_THINK), False))
            reasoning = f"{turn.thought}{END_THINK}" if thinks else ""
            pieces.append((reasoning + turn.answer + EOS, True))
        return pieces

    def prompt(self) -> str:
        """Text up to where the last answer begins."""
        return "".join(text for text, _ in self.segments()[:-1])
