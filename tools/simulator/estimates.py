"""Replacement by estimates of how soon experts will be used: frequencies at several paces, and routers' scores.

The engine's own estimate (`localrun.offload.cache.demand`) is the sum of three frequencies. Scores need a trace that holds them:
they are turned into probabilities of being chosen, forgotten like frequencies, and added. Where a trace has none, the choices
take their place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from localrun.offload.cache.demand import HALF_LIVES
from localrun.offload.cache.slots import TAIL_TOKENS
from localrun.offload.cache.trace import TraceHeader
from tools.simulator.replay import Outcome
from tools.simulator.trace_file import TracedCall

F64 = npt.NDArray[np.float64]

SOFTNESS = 0.1
"""Scores so far above the best one that is not chosen are chosen with 73 %."""
_RECENCY = 1e-9


@dataclass(frozen=True, slots=True)
class Recipe:
    """An estimate.

    Attributes:
        half_lives: in tokens, of frequencies.
        score: half-life of probabilities by score; None: they don't count.
    """

    half_lives: Sequence[float] = ()
    score: float | None = None


RECIPES = {
    "frequency 8": Recipe((8.0,)),
    "frequency 32": Recipe((32.0,)),
    "frequency 256": Recipe((256.0,)),
    "frequencies": Recipe(HALF_LIVES),
    "score 1": Recipe(score=1.0),
    "score 32": Recipe(score=32.0),
    "frequencies + score 1": Recipe(HALF_LIVES, score=1.0),
    "frequencies + score 32": Recipe(HALF_LIVES, score=32.0),
}
"""By the name that options and reports use."""


def replay_estimated(
    calls: Sequence[TracedCall], header: TraceHeader, n_slots: int, recipe: Recipe, *, warm_up: int = 0
) -> Outcome:
    """As `replay.replay`, evicting the smallest estimate."""
    rows = {layer: row for row, layer in enumerate(sorted(header.layers))}
    first = next((call.layer for call in calls), -1)
    shape = len(rows), max(n for n, _ in header.layers.values())
    rates = np.zeros((len(recipe.half_lives) + (recipe.score is not None), *shape))
    half_lives = np.array([*recipe.half_lives, *([] if recipe.score is None else [recipe.score])])
    value, resident = np.full(shape, np.inf), np.zeros(shape, bool)
    stamp = np.zeros(shape)
    n_resident = hits = misses = n_tokens = 0
    for time, call in enumerate(calls):
        row, (n_experts, n_used) = rows[call.layer], header.layers[call.layer]
        used = np.unique(call.ids)
        tail = call.ids[-TAIL_TOKENS:]
        chosen = np.bincount(tail.ravel(), minlength=shape[1]) / len(tail)
        kept = (0.5 ** (len(tail) / half_lives))[:, None]
        seen = np.tile(chosen, (len(half_lives), 1))
        if recipe.score is not None and call.scores is not None:
            seen[-1, :n_experts] = probabilities(call.scores, n_used)
        rates[:, row] = rates[:, row] * kept + (1 - kept) * seen
        stamp[row, tail] = time
        estimates = rates[:, row].sum(0) + _RECENCY * stamp[row]
        value[row] = np.where(resident[row], estimates, np.inf)
        found = resident[row, used]
        if time >= warm_up:
            hits += int(found.sum())
            misses += int((~found).sum())
            n_tokens += len(call.ids) if call.layer == first else 0
        value[row, used] = np.inf  # protected while the call runs
        for expert in used[~found]:
            if n_resident >= n_slots:
                at = int(value.argmin())
                if not np.isfinite(value.flat[at]):  # all are this call's: those computed first make room
                    at = row * shape[1] + int(np.flatnonzero(resident[row])[0])
                value.flat[at], resident.flat[at] = np.inf, False
                n_resident -= 1
            resident[row, expert] = True
            n_resident += 1
        value[row] = np.where(resident[row], estimates, np.inf)
    return Outcome(hits, misses, n_tokens)


def probabilities(scores: npt.NDArray[np.float32], n_used: int) -> F64:
    """(E,) how probably each expert is chosen, in the mean of tokens with these scores (t, E)."""
    ordered = np.partition(scores.astype(np.float64), (-n_used - 1, -n_used), axis=-1)
    limit = ordered[:, [-n_used - 1]]
    chance = 1 / (1 + np.exp(-(scores - limit) / SOFTNESS))
    return np.asarray((chance * n_used / chance.sum(-1, keepdims=True)).mean(0), np.float64)
