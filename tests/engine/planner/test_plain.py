"""A plan compares itself with llama.cpp's own way of running the model, and says where its figures come from."""

from __future__ import annotations

from dataclasses import replace

import pytest

from localrun.engine.planner.boxes import BY_SLUG
from localrun.engine.planner.hardware import Gpu, Hardware
from localrun.engine.planner.placement import GPU_HEADROOM_BYTES
from localrun.engine.planner.plain import MXFP4_SLOWER
from localrun.engine.planner.plan import Plan
from localrun.engine.planner.planner import make_plan
from localrun.engine.planner.sizes import ModelSizes, format_of, sizes_of
from localrun.offload.kernels.rates import CpuRates

GIB = 1 << 30
AS_FAST = "plain llama.cpp with the experts on the CPU would be just as fast here"


@pytest.fixture(scope="module")
def flash_q2() -> ModelSizes:
    return sizes_of("flash", base=format_of("q2_k"))


def plan_of(sizes: ModelSizes, machine: Hardware) -> Plan:
    return make_plan(sizes, machine, suggest=False)


def large(ram_gib: int, **values: object) -> Hardware:
    return replace(BY_SLUG["ram-128"].hardware, ram_bytes=ram_gib * GIB, total_ram_bytes=(ram_gib + 4) * GIB, **values)  # type: ignore[arg-type]


def test_a_model_that_is_all_in_ram_without_a_gpu_gains_nothing(flash_q2: ModelSizes) -> None:
    plan = plan_of(flash_q2, large(252))
    assert plan.plain is not None
    assert plan.decode is not None
    ours, theirs = dict(plan.decode.likely.seconds), dict(plan.plain.seconds)
    assert ours.pop("attention") < theirs.pop("attention")
    assert ours == theirs
    assert plan.plain_is_as_fast
    assert AS_FAST in plan.lines()[4]
    assert plan.to_json()["plain_llama_cpp"]["as_fast"] is True


def test_a_card_that_holds_the_dense_model_and_no_experts_gains_nothing(flash_q2: ModelSizes) -> None:
    at = plan_of(flash_q2, large(252)).placement
    dense = at.dense_bytes + at.kv_bytes + at.compute_bytes + GPU_HEADROOM_BYTES
    card = Gpu.described(dense, bytes_per_s=900e9)
    assert plan_of(flash_q2, large(252, gpus=(card,))).plain_is_as_fast
    with_experts = Gpu.described(dense + 20 * GIB, bytes_per_s=900e9)
    assert not plan_of(flash_q2, large(252, gpus=(with_experts,))).plain_is_as_fast


def test_slower_kernels_count() -> None:
    plan = plan_of(sizes_of("flash"), large(252))
    assert plan.plain is not None
    assert plan.decode is not None
    ours, theirs = (rate.seconds["experts in RAM"] for rate in (plan.decode.likely, plan.plain))
    assert theirs == pytest.approx(MXFP4_SLOWER * ours)


@pytest.mark.parametrize("slug", ["ram-32", "gpu-24-ram-64", "gpu-24-ram-128"])
def test_where_experts_are_read_or_on_a_card_llama_cpp_is_slower(flash_q2: ModelSizes, slug: str) -> None:
    plan = plan_of(flash_q2, BY_SLUG[slug].hardware)
    assert not plan.plain_is_as_fast
    assert AS_FAST not in "\n".join(plan.lines())


def test_lines_say_where_figures_come_from(flash_q2: ModelSizes) -> None:
    card = Gpu.described(24 * GIB)
    measured = replace(card, rates=replace(card.rates, measured=True))
    origin = {"memory_bytes_per_s": "measured", "disk_bytes_per_s": "assumed"}
    cpu = CpuRates(experts={}, dense_bytes_per_s=50e9, dense_macs_per_s=1e12)
    machine = large(100, gpus=(card, measured), origin=origin)
    lines = plan_of(flash_q2, machine).lines()
    assert "memory 65.0 GB/s (measured)" in lines[1]
    assert "drive 6.00 GB/s (assumed)" in lines[1]
    assert "free (rates assumed)" in lines[1]
    assert "free (rates measured)" in lines[1]
    assert "(estimated from the model's shape)" in lines[2]
    assert "(prediction from assumed kernels)" in lines[4]
    assert "(prediction from measured kernels)" in plan_of(flash_q2, replace(machine, cpu=cpu)).lines()[4]
