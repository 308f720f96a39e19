"""The planner: sizes that llama.cpp really allocates, plans that fit and say so, and more of anything that is never slower."""

from __future__ import annotations

import io
import json
import logging
import re
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localrun import cli
from localrun.commands import bench_report, common
from localrun.commands import plan as plan_command
from localrun.engine.engine import Engine
from localrun.engine.facts import Timings
from localrun.engine.llama import Context
from localrun.engine.measure.benchmark import Benchmark, Phase, Split
from localrun.engine.options import EngineOptions
from localrun.engine.planner import boxes, hardware, sizes
from localrun.engine.planner.bars import bars
from localrun.engine.planner.compute_buffers import compute_bytes
from localrun.engine.planner.hardware import ASSUMED_GPU, PROCESS_BYTES, Gpu, Hardware
from localrun.engine.planner.hit_rates import Curve, Learned, Scaled, Seen, _missed, touched
from localrun.engine.planner.placement import fit_dense, gpu_budgets, headroom
from localrun.engine.planner.plan import GpuShare, Placement, Plan, PlanOptions
from localrun.engine.planner.planner import make_plan
from localrun.engine.planner.sizes import ModelSizes, format_of, sizes_of
from localrun.engine.planner.speed import experts_on
from localrun.engine.planner.token_time import TokenTime
from localrun.engine.planner.usual_rates import KEPT, MAX_AGE_S, usual_rates
from localrun.errors import BudgetError, LocalrunError, UsageError
from localrun.offload.cache.profile import RoutingProfile
from localrun.offload.cache.trace import TraceHeader
from localrun.offload.kernels import FfnSpec
from localrun.offload.kernels.probe import probe_cpu
from localrun.offload.kernels.rates import MEMORY_SHARE, CpuRates, ExpertRates
from localrun.offload.model import OffloadOptions, open_offloaded
from localrun.quant.open import open_model
from localrun.quant.precision.solver import Target
from tests.gguf_models import TinyDeepseek4, write_deepseek4
from tests.rpc_server import rpc_server
from tools.simulator.replay import Step, replay_engine
from tools.synthetic_config import FLASH, PRO

GIB = 1 << 30
BOX = Hardware(ram_bytes=60 * GIB, total_ram_bytes=64 * GIB, disk_bytes_per_s=3e9, memory_bytes_per_s=50e9, n_threads=8)


@pytest.fixture(scope="module")
def flash() -> ModelSizes:
    return sizes_of("flash")


def plan_of(model: ModelSizes, ram_gib: float = 62, **values: Any) -> Plan:
    machine = replace(BOX, ram_bytes=int(ram_gib * GIB), total_ram_bytes=int((ram_gib + 2) * GIB))
    options = {name: values.pop(name) for name in ("n_ctx", "kv_type", "ram_bytes") if name in values}
    return make_plan(model, replace(machine, **values), PlanOptions(**options), suggest=False)


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "official", "experts", "expert", "params"),
    [
        ("flash", FLASH, 147_169_738_752, 13_369_344, 284.33e9),
        ("pro", PRO, 822_054_223_872, 35_094_528, 1573.0e9),
    ],
)
def test_built_in_models_have_the_official_sizes(
    name: str, official: dict[str, Any], experts: int, expert: int, params: float, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(official))
    built_in, from_file = sizes_of(name), sizes_of(tmp_path)
    assert replace(from_file, name=built_in.name) == built_in
    assert built_in.expert_file_bytes == experts
    assert built_in.experts[0].file_bytes == expert
    embedding = built_in.shape.n_vocab * built_in.shape.n_embd
    all_weights = (
        built_in.n_copies * 3 * built_in.shape.n_embd * built_in.shape.n_ff + built_in.dense_weights + embedding
    )
    assert all_weights == pytest.approx(params, rel=2e-4)


def test_cache_of_official_models_matches_the_published_figures() -> None:
    """128K and 1M tokens in f16, rings included: 0.845 and 6.72 GiB, 1.210 and 9.63 GiB; llama.cpp pads and keeps a batch."""
    for name, n_ctx, gib in (
        ("flash", 1 << 17, 0.845),
        ("flash", 1 << 20, 6.72),
        ("pro", 1 << 17, 1.210),
        ("pro", 1 << 20, 9.63),
    ):
        model = sizes_of(name)
        kv = model.kv(n_ctx, "f16", 512)
        rows = sum(kv[part] for part in ("CSA rows", "HCA rows", "indexer rows"))
        ring = model.shape.n_layers * 128 * 512 * 2
        assert (rows + ring) / GIB == pytest.approx(gib, rel=0.005), (name, n_ctx)
        assert kv["window"] == model.shape.n_layers * 768 * 512 * 2, "128 rows and a batch of 512, padded"
    assert sizes_of("flash").kv(4096, "f16", 512)["frontiers"] == pytest.approx(11.6 * 2**20, rel=0.01)
    assert sizes_of("pro").kv(4096, "f16", 512)["frontiers"] == pytest.approx(17.8 * 2**20, rel=0.01)


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.mark.parametrize(
    ("n_ctx", "n_batch", "kv_type"),
    [
        (4096, 256, "f16"),
        (40000, 64, "q8_0"),
        (512, 512, "f32"),
        (1 << 17, 64, "f16"),
        (1 << 17, 64, "q8_0"),
        (1 << 20, 64, "f16"),
        (1 << 20, 64, "q8_0"),
    ],
)
def test_llama_allocates_what_was_said(
    engine: Engine, model_path: Path, n_ctx: int, n_batch: int, kv_type: str
) -> None:
    model = sizes_of(model_path)
    log, handler = logging.getLogger("llama.cpp"), _Lines()
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        options = EngineOptions(n_batch=n_batch, kv_type=kv_type)
        Context(engine._loaded.model, options, n_ctx=n_ctx, n_threads=1, all_logits=False).close()
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
    text = "\n".join(handler.lines)
    rows = [float(mib) for mib in re.findall(r"KV buffer size = +([0-9.]+) MiB", text)]
    states = [float(mib) for mib in re.findall(r"state buffer size = +([0-9.]+) MiB", text)]
    buffers = [float(mib) for mib in re.findall(r"compute buffer size = +([0-9.]+) MiB", text)]
    assert rows
    assert states
    assert buffers
    assert model.kv_bytes(n_ctx, kv_type, n_batch) / 2**20 == pytest.approx(
        sum(rows + states), abs=0.02 * len(rows + states)
    )
    # The formula knows llama.cpp's tensors, not how its allocator fits them into each other: never less, at most a third more.
    assert 0.98 * sum(buffers) <= compute_bytes(model, n_ctx, n_batch) / 2**20 <= 1.35 * sum(buffers) + 0.5


def test_sizes_of_a_file_are_its_bytes(model_path: Path) -> None:
    source, model = open_model(model_path), sizes_of(model_path)
    assert model.dense_bytes + model.expert_file_bytes == sum(info.n_bytes for info in source.tensors.values())
    assert model.n_copies == sum(moe.n_experts for moe in source.moe_layers.values())
    assert 0 < model.dense_token_bytes < model.dense_bytes


def test_another_format_is_a_matter_of_converting_only_for_checkpoints(model_path: Path) -> None:
    smaller = sizes_of("flash", base=format_of("q2_k"))
    assert smaller.expert_file_bytes < 0.65 * sizes_of("flash").expert_file_bytes
    with pytest.raises(UsageError, match="already converted"):
        sizes_of(model_path, base=format_of("q2_k"))


# --- plans ------------------------------------------------------------------------------------------------------------


def test_automatic_headroom_is_a_tenth_of_the_machine_and_a_quarter_of_what_little_is_free() -> None:
    assert headroom(20 * GIB, 32 * GIB) == 32 * GIB // 10
    assert headroom(12 * GIB, 16 * GIB) == 2 * GIB
    assert headroom(4 * GIB, 32 * GIB) == GIB


def fixed_bytes(at: Placement) -> int:
    """What must be there whole."""
    return at.dense_bytes + at.kv_bytes + at.compute_bytes


def test_a_plan_stays_within_the_machine(flash: ModelSizes) -> None:
    for ram_gib in (16, 30, 62, 126, 254):
        at = plan_of(flash, ram_gib).placement
        assert at.ram_bytes is not None
        experts = at.ram_experts * flash.mean_slot_bytes + flash.staging_bytes
        assert experts <= at.ram_bytes + 1
        assert fixed_bytes(at) + at.ram_bytes + at.headroom_bytes <= ram_gib * GIB


def test_copies_of_routers_are_counted_where_experts_follow_from_scores() -> None:
    flash = sizes_of_flash()
    at = make_plan(flash, BOX, PlanOptions(n_ctx=4096, n_batch=512)).placement
    assert at.compute_bytes - compute_bytes(flash, 4096, 512) == (43 - 3) * 256 * 4096


@settings(max_examples=40, deadline=None)
@given(
    ram=st.integers(20, 300),
    more=st.integers(0, 200),
    disk=st.floats(0.3, 14),
    context=st.sampled_from([4096, 32768, 262144]),
    change=st.sampled_from(["ram", "disk", "memory", "threads", "drive", "context", "vram", "bits"]),
)
def test_more_of_anything_is_never_slower(ram: int, more: int, disk: float, context: int, change: str) -> None:
    model = sizes_of_flash()
    factor = 1 + more / 100
    machine = replace(BOX, ram_bytes=ram * GIB, total_ram_bytes=(ram + 2) * GIB, disk_bytes_per_s=disk * 1e9)
    options, better, other = PlanOptions(n_ctx=context, position=1024, n_batch=512), machine, model
    after = options
    if change == "ram":
        better = replace(machine, ram_bytes=(ram + more) * GIB)
    elif change == "disk":
        better = replace(machine, disk_bytes_per_s=machine.disk_bytes_per_s * factor)
    elif change == "memory":
        better = replace(machine, memory_bytes_per_s=machine.memory_bytes_per_s * factor)
    elif change == "threads":
        better = replace(machine, n_threads=8 + more)
    elif change == "drive":
        better = replace(machine, n_drives=2)
    elif change == "context":
        after = replace(options, n_ctx=context // 2)
    elif change == "vram":
        machine = replace(machine, gpus=(Gpu(vram_bytes=16 * GIB),))
        better = replace(machine, gpus=(Gpu(vram_bytes=(16 + more) * GIB),))
    else:
        other = sizes_of_flash("q2_k")
    first, second = make_plan(model, machine, options, suggest=False), make_plan(other, better, after, suggest=False)
    assert first.decode is not None
    assert second.decode is not None
    assert first.prefill is not None
    assert second.prefill is not None
    for a, b in ((first.decode, second.decode), (first.prefill, second.prefill)):
        assert b.likely.tokens_per_s >= a.likely.tokens_per_s * (1 - 1e-9)
        assert a.low.tokens_per_s <= a.likely.tokens_per_s <= a.high.tokens_per_s


_SIZES: dict[str, ModelSizes] = {}


def sizes_of_flash(base: str = "mxfp4") -> ModelSizes:
    if base not in _SIZES:
        _SIZES[base] = sizes_of("flash", base=format_of(base))
    return _SIZES[base]


def test_what_can_not_fit_is_refused_with_numbers_and_a_setting_that_fits(flash: ModelSizes) -> None:
    with pytest.raises(BudgetError, match=r"does not fit: dense model .* GiB, KV cache of 1048576 tokens") as refused:
        plan_of(flash, 12, n_ctx=1 << 20)
    assert refused.value.hint is not None
    found = re.match(r"it fits with --context (\d+)( --kv q8_0)?", refused.value.hint)
    assert found is not None, refused.value.hint
    plan_of(flash, 12, n_ctx=int(found[1]), kv_type="q8_0" if found[2] else "f16")
    with pytest.raises(BudgetError) as hopeless:
        plan_of(flash, 4)
    assert "must be free" in str(hopeless.value.hint)
    assert "with --dense q4_k: close other programs" in str(hopeless.value.hint)
    with pytest.raises(BudgetError, match=r"exceed the 62\.00 GiB that are free") as too_much:
        plan_of(flash, 62, ram_bytes=60 * GIB)
    hint = re.search(r"--ram ([0-9.]+)GiB", str(too_much.value.hint))
    assert hint is not None
    plan_of(flash, 62, ram_bytes=int((float(hint[1]) - 0.1) * GIB))


@pytest.mark.parametrize("free_gib", [19.7, 21.5])
def test_what_fits_with_dense_matrices_of_four_bits_is_told_so(free_gib: float) -> None:
    pro, small = sizes_of("pro"), sizes_of("pro", dense=format_of("q4_k"))
    with pytest.raises(BudgetError, match=r"dense model 28.* GiB") as refused:
        plan_of(pro, free_gib)
    found = re.fullmatch(r"it fits with --dense q4_k(?: --context (\d+))?(?: --kv (q8_0))?", str(refused.value.hint))
    assert found is not None, refused.value.hint
    plan_of(small, free_gib, n_ctx=int(found[1] or 0), kv_type=found[2] or "f16")
    foreseen = pro.with_dense(format_of("q4_k"))
    assert dict(foreseen.dense) == pytest.approx(dict(small.dense), rel=0.001)
    assert foreseen.dense_format == small.dense_format
    assert small.with_dense(format_of("q4_k")) is small
    converted = replace(pro, convertible=False)
    with pytest.raises(BudgetError) as refused:
        plan_of(converted, free_gib)
    assert "localrun convert ... --dense q4_k" in str(refused.value.hint)


def test_suggestions_are_plans_of_the_changed_machine(flash: ModelSizes) -> None:
    plan = make_plan(flash, BOX)
    assert plan.decode is not None
    gains = {suggestion.text: suggestion for suggestion in plan.suggestions}
    assert list(gains.values()) == sorted(gains.values(), key=lambda it: (it.phase == "prompts", -it.gain))
    bits = gains["convert --base q2_k"]
    again = make_plan(flash.with_experts(format_of("q2_k")), BOX, suggest=False)
    assert again.decode is not None
    assert bits.tokens_per_s == pytest.approx(again.decode.likely.tokens_per_s)
    assert bits.gain == pytest.approx(bits.tokens_per_s / plan.decode.likely.tokens_per_s)
    assert "with 96 GiB of RAM" in gains
    assert all(suggestion.cost for suggestion in plan.suggestions)
    resident = make_plan(flash, replace(BOX, ram_bytes=400 * GIB, total_ram_bytes=402 * GIB))
    assert not any("RAM" in suggestion.text or "mirror" in suggestion.text for suggestion in resident.suggestions)


def test_larger_batches_are_suggested_most_where_experts_come_from_the_drive(flash: ModelSizes) -> None:
    def gain(ram_gib: int, n_batch: int) -> float:
        box = replace(BOX, ram_bytes=ram_gib * GIB, total_ram_bytes=(ram_gib + 2) * GIB)
        made = make_plan(flash, box, PlanOptions(n_batch=n_batch)).suggestions
        return max([s.gain for s in made if s.phase == "prompts"], default=1.0)

    assert gain(60, 512) > 1.2 * gain(400, 512)
    assert gain(60, 2048) == 1.0


def test_memory_of_several_gpus_serves_the_dense_model_first() -> None:
    free = [24 * GIB, 24 * GIB]
    assert gpu_budgets(free, 20 * GIB, 12 * GIB) == [12 * GIB, 8 * GIB]
    assert gpu_budgets(free, 20 * GIB, 8 * GIB) == [10 * GIB, 10 * GIB]
    assert gpu_budgets(free, 20 * GIB, 30 * GIB) == [10 * GIB, 10 * GIB]  # it can't go there
    assert gpu_budgets([24 * GIB], 12 * GIB, GIB) == [12 * GIB]
    assert gpu_budgets([], GIB, GIB) == []


def test_gpus_take_the_dense_model_then_experts(flash: ModelSizes) -> None:
    small = plan_of(flash, gpus=(Gpu(vram_bytes=8 * GIB),)).placement
    assert 0 < small.dense_share < 1, "layers, which every token needs, come before experts"
    assert plan_of(flash, gpus=(Gpu(vram_bytes=2 * GIB),)).placement.dense_share == 0
    assert plan_of(flash, gpus=(Gpu(vram_bytes=2 * GIB),)).placement.gpu_experts > 0
    large = plan_of(flash, gpus=(Gpu(vram_bytes=24 * GIB), Gpu(vram_bytes=24 * GIB)))
    at = large.placement
    assert at.dense_on_gpu
    assert fixed_bytes(at) - at.embedding_bytes + at.gpu_expert_bytes <= 47 * GIB
    assert at.embedding_bytes == flash.dense["embedding"]
    free, experts = large.machine.ram_bytes, at.ram_experts * flash.mean_slot_bytes + flash.staging_bytes
    assert free is not None
    assert at.embedding_bytes + experts + at.headroom_bytes + PROCESS_BYTES <= free
    assert large.resident_share > plan_of(flash).resident_share + 0.2
    told = make_plan(flash, replace(BOX, gpus=(Gpu(vram_bytes=24 * GIB),)), gpu=GpuShare(), suggest=False)
    assert not told.placement.gpu_experts


def test_a_large_cache_stays_in_ram_where_that_costs_less_than_layers_would(flash: ModelSizes) -> None:
    """It is copied to the GPU for every token."""
    short, long = PlanOptions(n_ctx=32768), PlanOptions(n_ctx=1 << 20)
    card = replace(BOX, gpus=(Gpu(vram_bytes=14 * GIB),))
    plans = {options.n_ctx: make_plan(flash, card, options, suggest=False) for options in (short, long)}
    assert (plans[32768].placement.dense_share, plans[32768].placement.cache_in_ram) == (1, False)
    plan = plans[1 << 20]
    at = plan.placement
    assert (at.dense_share, at.cache_in_ram) == (1, True)
    assert at.kv_bytes > 6 * GIB
    assert fixed_bytes(at) - at.embedding_bytes - at.kv_bytes + at.gpu_expert_bytes <= 14 * GIB
    assert "all on the GPU but the cache" in plan.lines()[2]
    drawn = {bar.name: {segment.name for segment in bar.segments} for bar in bars(plan)}
    assert "cache" in drawn["RAM"]
    assert "cache" not in drawn["GPU"]
    assert plan.decode is not None
    assert plan.prefill is not None
    assert "attention" not in plan.decode.likely.seconds
    assert (
        plan.decode_at(262144).likely.seconds["GPU's bus"] > 20 * plan.decode_at(4096).likely.seconds["GPU's bus"] > 0
    )
    in_ram, on_gpu = (made.prefill.likely.seconds["GPU's bus"] for made in (plan, plans[32768]) if made.prefill)
    assert in_ram > on_gpu
    layers = fit_dense(flash, 8 * GIB, 32768, "f16", 512)
    assert 0 < layers.n_layers < 43, "a small cache is not what makes the difference"
    assert not layers.cache_in_ram
    larger = replace(card, gpus=(Gpu(vram_bytes=24 * GIB),))
    assert make_plan(flash, larger, long, suggest=False).placement.cache_in_ram is False


def test_hit_rates_rise_with_what_is_resident() -> None:
    profile = RoutingProfile("x", {0: 64, 1: 64})
    rng = np.random.default_rng(0)
    for _ in range(300):
        for layer in (0, 1):
            experts = np.unique(np.minimum(63, rng.geometric(0.1, 6))).astype(np.int32)
            profile.record(layer, experts, np.arange(experts.size + 1, dtype=np.int32), 1)
    for rates in (Curve(), Learned(profile, [0, 1])):
        shares = np.linspace(0, 1, 41)
        steady, unsteady = [rates.steady(s) for s in shares], [rates.unsteady(s) for s in shares]
        assert np.all(np.diff(steady) >= 0)
        assert np.all(np.diff(unsteady) >= -1e-12)
        assert all(a >= b for a, b in zip(steady, unsteady, strict=True))
        assert steady[-1] == pytest.approx(1)
        assert unsteady[-1] == pytest.approx(1)
    published = {0.094: 0.588, 0.125: 0.64, 0.156: 0.68, 0.25: 0.774}
    assert [Curve().steady(share) for share in published] == pytest.approx(list(published.values()))


def test_a_hundred_tokens_tell_an_uneven_model_from_chance() -> None:
    rng = np.random.default_rng(3)
    even, uneven = np.full(256, 1 / 256), rng.dirichlet(np.full(256, 0.1))

    def learned(p: npt.NDArray[np.float64]) -> tuple[float, float]:
        """What a profile of a hundred tokens expects of the most used tenth, and what these really get."""
        profile = RoutingProfile("x", {0: 256})
        for _ in range(100):
            experts = np.sort(rng.choice(256, 6, replace=False, p=p)).astype(np.int32)
            profile.record(0, experts, np.arange(7, dtype=np.int32), 1)
        chosen = [expert for _, expert in profile.hottest(26)]
        return Learned(profile, [0]).hottest(26 / 256), float(p[chosen].sum())

    expected, real = learned(even)
    assert expected == pytest.approx(0.1, abs=0.05)
    assert real == pytest.approx(0.1, abs=0.01)
    expected, real = learned(uneven)
    assert expected > 0.5
    assert expected == pytest.approx(real, abs=0.15)


def test_hits_follow_from_the_routing_that_a_run_has_seen() -> None:
    rng = np.random.default_rng(4)
    shares = [rng.dirichlet(np.full(64, 0.5)) for _ in range(4)]

    def tokens(n: int) -> list[list[tuple[int, int]]]:
        return [[(i, int(e)) for i, p in enumerate(shares) for e in rng.choice(64, 6, False, p)] for _ in range(n)]

    counts = [np.zeros(64) for _ in shares]
    for layer, expert in (pair for token in tokens(200) for pair in token):
        counts[layer][expert] += 1
    rates = Seen(counts, 6)
    for share in (0.15, 0.4, 0.7):
        assert rates.steady(share) == pytest.approx(_hits(tokens(600), 4, 64, share), abs=0.06)
    assert rates.steady(1.0) == 1
    assert rates.use().sum() == pytest.approx(1)


def test_the_chance_of_a_miss_is_the_product_of_each_draw_s() -> None:
    n, uses = 40, np.array([0, 1, 2, 7, 39, 40])
    for t in range(n):
        draws = np.arange(t)
        expected = np.prod(np.maximum(n - uses[:, None] - draws, 0) / (n - draws), axis=1)
        np.testing.assert_allclose(_missed(uses, n, t), expected, rtol=1e-12, atol=1e-15)


def test_a_long_run_s_routing_is_looked_at_in_little_memory() -> None:
    n = 32768
    counts = [np.random.default_rng(layer).integers(0, n, 256).astype(np.float64) for layer in range(43)]
    tracemalloc.start()
    try:
        rates = Seen([6 * n * layer / layer.sum() for layer in counts], 6)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
    assert 0 < rates.steady(0.1) < rates.steady(0.5) < 1


def test_sixty_tokens_tell_hits_without_assuming_how_uneven_the_routing_is() -> None:
    """Popular experts by Zipf's law, which an estimate by a Dirichlet distribution takes for more even than they are."""
    rng = np.random.default_rng(5)
    law = 1 / np.arange(1, 257) ** 1.8
    shares = [rng.permutation(law / law.sum()) for _ in range(6)]

    def token() -> list[tuple[int, int]]:
        return [(i, int(e)) for i, p in enumerate(shares) for e in rng.choice(256, 6, False, p)]

    counts = [np.zeros(256) for _ in shares]
    for layer, expert in (pair for _ in range(60) for pair in token()):
        counts[layer][expert] += 1
    rates = Seen(counts, 6)
    for share in (0.06, 0.15, 0.4):  # the last one holds more than the sixty tokens used
        assert rates.steady(share) == pytest.approx(_hits([token() for _ in range(300)], 6, 256, share), abs=0.04)


def _hits(tokens: list[list[tuple[int, int]]], n_layers: int, n_experts: int, share: float) -> float:
    """Hits of the latter half of these tokens in the engine's own slots."""
    header = TraceHeader(identity="x", layers={layer: (n_experts, 6) for layer in range(n_layers)}, created_at=0.0)
    steps = []
    for token in tokens:
        for layer in range(n_layers):
            keys = tuple(sorted({key for key in token if key[0] == layer}))
            steps.append(Step(keys, int(layer == 0), None, dict.fromkeys(keys, 1)))
    return replay_engine(steps, header, int(share * n_layers * n_experts), warm_up=len(steps) // 2).hit_rate


def test_hits_of_one_size_tell_those_of_another() -> None:
    scaled = Scaled(Curve(), 0.077, 0.79)
    assert scaled.steady(0.077) == pytest.approx(0.79)
    assert scaled.steady(0.0) == 0
    assert scaled.steady(1.0) == 1
    # Whole Flash, random weights: a recorded run of 166 tokens, replayed in the engine's own slots.
    assert scaled.steady(0.158) == pytest.approx(0.88, abs=0.02)
    assert Scaled(Curve(), 0.158, 0.88).steady(0.077) == pytest.approx(0.79, abs=0.05)
    even = Scaled(Curve(), 0.25, 0.25)
    assert even.steady(0.5) == pytest.approx(0.5, abs=0.02), "by chance"
    assert even.steady(1.0) == 1
    for rates in (scaled, even):
        steady = [rates.steady(share) for share in np.linspace(0, 1, 101)]
        assert np.all(np.diff(steady) >= 0)
        assert all(rates.unsteady(share) <= rates.steady(share) for share in np.linspace(0, 1, 11))


def test_a_short_profile_promises_nothing_for_changing_topics() -> None:
    profile = RoutingProfile("x", {0: 256})
    experts = np.arange(6, dtype=np.int32)
    for _ in range(200):
        profile.record(0, experts, np.arange(7, dtype=np.int32), 1)
    rates = Learned(profile, [0])
    assert rates.steady(0.1) > 0.95
    assert rates.unsteady(0.1) == Curve().unsteady(0.1)


def test_a_batch_touches_more_experts_the_longer_it_is_and_misses_fewer_the_more_there_are() -> None:
    for rates in (None, Curve()):
        by_length = [touched(rates, 0.3, n_tokens, 6, 256) for n_tokens in (1, 8, 64, 512)]
        assert by_length[0].distinct == pytest.approx(6 / 256, rel=0.01)
        assert all(a.distinct < b.distinct for a, b in pairwise(by_length))
        by_share = [touched(rates, share, 64, 6, 256).missing for share in (0.0, 0.3, 0.7, 1.0)]
        assert all(a > b for a, b in pairwise(by_share))
        assert by_share[-1] == 0
    assert touched(Curve(), 0.0, 64, 6, 256).distinct < touched(None, 0.0, 64, 6, 256).distinct


def test_measured_rates_decide_and_a_gpu_that_shares_the_cores_is_no_second_processor(flash: ModelSizes) -> None:
    def likely(**values: Any) -> tuple[float, float]:
        plan = plan_of(flash, 200, **values)
        assert plan.decode is not None
        assert plan.prefill is not None
        return plan.decode.likely.tokens_per_s, plan.prefill.likely.tokens_per_s

    (types,) = {group.types for group in flash.experts}
    slow = ExpertRates(decode_s=10e-3, few_s=20e-3, many_s=60e-3)
    cpu = CpuRates(dense_bytes_per_s=10e9, dense_macs_per_s=50e9, experts={types: slow})
    faster = replace(cpu, experts={types: slow.times(0.5)})
    assert all(a < b for a, b in zip(likely(cpu=cpu), likely(cpu=faster), strict=True))
    rates = replace(ASSUMED_GPU, decode_bytes_per_s=5e9, batch_macs_per_s=20e9, overlap=0.0)
    gpu = Gpu(vram_bytes=60 * GIB, rates=rates)
    alone = likely(cpu=cpu, gpus=(replace(gpu, rates=replace(rates, overlap=1.0)),))
    assert all(a < b for a, b in zip(likely(cpu=cpu, gpus=(gpu,)), alone, strict=True))
    # Formats that nobody measured are as much slower than assumed as those that somebody did.
    other = flash.with_experts(format_of("q2_k"))
    machine = replace(BOX, cpu=cpu)
    assert experts_on(machine, other).decode_s > 3 * experts_on(BOX, other).decode_s


def test_kernels_are_measured_on_the_model_s_own_formats() -> None:
    spec = FfnSpec((format_of("mxfp4"),) * 3, 256, 128, 10.0)
    rates = probe_cpu([spec, spec], n_threads=1)
    assert list(rates.experts) == [spec.types]
    assert rates.experts[spec.types].decode_s > 0
    assert rates.experts[spec.types].many_s > 0
    assert rates.dense_bytes_per_s > 0
    assert rates.dense_macs_per_s > 0


def test_a_busy_moment_does_not_make_the_machine_slow(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "rates.json"
    assert usual_rates({"memory": 5e9}, quiet=False, path=path) == {"memory": 5e9}, "nothing else is known"
    for _ in range(3):
        assert usual_rates({"memory": 20e9, "dense": 10e9}, path=path) == pytest.approx({"memory": 20e9, "dense": 10e9})
    for _ in range(3 * KEPT):
        slower = usual_rates({"memory": 5e9}, quiet=False, path=path)
    assert slower == {"memory": 20e9}, "a busy day has many starts"
    assert usual_rates({"memory": 90e9}, quiet=False, path=path) == {"memory": 20e9}
    known = json.loads(path.read_text())
    known["rates"]["memory"] = [[when - MAX_AGE_S, rate] for when, rate in known["rates"]["memory"]]
    path.write_text(json.dumps(known))
    assert usual_rates({"memory": 5e9}, quiet=False, path=path) == {"memory": 5e9}, "a week ago"
    path.write_text('{"version": 1, "rates": {"memory": "many"}}')
    assert usual_rates({"memory": 5e9}, path=path) == {"memory": 5e9}


def test_programs_of_lower_priority_count_half(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others used one core, and those of lower priority 0.8 of the second."""
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr("time.sleep", sleep)
    monkeypatch.setattr("time.monotonic", lambda: now)
    monkeypatch.setattr(
        hardware, "seconds_of_others", lambda *, low_priority=True: 100.0 + now * (1.8 if low_priority else 1.0)
    )
    assert hardware.cores_of_others(0.2) == pytest.approx(1.4)


def test_a_machine_that_changes_by_itself_is_planned_as_it_is_now(tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    for _ in range(3):
        usual_rates({"memory": 32e9}, path=path)
    moment = usual_rates({"memory": 50e9}, path=path)["memory"]
    assert moment == pytest.approx((32e9 * 50e9) ** 0.5), "now counts as much as the last ones"
    for _ in range(KEPT):
        lasting = usual_rates({"memory": 50e9}, path=path)["memory"]
    assert lasting == pytest.approx(50e9)


PROBE = """
import math, sys
from dataclasses import asdict
from gguf import GGMLQuantizationType as T
from localrun.engine.planner import hardware
from localrun.ggml.devices import add_rpc_server, gpu_devices
from localrun.offload.gpu.probe import probe_gpu
from localrun.offload.kernels import FfnSpec
add_rpc_server(sys.argv[1])
(device,) = [device for device in gpu_devices() if device.name.startswith("RPC")]
rates = probe_gpu(device, FfnSpec((T.MXFP4,) * 3, 256, 128, math.inf))
numbers = asdict(rates)
assert numbers.pop("measured") and 0 <= numbers.pop("overlap") <= 1, rates
assert all(0 < value < 1e15 for value in numbers.values()), rates
(assumed,) = hardware.measured_gpus([device], probe=False)
assert assumed.vram_bytes == device.free_bytes and not assumed.rates.measured
"""


def test_gpus_are_measured_with_the_expert_path_s_own_work() -> None:
    with rpc_server() as (endpoint, _):  # in a process of its own: ggml can't forget a device, nor bear that it is gone
        done = subprocess.run([sys.executable, "-c", PROBE, endpoint], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


# --- the command ------------------------------------------------------------------------------------------------------

GIVEN = ["--no-probe", "--machine-ram", "64GiB", "--machine-drive-rate", "3GB/s"]
GIVEN += ["--machine-memory-rate", "50GB/s", "--machine-threads", "8"]


def test_the_command_needs_no_weights(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "pro", *GIVEN, "--machine-vram", "24GiB", "--json"]) == 0
    value = json.load(io.StringIO(capsys.readouterr().out))
    assert value["model"]["n_experts"] == 61 * 384
    assert value["machine"]["origin"]["disk_bytes_per_s"] == "given"
    assert value["decode"]["low"]["tokens_per_s"] <= value["decode"]["likely"]["tokens_per_s"]
    assert sum(value["placement"]["kv"].values()) == value["placement"]["kv_bytes"]
    for part in (
        "format",
        "model",
        "machine",
        "settings",
        "placement",
        "hit_rates",
        "decode",
        "prefill",
        "suggestions",
    ):
        assert part in value
    assert cli.main(["plan", "flash", *GIVEN]) == 0
    lines = capsys.readouterr().out.splitlines()
    headed = [line.split()[0] for line in lines if line[:1].strip()]  # others continue the one above
    assert headed == ["model", "machine", "memory", "experts", "speed", "where", "answers", "prompts", "what", "to"]


def test_the_command_refuses_what_can_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "pro", "--no-probe", "--machine-ram", "16GiB"]) == 1
    error = capsys.readouterr().err
    assert "does not fit" in error
    assert "hint:" in error
    assert cli.main(["plan", "flash", "--kv", "q9"]) == 2
    assert cli.main(["plan", "flash", "--threads", "-1"]) == 2
    assert cli.main(["plan", "flash", "--no-probe", "--machine-ram", "64GiB", "--threads", "0"]) == 0, (
        "as in the commands that load"
    )
    assert cli.main(["plan", "nowhere"]) == 2


def test_limits_are_limits_and_the_machine_is_described_apart(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "flash", *GIVEN, "--ram", "20GiB", "--context", "8192", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["placement"]["ram_bytes"] == 20 << 30
    assert value["machine"]["total_ram_bytes"] == 64 << 30
    changes = {suggestion["change"]: suggestion["cost"] for suggestion in value["suggestions"]}
    assert not any("ram" in change or "--context" in change for change in changes), "those are the user's own limits"
    assert "on the drive" in changes["convert --base q2_k"]
    for limit, has in ((["--ram", "65GiB"], "has 64.00 GiB"), (["--vram", "1GiB"], "GPUs have 0 B")):
        assert cli.main(["plan", "flash", *GIVEN, *limit]) == 1
        assert has in capsys.readouterr().err
    assert cli.main(["plan", "flash", *GIVEN, "--context", "1048577"]) == 2
    assert "1048576" in capsys.readouterr().err


def test_what_is_taken_from_this_machine_is_marked(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "flash", "--no-probe", "--machine-ram", "64GiB"]) == 0
    machine = capsys.readouterr().out.splitlines()[1]
    assert "threads (this machine's)" in machine
    assert "RAM free," in machine
    assert cli.main(["plan", "flash", "--box", "gpu-24-ram-64"]) == 0
    machine = capsys.readouterr().out.splitlines()[1]
    assert "this machine" not in machine
    assert "64.00 GiB RAM" in machine
    assert cli.main(["plan", "flash", "--box", "mainframe"]) == 2
    assert "gpu-24-ram-64" in capsys.readouterr().err


def test_boxes_have_the_names_that_help_shows() -> None:
    assert tuple(boxes.BY_SLUG) == plan_command.BOX_NAMES


def test_a_config_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(LocalrunError, match=r"config\.json"):
        sizes.sizes_of(tmp_path)


# --- loads and measurements -------------------------------------------------------------------------------------------


def test_a_load_announces_its_plan_and_follows_it(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    announced: list[Plan] = []
    options = EngineOptions(n_ctx=512, n_batch=64, n_threads=1, ram_bytes=8 << 20)
    with Engine.open(model_path, options, announce=announced.append, learn=False) as engine:
        assert announced == [engine.plan]
        assert announced[0].placement.ram_bytes == options.ram_bytes
        assert announced[0].n_ctx == engine.facts.n_ctx
        assert len(announced[0].lines()) == 6
    tiny = Hardware(ram_bytes=100 << 20, total_ram_bytes=1 << 30)
    monkeypatch.setattr(hardware, "detect", lambda *args, **values: tiny)
    with pytest.raises(BudgetError, match="does not fit"):
        Engine.open(model_path, options, learn=False)


def test_a_context_beyond_the_trained_length_is_refused(model_path: Path) -> None:
    trained = sizes.sizes_of(model_path).shape.n_ctx_train
    with pytest.raises(UsageError, match=f"exceeds the {trained} tokens this model was trained for"):
        Engine.open(model_path, EngineOptions(n_ctx=trained + 1), learn=False)


def test_bench_says_how_wrong_the_plan_was(flash: ModelSizes) -> None:
    plan = plan_of(flash)
    expected = plan.decode_at(100).likely.tokens_per_s
    phase = Phase(kind="decode", context=100, n_tokens=10, seconds=30 / expected, step_ms=(1.0,) * 10, split=None)
    result = Benchmark(phases=(phase,), skipped=(), rss_start_bytes=0, peak_rss_bytes=0)
    line, source = bench_report.prediction_lines(result, plan)
    assert source == "predicted with published curve"
    assert "200% too fast" in line
    assert "outside the range" in line
    assert bench_report.prediction_lines(result, None) == []
    split = Split(dense_s=4.0, compute_s=2.0, wait_s=1.0, other_s=0.5, matrices_s=3.0, attention_s=0.25)
    _, terms, _ = bench_report.prediction_lines(replace(result, phases=(replace(phase, split=split),)), plan)
    parts = plan.decode_at(100).likely.seconds
    assert f"dense matrices {1e3 * parts['dense model in RAM']:.1f} / 300.0" in terms
    assert f"small operations {1e3 * parts['layers']:.1f} / 125.0" in terms
    assert "/ 25.0, small" in terms
    assert f"experts {1e3 * parts['experts in RAM']:.1f} / 200.0" in terms
    assert f"waiting {1e3 * parts['drive']:.1f} / 100.0" in terms
    timings = Timings(new_tokens=10, decode_s=1.0)
    assert "(planned: " in common.speed(timings, plan.to_json())
    assert "planned" not in common.speed(timings, {})
    fast = {"decode": {"low": {"tokens_per_s": 98.76}, "high": {"tokens_per_s": 1234.5}}}
    assert "(planned: 98.8 to 1,234)" in common.speed(timings, fast)


def test_a_plan_counts_the_slots_and_buffers_that_a_load_takes(tmp_path: Path) -> None:
    path = write_deepseek4(tmp_path / "model.gguf", TinyDeepseek4(ratios=(0, 4, 128)))[0]
    sizes = sizes_of(path)
    with open_offloaded(open_model(path), OffloadOptions()) as model:
        residency = model.pool.residency
        assert sizes.staging_bytes == residency.store.staging_bytes
        assert sizes.floor_bytes == residency.floor_bytes + residency.store.staging_bytes
        assert sizes.expert_slot_bytes == residency.table.arena.size_bytes
        assert sizes.expert_slot_bytes + sizes.staging_bytes == model.ram_bytes


def test_suggestions_leave_alone_what_the_user_set(flash: ModelSizes) -> None:
    free = make_plan(flash, BOX, PlanOptions(n_ctx=100_000, n_batch=512))
    set_by_the_user = make_plan(flash, BOX, PlanOptions(n_ctx=100_000, n_batch=512, fixed=frozenset({"kv", "batch"})))
    assert any(s.text == "--batch 2048" for s in free.suggestions)
    left = {s.text for s in free.suggestions if not s.text.startswith(("--kv", "--batch"))}
    assert {s.text for s in set_by_the_user.suggestions} == left


def test_a_byte_that_every_token_reads_costs_what_the_box_makes_of_it(flash: ModelSizes) -> None:
    """All of its time where a token waits for RAM, none where it waits for the drive anyhow."""

    def saved_s(ram_gib: int) -> float:
        time = TokenTime(flash.shape, Target(ram_bytes=ram_gib * GIB))
        large, small = (
            time.seconds(dense_bytes=9 * GIB, dense_token_bytes=n * GIB, expert_bytes=140 * GIB) for n in (8, 4)
        )
        return large - small

    reading_s = 4 * GIB / (MEMORY_SHARE * hardware.ASSUMED_MEMORY_BYTES_PER_S)
    assert saved_s(160) == pytest.approx(reading_s)
    assert saved_s(9) == pytest.approx(0, abs=1e-9), "the drive hides all of it"
    time = TokenTime(flash.shape, Target(ram_bytes=160 * GIB))
    in_ram_s = time.seconds(dense_bytes=9 * GIB, dense_token_bytes=8 * GIB, expert_bytes=140 * GIB)
    gpu = TokenTime(flash.shape, Target(ram_bytes=64 * GIB, vram_bytes=24 * GIB))
    assert gpu.seconds(dense_bytes=9 * GIB, dense_token_bytes=8 * GIB, expert_bytes=70 * GIB) < in_ram_s
