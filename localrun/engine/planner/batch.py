"""Chooses how many tokens of a prompt are computed at once, where nobody has said.

A batch of hundreds of tokens uses nearly every expert, so what is not in memory is read once per batch: larger batches read less.
But llama.cpp's buffers grow with the batch, and experts lose that memory, which makes answers slower.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from localrun.errors import BudgetError
from localrun.units import format_size

BATCHES = (64, 128, 256, 512, 1024, 2048)
"""Candidates. 64: below that, memory hardly changes. 2048: the typical prompt is no longer, and only between batches is progress
shown and are states saved."""

PROMPT_TOKENS, ANSWER_TOKENS = 2048, 512
"""A typical question with its answer, whose time is compared."""

WORTH = 1.03
"""A larger batch must save so much of that time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """What a batch of `n_batch` tokens would give.

    Attributes:
        prompt_tokens_per_s, answer_tokens_per_s: likely rates.
        buffer_bytes: llama.cpp's.
    """

    n_batch: int
    prompt_tokens_per_s: float
    answer_tokens_per_s: float
    buffer_bytes: int

    @property
    def seconds(self) -> float:
        """Of the typical question and its answer."""
        return PROMPT_TOKENS / self.prompt_tokens_per_s + ANSWER_TOKENS / self.answer_tokens_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchChoice:
    """The planner's batch, and why it is this one."""

    n_batch: int
    reason: str


def choose_batch(n_ctx: int, predict: Callable[[int], Candidate]) -> BatchChoice:
    """The smallest batch with which the typical question takes hardly longer than with the best one.

    Args:
        n_ctx: tokens of context: no batch is longer.
        predict: plans a batch; raises BudgetError if it does not fit.

    Raises:
        BudgetError: none fits; of the smallest one.
    """
    possible, refusal = [], None
    for n_batch in [n for n in BATCHES if n <= n_ctx] or [n_ctx]:
        try:
            possible.append(predict(n_batch))
        except BudgetError as error:
            refusal = refusal or error
            break  # larger ones need more
    if not possible:
        assert refusal is not None
        raise refusal
    best_s = min(candidate.seconds for candidate in possible)
    chosen = next(candidate for candidate in possible if candidate.seconds <= WORTH * best_s)
    return BatchChoice(n_batch=chosen.n_batch, reason=_reason(chosen, possible, is_full=refusal is not None))


def _reason(chosen: Candidate, possible: Sequence[Candidate], *, is_full: bool) -> str:
    """Why neither a smaller nor a larger one."""
    at = possible.index(chosen)
    parts = []
    if at > 0:
        smaller = possible[at - 1]
        parts.append(
            f"prompts {chosen.prompt_tokens_per_s / smaller.prompt_tokens_per_s:.2f}x as fast as with {smaller.n_batch}, "
            f"for {format_size(chosen.buffer_bytes - smaller.buffer_bytes)} more"
        )
    if at + 1 < len(possible):
        parts.append(f"{possible[at + 1].n_batch} would gain little")
    elif is_full:
        parts.append("more do not fit")
    return "; ".join(parts)
