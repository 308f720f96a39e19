"""Whole runs as they were measured (`recorded.toml`), and the plans that would have been made for them."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from localrun.engine.planner.hardware import Hardware
from localrun.engine.planner.hit_rates import UNEVEN, Curve, HitRates, Scaled
from localrun.engine.planner.plan import Plan, PlanOptions
from localrun.engine.planner.planner import make_plan
from localrun.engine.planner.sizes import ModelSizes, format_of, sizes_of
from localrun.engine.planner.token_rates import Spent
from localrun.offload.kernels.rates import CpuRates, ExpertRates

DRIVE = "7:0 xfs /dev/loop0"


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """One phase of decoding.

    Attributes:
        base, dense: formats.
        probe: what was measured of the machine when it was planned.
        ram_bytes: free then.
        budget_bytes: `--ram`; 0: none was given.
        others: cores that other programs used then.
        cost: of all its tokens.
        seconds: of all its tokens.
    """

    name: str
    base: str
    dense: str
    probe: Mapping[str, float]
    ram_bytes: int
    budget_bytes: int
    others: float
    cost: Spent
    seconds: float
    n_tokens: int

    @property
    def token_s(self) -> float:
        return self.seconds / self.n_tokens

    @functools.cached_property
    def sizes(self) -> ModelSizes:
        sizes = sizes_of("flash", base=format_of(self.base), dense=format_of(self.dense))
        return replace(sizes, identity="whole Flash, random weights")

    @property
    def machine(self) -> Hardware:
        """As it was probed, with nothing learnt."""
        (types,) = {group.types for group in self.sizes.experts}
        at = self.probe
        expert = ExpertRates(decode_s=at["decode_s"], few_s=at["few_s"], many_s=at["many_s"])
        return Hardware(
            ram_bytes=self.ram_bytes,
            total_ram_bytes=25276502016,
            disk_bytes_per_s=at["drive_bytes_per_s"],
            drive=DRIVE,
            memory_bytes_per_s=at["memory_bytes_per_s"],
            n_threads=2,
            cpu=CpuRates(dense_bytes_per_s=at["dense_bytes_per_s"], dense_macs_per_s=320e9, experts={types: expert}),
            others=self.others,
            n_cores=2,
        )

    def plan(self, rates: HitRates | None = None, **machine: Any) -> Plan:
        """As it would have been made for this run.

        Args:
            machine: fields of `machine` that are known better.
        """
        options = PlanOptions(n_ctx=2048, n_batch=512, position=20, ram_bytes=self.budget_bytes or None)
        return make_plan(
            self.sizes, replace(self.machine, **machine), options, suggest=False, rates=rates or Curve(uneven=UNEVEN)
        )

    def hits_of(self, plan: Plan) -> HitRates:
        """Rates that say of this plan's memory what the run has hit."""
        used_bytes = self.cost.disk_bytes - self.cost.wasted * plan.sizes.mean_file_bytes
        hits = 1 - used_bytes / plan.sizes.mean_file_bytes / self.cost.requests
        return Scaled(Curve(), plan.resident_share, hits)

    def plan_with_hits(self, **machine: Any) -> Plan:
        """As `plan`, if what the caches hit had been known."""
        return self.plan(self.hits_of(self.plan(**machine)), **machine)


def _read() -> dict[str, Recorded]:
    content = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
    runs = {}
    for row in content["run"]:
        cost = Spent(**{field.name: row.pop(field.name) for field in fields(Spent)})
        runs[row["name"]] = Recorded(cost=cost, **{**row, "probe": content["probe"][row["probe"]]})
    return runs


RUNS = _read()
