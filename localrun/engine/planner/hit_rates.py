"""Expert hit rates for a given resident share: seen in the model's last runs, from its profile, or from published measurements.

A rate is the share of (token, expert) requests in steady decode. Two curves bound real use: one topic for a long time, and
short unrelated prompts. Of a model that nobody has seen here, not even how unevenly it routes is known (its routers alone don't
say, docs/planner.md): a third curve bounds that. The same data gives the number of experts
that a prompt batch touches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from localrun.engine.planner.last_runs import Kind, last_hits
from localrun.offload.cache.profile import RoutingProfile, profile_path

PUBLISHED = (
    (0.0, 0.0), (0.03, 0.37), (0.06, 0.50), (0.094, 0.588), (0.125, 0.64), (0.156, 0.68), (0.25, 0.774), (0.30, 0.80), (0.40, 0.85),
    (0.50, 0.90), (1.0, 1.0),
)  # fmt: skip
"""Resident share -> hit rate of V4-Flash, decode of one topic, LRU. Measured by users of other engines at 9.4, 12.5, 15.6 and 25
% (Crow, issue 30, llama.cpp with expert streaming, coding prompt, 11,008 layer steps); 30 % agrees with DeepSeek-V4.1's published
trace; 3 and 6 % continue the first points along the logarithm of the share, 40 and 50 % the last ones, beyond that linearly to
100 %. No curve has been published for V4-Pro, so this one is used."""

TOPIC_CHANGES = 0.15
"""Deducted for short unrelated prompts: 10 to 20 points (SGLang's expert pack: 46 to 54 % where the curve says 68)."""

UNEVEN = 2.0
"""Exponent on the published curve's misses for weights that use their experts less evenly than those it was published for, or the
same ones for longer. [m] Whole Flash, random weights, a recorded run of 166 tokens in the engine's own slots: 21, 18 and 12 %
misses with 7.7, 9.4 and 15.8 % of the experts in memory, where the curve says 46, 41 and 32; V4.1-Flash (published, other
weights) 20 % with 19.5 %, where it says 28."""

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

    def best(self, share: float) -> float:
        """While the topic stays, if the model uses its experts as unevenly as can be expected."""
        ...

    def hottest(self, share: float) -> float:
        """Of a list that hardly changes, as on GPUs."""
        ...

    def use(self) -> npt.NDArray[np.float64]:
        """(n,) shares of all requests that equal parts of a layer's experts get, falling."""
        ...


@dataclass(frozen=True, slots=True)
class Curve:
    """Straight lines between points.

    Attributes:
        source: for people.
        uneven: exponent on the misses for `best`; above 1 for a model that the points may not describe.
    """

    points: Sequence[tuple[float, float]] = PUBLISHED
    source: str = "published curve"
    uneven: float = 1.0

    def steady(self, share: float) -> float:
        """See `HitRates`."""
        shares, rates = zip(*self.points, strict=True)
        return float(np.interp(share, shares, rates))

    def unsteady(self, share: float) -> float:
        """See `HitRates`. The loss shrinks with the non-resident share: at 100 % resident there is none."""
        rate = self.steady(share)
        return max(0.0, rate - TOPIC_CHANGES * min(1.0, (1 - rate) / 0.2))

    def best(self, share: float) -> float:
        """See `HitRates`."""
        return float(1 - (1 - self.steady(share)) ** self.uneven)

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

    def best(self, share: float) -> float:
        """See `HitRates`."""
        return self.steady(share)

    def use(self) -> npt.NDArray[np.float64]:
        """See `HitRates`."""
        return _use(self.hottest)


class Seen:
    """From the uses that a run has counted so far: the same experts at the same rates, through one cache for all layers.

    Tokens are taken to choose independently, so that their order says nothing. Then the counts alone say, without any assumption
    about how uneven the routing is, how many different experts t of these tokens use on average, and how likely one of t others
    has used what a token asks for: an expert used by c of n tokens is missed by t random ones with the chance
    C(n - c, t) / C(n, t). LRU holds what the last t tokens used, with t such that as many are as fit. What would hold more than
    all of these tokens used is read off the published curve, scaled to go through the last point. A list that never changes would
    hold the most used ones. The engine's slots go by how often an expert was used lately, so they are taken to hit what lies in the
    middle. Topics would add hits.

    Args:
        counts: tokens that used each of a layer's experts, by layer.
        n_used: experts of a layer that a token uses.
    """

    def __init__(self, counts: Sequence[npt.NDArray[np.float64]], n_used: int) -> None:
        self._counts = np.rint(np.concatenate(counts)).astype(np.int64)
        self._n_experts = self._counts.size
        n_tokens = max(2, round(max(float(layer.sum()) for layer in counts) / n_used))
        chances = [expected_counts(layer) * (n_used / max(1.0, float(layer.sum()))) for layer in counts]
        chance = np.minimum(np.sort(np.concatenate(chances))[::-1], 1.0)
        self._static = np.concatenate([[0.0], (chance / max(float(chance.sum()), 1e-300)).cumsum()])
        self._shares, self._hits = self._curve(n_tokens)
        self._beyond = Scaled(Curve(), float(self._shares[-1]), float(self._hits[-1]))
        self.source = f"the routing of this run, {n_tokens} tokens"

    def _curve(self, n: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """(k,) resident shares and hit rates at LRU windows of 0 to n - 1 tokens."""
        uses, n_experts = np.unique(np.minimum(self._counts[self._counts > 0], n), return_counts=True)
        windows = np.unique(np.rint(np.geomspace(1, n - 1, _POINTS)).astype(np.int64))
        shares, hits = [0.0], [0.0]
        for t in windows:
            shares.append(float((n_experts * (1 - _missed(uses, n, t))).sum()) / self._n_experts)
            asked = n_experts * uses
            # A layer's own visits lie a whole token apart: of t tokens, t - 1/2 on average have been there.
            missed = (_missed(uses - 1, n - 1, t) + _missed(uses - 1, n - 1, t - 1)) / 2
            hits.append(float((asked * (1 - missed)).sum() / max(1, asked.sum())))
        return np.array(shares), np.array(hits)

    def steady(self, share: float) -> float:
        """See `HitRates`."""
        recent = self._beyond.steady(share)
        if share <= self._shares[-1]:
            recent = float(np.interp(share, self._shares, self._hits))
        at = min(1.0, share) * self._n_experts
        return (recent + max(recent, float(np.interp(at, np.arange(self._static.size), self._static)))) / 2

    def unsteady(self, share: float) -> float:
        """See `HitRates`."""
        return self.steady(share)

    def best(self, share: float) -> float:
        """See `HitRates`."""
        return self.steady(share)

    def hottest(self, share: float) -> float:
        """See `HitRates`; no profile is used, so any experts are on GPUs."""
        return share

    def use(self) -> npt.NDArray[np.float64]:
        """See `HitRates`."""
        grid = np.linspace(0, 1, _GRID + 1) * self._n_experts
        return _use_of(np.interp(grid, np.arange(self._static.size), self._static))


_POINTS = 60


def _missed(uses: npt.NDArray[np.int64], n: int, t: int) -> npt.NDArray[np.float64]:
    """Chance that t of n tokens, drawn without replacement, are none of the `uses` (k,) that used an expert."""
    log_factorial = np.concatenate([[0.0], np.log(np.arange(1, n + 1)).cumsum()])
    left = np.maximum(n - uses, 0)
    rest = np.maximum(left - t, 0)
    ratio = log_factorial[left] - log_factorial[rest] - (log_factorial[n] - log_factorial[n - t])
    return np.where(left >= t, np.exp(ratio), 0.0)


class Scaled:
    """Other rates, changed to go through a point that was seen.

    A model that routes more evenly or less is taken to hit at a share of s what `rates` have at k s. [m] Whole Flash, random
    weights, 70 % hits with 8.3 % of the experts in memory and 83 % with 16.6 %: from the one, the published curve so stretched
    gives the other as 82 %. Stretched that way, a curve ends at 1/k, too early or never. So beyond the point, misses that are a
    power of those of `rates` bound it, which changes nothing where all is resident.

    Args:
        rates: for another model, or from another source.
        share, hits: the point.
        source: for people.
    """

    def __init__(self, rates: HitRates, share: float, hits: float, source: str = "") -> None:
        self._rates, self._share = rates, share
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if rates.steady(middle) < hits else (low, middle)
        self._stretch = high / share
        misses = math.log(_kept(1 - rates.steady(share)))
        self._power = math.log(_kept(1 - hits)) / misses
        self.source = source or rates.source

    def _scaled(self, curve: Callable[[float], float], share: float) -> float:
        stretched = curve(min(1.0, self._stretch * share))
        if share <= self._share:
            return stretched
        bound = float(1 - max(0.0, 1 - curve(share)) ** self._power)
        # What is asked for at random is in memory with a chance of `share`.
        return min(stretched, bound) if self._stretch >= 1 else max(stretched, bound, share)

    def steady(self, share: float) -> float:
        """See `HitRates`."""
        return self._scaled(self._rates.steady, share)

    def unsteady(self, share: float) -> float:
        """See `HitRates`."""
        return self._scaled(self._rates.unsteady, share)

    def best(self, share: float) -> float:
        """See `HitRates`."""
        return self.steady(share)

    def hottest(self, share: float) -> float:
        """See `HitRates`."""
        return self._rates.hottest(share)

    def use(self) -> npt.NDArray[np.float64]:
        """See `HitRates`."""
        return self._rates.use()


def _kept(misses: float) -> float:
    """Neither none nor all, for logarithms."""
    return min(0.999, max(1e-3, misses))


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

    def best(self, share: float) -> float:
        """See `HitRates`."""
        return self.rates.best(share)

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


def hit_rates(identity: str, shapes: dict[int, int], *, learned: bool = True) -> HitRates:
    """What the model's own routing has shown: hits of its last runs, else its profile if that is long enough; else the published
    curve.

    Args:
        identity: of the model; empty if there is none.
        shapes: experts by block number.
        learned: for answers; False: for a measurement, whose tokens are made up, and which uses no profile.
    """
    rates: HitRates = Curve(uneven=UNEVEN if identity else 1.0)
    if identity and profile_path(identity).is_file():
        profile = RoutingProfile.load(identity, shapes)
        if profile.clock >= MIN_PROFILE_TOKENS:
            rates = Learned(profile, list(shapes))
    if not learned:
        rates = Unlearned(rates)
    kinds: tuple[Kind, Kind] = ("answers", "measurements")
    for kind in (kinds if learned else reversed(kinds)) if identity else ():
        last = last_hits(identity, kind)
        if last is not None:
            source = f"{last.hits:.0%} with {last.share:.0%} of the experts in RAM in the last {kind}"
            return Scaled(rates, last.share, last.hits, source)
    return rates
