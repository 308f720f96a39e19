"""What is suggested: changes that gain, best first, with their cost; nothing the user has decided; nothing that can't be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from gguf import GGMLQuantizationType

from localrun.engine.planner.hardware import Hardware
from localrun.engine.planner.plan import Plan, PlanOptions
from localrun.engine.planner.planner import make_plan
from localrun.engine.planner.sizes import ModelSizes, sizes_of
from localrun.engine.planner.suggestions import LARGE_BATCH, suggestions
from localrun.errors import BudgetError

GIB = 1 << 30
BOX = Hardware(ram_bytes=60 * GIB, total_ram_bytes=64 * GIB, disk_bytes_per_s=3e9, memory_bytes_per_s=50e9, n_threads=8)
Change = tuple[ModelSizes, Hardware, PlanOptions]


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(sizes_of("flash"), BOX, PlanOptions(n_batch=512), suggest=False)


def faster(plan: Plan, *, answers: float = 1.0, prompts: float = 1.0) -> Plan:
    """The same plan at other rates."""

    def scaled(span: Any, factor: float) -> Any:
        seconds = {name: value / factor for name, value in span.likely.seconds.items()}
        return replace(
            span, likely=replace(span.likely, tokens_per_s=span.likely.tokens_per_s * factor, seconds=seconds)
        )

    return replace(plan, decode=scaled(plan.decode, answers), prefill=scaled(plan.prefill, prompts))


class Planner:
    """Plans again: notes what was changed, and makes some of it faster."""

    def __init__(self, plan: Plan, **gains: float) -> None:
        self.plan, self.gains = plan, gains
        self.changes: dict[str, Change] = {}

    def __call__(self, sizes: ModelSizes, machine: Hardware, options: PlanOptions) -> Plan:
        name = self.name(sizes, machine, options)
        self.changes[name] = sizes, machine, options
        gain = self.gains.get(name, 1.0)
        if gain == 0:
            raise BudgetError("does not fit")
        return faster(self.plan, prompts=gain) if name == "batch" else faster(self.plan, answers=gain)

    def name(self, sizes: ModelSizes, machine: Hardware, options: PlanOptions) -> str:
        before = self.plan
        if machine.n_drives != before.machine.n_drives:
            return "mirror"
        if machine.total_ram_bytes != before.machine.total_ram_bytes:
            return "ram"
        if options.n_batch != before.options.n_batch:
            return "batch"
        if options.kv_type != before.options.kv_type:
            return "kv"
        if options.n_ctx != before.options.n_ctx:
            return "context"
        if sizes.dense_bytes != before.sizes.dense_bytes:
            return f"dense_{sizes.dense_format.name.lower()}"
        return sizes.experts[0].name.lower()


def found(plan: Plan, **gains: float) -> list[str]:
    return [suggestion.text for suggestion in suggestions(plan, Planner(plan, **gains))]


def test_only_what_gains_a_twentieth_is_suggested_best_first(plan: Plan) -> None:
    assert found(plan) == []
    assert found(plan, mirror=1.049, ram=1.06, kv=1.2, q2_k=1.1) == [
        "--kv q8_0",
        "convert --base q2_k",
        "with 96 GiB of RAM",
    ]


def test_what_does_not_fit_is_left_out(plan: Plan) -> None:
    assert found(plan, mirror=0, ram=1.5, batch=0) == ["with 96 GiB of RAM"]


def test_a_suggestion_says_the_rate_the_gain_and_the_cost(plan: Plan) -> None:
    assert plan.decode is not None
    (ram,) = suggestions(plan, Planner(plan, ram=1.5))
    assert (ram.gain, ram.cost, ram.phase) == (pytest.approx(1.5), "32.00 GiB more RAM", "answers")
    assert ram.tokens_per_s == pytest.approx(1.5 * plan.decode.likely.tokens_per_s)


def test_more_ram_is_the_next_size_that_is_sold_and_all_of_it_is_free(plan: Plan) -> None:
    planner = Planner(plan)
    suggestions(plan, planner)
    _, machine, _ = planner.changes["ram"]
    assert (machine.total_ram_bytes, machine.ram_bytes) == (96 * GIB, 92 * GIB)
    assert planner.changes["mirror"][1].n_drives == 2
    assert planner.changes["context"][2].n_ctx <= plan.n_ctx // 2 + 256


def test_larger_steps_come_last_and_only_where_answers_stay_as_fast(plan: Plan) -> None:
    assert found(plan, batch=1.5, ram=1.1) == ["with 96 GiB of RAM", f"--batch {LARGE_BATCH}"]
    assert found(plan, batch=1.04) == []

    def slower(sizes: ModelSizes, machine: Hardware, options: PlanOptions) -> Plan:
        return faster(plan, answers=0.9, prompts=1.5)

    assert suggestions(plan, slower) == []


def test_what_the_user_has_set_stays(plan: Plan) -> None:
    fixed = replace(plan, options=replace(plan.options, ram_bytes=GIB, n_ctx=8192, fixed=frozenset({"kv", "batch"})))
    planner = Planner(fixed)
    suggestions(fixed, planner)
    assert planner.changes.keys().isdisjoint({"ram", "context", "kv", "batch"})
    assert "mirror" in planner.changes


def test_smaller_dense_matrices_are_an_option_of_a_checkpoint_and_another_conversion_of_a_converted_model(
    plan: Plan,
) -> None:
    assert found(plan, dense_q6_k=1.1, dense_q4_k=1.2) == ["--dense q4_k", "--dense q6_k"]
    converted = replace(plan, sizes=replace(plan.sizes, convertible=False))
    assert found(converted, dense_q4_k=1.2) == ["convert --dense q4_k"]
    (four,) = suggestions(plan, Planner(plan, dense_q4_k=1.2))
    assert four.cost == "4.65 GiB of dense matrices instead of 8.57 GiB, less accurate answers"
    given = replace(plan, options=replace(plan.options, fixed=frozenset({"dense"})))
    assert found(given, dense_q4_k=1.2) == []
    small = replace(plan, sizes=sizes_of("flash", dense=GGMLQuantizationType.Q6_K))
    assert found(small, dense_q4_k=1.2) == []
