"""Whole tokens correct the plan: what recorded runs show, and that a plan that knows one predicts the next."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from localrun.engine.planner import speed
from localrun.engine.planner.hardware import (
    USUAL_COMPANY_COST,
    Known,
    drive_name,
    seen_key,
    seen_name,
    seen_tokens,
)
from localrun.engine.planner.hit_rates import HitRates, hit_rates
from localrun.engine.planner.last_runs import company_cost, last_hits
from localrun.engine.planner.plan import GpuShare, Plan, resident_shares
from localrun.engine.planner.planner import make_plan
from localrun.engine.planner.speed import HIDDEN, USEFUL, computing, waiting
from localrun.engine.planner.token_rates import (
    LEAST_POSITION,
    MIN_DRIVE_BYTES,
    MIN_TOKENS,
    Spent,
    hits_seen,
    learn_tokens,
    quiet_seconds,
    token_ratios,
)
from localrun.engine.planner.usual_rates import MAX_AGE_S, remember_rates, sustained_rates
from localrun.paths import cache_dir
from tests.engine.planner.recorded import DRIVE, RUNS, Recorded

GIB = 1 << 30
LOSSLESS, LOSSLESS_AGAIN = RUNS["lossless"], RUNS["lossless again"]
TWO_BITS, TWO_BITS_AGAIN = RUNS["two bits"], RUNS["two bits again"]
IN_COMPANY = RUNS["lossless in company"]
WITHIN = 0.25
"""What a plan may be off by."""

each_run = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)


@pytest.fixture(autouse=True)
def _nothing_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCALRUN_CACHE_DIR", str(tmp_path))


def learn(run: Recorded, plan: Plan, *, direct: bool = True, **changed: float) -> None:
    cost = replace(run.cost, **changed)
    learn_tokens(plan, cost, n_tokens=run.n_tokens, seconds=run.seconds, position=20, direct=direct)


def off(run: Recorded, plan: Plan) -> float:
    """How much longer than measured a token takes by the plan, relatively."""
    return 1 / plan.decode_at(20, now=True).likely.tokens_per_s / run.token_s - 1


# --- the arithmetic against recorded runs -----------------------------------------------------------------------------


@each_run
def test_a_first_plan_is_right_given_the_hits(run: Recorded) -> None:
    """Rates come from the machine's probes alone, in company as on a quiet machine; how the model routes is given. What single
    terms cost in company varies, so only those of quiet runs are compared."""
    plan = run.plan_with_hits()
    likely, n = plan.decode_at(20, now=True).likely, run.n_tokens
    assert abs(off(run, plan)) < WITHIN
    if run.others == 0:
        assert likely.disk_bytes == pytest.approx(run.cost.disk_bytes / n, rel=0.1)
        assert likely.seconds["dense model in RAM"] == pytest.approx(run.cost.matrices_s / n, rel=WITHIN)
        assert likely.seconds["experts in RAM"] == pytest.approx(run.cost.experts_s / n, rel=WITHIN)
        # The drive gave between 1.2 and 1.6 GB/s in these runs.
        assert likely.seconds["drive"] == pytest.approx(run.cost.waiting_s / n, rel=WITHIN, abs=0.15 * run.token_s)


@each_run
def test_the_range_of_a_first_plan_holds_what_was_measured(run: Recorded) -> None:
    """Nothing is known of the model's routing."""
    plan = run.plan(hit_rates("never seen", {}))
    assert plan.rates.source == "published curve"
    assert plan.decode_at(20, now=True).covers(1 / run.token_s)


BROKEN = {
    "matrices": ("INSIDE", {"dense model in RAM": 0.45}),
    "small operations": ("LAYER_VALUE_S", 1.4e-6),
    "packing": ("PACK_WEIGHTS_PER_CORE", 1.6e9),
    "hidden reads": ("HIDDEN_READS", (0.0, 0.0, 0.0)),
    "the drive": ("DISK_SHARE", (0.4, 0.4, 0.4)),
    "useful reads": ("USEFUL_READS", 0.4),
    "company": ("COMPANY", {}),
}


@pytest.mark.parametrize("name", BROKEN)
def test_each_term_counts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """These runs notice if one of the planner's terms is wrong."""
    attribute, value = BROKEN[name]
    monkeypatch.setattr(speed, attribute, value)
    plans = [(run, run.plan_with_hits()) for run in RUNS.values()]
    if name == "hidden reads":  # of a token that is planned too slow and too fast elsewhere, it may hide
        waits = [
            (run.cost.waiting_s, run.n_tokens * plan.decode_at(20, now=True).likely.seconds["drive"])
            for run, plan in plans
        ]
        assert any(planned > (1 + WITHIN) * measured for measured, planned in waits)
    else:
        assert any(abs(off(run, plan)) > WITHIN for run, plan in plans)


@pytest.mark.parametrize(("run", "hits"), [(LOSSLESS, 0.695), (LOSSLESS_AGAIN, 0.696), (TWO_BITS, 0.822)])
def test_hits_are_what_was_read_without_wrong_guesses(run: Recorded, hits: float) -> None:
    plan = run.plan()
    assert hits_seen(plan, run.cost) == pytest.approx(hits, abs=0.001)
    assert hits_seen(plan, replace(run.cost, evictions=10)) is None, "memory isn't full: everything is read once"
    assert hits_seen(plan, replace(run.cost, requests=0)) is None


def test_reads_hide_behind_computing_but_not_more_than_there_is() -> None:
    assert waiting(0.8, 0.6, 0.5) == pytest.approx(0.4)
    assert waiting(2.0, 0.6, 0.5) == pytest.approx(1.4)
    assert waiting(0.0, 0.6, 0.5) == 0


def test_a_drive_that_is_not_steady_widens_the_range_and_is_shown_as_one() -> None:
    steady = LOSSLESS.plan()
    wide = LOSSLESS.plan(disk_spread=(0.6, 1.5))
    a, b = steady.decode_at(20), wide.decode_at(20)
    assert b.low.tokens_per_s < a.low.tokens_per_s
    assert b.likely == a.likely
    assert b.high.tokens_per_s >= a.high.tokens_per_s
    assert any("drive 1.43 GB/s" in line for line in steady.lines())
    assert any("drive 0.86 to 2.15 GB/s" in line for line in wide.lines())


# --- one run teaches the next plan ------------------------------------------------------------------------------------


def taught(run: Recorded) -> tuple[dict[str, object], HitRates]:
    """What the next plan knows of the machine, and the hit rates, after one run with a drive that was probed in a bad second."""
    learn(run, run.plan(disk_bytes_per_s=0.74e9))
    return known_now()


def known_now() -> tuple[dict[str, object], HitRates]:
    known: dict[str, object] = {"disk_bytes_per_s": 0.74e9, "seen": seen_tokens(2)}
    drive = sustained_rates(drive_name(DRIVE)).get(drive_name(DRIVE))
    if drive is not None:
        known |= {"disk_bytes_per_s": drive, "drive_seen": True}
    return known, hit_rates(LOSSLESS.sizes.identity, dict.fromkeys(range(43), 256))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("lossless", "lossless again"),
        ("lossless again", "lossless"),
        ("two bits", "two bits again"),
        ("lossless", "lossless in company"),
    ],
)
def test_one_run_teaches_the_next_plan(first: str, second: str) -> None:
    machine, rates = taught(RUNS[first])
    assert abs(off(RUNS[second], RUNS[second].plan(rates, **machine))) < WITHIN


def test_one_run_teaches_the_plan_of_other_formats() -> None:
    """Two bits planned after a lossless run: the same machine, and the same router in a cache twice as large."""
    machine, rates = taught(LOSSLESS)
    assert abs(off(TWO_BITS, TWO_BITS.plan(rates, **machine))) < WITHIN


def test_one_run_in_company_teaches_the_next() -> None:
    """Hits, the drive and what company costs, but none of the rates that others had lowered."""
    machine, rates = taught(IN_COMPANY)
    assert machine["seen"] == {}
    cost = company_cost()
    assert cost is not None
    for run in (IN_COMPANY, LOSSLESS_AGAIN):
        assert abs(off(run, run.plan(rates, **machine, company_cost=cost))) < WITHIN


def test_a_measurement_teaches_a_measurement_before_answers_do() -> None:
    shapes = dict.fromkeys(range(43), 256)
    plan = LOSSLESS.plan()
    identity = plan.sizes.identity
    for kind, wasted in (("answers", 69), ("measurements", 1069)):
        cost = replace(LOSSLESS.cost, wasted=wasted)
        learn_tokens(plan, cost, n_tokens=30, seconds=24.2, position=20, kind=kind)  # type: ignore[arg-type]
    share = plan.resident_share
    answers, measurements = hit_rates(identity, shapes), hit_rates(identity, shapes, learned=False)
    assert answers.steady(share) == pytest.approx(0.695, abs=0.001)
    assert measurements.steady(share) == pytest.approx(0.825, abs=0.001)
    assert hit_rates("another", shapes).source == "published curve"


def test_ratios_are_independent_of_what_a_probe_met() -> None:
    """The kernels were probed in a bad moment; the tokens were not. The next probe is good, and the plan stays the same."""
    plan = LOSSLESS.plan_with_hits()
    cpu = plan.machine.cpu
    assert cpu is not None
    slow = replace(cpu, dense_bytes_per_s=10e9)
    learn(LOSSLESS, replace(plan, machine=replace(plan.machine, cpu=slow)))
    for found in (cpu, slow):
        knowing = replace(plan, machine=replace(plan.machine, cpu=found, seen=seen_tokens(2)))
        dense_s = knowing.decode_at(20).likely.seconds["dense model in RAM"]
        assert dense_s == pytest.approx(LOSSLESS.cost.matrices_s / 30, rel=0.01)


def test_tokens_that_read_nothing_are_another_kind() -> None:
    plan = LOSSLESS.plan_with_hits()
    cost = replace(LOSSLESS.cost, disk_bytes=0, waiting_s=0.0, matrices_s=30 * 0.2)
    learn_tokens(plan, cost, n_tokens=30, seconds=12.0, position=20)
    seen = seen_tokens(2)
    formats = plan.sizes.formats
    assert set(seen) == {seen_key(formats, reads=False), seen_key("", reads=False)}
    assert HIDDEN not in seen[seen_key(formats, reads=False)]
    assert replace(plan.machine, seen=seen).known(formats, reads=True) == Known()


def test_ratios_are_those_of_assumed_rates_to_rates_in_tokens() -> None:
    plan = LOSSLESS.plan_with_hits()
    cost, seconds = LOSSLESS.cost, LOSSLESS.seconds
    shares = resident_shares(plan.sizes, plan.machine, plan.placement)
    reference = plan.machine.reference
    by_reference = computing(plan.sizes, shares, reference, 0.0, cost.disk_bytes / 30, position=20, kv_type="f16")
    ratios = token_ratios(plan, cost, reference, n_tokens=30, seconds=seconds, position=20)
    assert ratios.pop(HIDDEN) == pytest.approx(1 - cost.waiting_s / cost.reading_s)
    assert ratios.pop(USEFUL) == pytest.approx(1 - 69 * 13369344 / cost.disk_bytes)
    assert ratios["dense model in RAM"] == pytest.approx(30 * by_reference["dense model in RAM"] / cost.matrices_s)
    assert ratios.keys() == {"dense model in RAM", "layers", "experts in RAM"}


@pytest.mark.parametrize("position", [20, LEAST_POSITION - 1, LEAST_POSITION, 32_768])
def test_a_short_context_says_nothing_about_attention_in_a_long_one(position: int) -> None:
    plan = LOSSLESS.plan_with_hits()
    planned_s = plan.decode_at(32_768).likely.seconds["attention"]
    long = position >= LEAST_POSITION
    attention_s = 30 * (2 * plan.decode_at(position).likely.seconds["attention"] if long else 3.9e-3)
    cost = replace(LOSSLESS.cost, attention_s=attention_s)
    learn_tokens(plan, cost, n_tokens=30, seconds=LOSSLESS.seconds, position=position)
    knowing = replace(plan, machine=replace(plan.machine, seen=seen_tokens(2)))
    found_s = knowing.decode_at(32_768).likely.seconds["attention"]
    assert found_s == pytest.approx(planned_s * (2 if long else 1), rel=0.01)


def test_too_few_tokens_and_those_of_gpus_teach_nothing() -> None:
    plan = LOSSLESS.plan_with_hits()
    learn_tokens(plan, LOSSLESS.cost, n_tokens=MIN_TOKENS - 1, seconds=15.0, position=20)
    on_gpu = make_plan(plan.sizes, plan.machine, suggest=False, gpu=GpuShare(dense_share=1.0, expert_bytes=GIB))
    learn(LOSSLESS, on_gpu)
    assert seen_tokens(2) == {}


def test_what_was_not_measured_is_not_learned() -> None:
    plan = LOSSLESS.plan_with_hits()
    cost = replace(LOSSLESS.cost, attention_s=0.0, reading_s=0.0)
    ratios = token_ratios(plan, cost, plan.machine, n_tokens=30, seconds=24.2, position=20)
    assert HIDDEN not in ratios
    assert "attention" not in ratios


def test_names_of_another_form_and_other_threads_are_left_alone() -> None:
    remember_rates({"tokens: something, 2 threads": 5.0, seen_name("layers", "x", 4): 2.0})
    assert seen_tokens(2) == {}
    assert seen_tokens(4) == {"x": {"layers": 2.0}}
    given = replace(LOSSLESS.machine, seen={"any": {"layers": 2.0}}, drive_seen=True)
    assert given.given(memory_bytes_per_s=9e9).seen == {}
    assert given.given(disk_bytes_per_s=9e9).seen == given.seen
    assert given.given(disk_bytes_per_s=9e9).drive == ""
    assert not given.given(disk_bytes_per_s=9e9).drive_seen


def test_differences_are_what_lies_between() -> None:
    before, after = Spent(matrices_s=1.0, disk_bytes=10), Spent(matrices_s=3.0, attention_s=0.5, disk_bytes=30)
    assert after - before == Spent(matrices_s=2.0, attention_s=0.5, disk_bytes=20)


# --- drive and company ------------------------------------------------------------------------------------------------


def test_a_drive_is_as_fast_as_the_last_runs_have_read() -> None:
    plan = LOSSLESS.plan_with_hits()
    name = drive_name(DRIVE)
    learn(LOSSLESS, plan, reading_s=LOSSLESS.cost.disk_bytes / 1.4e9)
    assert sustained_rates(name)[name] == pytest.approx(1.4e9)
    for _ in range(2):
        learn(LOSSLESS, plan, reading_s=LOSSLESS.cost.disk_bytes / 1.6e9)
    learn(LOSSLESS, plan, reading_s=LOSSLESS.cost.disk_bytes / 0.6e9)
    assert sustained_rates(name)[name] == pytest.approx(1.5e9), "one that was slow decides nothing"
    known = json.loads((cache_dir() / "rates.json").read_text())
    known["rates"][name] = [[when - MAX_AGE_S, rate] for when, rate in known["rates"][name]]
    (cache_dir() / "rates.json").write_text(json.dumps(known))
    learn(LOSSLESS, plan, reading_s=LOSSLESS.cost.disk_bytes / 0.6e9)
    assert sustained_rates(name)[name] == pytest.approx(0.6e9), "the others are too old"


def test_neither_a_short_answer_nor_the_page_cache_says_what_a_drive_does() -> None:
    plan = LOSSLESS.plan_with_hits()
    name = drive_name(DRIVE)
    learn(LOSSLESS, plan, reading_s=1.0, disk_bytes=MIN_DRIVE_BYTES - 1)
    learn(LOSSLESS, plan, direct=False, reading_s=1.0)
    assert sustained_rates(name) == {}
    assert seen_tokens(2), "of the rest they say as much as any"


def test_company_teaches_what_company_costs_and_nothing_else() -> None:
    plan = LOSSLESS.plan_with_hits(others=1.0)
    quiet = quiet_seconds(plan, LOSSLESS.cost, n_tokens=30, position=20)
    token_s = sum(s * (1 + 0.6 * speed.COMPANY[name]) for name, s in quiet.items())
    slower = replace(LOSSLESS, seconds=30 * token_s + LOSSLESS.cost.waiting_s)
    learn(slower, plan, others_s=1.0 * slower.seconds)
    assert seen_tokens(2) == {}
    assert company_cost() == pytest.approx(1.2), "0.6 with others on one of two cores"
    learn(LOSSLESS, LOSSLESS.plan_with_hits(), others_s=1.0 * LOSSLESS.seconds)  # it came during the run
    assert company_cost() == pytest.approx(1.2)


def test_a_plan_in_company_says_both() -> None:
    quiet = LOSSLESS.plan_with_hits()
    plan = LOSSLESS.plan_with_hits(others=2.0)
    assert plan.decode == quiet.decode
    assert quiet.decode_now == quiet.decode
    assert plan.decode_now is not None
    assert plan.decode is not None
    alone, now = plan.decode.likely.seconds, plan.decode_now.likely.seconds
    for name, share in speed.COMPANY.items():
        assert now[name] == pytest.approx((1 + share * USUAL_COMPANY_COST) * alone[name])
    assert now["drive"] == alone["drive"], "the drive doesn't care"
    assert not any("busy now" in line for line in quiet.lines())
    assert any("busy now: other programs use 2.0 of 2 cores" in line for line in plan.lines())
    assert not replace(LOSSLESS.machine, others=0.3).is_busy, "a desktop's idle programs"


def test_hits_of_the_latest_tokens_count() -> None:
    plan = LOSSLESS.plan()
    for wasted in (69, 69, *[1069] * 30):
        learn_tokens(plan, replace(LOSSLESS.cost, wasted=wasted), n_tokens=30, seconds=24.2, position=20)
    last = last_hits(plan.sizes.identity, "answers")
    assert last is not None
    assert last.hits == pytest.approx(0.825, abs=0.005)
    assert last.share == pytest.approx(plan.resident_share)
