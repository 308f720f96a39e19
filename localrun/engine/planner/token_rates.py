"""What whole tokens show about this machine: how fast kernels are inside a token, how many reads they hide, what was in memory.

A probe runs one kernel at a time, on warm caches. Inside a token, matrices follow each other, threads wake for each, and reads and
packing use the same cores. How much that costs depends on the machine, so tokens are compared with what the planner's arithmetic
gives for the bytes that were really read. The ratios are remembered as rates are (`usual_rates.py`), and later plans use them: for
models in the same formats relative to a machine of assumed rates, which no probe's bad moment can change, and for models in
other formats relative to the probes.

The drive's rate is measured while it reads. Hits and what company costs are remembered apart (`last_runs.py`). What others
have slowed down teaches nothing but that.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from localrun.engine.planner.hardware import BUSY_CORES, Hardware, drive_name, seen_key, seen_name
from localrun.engine.planner.last_runs import Kind, remember_company, remember_hits
from localrun.engine.planner.plan import Plan, resident_shares
from localrun.engine.planner.speed import (
    COMPANY,
    FEW_READS,
    HIDDEN,
    USEFUL,
    ResidentShares,
    computing,
    inside,
    used_bytes,
)
from localrun.engine.planner.usual_rates import remember_rates

MIN_TOKENS = 16
"""Fewer say little: the first ones warm caches."""

MIN_DRIVE_BYTES = 8 << 30
"""Less read in a run says little about the drive's rate."""

FULL = 0.5
"""Evictions per read from which on memory counts as full: before, everything is read once, and hits say nothing."""

LEAST_POSITION = 2048
"""Tokens in the context from which on attention's time shows how fast it multiplies. [m] With 15, whole Flash takes 3.9 ms where
the arithmetic is 0.8, on two Emerald Rapids cores; with 2,048 the arithmetic is 20 ms."""

_BOUNDS = (0.1, 10.0)
"""What a ratio may be; beyond, something else was measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """Seconds by what passed them, and what happened meanwhile.

    Attributes:
        reading_s: with at least one read under way.
        others_s: core seconds of other programs.
        disk_bytes: read, guesses included.
        requests: pairs of a token and an expert.
        wasted: experts read and not used.
        evictions: experts displaced.
    """

    matrices_s: float = 0.0
    attention_s: float = 0.0
    experts_s: float = 0.0
    waiting_s: float = 0.0
    reading_s: float = 0.0
    others_s: float = 0.0
    disk_bytes: int = 0
    requests: int = 0
    wasted: int = 0
    evictions: int = 0

    def __sub__(self, before: Spent) -> Spent:
        return Spent(**{f.name: getattr(self, f.name) - getattr(before, f.name) for f in fields(self)})


def others_in(cost: Spent, seconds: float) -> float:
    """Cores that other programs used meanwhile."""
    return max(0.0, cost.others_s) / seconds


def token_ratios(
    plan: Plan, cost: Spent, machine: Hardware, *, n_tokens: int, seconds: float, position: int
) -> dict[str, float]:
    """Name as in `Hardware.seen` -> ratio to that machine's rates, or a share of reads.

    Args:
        cost: of tokens that were decoded one by one.
        machine: whose rates.
        seconds: of all of them.
        position: tokens in the context, on average.
    """
    shares = _shares(plan)
    n = n_tokens
    alone = computing(
        plan.sizes, shares, machine, 0.0, cost.disk_bytes / n, position=position, kv_type=plan.options.kv_type
    )
    named_s = cost.matrices_s + cost.attention_s + cost.experts_s + cost.waiting_s
    measured = {
        "dense model in RAM": cost.matrices_s,
        "attention": cost.attention_s if position >= LEAST_POSITION else 0.0,
        "layers": seconds - named_s,
        "experts in RAM": cost.experts_s,
    }
    low, high = _BOUNDS
    ratios = {name: alone[name] * n / spent_s for name, spent_s in measured.items() if spent_s > 0}
    ratios = {name: ratio for name, ratio in ratios.items() if low <= ratio <= high}
    if cost.disk_bytes and _reads(plan, cost, n):
        if 0 < cost.waiting_s < cost.reading_s:
            ratios[HIDDEN] = 1 - cost.waiting_s / cost.reading_s
        ratios[USEFUL] = max(0.1, 1 - cost.wasted * shares.miss_bytes / cost.disk_bytes)
    return ratios


def hits_seen(plan: Plan, cost: Spent) -> float | None:
    """Share of requests that needed no read; None while memory isn't full."""
    shares = _shares(plan)
    n_reads = cost.disk_bytes / shares.miss_bytes
    if not cost.requests or not 0 < shares.share < 1 or cost.evictions < FULL * n_reads or n_reads == 0:
        return None
    return min(1.0, max(0.0, 1 - (n_reads - cost.wasted) / cost.requests))


def quiet_seconds(plan: Plan, cost: Spent, *, n_tokens: int, position: int) -> dict[str, float]:
    """Seconds of a token by resource as the plan has them for what was really read, with nothing else running and without waiting
    for it."""
    kv_type, disk_bytes = plan.options.kv_type, cost.disk_bytes / n_tokens
    return inside(plan.sizes, _shares(plan), plan.machine, 0.0, disk_bytes, position=position, kv_type=kv_type)


def company_cost_of(plan: Plan, cost: Spent, *, n_tokens: int, seconds: float, position: int) -> float:
    """How much longer matrices would have taken with all cores used by others, from what a run beside some took."""
    quiet = quiet_seconds(plan, cost, n_tokens=n_tokens, position=position)
    longer_s = (seconds - cost.waiting_s) / n_tokens - sum(quiet.values())
    affected_s = sum(COMPANY.get(name, 0.0) * s for name, s in quiet.items())
    return max(0.0, longer_s) / affected_s * plan.machine.n_cores / plan.machine.others


def learn_tokens(
    plan: Plan,
    cost: Spent,
    *,
    n_tokens: int,
    seconds: float,
    position: int,
    direct: bool = True,
    kind: Kind = "answers",
) -> None:
    """Remembers what these tokens show, for later plans; nothing if a GPU has a part in them. Arguments as `token_ratios`.

    Args:
        direct: reads bypass the page cache. If not, they say nothing about the drive.
    """
    shares, sizes = _shares(plan), plan.sizes
    if n_tokens < MIN_TOKENS or plan.decode is None or not shares.is_cpu_only:
        return
    hits = hits_seen(plan, cost)
    if hits is not None and sizes.identity:
        remember_hits(sizes.identity, kind, share=shares.share, hits=hits, tokens=n_tokens)
    enough = cost.disk_bytes >= MIN_DRIVE_BYTES and cost.reading_s > 0
    if plan.machine.drive and direct and enough:
        name = drive_name(plan.machine.drive)
        remember_rates({name: cost.disk_bytes / cost.reading_s})  # however busy the cores
    if others_in(cost, seconds) > BUSY_CORES:
        if plan.machine.is_busy:
            remember_company(company_cost_of(plan, cost, n_tokens=n_tokens, seconds=seconds, position=position))
        return
    reads = _reads(plan, cost, n_tokens)
    rates: dict[str, float] = {}
    for formats, machine in ((sizes.formats, plan.machine.reference), ("", plan.machine)):
        ratios = token_ratios(plan, cost, machine, n_tokens=n_tokens, seconds=seconds, position=position)
        key = seen_key(formats, reads=reads)
        rates |= {seen_name(name, key, machine.n_threads): ratio for name, ratio in ratios.items()}
    if rates:
        remember_rates(rates)


def _shares(plan: Plan) -> ResidentShares:
    return resident_shares(plan.sizes, plan.machine, plan.placement, adaptive=plan.options.adaptive)


def _reads(plan: Plan, cost: Spent, n_tokens: int) -> bool:
    return cost.disk_bytes / n_tokens >= FEW_READS * used_bytes(plan.sizes, _shares(plan))
