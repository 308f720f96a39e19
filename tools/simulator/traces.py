"""Synthetic routing traces.

The router draws each token's experts from logits of three parts: popularity (falling with the logarithm of the rank), a part that
changes slowly from token to token, and noise. Its two shares and its time scale were fitted to the hit rates published for
V4-Flash (one LRU per layer, steady decode of one topic); got / published at 10, 15, 25 and 30 % resident: 0.583/0.58, 0.670/0.68,
0.768/0.77, 0.800/0.80.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tools.simulator.trace_file import TracedCall

SKEW = 0.48
SLOW_SHARE = 0.40
SLOW_TOKENS = 12.0


@dataclass(frozen=True, slots=True)
class Workload:
    """A synthetic run.

    Attributes:
        n_layers, n_experts, n_used: shape of the model.
        n_tokens: in all.
        topic_tokens: tokens of one topic; half of the experts change their popularity with the topic. 0: one topic.
        prompt_tokens: of each topic's tokens, so many come first, in prefill calls of `chunk` tokens.
    """

    n_layers: int
    n_experts: int
    n_used: int
    n_tokens: int
    topic_tokens: int = 0
    prompt_tokens: int = 0
    chunk: int = 512
    skew: float = SKEW
    slow_share: float = SLOW_SHARE
    slow_tokens: float = SLOW_TOKENS

    @property
    def topic_starts(self) -> range:
        """First token of each topic."""
        return range(0, self.n_tokens, self.topic_tokens or self.n_tokens)


def route_layer(work: Workload, rng: np.random.Generator) -> npt.NDArray[np.int32]:
    """(n_tokens, n_used) experts of one layer, distinct per token."""
    shape = (work.n_tokens, work.n_experts)
    keep = np.exp(-1 / work.slow_tokens)
    slow = rng.standard_normal(shape, np.float32)
    slow[1:] *= np.sqrt(1 - keep * keep)
    for t in range(1, work.n_tokens):
        slow[t] += keep * slow[t - 1]
    logits = np.sqrt(work.slow_share) * slow
    logits += np.sqrt(1 - work.slow_share) * rng.standard_normal(shape, np.float32)
    bias = work.skew * rng.permutation(popularity(work.n_experts))
    for start in work.topic_starts:
        if start:
            changed = rng.permutation(work.n_experts)[: work.n_experts // 2]
            bias[changed] = bias[rng.permutation(changed)]
        logits[start : start + (work.topic_tokens or work.n_tokens)] += bias
    return np.argpartition(-logits, work.n_used - 1, axis=1)[:, : work.n_used].astype(np.int32)


def popularity(n_experts: int) -> npt.NDArray[np.float64]:
    """Bias by popularity rank: -log(rank), zero mean, unit deviation."""
    curve = -np.log(np.arange(1, n_experts + 1))
    return np.asarray((curve - curve.mean()) / max(curve.std(), 1e-9))


def synthetic_calls(work: Workload, seed: int) -> list[TracedCall]:
    """The calls of a whole run, in the engine's order: all layers of a batch, then the next batch."""
    rng = np.random.default_rng(seed)
    layers = [route_layer(work, rng) for _ in range(work.n_layers)]
    return [TracedCall(layer, ids[batch]) for batch in _batches(work) for layer, ids in enumerate(layers)]


def _batches(work: Workload) -> Iterator[slice]:
    for start, end in itertools.pairwise([*work.topic_starts, work.n_tokens]):
        decode_start = min(end, start + work.prompt_tokens)
        for at in range(start, decode_start, work.chunk):
            yield slice(at, min(at + work.chunk, decode_start))
        for at in range(decode_start, end):
            yield slice(at, at + 1)
