"""Groups tokens by expert."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from localrun.errors import DecodeError
from localrun.kernel_cache import cached_jit
from localrun.offload.device.view import I32


@dataclass(frozen=True, slots=True)
class Routing:
    """The routing of one call, sorted by expert.

    Attributes:
        experts: distinct expert ids, ascending (which is file order).
        starts: (n_experts_used + 1,) pairs of `experts[i]` are `starts[i]:starts[i+1]`.
        x_rows, out_rows: (n_pairs,) token row and output row (token * K + k) of each pair.
    """

    experts: I32
    starts: I32
    x_rows: I32
    out_rows: I32


@cached_jit(nogil=True)
def _route(ids: I32, n_experts: int, experts: I32, starts: I32, x_rows: I32, out_rows: I32) -> int:
    """Counting sort of (T, K) expert ids; returns how many distinct experts there are, or -1 for an id out of range."""
    n_tokens, k_used = ids.shape
    counts = np.zeros(n_experts + 1, np.int32)
    for t in range(n_tokens):
        for k in range(k_used):
            if ids[t, k] < 0 or ids[t, k] >= n_experts:
                return -1
            counts[ids[t, k] + 1] += 1
    used = 0
    for e in range(n_experts):
        if counts[e + 1]:
            experts[used] = e
            starts[used] = counts[e]
            used += 1
        counts[e + 1] += counts[e]
    starts[used] = n_tokens * k_used
    for t in range(n_tokens):
        for k in range(k_used):
            at = counts[ids[t, k]]
            counts[ids[t, k]] += 1
            x_rows[at], out_rows[at] = t, t * k_used + k
    return used


def route(ids: I32, n_experts: int) -> Routing:
    """Groups the (token, expert) pairs of one call by expert.

    Args:
        ids: (T, K) expert of each token's k-th choice; rows may be strided.

    Raises:
        DecodeError: an id outside 0..n_experts-1 (damaged routing table).
    """
    n_pairs = ids.size
    experts, starts = np.empty(min(n_pairs, n_experts), np.int32), np.empty(min(n_pairs, n_experts) + 1, np.int32)
    x_rows, out_rows = np.empty(n_pairs, np.int32), np.empty(n_pairs, np.int32)
    used = _route(ids, n_experts, experts, starts, x_rows, out_rows)
    if used < 0:
        raise DecodeError(
            f"the router chose an expert outside 0..{n_experts - 1}", hint="run `localrun verify` on the model"
        )
    return Routing(experts[:used], starts[: used + 1], x_rows, out_rows)
