"""The box simulator: the engine's slot table decides what is read, and slower resources take longer."""

from __future__ import annotations

from dataclasses import replace

import pytest

from localrun.engine.planner.boxes import BOXES
from localrun.engine.planner.hardware import Hardware
from localrun.engine.planner.plan import PlanOptions
from localrun.engine.planner.planner import make_plan
from localrun.engine.planner.sizes import ModelSizes, sizes_of
from localrun.offload.cache.trace import TraceHeader
from tools import plan_table
from tools.simulator.box import simulate
from tools.simulator.replay import replay_engine, steps_of
from tools.simulator.traces import Workload, synthetic_calls

GIB = 1 << 30
LAYERS = 3


@pytest.fixture(scope="module")
def slice_of_flash() -> ModelSizes:
    flash = sizes_of("flash")
    (group,) = flash.experts
    group = replace(group, count=LAYERS * flash.shape.n_experts)
    shape = replace(flash.shape, n_layers=LAYERS, moe_layers=tuple(range(LAYERS)))
    return replace(flash, shape=shape, experts=(group,))


def test_time_follows_from_what_the_slot_table_misses(slice_of_flash: ModelSizes) -> None:
    header = TraceHeader("synthetic", dict.fromkeys(range(LAYERS), (256, 6)), 0.0)
    calls = synthetic_calls(Workload(LAYERS, 256, 6, 200, 0, 64, 32), seed=1)
    machine = Hardware(
        ram_bytes=60 * GIB, total_ram_bytes=64 * GIB, disk_bytes_per_s=2e9, memory_bytes_per_s=20e9, n_threads=2
    )
    results = {}
    for name, box, ram in (
        ("little", machine, 2 * GIB),
        ("fast drive", replace(machine, disk_bytes_per_s=8e9), 2 * GIB),
        ("more", machine, 5 * GIB),
        ("all", machine, 12 * GIB),
    ):
        plan = make_plan(slice_of_flash, box, PlanOptions(ram_bytes=ram, n_ctx=4096), suggest=False)
        results[name] = simulate(name, slice_of_flash, plan, calls, header, warm_up=0.0)
        assert results[name].prefill is not None
    little, fast, more, everything = (results[name] for name in ("little", "fast drive", "more", "all"))
    assert little.decode < fast.decode
    assert little.decode < more.decode < everything.decode
    assert little.hit_rate == fast.hit_rate < more.hit_rate
    assert little.disk_gb == fast.disk_gb > more.disk_gb
    all_calls = replay_engine(steps_of(calls), header, everything.slots)
    assert all_calls.misses <= LAYERS * 256, "each expert is read once"


def test_the_table_has_a_row_per_box_and_model(slice_of_flash: ModelSizes) -> None:
    rows = plan_table.rows([slice_of_flash], BOXES, PlanOptions())
    assert len(rows) == len(BOXES)
    text = plan_table.table(rows)
    assert text.count("\n") == len(rows) + 1
    assert "100%" in text
