"""Two arithmetics against a reference: statistics of pairs, with an interval.

Rounding moves a tiny random model's answer a little at most positions and wildly at a few, where two experts of the router or two
rows of the indexer are nearly tied: a divergence of 1.3 nats stands among 0.002. A mean over 200 positions is decided by two or
three of those, and which they are depends on the order of sums, that is on the processor. Nor are positions of one text
independent: one tie early on changes what all later ones attend to. [m] On the fixture pro-1 llama.cpp with batches of 50 tokens
has 1.08 of its own median with batches of 200, and 1.38 of its mean without the worst tenth.

So divergences at the same positions of the same texts, (texts, positions), are compared by statistics that ties don't decide, and
the interval comes from drawing texts, and positions within them, again and again (bootstrap of clusters).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]

_DRAWS: Final = 1500
_CHANCE: Final = 0.002
"""Both tails of an interval: a suite has dozens of comparisons, on every processor, and none may fail by chance."""

_NOTHING: Final = 1e-9
"""Nats: less is rounding of the logits themselves."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """Of a statistic, ours to theirs, and between what bounds chance leaves it."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Ours to theirs, below 1 where ours is nearer to the reference.

    Attributes:
        median: of the medians over all positions.
        trimmed: of the means without the worst tenth of each.
        pairs: the median of the ratios at each position.
    """

    median: Ratio
    trimmed: Ratio
    pairs: Ratio

    @property
    def is_worse(self) -> bool:
        """Ours is further from the reference by some statistic, and that is not chance."""
        return any(ratio.low > 1 for ratio in (self.median, self.trimmed, self.pairs))

    @property
    def is_better(self) -> bool:
        """Ours is nearer to the reference, and that is not chance."""
        return self.median.high < 1 and self.pairs.high < 1


def compare(ours: npt.ArrayLike, theirs: npt.ArrayLike, *, seed: int = 0) -> Comparison:
    """Compares divergences from one reference.

    Args:
        ours, theirs: (n_texts, n_positions), the same positions of the same texts. Several texts (or models) are needed for an
            interval that means something.
    """
    a, b = (np.maximum(np.asarray(values, np.float64), _NOTHING) for values in (ours, theirs))
    assert a.shape == b.shape
    assert a.ndim == 2
    n_texts, n_positions = a.shape
    rows = np.stack([a.ravel(), b.ravel(), np.log(a / b).ravel()])
    rng, draws = np.random.default_rng(seed), []
    for _ in range(_DRAWS):
        texts = rng.integers(0, n_texts, (n_texts, 1))
        positions = rng.integers(0, n_positions, (n_texts, n_positions))
        draws.append(_statistics(rows.take((texts * n_positions + positions).ravel(), axis=1)))
    low, high = np.quantile(draws, (_CHANCE / 2, 1 - _CHANCE / 2), axis=0)
    median, trimmed, pairs = map(Ratio, _statistics(rows), low.tolist(), high.tolist())
    return Comparison(median, trimmed, pairs)


def _statistics(rows: F64) -> list[float]:
    """Of (3, n): ours, theirs, logarithms of their ratios. Sorted once: thousands of `np.median` took half of such a test."""
    rows = np.sort(rows, axis=1)
    n, kept = rows.shape[1], _kept(rows.shape[1])
    medians = (rows[:, (n - 1) // 2] + rows[:, n // 2]) / 2
    means = rows[:2, :kept].mean(axis=1)
    return [float(medians[0] / medians[1]), float(means[0] / means[1]), float(np.exp(medians[2]))]


def median(values: npt.ArrayLike) -> float:
    return float(np.median(np.asarray(values)))


def trimmed_mean(values: npt.ArrayLike) -> float:
    """Mean without the largest tenth."""
    flat = np.asarray(values, np.float64).ravel()
    kept = _kept(flat.size)
    return float(np.partition(flat, kept - 1)[:kept].mean())


def _kept(n: int) -> int:
    return max(1, int(n * 0.9))


def same_but_for_rounding(found: npt.ArrayLike, noise: npt.ArrayLike) -> bool:
    """True if divergences are like those that rounding alone has: for tests of wiring, where one text is enough.

    A wrong expert or matrix gives ten times as much at most positions; chance gives a single text a third more.
    """
    return median(found) <= 2 * median(noise) + 1e-7 and trimmed_mean(found) <= 3 * trimmed_mean(noise) + 1e-6
