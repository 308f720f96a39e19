"""The batch that the planner chooses for prompts, and who may choose it instead."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from localrun.api.planning import Machine, plan_with
from localrun.config import Settings
from localrun.engine.engine import Engine
from localrun.engine.options import DEFAULT_BATCH, EngineOptions
from localrun.engine.planner.batch import (
    ANSWER_TOKENS,
    BATCHES,
    PROMPT_TOKENS,
    WORTH,
    BatchChoice,
    Candidate,
    choose_batch,
)
from localrun.engine.planner.cards import card_of
from localrun.engine.planner.hardware import Gpu, Hardware, described
from localrun.engine.planner.hit_rates import Curve
from localrun.engine.planner.plan import Plan, PlanOptions
from localrun.engine.planner.planner import make_plan, plan_load
from localrun.engine.planner.sizes import ModelSizes, sizes_of
from localrun.errors import BudgetError

GIB = 1 << 30
FULL = BudgetError("does not fit")


def box(ram_gib: int) -> Hardware:
    return described(ram_bytes=ram_gib * GIB, n_threads=8, disk_bytes_per_s=3e9, memory_bytes_per_s=60e9)


@pytest.fixture(scope="module")
def flash() -> ModelSizes:
    return sizes_of("flash")


def of(rates: Mapping[int, tuple[float, float] | None]) -> Callable[[int], Candidate]:
    """(prompts, answers) in tokens/s by batch; None: does not fit."""

    def predict(n_batch: int) -> Candidate:
        known = rates.get(n_batch)
        if known is None:
            raise FULL
        return Candidate(
            n_batch=n_batch,
            prompt_tokens_per_s=known[0],
            answer_tokens_per_s=known[1],
            buffer_bytes=n_batch << 20,
        )

    return predict


def test_the_smallest_batch_that_is_hardly_slower_than_the_best_is_chosen() -> None:
    even = dict.fromkeys(BATCHES, (10.0, 1.0))
    assert choose_batch(32768, of(even)) == BatchChoice(n_batch=64, reason="128 would gain little")
    faster = even | {1024: (20.0, 1.0), 2048: (20.1, 1.0)}
    chosen = choose_batch(32768, of(faster))
    assert chosen.n_batch == 1024
    assert chosen.reason == "prompts 2.00x as fast as with 512, for 512.00 MiB more; 2048 would gain little"
    seconds = PROMPT_TOKENS / 10 + ANSWER_TOKENS
    for gain, n_batch in ((1.001 * WORTH, 2048), (0.999 * WORTH, 64)):
        rates = even | {2048: (PROMPT_TOKENS / (seconds / gain - ANSWER_TOKENS), 1.0)}
        assert choose_batch(32768, of(rates)).n_batch == n_batch, gain


def test_answers_count_too() -> None:
    rates = dict.fromkeys(BATCHES, (10.0, 1.0)) | {512: (20.0, 1.0), 1024: (25.0, 0.8), 2048: (30.0, 0.5)}
    assert choose_batch(32768, of(rates)).n_batch == 512


def test_what_does_not_fit_or_exceeds_the_context_is_not_chosen() -> None:
    rising = {n: (n / 32, 1.0) for n in BATCHES}
    assert choose_batch(32768, of(rising)).n_batch == 2048
    assert choose_batch(1000, of(rising)).n_batch == 512
    assert choose_batch(40, of({40: (1.0, 1.0)})).n_batch == 40
    chosen = choose_batch(32768, of(rising | {1024: None}))
    assert chosen.n_batch == 512
    assert chosen.reason.endswith("; more do not fit")
    with pytest.raises(BudgetError) as refused:
        choose_batch(32768, of({}))
    assert refused.value is FULL


def seconds_of(plan: Plan) -> float:
    assert plan.decode is not None
    return PROMPT_TOKENS / plan.prefill_of(PROMPT_TOKENS).likely.tokens_per_s + (
        ANSWER_TOKENS / plan.decode.likely.tokens_per_s
    )


@pytest.mark.parametrize("ram_gib", [24, 64, 256])
def test_the_plan_has_the_batch_with_the_least_time(flash: ModelSizes, ram_gib: int) -> None:
    chosen = make_plan(flash, box(ram_gib), suggest=False, rates=Curve())
    each = [make_plan(flash, box(ram_gib), PlanOptions(n_batch=n), suggest=False, rates=Curve()) for n in BATCHES]
    assert chosen.options.n_batch in BATCHES
    assert seconds_of(chosen) <= WORTH * min(map(seconds_of, each)) + 1e-9
    same = next(plan for plan in each if plan.options.n_batch == chosen.options.n_batch)
    assert chosen.placement == same.placement
    assert not any(plan.batch_reason for plan in each)
    said = next(line for line in chosen.lines() if line.startswith("speed"))
    assert f"in batches of {chosen.options.n_batch} ({chosen.batch_reason})" in said
    assert chosen.to_json()["settings"]["batch_reason"] == chosen.batch_reason


def test_experts_from_the_drive_want_larger_batches_than_experts_in_ram(flash: ModelSizes) -> None:
    streamed, resident = (make_plan(flash, box(n), suggest=False, rates=Curve()).options.n_batch for n in (32, 256))
    assert resident < streamed


def test_a_small_batch_gains_nothing_from_experts_on_the_gpu_that_it_does_not_use(flash: ModelSizes) -> None:
    """96 GiB hold two thirds of the experts; a batch of 64 tokens uses about as many, but not the same ones."""
    machine = replace(box(256), gpus=(Gpu.of_card(card_of("RTX PRO 6000")),))
    each = [make_plan(flash, machine, PlanOptions(n_batch=n), suggest=False, rates=Curve()) for n in BATCHES]
    rates = [plan.prefill_of(PROMPT_TOKENS).likely.tokens_per_s for plan in each]
    assert rates == sorted(rates)
    assert make_plan(flash, machine, suggest=False, rates=Curve()).options.n_batch > 512


def test_what_was_set_is_kept_and_a_larger_one_suggested(flash: ModelSizes) -> None:
    by_plan = make_plan(flash, box(64), rates=Curve())
    assert not any(s.text.startswith("--batch") for s in by_plan.suggestions)
    settings = Settings().changed(batch=96)
    by_user = plan_with(
        "flash", settings, Machine(ram="64GiB", threads=8, drive_rate=3e9, memory_rate=60e9), probe=False
    )
    assert (by_user.options.n_batch, by_user.batch_reason) == (96, "")
    load = plan_load(flash, EngineOptions(n_batch=96), box(64), suggest=True)
    assert load.options.n_batch == 96
    assert any(s.text.startswith("--batch") for s in load.suggestions)


def test_a_batch_that_was_chosen_before_is_the_plans(flash: ModelSizes) -> None:
    plan = plan_load(flash, EngineOptions(), box(64), batch=BatchChoice(n_batch=128, reason="as GPUs have room"))
    assert (plan.options.n_batch, plan.batch_reason) == (128, "as GPUs have room")


def test_a_load_computes_in_the_batch_of_its_plan(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = EngineOptions(n_ctx=1024, n_threads=1, ram_bytes=64 << 20)
    with Engine.open(model_path, options, learn=False) as engine:
        assert engine.plan is not None
        assert engine.facts.n_batch == engine.plan.options.n_batch == DEFAULT_BATCH, "too small to predict"
    monkeypatch.setattr("localrun.engine.planner.planner.DEFAULT_BATCH", 32)
    with Engine.open(model_path, options, learn=False) as engine, engine.session() as session:
        assert engine.plan is not None
        assert engine.facts.n_batch == engine.plan.options.n_batch == 32
        steps: list[int] = []
        session.feed([1] * 70, progress=lambda done, total: steps.append(done))
        assert steps == [32, 64, 70]
    with Engine.open(model_path, replace(options, n_batch=48), learn=False) as engine:
        assert engine.facts.n_batch == 48
