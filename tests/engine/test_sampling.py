"""The sampler chain, judged by what it draws."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest

from localrun.engine.engine import Engine
from localrun.engine.options import SamplingOptions
from localrun.engine.sampling import Sampler, check
from localrun.engine.session import Session
from localrun.errors import UsageError
from localrun.options import MAX_SEED

PROMPT = [3, 1, 4, 1, 5]
N_DRAWS = 400


@pytest.fixture(scope="module")
def session(engine: Engine) -> Session:
    session = engine.session()
    session.feed(PROMPT)
    return session


def probabilities(session: Session) -> np.ndarray:
    logits = session.logits.astype(np.float64)
    p = np.exp(logits - logits.max())
    return p / p.sum()


def draws(session: Session, options: SamplingOptions, n: int = N_DRAWS) -> list[int]:
    with Sampler(options) as sampler:
        return [session._step(sampler) for _ in range(n)]


def test_temperature_zero_takes_the_most_likely_token(session: Session) -> None:
    assert set(draws(session, SamplingOptions(temperature=0), 5)) == {int(session.logits.argmax())}


def test_same_seed_same_tokens_other_seed_other_tokens(session: Session) -> None:
    first = draws(session, SamplingOptions(seed=7))
    assert draws(session, SamplingOptions(seed=7)) == first
    assert draws(session, SamplingOptions(seed=8)) != first


def test_seed_is_drawn_and_reported_when_none_is_given(session: Session) -> None:
    with Sampler(SamplingOptions()) as drawn, Sampler(SamplingOptions()) as other:
        assert drawn.seed != other.seed
        tokens = [session._step(drawn) for _ in range(20)]
    assert draws(session, SamplingOptions(seed=drawn.seed), 20) == tokens


def test_plain_draws_follow_the_distribution(session: Session) -> None:
    p = probabilities(session)
    counts = Counter(draws(session, SamplingOptions(seed=1), 3000))
    likely = int(p.argmax())
    # Six standard deviations: fails for a wrong distribution, not by chance.
    assert abs(counts[likely] / 3000 - p[likely]) < 6 * np.sqrt(p[likely] / 3000)


def test_top_k_keeps_the_k_most_likely(session: Session) -> None:
    best = set(np.argsort(-session.logits)[:3].tolist())
    assert set(draws(session, SamplingOptions(top_k=3, seed=1))) == best


def test_top_p_keeps_the_smallest_sufficient_set(session: Session) -> None:
    p = probabilities(session)
    order = np.argsort(-p)
    keep = int(np.searchsorted(np.cumsum(p[order]), 0.3)) + 1
    assert set(draws(session, SamplingOptions(top_p=0.3, seed=1))) <= set(order[:keep].tolist())


def test_min_p_drops_unlikely_tokens(session: Session) -> None:
    p = probabilities(session)
    allowed = set(np.flatnonzero(p >= 0.5 * p.max()).tolist())
    assert set(draws(session, SamplingOptions(min_p=0.5, seed=1))) <= allowed


def test_low_temperature_prefers_likely_tokens(session: Session) -> None:
    likely = int(session.logits.argmax())
    cold = Counter(draws(session, SamplingOptions(temperature=0.2, seed=1)))[likely]
    warm = Counter(draws(session, SamplingOptions(temperature=1.0, seed=1)))[likely]
    assert cold > warm


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 1.5),
        ("min_p", -1.0),
        ("top_k", -1),
        ("seed", -1),
        ("seed", MAX_SEED + 1),
    ],
)
def test_values_without_meaning_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=name):
        check(dataclasses.replace(SamplingOptions(), **{name: value}))
