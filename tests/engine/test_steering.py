"""What may come next: end tokens, bans, budgets."""

from __future__ import annotations

import numpy as np
import pytest

from localrun.engine.steering import Steering, check_counts, log_probabilities, most_likely
from localrun.errors import UsageError

END, THINK_END, CALL = 1, 2, 3
N_VOCAB = 8


def allowed(steering: Steering) -> set[int]:
    logits = np.zeros(N_VOCAB, np.float32)
    steering.allow(logits)
    return {int(i) for i in np.flatnonzero(np.isfinite(logits))}


def test_no_end_before_so_many_tokens() -> None:
    steering = Steering(thinking=False, think_end=THINK_END, ends=[END], min_tokens=2)
    for _ in range(2):
        assert END not in allowed(steering)
        steering.accept(5)
    assert allowed(steering) == set(range(N_VOCAB))


def test_banned_tokens_never_come() -> None:
    steering = Steering(thinking=True, think_end=THINK_END, ends=[END], banned=[CALL])
    assert CALL not in allowed(steering)
    steering.accept(THINK_END)
    assert CALL not in allowed(steering)


def test_reasoning_ends_when_its_budget_is_spent() -> None:
    steering = Steering(thinking=True, think_end=THINK_END, think_budget=2)
    steering.accept(5)
    assert len(allowed(steering)) == N_VOCAB
    steering.accept(5)
    assert allowed(steering) == {THINK_END}
    steering.accept(THINK_END)
    assert len(allowed(steering)) == N_VOCAB


def test_log_probabilities_add_up_to_one_and_are_sorted() -> None:
    logits = np.random.default_rng(0).standard_normal(1000).astype(np.float32) * 5
    logs = log_probabilities(logits)
    assert np.exp(logs.astype(np.float64)).sum() == pytest.approx(1, abs=1e-5)
    assert most_likely(logs, 3) == [int(i) for i in np.argsort(-logits)[:3]]
    assert most_likely(logs, 0) == []
    assert len(most_likely(logs, 5000)) == 1000


def test_negative_counts_are_refused_by_name() -> None:
    with pytest.raises(UsageError, match="min_tokens"):
        check_counts(min_tokens=-1)
    check_counts(min_tokens=None, other=0)
