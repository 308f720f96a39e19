"""Routing of synthetic models: how skewed, and how that is calibrated.

Published for Flash in steady decode (one LRU cache per layer, coding prompt, 11,008 layer-steps): 24, 32, 40 and 64 of 256
slots give 58.8, 64.0, 68.0 and 77.4 % hits. A router of random weights on independent hidden states would give little more
than the cached share, so two things are added, both of which real models have:

* popularity: the router's bias falls with the logarithm of an expert's rank (Zipf-like), ranks shuffled per layer;
* locality: a part of the hidden state changes slowly, because attention averages over a window (`synthetic_weights` makes
  attention outputs as large as embeddings).

`simulate_hit_rate` plays this with numpy: logits of unit variance, `slow_share` of it an AR(1) process. With a slow share of
0.5 over 30 tokens and the skew that gives 77.4 % at 64 slots it yields 55, 63, 68 and 77 %, close to the published curve;
popularity alone gives 50, 58, 65 and 77 %.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

TARGET_HIT_RATE = 0.774
CACHE_SHARE = 0.25
SLOW_SHARE = 0.5
SLOW_TOKENS = 30.0
_STEPS = 1500
_WARM_UP = 300


def popularity(n_experts: int) -> npt.NDArray[np.float64]:
    """Bias by popularity rank: zero mean, unit standard deviation, falling as -log(rank)."""
    curve: npt.NDArray[np.float64] = -np.log(np.arange(1, n_experts + 1, dtype=np.float64))
    curve -= curve.mean()
    curve /= float(curve.std()) or 1.0
    return curve


def router_bias(skew: float, n_experts: int, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """`ffn.gate.bias` of one layer."""
    return (skew * rng.permutation(popularity(n_experts))).astype(np.float32)


def hash_table(skew: float, vocab: int, n_experts: int, n_used: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """`ffn.gate.tid2eid` of one layer: distinct experts per token, drawn with probability rank**-skew."""
    log_weight = rng.permutation(-skew * np.log(np.arange(1, n_experts + 1)))
    table = np.empty((vocab, n_used), dtype=np.int64)
    for start in range(0, vocab, 4096):
        n = min(4096, vocab - start)
        # Top-k of log-weights plus Gumbel noise draws without replacement.
        noisy = log_weight + rng.gumbel(size=(n, n_experts))
        table[start : start + n] = np.argsort(-noisy, axis=1)[:, :n_used]
    return table


def route(logits: npt.NDArray[np.floating], bias: npt.NDArray[np.floating], n_used: int) -> npt.NDArray[np.int64]:
    """Experts per token as the model picks them: top of sqrt(softplus(logit)) + bias. logits: (T, E) -> (T, n_used)."""
    scores = np.sqrt(np.logaddexp(0, logits)) + bias
    return np.argpartition(-scores, n_used - 1, axis=1)[:, :n_used]


def lru_hit_rate(experts: Iterable[Iterable[int]], n_slots: int, warm_up: int = 0) -> float:
    """Share of (token, expert) requests that one layer's LRU cache of `n_slots` experts serves, after `warm_up` tokens."""
    recent: dict[int, None] = {}
    hits = requests = 0
    for step, token in enumerate(experts):
        for expert in token:
            known = expert in recent
            if known:
                del recent[expert]
            elif len(recent) >= n_slots:
                del recent[next(iter(recent))]
            recent[expert] = None
            if step >= warm_up:
                requests += 1
                hits += known
    return hits / max(1, requests)


def simulate_hit_rate(
    skew: float,
    n_experts: int,
    n_used: int,
    *,
    cache_share: float = CACHE_SHARE,
    slow_share: float = SLOW_SHARE,
    slow_tokens: float = SLOW_TOKENS,
    seed: int = 0,
) -> float:
    """LRU hit rate of one router layer on simulated hidden states."""
    rng = np.random.default_rng([seed, n_experts, n_used])
    keep = np.exp(-1 / slow_tokens)
    slow = rng.standard_normal((_STEPS, n_experts))
    slow[1:] *= np.sqrt(1 - keep * keep)
    for step in range(1, _STEPS):
        slow[step] += keep * slow[step - 1]
    fast = rng.standard_normal((_STEPS, n_experts))
    logits = np.sqrt(slow_share) * slow + np.sqrt(1 - slow_share) * fast
    chosen = route(logits, skew * popularity(n_experts), n_used)
    return lru_hit_rate(chosen.tolist(), max(n_used, round(cache_share * n_experts)), _WARM_UP)


def simulate_hash_hit_rate(skew: float, n_experts: int, n_used: int, *, seed: int = 0) -> float:
    """LRU hit rate of one hash layer when every next token is new, as a model with random weights samples them."""
    rng = np.random.default_rng([seed, n_experts, n_used, 1])
    table = hash_table(skew, _STEPS, n_experts, n_used, rng)
    return lru_hit_rate(table.tolist(), max(n_used, round(CACHE_SHARE * n_experts)), _WARM_UP)


def calibrate(hit_rate: float, n_experts: int, n_used: int, *, hashed: bool = False, seed: int = 0) -> float:
    """The skew that gives `hit_rate`, by bisection; 0 where no skew is needed (few experts, large cache)."""
    simulate = simulate_hash_hit_rate if hashed else simulate_hit_rate
    low, high = 0.0, 4.0 if hashed else 2.0
    for _ in range(10):
        middle = (low + high) / 2
        if simulate(middle, n_experts, n_used, seed=seed) < hit_rate:
            low = middle
        else:
            high = middle
    return (low + high) / 2 if low else 0.0
