"""Whole tokens correct the plan's rates: what they show, and that a plan that knows it predicts them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from localrun.engine.planner.hardware import Hardware, drive_name, seen_tokens
from localrun.engine.planner.plan import GpuShare, Plan, resident_shares
from localrun.engine.planner.planner import make_plan, with_routing
from localrun.engine.planner.sizes import sizes_of
from localrun.engine.planner.speed import WAITED, computing
from localrun.engine.planner.token_rates import MIN_TOKENS, Spent, learn_tokens, token_ratios
from localrun.engine.planner.usual_rates import usual_rates

GIB = 1 << 30
BOX = Hardware(
    ram_bytes=22 * GIB, total_ram_bytes=24 * GIB, disk_bytes_per_s=1.2e9, memory_bytes_per_s=50e9, n_threads=2
)
N = 100


@pytest.fixture(scope="module")
def plan() -> Plan:
    rng = np.random.default_rng(0)
    routing = [rng.multinomial(6 * N, rng.dirichlet(np.full(256, 0.3))).astype(np.float64) for _ in range(43)]
    return with_routing(make_plan(sizes_of("flash"), BOX, suggest=False), routing)


def _alone(plan: Plan, disk_bytes: float) -> dict[str, float]:
    shares = resident_shares(plan.sizes, plan.machine, plan.placement)
    return computing(plan.sizes, shares, plan.machine, 0.0, disk_bytes, position=100, kv_type="f16")


def _spent(plan: Plan, disk_bytes: float, slower: float, waiting_s: float) -> tuple[Spent, float]:
    """What N tokens take whose kernels are that much slower than alone, and their time."""
    alone = {name: N * slower * s for name, s in _alone(plan, disk_bytes).items()}
    spent = Spent(
        matrices_s=alone["dense model in RAM"],
        attention_s=alone["attention"],
        experts_s=alone["experts in RAM"],
        waiting_s=N * waiting_s,
        disk_bytes=int(N * disk_bytes),
    )
    return spent, sum(alone.values()) + spent.waiting_s


def test_ratios_are_those_of_rates_alone_to_rates_in_tokens(plan: Plan) -> None:
    spent, seconds = _spent(plan, 0.6e9, slower=2.0, waiting_s=0.2)
    ratios = token_ratios(plan, spent, n_tokens=N, seconds=seconds, position=100)
    assert ratios.pop(WAITED) == pytest.approx(0.6e9 / 0.2)
    assert ratios == pytest.approx(dict.fromkeys(("dense model in RAM", "attention", "layers", "experts in RAM"), 0.5))


def test_a_plan_that_has_seen_such_tokens_predicts_them(plan: Plan) -> None:
    disk_bytes = plan.decode_at(100).likely.disk_bytes
    spent, seconds = _spent(plan, disk_bytes, slower=1.6, waiting_s=0.3)
    learn_tokens(plan, spent, n_tokens=N, seconds=seconds, position=100)
    knowing = replace(plan, machine=replace(plan.machine, seen=seen_tokens(plan.machine.n_threads)))
    assert knowing.decode_at(100).likely.tokens_per_s == pytest.approx(N / seconds, rel=1e-3)
    given = knowing.machine.given(disk_bytes_per_s=9e9)
    assert WAITED not in given.seen[plan.sizes.formats], "another drive"
    assert given.seen[plan.sizes.formats]["layers"] == pytest.approx(1 / 1.6)
    assert seen_tokens(plan.machine.n_threads).keys() == {plan.sizes.formats}, "other formats, other rates"
    assert seen_tokens(plan.machine.n_threads + 1) == {}, "other threads, other rates"
    assert replace(plan.machine, seen={"any": {"layers": 2.0}}).given(memory_bytes_per_s=9e9).seen == {}


def test_too_few_tokens_and_those_of_gpus_teach_nothing(plan: Plan) -> None:
    spent, seconds = _spent(plan, 0.6e9, slower=2.0, waiting_s=0.2)
    assert token_ratios(plan, spent, n_tokens=MIN_TOKENS - 1, seconds=seconds, position=100) == {}
    on_gpu = make_plan(plan.sizes, BOX, suggest=False, gpu=GpuShare(dense_share=1.0, expert_bytes=GIB))
    assert token_ratios(on_gpu, spent, n_tokens=N, seconds=seconds, position=100) == {}


def test_what_was_not_measured_is_not_learned(plan: Plan) -> None:
    spent, seconds = _spent(plan, 0.0, slower=1.0, waiting_s=0.0)
    ratios = token_ratios(plan, replace(spent, attention_s=0.0), n_tokens=N, seconds=seconds, position=100)
    assert WAITED not in ratios
    assert "attention" not in ratios
    assert ratios["dense model in RAM"] == pytest.approx(1.0)


def test_names_of_another_form_are_left_alone() -> None:
    before = seen_tokens(2)
    usual_rates({"tokens: something, 2 threads": 5.0})
    assert seen_tokens(2) == before


def test_differences_are_what_lies_between() -> None:
    before, after = Spent(matrices_s=1.0, disk_bytes=10), Spent(matrices_s=3.0, attention_s=0.5, disk_bytes=30)
    assert after - before == Spent(matrices_s=2.0, attention_s=0.5, disk_bytes=20)


def test_a_drive_is_at_least_as_fast_as_tokens_have_read(plan: Plan) -> None:
    """The probe may have met a busy drive; it is not repeated for a month."""
    plan = replace(plan, machine=replace(plan.machine, drive="8:0 ext4 /dev/sda"))
    name = drive_name(plan.machine.drive)
    assert usual_rates({name: 0.1e9})[name] == 0.1e9
    spent, seconds = _spent(plan, 0.6e9, slower=1.0, waiting_s=0.2)
    for _ in range(2):  # a single measurement may have been lucky
        learn_tokens(plan, spent, n_tokens=N, seconds=seconds, position=100)
    assert usual_rates({name: 0.1e9})[name] == pytest.approx(spent.disk_bytes / seconds)
