"""Counters of the expert path: always on, a few integer additions per layer call, readable from any thread.

One row per block number. Times are nanoseconds of wall clock on the decoding thread; bytes are payload read from files.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt


class Counter(IntEnum):
    """Columns of `Telemetry.values`."""

    CALLS = 0  # layer calls
    TOKENS = 1  # tokens in those calls
    REQUESTS = 2  # (token, expert) pairs
    HITS = 3  # distinct experts of a call found in RAM
    MISSES = 4  # distinct experts of a call that had to be read (or were being read)
    BYTES_READ = 5  # bytes of those reads; of prefetches when they have arrived
    PREFETCHED = 6  # experts read ahead of their call
    EVICTIONS = 7
    WAIT_NS = 8  # decoding thread idle, waiting for a read
    COMPUTE_NS = 9  # in kernels
    TOTAL_NS = 10  # whole calls
    GPU_HITS = 11  # part of HITS that a GPU computed
    STREAMED = 12  # distinct experts of a call that passed through a GPU, whether hit or miss
    GUESSES = 13  # part of PREFETCHED: experts read because a router of a later layer made them likely
    GUESSES_USED = 14  # those that their call used
    GUESSES_WASTED = 15  # those that were read and not used; others were cancelled


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over all layers since the model was opened or `Telemetry.reset`."""

    calls: int
    tokens: int
    requests: int
    hits: int
    misses: int
    bytes_read: int
    prefetched: int
    evictions: int
    wait_s: float
    compute_s: float
    total_s: float
    gpu_hits: int
    streamed: int
    guesses: int
    guesses_used: int
    guesses_wasted: int

    @property
    def hit_rate(self) -> float:
        """Share of distinct experts per call that were in RAM; 1.0 before the first call."""
        touched = self.hits + self.misses
        return self.hits / touched if touched else 1.0


class Telemetry:
    """Counters per layer. Written by the decoding thread, and under residency's lock by read-ahead; readers may see half a call."""

    def __init__(self, n_layers: int) -> None:
        self.values: npt.NDArray[np.int64] = np.zeros((n_layers, len(Counter)), np.int64)
        self.started_at = time.monotonic()

    def reset(self) -> None:
        """Back to zero (bench uses it between phases)."""
        self.values[:] = 0
        self.started_at = time.monotonic()

    def totals(self) -> Totals:
        """Sums over layers."""
        v = [int(n) for n in self.values.sum(0)]
        return Totals(
            v[Counter.CALLS],
            v[Counter.TOKENS],
            v[Counter.REQUESTS],
            v[Counter.HITS],
            v[Counter.MISSES],
            v[Counter.BYTES_READ],
            v[Counter.PREFETCHED],
            v[Counter.EVICTIONS],
            v[Counter.WAIT_NS] / 1e9,
            v[Counter.COMPUTE_NS] / 1e9,
            v[Counter.TOTAL_NS] / 1e9,
            v[Counter.GPU_HITS],
            v[Counter.STREAMED],
            v[Counter.GUESSES],
            v[Counter.GUESSES_USED],
            v[Counter.GUESSES_WASTED],
        )

    def layers(self) -> list[dict[str, int]]:
        """One dictionary per layer with routed experts, keys as in `Counter`, lower case."""
        return [
            {"layer": layer, **{counter.name.lower(): int(row[counter]) for counter in Counter}}
            for layer, row in enumerate(self.values)
            if row[Counter.CALLS]
        ]
