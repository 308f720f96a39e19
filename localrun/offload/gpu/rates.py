"""A GPU's rates, measured by `probe.py` or assumed for a described card. Only numbers, no device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

MEMORY_SHARE: Final = 0.6
"""Of a card's memory bandwidth that products with one row reach. Assumed."""

MACS_PER_BYTE: Final = 60.0
"""Multiplications per second of a batch, as a multiple of a card's memory bandwidth. Assumed."""

LATENCY_S: Final = 50e-6
"""Of a call of the expert path on a card in this machine. Assumed."""

NODE_S: Final = 2e-6
"""Of one small operation in a graph on a card. Assumed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuRates:
    """Rates of one device with nothing else running, unless noted. `docs/planner.md` has the method.

    Attributes:
        latency_s: seconds per call of the expert path with nothing to compute: a round trip.
        decode_bytes_per_s: bytes of experts per second, multiplied with one token each, eight in a call; without `latency_s`.
        batch_macs_per_s: multiplications per second of 512 (token, expert) pairs over eight experts; without `latency_s`.
        dense_bytes_per_s: bytes per second of 8-bit matrices multiplied with one row; without `latency_s`.
        dense_macs_per_s: multiplications per second of such a matrix with 512 rows; without `latency_s`.
        node_s: seconds per graph operation on a single row of 4096 values, i.e. launch overhead.
        value_s: seconds of such an operation per value, in a batch of rows.
        overlap: when the device and memory-bound CPU kernels run at once, the share of the shorter task's time that is hidden.
            1: neither slows the other down; 0: they serialize, as when they share cores.
        measured: False: assumed.
    """

    latency_s: float
    decode_bytes_per_s: float
    batch_macs_per_s: float
    dense_bytes_per_s: float
    dense_macs_per_s: float
    node_s: float
    value_s: float
    overlap: float
    measured: bool = True


def assumed_rates(memory_bytes_per_s: float) -> GpuRates:
    """Assumed rates of a card that was not measured.

    Args:
        memory_bytes_per_s: memory bandwidth according to its maker.
    """
    return GpuRates(
        latency_s=LATENCY_S,
        decode_bytes_per_s=MEMORY_SHARE * memory_bytes_per_s,
        batch_macs_per_s=MACS_PER_BYTE * memory_bytes_per_s,
        dense_bytes_per_s=MEMORY_SHARE * memory_bytes_per_s,
        dense_macs_per_s=MACS_PER_BYTE * memory_bytes_per_s,
        node_s=NODE_S,
        value_s=8 / (MEMORY_SHARE * memory_bytes_per_s),  # read once, written once
        overlap=1.0,
        measured=False,
    )
