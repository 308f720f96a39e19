"""Constrains the next token: end tokens, the reasoning budget, and a grammar for what follows the reasoning.

A `Steering` belongs to one answer. Before sampling it masks forbidden tokens in the logits; afterwards it is given the sampled
token. Reasoning is unconstrained: a grammar applies after `</think>`, and until then the answer can't end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from localrun.errors import DecodeError, UsageError

_NEVER = np.float32(-np.inf)


class Steering:
    """Constraints on the tokens of one answer. Not thread-safe.

    Args:
        thinking: the prompt left the reasoning open.
        think_end: id of the token that ends the reasoning; None if the model has none.
        ends: ids that end an answer.
        banned: forbidden ids.
        free_of: ids forbidden in the reasoning, because they would start what the grammar covers.
        min_tokens: minimum length before an end token.
        think_budget: maximum tokens of reasoning.
        matcher: an `llguidance.LLMatcher` for what follows the reasoning.
    """

    def __init__(
        self,
        *,
        thinking: bool,
        think_end: int | None,
        ends: Sequence[int] = (),
        banned: Sequence[int] = (),
        free_of: Sequence[int] = (),
        min_tokens: int = 0,
        think_budget: int | None = None,
        matcher: Any = None,
    ) -> None:
        self._thinking = thinking and think_end is not None
        self._think_end = think_end
        self._ends = list(ends)
        self._banned = list(banned)
        self._in_thought = [*free_of, *(self._ends if matcher is not None else ())]
        self._min_tokens, self._think_budget = min_tokens, think_budget
        self._matcher = matcher
        self._n_tokens = 0

    def allow(self, logits: npt.NDArray[np.float32]) -> None:
        """Sets the logits (n_vocab,) of forbidden tokens to minus infinity, in place.

        Raises:
            DecodeError: the grammar has reached a dead end.
        """
        if self._thinking:
            if self._think_budget is not None and self._n_tokens >= self._think_budget:
                self._only(logits, self._think_end)
                return
            logits[self._in_thought] = _NEVER
        elif self._matcher is not None:
            self._follow_grammar(logits)
        logits[self._banned] = _NEVER
        if self._n_tokens < self._min_tokens and self._matcher is None:
            logits[self._ends] = _NEVER

    def accept(self, token: int) -> None:
        """Takes note of a sampled token.

        Raises:
            DecodeError: the grammar does not allow it.
        """
        self._n_tokens += 1
        if self._thinking:
            self._thinking = token != self._think_end
        elif self._matcher is not None and token not in self._ends and not self._matcher.consume_token(token):
            raise DecodeError(f"the grammar does not allow token {token}: {self._matcher.get_error()}")

    def _follow_grammar(self, logits: npt.NDArray[np.float32]) -> None:
        if self._matcher.is_stopped() and not self._matcher.is_error():  # nothing but the end can follow
            ends = logits[self._ends].copy()
            logits[:] = _NEVER
            logits[self._ends] = ends
            return
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise DecodeError(f"the answer's grammar failed: {self._matcher.get_error()}")
        allowed = np.unpackbits(bits, bitorder="little")[: len(logits)].view(np.bool_)
        if not allowed.any():
            raise DecodeError("nothing can follow in the answer's grammar", hint="simplify the schema")
        logits[: len(allowed)][~allowed] = _NEVER
        logits[len(allowed) :] = _NEVER

    def _only(self, logits: npt.NDArray[np.float32], token: int | None) -> None:
        assert token is not None
        logits[:] = _NEVER
        logits[token] = 0


def log_probabilities(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Logarithms of the softmax of logits (n_vocab,)."""
    shifted = logits - logits.max()
    result: npt.NDArray[np.float32] = shifted - np.log(np.exp(shifted, dtype=np.float64).sum()).astype(np.float32)
    return result


def most_likely(values: npt.NDArray[np.float32], n: int) -> list[int]:
    """The `n` ids of the largest values, largest first."""
    n = min(n, len(values))
    if n <= 0:
        return []
    some = np.argpartition(values, -n)[-n:]
    return [int(i) for i in some[np.argsort(-values[some], kind="stable")]]


def check_counts(**counts: int | None) -> None:
    """Raises UsageError, by name, for a negative number."""
    for name, value in counts.items():
        if value is not None and value < 0:
            raise UsageError(f"{name} is {value}, but must not be negative")
