"""Whole tokens correct the plan: what recorded runs show, and that a plan that knows one predicts the next."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from localrun.engine.planner.hardware import (
    USUAL_COMPANY_COST,
    Hardware,
    Known,
    drive_name,
    seen_key,
    seen_name,
    seen_tokens,
)
from localrun.engine.planner.hit_rates import Curve, HitRates, Scaled, hit_rates
from localrun.engine.planner.last_runs import company_cost, last_hits
from localrun.engine.planner.plan import GpuShare, Plan, resident_shares
from localrun.engine.planner.planner import make_plan
from localrun.engine.planner.speed import HIDDEN, HIDDEN_READS, USEFUL, computing, waiting
from localrun.engine.planner.token_rates import (
    MIN_DRIVE_BYTES,
    MIN_TOKENS,
    Spent,
    hits_seen,
    learn_tokens,
    quiet_token_s,
    token_ratios,
)
from localrun.engine.planner.usual_rates import MAX_AGE_S, sustained_rates, usual_rates
from localrun.paths import cache_dir
from tests.engine.planner.recorded import DRIVE, LOSSLESS, LOSSLESS_AGAIN, TWO_BITS, Recorded

GIB = 1 << 30
UNKNOWN = Hardware(ram_bytes=0, total_ram_bytes=0, disk_bytes_per_s=1.4e9)
"""A machine without a memory. 1.4 GB/s: these runs read 1.27 and 1.29 on average, and were not always reading."""


@pytest.fixture(autouse=True)
def _nothing_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCALRUN_CACHE_DIR", str(tmp_path))


def with_hits(run: Recorded, machine: Hardware = UNKNOWN) -> Plan:
    """The run's plan, knowing what its caches hit."""
    plan = run.plan(machine)
    hits = hits_seen(plan, run.cost)
    assert hits is not None
    return run.plan(machine, Scaled(Curve(), plan.resident_share, hits))


def learn(run: Recorded, plan: Plan, *, direct: bool = True, **changed: float) -> None:
    cost = replace(run.cost, **changed)
    learn_tokens(plan, cost, n_tokens=run.n_tokens, seconds=run.seconds, position=20, direct=direct)


# --- the arithmetic against recorded runs -----------------------------------------------------------------------------


@pytest.mark.parametrize("run", [LOSSLESS, LOSSLESS_AGAIN, TWO_BITS], ids=["lossless", "again", "two bits"])
def test_the_sum_is_what_was_measured_given_hits_and_the_drive(run: Recorded) -> None:
    likely = with_hits(run).decode_at(20).likely
    assert 1 / likely.tokens_per_s == pytest.approx(run.token_s, rel=0.08)
    assert likely.disk_bytes == pytest.approx(run.cost.disk_bytes / run.n_tokens, rel=0.03)
    parts, n = likely.seconds, run.n_tokens
    assert parts["drive"] == pytest.approx(run.cost.waiting_s / n, rel=0.15)
    assert parts["experts in RAM"] == pytest.approx(run.cost.experts_s / n, rel=0.15)
    assert parts["dense model in RAM"] == pytest.approx(run.cost.matrices_s / n, rel=0.15)


@pytest.mark.parametrize("run", [LOSSLESS, TWO_BITS], ids=["lossless", "two bits"])
@pytest.mark.parametrize("bytes_per_s", [1.2e9, 1.4e9, 1.6e9])
def test_the_range_of_a_first_plan_holds_what_was_measured(run: Recorded, bytes_per_s: float) -> None:
    """Nothing is known of the model's routing; the drive gives between 1.2 and 1.6 GB/s in the probe."""
    plan = run.plan(replace(UNKNOWN, disk_bytes_per_s=bytes_per_s), hit_rates("never seen", {}))
    assert plan.rates.source == "published curve"
    assert plan.decode_at(20).covers(1 / run.token_s)


@pytest.mark.parametrize(("run", "hits"), [(LOSSLESS, 0.701), (LOSSLESS_AGAIN, 0.700), (TWO_BITS, 0.831)])
def test_hits_are_what_was_read_without_wrong_guesses(run: Recorded, hits: float) -> None:
    plan = run.plan(UNKNOWN)
    assert hits_seen(plan, run.cost) == pytest.approx(hits, abs=0.001)
    assert hits_seen(plan, replace(run.cost, evictions=100)) is None, "memory isn't full: everything is read once"
    assert hits_seen(plan, replace(run.cost, requests=0)) is None


def test_reads_hide_behind_computing_but_not_more_than_there_is() -> None:
    assert waiting(0.8, 0.6, 0.5) == pytest.approx(0.4)
    assert waiting(2.0, 0.6, 0.5) == pytest.approx(1.4)
    assert waiting(0.0, 0.6, 0.5) == 0
    for run in (LOSSLESS, TWO_BITS):
        reading_s = run.cost.disk_bytes / 1.5e9
        assert 1 - run.cost.waiting_s / reading_s == pytest.approx(HIDDEN_READS[1], abs=0.06)


# --- one run teaches the next plan ------------------------------------------------------------------------------------


def taught(run: Recorded, reading_s: float) -> tuple[Hardware, HitRates]:
    """The machine and the hit rates that the next plan finds, after one run with a drive that was probed in a bad second."""
    machine = replace(UNKNOWN, disk_bytes_per_s=0.92e9)
    plan = run.plan(machine)
    learn(run, replace(plan, sizes=replace(plan.sizes, identity="flash")), reading_s=reading_s)
    drive = sustained_rates(drive_name(DRIVE))[drive_name(DRIVE)]
    known = replace(machine, disk_bytes_per_s=drive, seen=seen_tokens(2))
    return known, hit_rates("flash", dict.fromkeys(range(43), 256))


def test_one_run_teaches_the_next_plan() -> None:
    machine, rates = taught(LOSSLESS, 0.8 * LOSSLESS.seconds)
    likely = LOSSLESS_AGAIN.plan(machine, rates).decode_at(20).likely
    assert 1 / likely.tokens_per_s == pytest.approx(LOSSLESS_AGAIN.token_s, rel=0.03)
    assert "70% with 8% of the experts in RAM" in rates.source
    assert machine.disk_bytes_per_s == pytest.approx(LOSSLESS.cost.disk_bytes / 0.8 / LOSSLESS.seconds)


def test_one_run_teaches_the_plan_of_other_formats() -> None:
    """Two bits planned after a lossless run: the same machine, and the same router in a cache twice as large."""
    machine, rates = taught(LOSSLESS, 0.8 * LOSSLESS.seconds)
    likely = TWO_BITS.plan(machine, rates).decode_at(20).likely
    assert 1 / likely.tokens_per_s == pytest.approx(TWO_BITS.token_s, rel=0.15)


def test_a_measurement_teaches_a_measurement_before_answers_do() -> None:
    shapes = dict.fromkeys(range(43), 256)
    sizes = replace(LOSSLESS.sizes, identity="flash")
    plan = replace(LOSSLESS.plan(UNKNOWN), sizes=sizes)
    for kind, wasted in (("answers", 466), ("measurements", 1466)):
        cost = replace(LOSSLESS.cost, wasted=wasted)
        learn_tokens(plan, cost, n_tokens=40, seconds=37.4, position=20, kind=kind)  # type: ignore[arg-type]
    share = plan.resident_share
    answers, measurements = hit_rates("flash", shapes), hit_rates("flash", shapes, learned=False)
    assert answers.steady(share) == pytest.approx(0.701, abs=0.001)
    assert measurements.steady(share) == pytest.approx(0.798, abs=0.001)
    assert hit_rates("another", shapes).source == "published curve"


def test_ratios_are_independent_of_what_a_probe_met() -> None:
    """The kernels were probed in a bad moment; the tokens were not. The next probe is good, and the plan stays the same."""
    plan = with_hits(LOSSLESS)
    cpu = plan.machine.cpu
    assert cpu is not None
    slow = replace(cpu, dense_bytes_per_s=10e9)
    learn(LOSSLESS, replace(plan, machine=replace(plan.machine, cpu=slow)))
    for found in (cpu, slow):
        knowing = replace(plan, machine=replace(plan.machine, cpu=found, seen=seen_tokens(2)))
        dense_s = knowing.decode_at(20).likely.seconds["dense model in RAM"]
        assert dense_s == pytest.approx(LOSSLESS.cost.matrices_s / 40, rel=0.01)


def test_tokens_that_read_nothing_are_another_kind() -> None:
    plan = with_hits(LOSSLESS)
    cost = replace(LOSSLESS.cost, disk_bytes=0, waiting_s=0.0, matrices_s=40 * 0.2)
    learn_tokens(plan, cost, n_tokens=40, seconds=16.0, position=20)
    seen = seen_tokens(2)
    formats = plan.sizes.formats
    assert set(seen) == {seen_key(formats, reads=False), seen_key("", reads=False)}
    assert HIDDEN not in seen[seen_key(formats, reads=False)]
    assert replace(plan.machine, seen=seen).known(formats, reads=True) == Known()


def test_ratios_are_those_of_assumed_rates_to_rates_in_tokens() -> None:
    plan = with_hits(LOSSLESS)
    cost = replace(LOSSLESS.cost, reading_s=30.0)
    shares = resident_shares(plan.sizes, plan.machine, plan.placement)
    reference = plan.machine.reference
    by_reference = computing(plan.sizes, shares, reference, 0.0, cost.disk_bytes / 40, position=20, kv_type="f16")
    ratios = token_ratios(plan, cost, reference, n_tokens=40, seconds=LOSSLESS.seconds, position=20)
    assert ratios.pop(HIDDEN) == pytest.approx(1 - cost.waiting_s / 30)
    assert ratios.pop(USEFUL) == pytest.approx(1 - 466 * 13369344 / cost.disk_bytes)
    assert ratios["dense model in RAM"] == pytest.approx(40 * by_reference["dense model in RAM"] / cost.matrices_s)
    assert ratios.keys() == {"dense model in RAM", "attention", "layers", "experts in RAM"}


def test_too_few_tokens_and_those_of_gpus_teach_nothing() -> None:
    plan = with_hits(LOSSLESS)
    learn_tokens(plan, LOSSLESS.cost, n_tokens=MIN_TOKENS - 1, seconds=15.0, position=20)
    on_gpu = make_plan(plan.sizes, plan.machine, suggest=False, gpu=GpuShare(dense_share=1.0, expert_bytes=GIB))
    learn(LOSSLESS, on_gpu)
    assert seen_tokens(2) == {}


def test_what_was_not_measured_is_not_learned() -> None:
    plan = with_hits(LOSSLESS)
    cost = replace(LOSSLESS.cost, attention_s=0.0, reading_s=0.0)
    ratios = token_ratios(plan, cost, plan.machine, n_tokens=40, seconds=37.0, position=20)
    assert HIDDEN not in ratios
    assert "attention" not in ratios


def test_names_of_another_form_and_other_threads_are_left_alone() -> None:
    usual_rates({"tokens: something, 2 threads": 5.0, seen_name("layers", "x", 4): 2.0})
    assert seen_tokens(2) == {}
    assert seen_tokens(4) == {"x": {"layers": 2.0}}
    given = replace(UNKNOWN, seen={"any": {"layers": 2.0}}, drive="8:0 ext4 /dev/sda")
    assert given.given(memory_bytes_per_s=9e9).seen == {}
    assert given.given(disk_bytes_per_s=9e9).seen == given.seen
    assert given.given(disk_bytes_per_s=9e9).drive == ""


def test_differences_are_what_lies_between() -> None:
    before, after = Spent(matrices_s=1.0, disk_bytes=10), Spent(matrices_s=3.0, attention_s=0.5, disk_bytes=30)
    assert after - before == Spent(matrices_s=2.0, attention_s=0.5, disk_bytes=20)


# --- drive and company ------------------------------------------------------------------------------------------------


def test_a_drive_is_at_once_as_fast_as_tokens_have_read_and_stays_so() -> None:
    plan = with_hits(LOSSLESS)
    name = drive_name(DRIVE)
    learn(LOSSLESS, plan, reading_s=LOSSLESS.cost.disk_bytes / 1.4e9)
    assert sustained_rates(name)[name] == pytest.approx(1.4e9)
    for _ in range(10):  # a busy day
        learn(LOSSLESS, plan, reading_s=LOSSLESS.cost.disk_bytes / 0.6e9)
    assert sustained_rates(name)[name] == pytest.approx(1.4e9), "it can do that"
    known = json.loads((cache_dir() / "rates.json").read_text())
    known["rates"][name] = [[when - MAX_AGE_S, rate] for when, rate in known["rates"][name]]
    (cache_dir() / "rates.json").write_text(json.dumps(known))
    learn(LOSSLESS, plan, reading_s=LOSSLESS.cost.disk_bytes / 0.6e9)
    assert sustained_rates(name)[name] == pytest.approx(0.6e9), "what is so for a week is no moment"


def test_neither_a_short_answer_nor_the_page_cache_says_what_a_drive_does() -> None:
    plan = with_hits(LOSSLESS)
    name = drive_name(DRIVE)
    learn(LOSSLESS, plan, reading_s=1.0, disk_bytes=MIN_DRIVE_BYTES - 1)
    learn(LOSSLESS, plan, direct=False, reading_s=1.0)
    assert sustained_rates(name) == {}
    assert seen_tokens(2), "of the rest they say as much as any"


def busy(cores: float) -> Hardware:
    return replace(UNKNOWN, others=cores, n_cores=2)


def test_company_teaches_what_company_costs_and_nothing_else() -> None:
    plan = with_hits(LOSSLESS, busy(2.0))
    slower = replace(LOSSLESS, seconds=2.2 * 40 * quiet_token_s(plan, LOSSLESS.cost, n_tokens=40, position=20))
    learn(slower, plan, others_s=1.0 * slower.seconds)
    assert seen_tokens(2) == {}
    assert company_cost() == pytest.approx(1.2)
    learn(LOSSLESS, with_hits(LOSSLESS), others_s=1.0 * LOSSLESS.seconds)  # it came during the run
    assert company_cost() == pytest.approx(1.2)


def test_a_plan_in_company_says_both() -> None:
    quiet = with_hits(LOSSLESS)
    plan = with_hits(LOSSLESS, busy(2.0))
    assert plan.decode == quiet.decode
    assert quiet.decode_now == quiet.decode
    assert plan.decode_now is not None
    assert plan.decode is not None
    factor = 1 + USUAL_COMPANY_COST
    assert plan.decode_now.likely.tokens_per_s == pytest.approx(plan.decode.likely.tokens_per_s / factor)
    assert not any("busy now" in line for line in quiet.lines())
    assert any("busy now: other programs use 2.0 of 2 cores" in line for line in plan.lines())
    assert not busy(0.3).is_busy, "a desktop's idle programs"


def test_hits_of_the_latest_tokens_count() -> None:
    plan = LOSSLESS.plan(UNKNOWN)
    plan = replace(plan, sizes=replace(plan.sizes, identity="flash"))
    for wasted in (466, 466, *[1466] * 30):
        learn_tokens(plan, replace(LOSSLESS.cost, wasted=wasted), n_tokens=40, seconds=37.4, position=20)
    last = last_hits("flash", "answers")
    assert last is not None
    assert last.hits == pytest.approx(0.798, abs=0.005)
    assert last.share == pytest.approx(plan.resident_share)
