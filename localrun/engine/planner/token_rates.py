"""What whole tokens show about this machine: how much slower kernels are inside a token than alone, and what waiting costs.

A probe runs one kernel at a time, on warm caches. Inside a token, matrices follow each other, threads wake for each, and reads and
packing use the same cores. How much that costs depends on the machine, so tokens are compared with what the probes' rates would
give, with the bytes that were read; the ratios are remembered as rates are (`usual_rates.py`), and later plans use them. The
drive was probed once, maybe when others used it: what tokens have read in their time is a lower bound of its rate.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from localrun.engine.planner.hardware import drive_name, seen_name
from localrun.engine.planner.plan import Plan, resident_shares
from localrun.engine.planner.speed import WAITED, computing
from localrun.engine.planner.usual_rates import usual_rates

MIN_TOKENS = 16
"""Fewer say little: the first ones warm caches."""

_BOUNDS = (0.1, 10.0)
"""What a ratio may be; beyond, something else was measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """Seconds by what passed them, and bytes read meanwhile."""

    matrices_s: float = 0.0
    attention_s: float = 0.0
    experts_s: float = 0.0
    waiting_s: float = 0.0
    disk_bytes: int = 0

    def __sub__(self, before: Spent) -> Spent:
        return Spent(**{f.name: getattr(self, f.name) - getattr(before, f.name) for f in fields(self)})


def token_ratios(plan: Plan, cost: Spent, *, n_tokens: int, seconds: float, position: int) -> dict[str, float]:
    """Name as in `Hardware.seen` -> ratio; none for tokens in which a GPU has a part.

    Args:
        cost: of tokens that were decoded one by one.
        seconds: of all of them.
        position: tokens in the context, on average.
    """
    shares = resident_shares(plan.sizes, plan.machine, plan.placement, adaptive=plan.options.adaptive)
    n = n_tokens
    if n < MIN_TOKENS or plan.decode is None or not shares.is_cpu_only:
        return {}
    alone = computing(
        plan.sizes,
        shares,
        plan.machine,
        0.0,
        cost.disk_bytes / n,
        position=position,
        kv_type=plan.options.kv_type,
    )
    named_s = cost.matrices_s + cost.attention_s + cost.experts_s + cost.waiting_s
    measured = {
        "dense model in RAM": cost.matrices_s,
        "attention": cost.attention_s,
        "layers": seconds - named_s,
        "experts in RAM": cost.experts_s,
    }
    low, high = _BOUNDS
    ratios = {name: alone[name] * n / spent_s for name, spent_s in measured.items() if spent_s > 0}
    ratios = {name: ratio for name, ratio in ratios.items() if low <= ratio <= high}
    if cost.waiting_s > 0:
        ratios[WAITED] = cost.disk_bytes / cost.waiting_s
    return ratios


def learn_tokens(plan: Plan, cost: Spent, *, n_tokens: int, seconds: float, position: int) -> None:
    """Remembers what these tokens show, for later plans. Arguments as `token_ratios`."""
    ratios = token_ratios(plan, cost, n_tokens=n_tokens, seconds=seconds, position=position)
    formats, n_threads = plan.sizes.formats, plan.machine.n_threads
    rates = {seen_name(name, formats, n_threads): ratio for name, ratio in ratios.items()}
    if ratios and plan.machine.drive:
        rates[drive_name(plan.machine.drive)] = cost.disk_bytes / seconds  # it can do at least that
    if rates:
        usual_rates(rates)
