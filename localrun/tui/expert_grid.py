"""The state of every expert for the map, and rates computed from two samples of the engine's counters.

What `Stats.experts` holds (compact, because Pro has 23,424 experts):

    {"n_experts": 256,
     "layers": [{"layer": 3,             # block number
                 "where": "rdgl...",     # one letter an expert: g GPU, r RAM, l being read, d disk
                 "types": ["MXFP4"],     # ggml types of this layer's experts
                 "type_of": "000...",    # index into `types` for each expert; left out if all have the first
                 "heat": [0, 7, ...]},   # how often each was used, recent uses counting more; may be left out
                ...]}

Unknown keys are ignored and a missing map is None: an older or newer engine must not break the interface.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from localrun.alignment import ceil_div
from localrun.engine.facts import ModelFacts
from localrun.engine.process.protocol import Stats

GPU, RAM, LOADING, DISK = "g", "r", "l", "d"


@dataclass(frozen=True, slots=True)
class LayerExperts:
    """One row of the map; the sequences have one item per expert (`heat` may be empty)."""

    layer: int
    where: str
    types: tuple[str, ...]
    type_of: tuple[int, ...]
    heat: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ExpertGrid:
    """All rows, by ascending block number. `hottest` is the largest heat of all."""

    n_experts: int
    layers: tuple[LayerExperts, ...]
    hottest: float = 0.0

    @property
    def n_all(self) -> int:
        """Experts of all layers."""
        return sum(len(row.where) for row in self.layers)

    def count(self, where: str) -> int:
        """Experts of all layers in that place."""
        return sum(row.where.count(where) for row in self.layers)


def read_grid(experts: Mapping[str, Any] | None) -> ExpertGrid | None:
    """Parses `Stats.experts`; None if there is no map or its format is unknown."""
    try:
        if not experts or not experts["layers"]:
            return None
        rows = tuple(sorted((_read_layer(row) for row in experts["layers"]), key=lambda row: row.layer))
        hottest = max((max(row.heat, default=0.0) for row in rows), default=0.0)
        return ExpertGrid(max(len(row.where) for row in rows), rows, hottest)
    except (KeyError, TypeError, ValueError, IndexError):
        return None


def _read_layer(row: Mapping[str, Any]) -> LayerExperts:
    where = str(row["where"])
    types = tuple(str(name) for name in row.get("types", ("?",)))
    type_of = tuple(int(index, 36) for index in row.get("type_of", "0" * len(where)))
    heat = tuple(float(value) for value in row.get("heat", ()))
    if len(type_of) != len(where) or (heat and len(heat) != len(where)) or max(type_of, default=0) >= len(types):
        raise ValueError("rows of different lengths")
    return LayerExperts(int(row["layer"]), where, types, type_of, heat)


@dataclass(frozen=True, slots=True)
class TierRates:
    """Rates between two samples of the counters. None: nothing to measure.

    Attributes:
        hit_rate: experts found in memory, of those asked for.
        bytes_per_token: read from disk for each token.
        disk_bytes_per_s: over the time spent in layer calls.
        wait_share: share of the layer calls' time spent waiting for reads.
    """

    hit_rate: float | None = None
    bytes_per_token: float | None = None
    disk_bytes_per_s: float | None = None
    wait_share: float | None = None


def tier_rates(before: Stats | None, after: Stats, facts: ModelFacts | None) -> TierRates:
    """Rates between two samples; `before` None: since the model was loaded."""
    change = {name: _number(after, name) - (_number(before, name) if before else 0) for name in _COUNTERS}
    if any(value < 0 for value in change.values()):  # the engine was restarted meanwhile
        return tier_rates(None, after, facts)
    touched = change["hits"] + change["misses"]
    if not touched:
        return TierRates()
    n_layers = facts.n_moe_layers if facts is not None else 0
    n_tokens = change["tokens"] / n_layers if n_layers else 0
    seconds = change["total_s"]
    return TierRates(
        hit_rate=change["hits"] / touched,
        bytes_per_token=change["bytes_read"] / n_tokens if n_tokens else None,
        disk_bytes_per_s=change["bytes_read"] / seconds if seconds > 0 else None,
        wait_share=change["wait_s"] / seconds if seconds > 0 else None,
    )


_COUNTERS = ("hits", "misses", "tokens", "bytes_read", "total_s", "wait_s")


def _number(stats: Stats, name: str) -> float:
    value = stats.telemetry.get(name, 0)
    return float(value) if isinstance(value, int | float) else 0.0


def bits_of(type_name: str) -> str:
    """`IQ2_XXS` -> `2`: the digit of the map's precision view; `·` for what has none."""
    for char in type_name.removeprefix("MX").removeprefix("NV"):
        if char.isdigit():
            return {"1": "g"}.get(char, char) if type_name.startswith(("BF1", "F1")) else char
    return "·"


def column_groups(n_experts: int, width: int) -> Sequence[range]:
    """Experts that share a cell when there are more of them than cells: equal groups, the last may be smaller."""
    size = max(1, ceil_div(n_experts, max(1, width)))
    return [range(start, min(start + size, n_experts)) for start in range(0, n_experts, size)]
