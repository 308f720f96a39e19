"""Expert hit rates for a given resident share: from published measurements, or from the user's own profile.

A rate is the share of (token, expert) requests in steady decode. Two curves bound real use: one topic for a long time, and
short unrelated prompts. The same data gives the number of experts that a prompt batch touches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from localrun.offload.cache.profile import RoutingProfile, profile_path

PUBLISHED = ((0.0, 0.0), (0.10, 0.58), (0.15, 0.68), (0.25, 0.77), (0.30, 0.80), (0.40, 0.85), (0.50, 0.90), (1.0, 1.0))
"""Resident share -> hit rate of V4-Flash, decode of one topic, LRU. Measured by users of other engines at 9.4, 12.5, 15.6 and 25 %
(58.8, 64.0, 68.0 and 77.4 %: Crow, issue 30, llama.cpp with expert streaming, coding prompt, 11,008 layer steps); 30 % agrees with
DeepSeek-V4.1's published trace; 40 and 50 % are extrapolated, beyond that linearly to 100 %. No curve has been published for
V4-Pro, so this one is used."""

TOPIC_CHANGES = 0.15
"""Deducted for short unrelated prompts: 10 to 20 points (SGLang's expert pack: 46 to 54 % where the curve says 68)."""

LRU_GAIN = 0.41
"""Share of a static list's misses that LRU hits: 41, 43, 43, 42 and 41 % at 20, 26, 29, 33 and 39 % resident in the published trace
of V4.1-Flash (0.670 -> 0.805, 0.748 -> 0.855, 0.780 -> 0.875, 0.810 -> 0.891, 0.859 -> 0.917)."""

_GRID = 256


class HitRates(Protocol):
    """Hit rate by resident share, rising."""

    @property
    def source(self) -> str:
        """For people."""
        ...

    def steady(self, share: float) -> float:
        """While the topic stays."""
        ...

    def unsteady(self, share: float) -> float:
        """When topics change."""
        ...

    def hottest(self, share: float) -> float:
        """Of a list that hardly changes, as on GPUs."""
        ...

    def use(self) -> npt.NDArray[np.float64]:
        """(n,) shares of all requests that equal parts of a layer's experts get, falling."""
        ...


@dataclass(frozen=True, slots=True)
class Curve:
    """Straight lines between points."""

    points: Sequence[tuple[float, float]] = PUBLISHED
    source: str = "published curve"

    def steady(self, share: float) -> float:
        """See `HitRates`."""
        shares, rates = zip(*self.points, strict=True)
        return float(np.interp(share, shares, rates))

    def unsteady(self, share: float) -> float:
        """See `HitRates`. The loss shrinks with the non-resident share: at 100 % resident there is none."""
        rate = self.steady(share)
        return max(0.0, rate - TOPIC_CHANGES * min(1.0, (1 - rate) / 0.2))

    def hottest(self, share: float) -> float:
        """See `HitRates`; `LRU_GAIN` taken back. Never less than chance."""
        return max(share, 1 - (1 - self.steady(share)) / (1 - LRU_GAIN))

    def use(self) -> npt.NDArray[np.float64]:
        """See `HitRates`."""
        return _use(self.hottest)


class Learned:
    """From the model's own routing profile.

    Keeping the hottest experts permanently would hit `hottest(share)`, which remains valid when topics change, because a long
    profile has seen many. LRU adds recency. A short profile shows how unevenly the model routes, but not how topics change, so
    for changing topics it is capped at the published curve.
    """

    def __init__(self, profile: RoutingProfile, layers: Sequence[int]) -> None:
        counts = np.concatenate([expected_counts(profile.counts(layer)) for layer in layers])
        uses = np.sort(counts)[::-1].cumsum()
        self._topics: HitRates | None = None if profile.clock >= TOPICS_TOKENS else Curve()
        self._static = np.concatenate([[0.0], uses / max(uses[-1], 1e-300)])
        self.source = f"your own use, {profile.clock} tokens"

    def unsteady(self, share: float) -> float:
        """See `HitRates`."""
        static = self.hottest(share)
        return static if self._topics is None else min(static, self._topics.unsteady(share))

    def hottest(self, share: float) -> float:
        """See `HitRates`."""
        at = min(max(share, 0.0), 1.0) * (self._static.size - 1)
        return float(np.interp(at, np.arange(self._static.size), self._static))

    def steady(self, share: float) -> float:
        """See `HitRates`."""
        static = self.hottest(share)
        return static + LRU_GAIN * (1 - static) * min(1.0, share / 0.05)

    def use(self) -> npt.NDArray[np.float64]:
        """See `HitRates`."""
        return _use(self.hottest)


class Seen:
    """From the uses that a run has counted so far: the same experts at the same rates, through one LRU for all layers.

    Tokens are taken to choose independently, so that LRU's hits follow from the rates alone (Che, Tung and Wang 2002): an
    expert is in memory if one of the last t tokens used it, with t such that as many are as fit. Topics would add hits.

    Args:
        counts: uses of each layer's experts.
        n_used: experts of a layer that a token uses.
    """

    def __init__(self, counts: Sequence[npt.NDArray[np.float64]], n_used: int) -> None:
        chances = [expected_counts(layer) * (n_used / max(1.0, float(layer.sum()))) for layer in counts]
        self._chances = np.minimum(np.sort(np.concatenate(chances))[::-1], 1.0)
        shares = self._chances / max(float(self._chances.sum()), 1e-300)
        self._static = np.concatenate([[0.0], shares.cumsum()])
        self.source = f"the routing of this run, {round(float(sum(layer.sum() for layer in counts)))} uses"

    def steady(self, share: float) -> float:
        """See `HitRates`."""
        chances, n_fit = self._chances, min(max(share, 0.0), 1.0) * self._chances.size
        if n_fit >= np.count_nonzero(chances):
            return 1.0
        low, high = 0.0, 1.0
        while (1 - (1 - chances) ** high).sum() < n_fit:
            high *= 2
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if (1 - (1 - chances) ** middle).sum() < n_fit else (low, middle)
        # A layer's own visits lie a whole token apart: of t tokens, t - 1/2 on average have been there.
        return float((chances * (1 - (1 - chances) ** max(0.0, high - 0.5))).sum() / chances.sum())

    def unsteady(self, share: float) -> float:
        """See `HitRates`."""
        return self.steady(share)

    def hottest(self, share: float) -> float:
        """See `HitRates`; no profile is used, so any experts are on GPUs."""
        return share

    def use(self) -> npt.NDArray[np.float64]:
        """See `HitRates`."""
        grid = np.linspace(0, 1, _GRID + 1) * self._chances.size
        return _use_of(np.interp(grid, np.arange(self._static.size), self._static))


def expected_counts(counts: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """(n,) expected uses of a layer's experts, with the same sum.

    A few uses per expert are uneven by chance alone. The experts' true shares are modelled as drawn from a symmetric Dirichlet
    distribution, whose concentration is estimated from the counts' excess variance; the expectation then lies between the
    counts and a uniform distribution.
    """
    n, total = counts.size, float(counts.sum())
    if n < 2 or total <= 0:
        return counts
    by_chance = total * (1 / n) * (1 - 1 / n)
    ratio = float(counts.var()) / by_chance  # of a Dirichlet-multinomial: (total + a) / (1 + a)
    if ratio <= 1:
        return np.full(n, total / n)
    a = max(0.0, (total - ratio) / (ratio - 1))
    return (counts + a / n) * (total / (total + a))


@dataclass(frozen=True, slots=True)
class Unlearned:
    """`rates` of a measurement: its tokens are made up and have no topic, and as no profile is used, any experts are on GPUs."""

    rates: HitRates

    @property
    def source(self) -> str:
        """See `HitRates`."""
        return self.rates.source

    def steady(self, share: float) -> float:
        """See `HitRates`."""
        return self.rates.unsteady(share)

    def unsteady(self, share: float) -> float:
        """See `HitRates`."""
        return self.rates.unsteady(share)

    def hottest(self, share: float) -> float:
        """See `HitRates`."""
        return share

    def use(self) -> npt.NDArray[np.float64]:
        """See `HitRates`."""
        return self.rates.use()


@dataclass(frozen=True, slots=True)
class Touched:
    """Shares of a layer's experts in one batch.

    Attributes:
        distinct: used by the batch.
        missing: of these, not in memory when the most used ones are.
    """

    distinct: float
    missing: float


def touched(rates: HitRates | None, share: float, n_tokens: int, n_used: int, n_experts: int) -> Touched:
    """Experts that a batch uses if its tokens choose independently.

    Args:
        rates: None: uniform use.
        share: resident share.
    """
    use = np.full(_GRID, 1 / _GRID) if rates is None else rates.use()
    chance = np.minimum(1.0, n_used * use * (use.size / n_experts))
    used = 1 - (1 - chance) ** n_tokens
    absent = np.clip(np.arange(1, use.size + 1) - share * use.size, 0.0, 1.0)
    return Touched(float(used.mean()), float((used * absent).mean()))


def _use(hits: Callable[[float], float]) -> npt.NDArray[np.float64]:
    """Differences of a curve, in falling order: a curve that was put together from measurements need not bend one way only."""
    return _use_of(np.array([hits(at) for at in np.linspace(0, 1, _GRID + 1)]))


def _use_of(hits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.sort(np.diff(hits))[::-1]


MIN_PROFILE_TOKENS = 100
"""2.3 uses of each of Flash's experts, enough to estimate their unevenness (`expected_counts`)."""

TOPICS_TOKENS = 2000
"""A shorter profile reflects one conversation rather than a user."""


def hit_rates(identity: str, shapes: dict[int, int]) -> HitRates:
    """The user's own rates if the profile is long enough, else the published curve.

    Args:
        identity: of the model; empty if there is none.
        shapes: experts by block number.
    """
    if identity and profile_path(identity).is_file():
        profile = RoutingProfile.load(identity, shapes)
        if profile.clock >= MIN_PROFILE_TOKENS:
            return Learned(profile, list(shapes))
    return Curve()
