"""A plan's words and its JSON: every figure is the plan's, and what is unknown or assumed is called so."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from localrun.engine.planner.hardware import ASSUMED_GPU, Gpu, Hardware
from localrun.engine.planner.plan import Plan, PlanOptions, Suggestion
from localrun.engine.planner.planner import make_plan
from localrun.engine.planner.sizes import sizes_of
from localrun.engine.planner.text import plan_json, plan_lines
from localrun.units import format_size

GIB = 1 << 30
BOX = Hardware(ram_bytes=60 * GIB, total_ram_bytes=64 * GIB, disk_bytes_per_s=3e9, memory_bytes_per_s=50e9, n_threads=8)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(sizes_of("flash"), BOX, PlanOptions(n_ctx=8192), suggest=False)


def words(plan: Plan) -> dict[str, str]:
    """What each of the six lines says."""
    lines = plan_lines(plan)
    assert [line.split(maxsplit=1)[0] for line in lines] == ["model", "machine", "memory", "experts", "speed", "faster"]
    return {line.split(maxsplit=1)[0]: line.split(maxsplit=1)[1] for line in lines}


def test_six_lines_with_the_plan_s_figures(plan: Plan) -> None:
    said, at = words(plan), plan.placement
    assert plan.decode is not None
    assert said["model"].startswith("DeepSeek-V4-Flash, 43 layers, dense ")
    assert "11008 experts 137.06 GiB (11008 in MXFP4)" in said["model"]
    assert said["machine"] == "60.00 GiB of 64.00 GiB RAM free, memory 50.0 GB/s, drive 3.00 GB/s, 8 threads, no GPU"
    assert f"f16 cache of 8192 tokens {format_size(at.kv_bytes)}" in said["memory"]
    assert "all in RAM" in said["memory"]
    assert said["experts"].startswith(f"{at.ram_experts} of 11008 in ")
    assert f"{plan.decode.likely.disk_bytes / 1e9:.2f} GB read per token" in said["experts"]
    low, high = plan.decode.low.tokens_per_s, plan.decode.high.tokens_per_s
    assert said["speed"].startswith(f"answers {low:.2f} to {high:.2f} tokens/s, prompts ")
    assert "(prediction from assumed kernels)" in said["speed"]
    assert said["faster"] == "nothing the planner knows of"


def test_what_is_assumed_or_measured_is_called_so(plan: Plan) -> None:
    origin = {
        "ram_bytes": "this machine's",
        "n_threads": "measured",
        "disk_bytes_per_s": "measured",
        "memory_bytes_per_s": "given",
    }
    machine = replace(BOX, origin=origin, n_drives=2)
    assert words(replace(plan, machine=machine))["machine"] == (
        "60.00 GiB of 64.00 GiB RAM free (this machine's), memory 50.0 GB/s, 2 drives, each 3.00 GB/s (measured), 8 threads, no GPU"
    )


def test_a_gpu_and_what_is_on_it() -> None:
    card = Gpu(name="card", vram_bytes=24 * GIB, rates=ASSUMED_GPU)
    plan = make_plan(sizes_of("flash"), replace(BOX, gpus=(card,)), PlanOptions(), suggest=False)
    said = words(plan)
    assert said["machine"].endswith("card 24.00 GiB free (rates assumed)")
    assert "all on the GPU" in said["memory"]
    assert f", {plan.placement.gpu_experts} on the GPU" in said["experts"]


def test_three_suggestions_for_answers_and_all_for_prompts(plan: Plan) -> None:
    made = tuple(Suggestion(text=f"--s{n}", cost=f"cost {n}", gain=2.0, tokens_per_s=n + 0.5) for n in range(4))
    prompts = Suggestion(text="--batch 2048", cost="more", gain=1.5, tokens_per_s=40.0, phase="prompts")
    said = words(replace(plan, suggestions=(*made, prompts)))["faster"]
    assert said.split("; ") == [
        "--s0: 0.5 tokens/s, cost 0",
        "--s1: 1.5 tokens/s, cost 1",
        "--s2: 2.5 tokens/s, cost 2",
        "--batch 2048: prompts 40 tokens/s, more",
    ]
    rates = [
        set(each) & {"decode_tokens_per_s", "prefill_tokens_per_s"}
        for each in plan_json(replace(plan, suggestions=(made[0], prompts)))["suggestions"]
    ]
    assert rates == [{"decode_tokens_per_s"}, {"prefill_tokens_per_s"}]


def test_a_model_too_small_to_predict_has_no_speed(plan: Plan) -> None:
    small = replace(plan, decode=None, prefill=None)
    said = words(small)
    assert (said["speed"], said["faster"]) == ("model too small to predict", "-")
    value = plan_json(small)
    assert (value["decode"], value["prefill"]) == (None, None)


def test_json_has_every_figure(plan: Plan) -> None:
    value = json.loads(json.dumps(plan_json(plan)))
    assert plan.decode is not None
    likely = plan.decode.likely
    assert value["decode"]["likely"]["tokens_per_s"] == likely.tokens_per_s
    assert sum(value["decode"]["likely"]["ms_per_token"].values()) >= 0.999e3 / likely.tokens_per_s
    assert value["settings"] == {
        "n_ctx": 8192,
        "kv_type": "f16",
        "n_batch": plan.options.n_batch,
        "batch_reason": plan.batch_reason,
        "prompt_tokens": plan.options.prompt_tokens,
    }
    assert value["placement"]["resident_share"] == plan.resident_share
    assert value["machine"]["cpu"] is None
    assert value["model"]["experts"] == [
        {"type": g.name, "count": g.count, "file_bytes": g.file_bytes, "slot_bytes": g.slot_bytes}
        for g in plan.sizes.experts
    ]
