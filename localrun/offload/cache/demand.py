"""How soon each expert will probably be used again: what eviction goes by.

The estimate is a sum of frequencies, each forgotten at its own pace: over a few tokens, which is recency, over the last
sentences, and over the whole answer. `docs/benchmarks.md` ("Cache policies") compares it with recency alone, with a single
frequency, with routers' scores and with the bound.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from localrun.kernel_cache import cached_jit

I64 = npt.NDArray[np.int64]

HALF_LIVES: Final = (4.0, 32.0, 256.0)
"""In tokens, equally weighted. [m] Demo model, 25 % resident, conversations and a story: 0.331 and 0.560; halved: 0.330 and 0.547;
without the longest: 0.329 and 0.550; recency alone: 0.310 and 0.471."""

SHIFT: Final = 36
"""Bits of an eviction order's word below the estimate, for recency."""
_UNIT: Final = 1 << 20
"""The estimate of an expert that every token uses is so many times the number of half-lives."""


class Demand:
    """Estimates for one slot table. For whoever may change the table; compiled code adds to `uses` meanwhile.

    A layer that the running batch has passed is judged with this batch's uses, one that is still to come without: its experts are
    needed sooner.

    Attributes:
        values: (n_layers, n_experts) estimates shifted by `SHIFT`, without what the running batch has used.

    Args:
        uses: (n_layers, n_experts) (token, expert) pairs served.
    """

    def __init__(self, uses: I64) -> None:
        self._uses = uses
        self._seen = uses.copy()
        self._rates = np.zeros((len(HALF_LIVES), *uses.shape))  # uses per token
        self._n_tokens = 1
        self._coming = np.zeros_like(uses)
        self._passed = np.zeros_like(uses)
        self._n_passed = 0
        self.values = np.zeros_like(uses)
        self._order = np.zeros_like(uses)
        self._lowered = np.ones(len(uses), np.uint8)  # layers whose smallest order is not known
        self._smallest, self._where = np.zeros(len(uses), np.int64), np.zeros(len(uses), np.int64)
        self._use = 0
        self._prepare()

    def advance(self, n_tokens: int) -> None:
        """A batch of so many tokens begins: learns from the one before."""
        fresh = self._uses - self._seen
        self._seen += fresh
        np.minimum(fresh, self._n_tokens, out=fresh)  # a batch that nobody began
        for rates, kept in zip(self._rates, self._kept(), strict=True):
            rates *= kept
            rates += (1 - kept) / self._n_tokens * fresh
        self._n_tokens = max(1, n_tokens)
        self._prepare()

    def _kept(self) -> list[float]:
        return [float(0.5 ** (self._n_tokens / half_life)) for half_life in HALF_LIVES]

    def _prepare(self) -> None:
        kept = self._kept()
        self._coming = _word(self._rates.sum(0))
        self._passed = _word(np.tensordot(kept, self._rates, 1))
        self._use = int(_UNIT * sum(1 - k for k in kept) / self._n_tokens) << SHIFT
        self.values[:] = self._coming
        self._n_passed = 0
        self._lowered[:] = 1

    @property
    def layer(self) -> int:
        """The last one that an order was asked for."""
        return self._n_passed

    def _pass(self, layer: int) -> None:
        """`layer` is computed from now on."""
        if layer != self._n_passed:
            self._lowered[min(layer, self._n_passed) : max(layer, self._n_passed)] = 1
            self._n_passed = layer
            self.values[:layer] = self._passed[:layer]
            self.values[layer:] = self._coming[layer:]

    def lower(self, layer: int) -> None:
        """To be told before the next `first`: a word of `others` has become smaller in this layer."""
        self._lowered[layer] = 1

    def lower_all(self) -> None:
        """The same for all layers."""
        self._lowered[:] = 1

    def first(self, layer: int, *others: I64) -> tuple[int, int]:
        """Flat index and value of the smallest word of `order`, the first of equal ones, at a tenth of its cost: layers in which no
        word has become smaller since are not looked at again, but for the one that has the smallest."""
        self._pass(layer)
        at, least = _find_first(
            self.values,
            self._uses,
            self._seen,
            self._n_tokens,
            self._use,
            others,
            self._lowered,
            self._smallest,
            self._where,
        )
        return int(at), int(least)

    def order(self, layer: int, *others: I64) -> I64:
        """(n_layers, n_experts) estimates for while `layer` is computed; the smaller, the sooner to go. Valid until the next call.

        Args:
            others: added to them.
        """
        self._pass(layer)
        _add_uses(self.values, self._uses, self._seen, self._n_tokens, self._use, self._order)
        for other in others:
            self._order += other
        return self._order


@cached_jit(nogil=True)
def _add_uses(values: I64, uses: I64, seen: I64, most: int, use: int, out: I64) -> None:
    """out = values + min(uses - seen, most) * use."""
    for layer in range(values.shape[0]):
        for e in range(values.shape[1]):
            out[layer, e] = values[layer, e] + min(uses[layer, e] - seen[layer, e], most) * use


@cached_jit(nogil=True)
def _find_first(
    values: I64,
    uses: I64,
    seen: I64,
    most: int,
    use: int,
    others: tuple[I64, ...],
    lowered: npt.NDArray[np.uint8],
    smallest: I64,
    where: I64,
) -> tuple[int, int]:
    """See `Demand.first`. Known smallest words may have grown since, so the layer that is chosen is looked at again."""
    n_layers, n_experts = values.shape
    row = np.empty(n_experts, np.int64)
    best: Any = -1
    while True:
        for layer in range(n_layers):
            if lowered[layer] != 0 or layer == best:
                for e in range(n_experts):
                    row[e] = values[layer, e] + min(uses[layer, e] - seen[layer, e], most) * use
                for other in others:
                    for e in range(n_experts):
                        row[e] += other[layer, e]
                where[layer] = row.argmin()
                smallest[layer], lowered[layer] = row[where[layer]], 0
        chosen: Any = smallest.argmin()
        if chosen == best:
            return chosen * n_experts + where[chosen], smallest[chosen]
        best = chosen


def _word(rates: npt.NDArray[np.float64]) -> I64:
    return (rates * _UNIT).astype(np.int64) << SHIFT
