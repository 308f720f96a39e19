"""How often an expert is found in fast memory when a given share of them fits there: published, or from the user's own profile.

A rate here is the share of (token, expert) requests of steady decode. Two curves bound what a user meets: one topic for a long
time, and short unrelated prompts. The same knowledge says how many experts a batch of a prompt touches.
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
DeepSeek-V4.1's published trace; 40 and 50 % are extrapolated, and above that a straight line to everything. There is no published
curve of V4-Pro: this one is used."""

TOPIC_CHANGES = 0.15
"""Taken off for short unrelated prompts: 10 to 20 points (SGLang's expert pack: 46 to 54 % where the curve says 68)."""

LRU_GAIN = 0.41
"""Part of a static list's misses that LRU hits: 41, 43, 43, 42 and 41 % at 20, 26, 29, 33 and 39 % resident in the published trace
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
        """See `HitRates`. The loss shrinks with what does not fit: at 100 % there is none."""
        rate = self.steady(share)
        return max(0.0, rate - TOPIC_CHANGES * min(1.0, (1 - rate) / 0.2))

    def hottest(self, share: float) -> float:
        """See `HitRates`; `LRU_GAIN` taken back. Never less than chance."""
        return max(share, 1 - (1 - self.steady(share)) / (1 - LRU_GAIN))

    def use(self) -> npt.NDArray[np.float64]:
        """See `HitRates`."""
        return _use(self.hottest)


class Learned:
    """From the routing profile of the user's own model.

    The hottest experts, kept for ever, would hit `hottest(share)`: that is what is left when topics change, for a long profile has
    seen many. LRU adds what is recent. A short profile knows how unevenly this model routes, not how topics change: it is no
    promise above the published curve for those.
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


def expected_counts(counts: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """(n,) uses of a layer's experts, as far as they say something about the next uses; the same sum.

    A few uses per expert are uneven by chance alone. The experts' true shares are taken as drawn from a symmetric Dirichlet
    distribution, whose concentration follows from how much more the counts vary than chance would have it; what is expected then
    lies between the counts and all alike.
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
    """Of a layer's experts, in one batch, as shares.

    Attributes:
        distinct: that the batch uses.
        missing: of these, not in memory when the most used ones are there.
    """

    distinct: float
    missing: float


def touched(rates: HitRates | None, share: float, n_tokens: int, n_used: int, n_experts: int) -> Touched:
    """Experts that a batch uses, its tokens choosing independently.

    Args:
        rates: None: all experts alike.
        share: resident.
    """
    use = np.full(_GRID, 1 / _GRID) if rates is None else rates.use()
    chance = np.minimum(1.0, n_used * use * (use.size / n_experts))
    used = 1 - (1 - chance) ** n_tokens
    absent = np.clip(np.arange(1, use.size + 1) - share * use.size, 0.0, 1.0)
    return Touched(float(used.mean()), float((used * absent).mean()))


def _use(hits: Callable[[float], float]) -> npt.NDArray[np.float64]:
    """Differences of a curve, in falling order: a curve that was put together from measurements need not bend one way only."""
    return np.sort(np.diff([hits(at) for at in np.linspace(0, 1, _GRID + 1)]))[::-1]


MIN_PROFILE_TOKENS = 100
"""2.3 uses of each of Flash's experts, enough for how uneven they are (`expected_counts`)."""

TOPICS_TOKENS = 2000
"""A shorter profile says more about one conversation's words than about a user."""


def hit_rates(identity: str, shapes: dict[int, int]) -> HitRates:
    """The user's own where enough is known, else the published curve.

    Args:
        identity: of the model; empty for one that is not there.
        shapes: experts by block number.
    """
    if identity and profile_path(identity).is_file():
        profile = RoutingProfile.load(identity, shapes)
        if profile.clock >= MIN_PROFILE_TOKENS:
            return Learned(profile, list(shapes))
    return Curve()
