"""Plans, for any machine and before reading anything, what fits where, how fast it will be, and what would make it faster.

Used by `localrun plan`, by every load (it decides the engine's budgets) and by simulations. A `Plan` is
made from sizes (`sizes.py`), a machine (`hardware.py`), places (`placement.py`), hit rates (`hit_rates.py`) and rates of bytes
(`speed.py`). A load decides about its GPUs itself (`gpu.py`) and tells the plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from localrun.engine.options import EngineOptions
from localrun.engine.planner.compute_buffers import compute_bytes
from localrun.engine.planner.hardware import Hardware
from localrun.engine.planner.hit_rates import HitRates, Scaled, Seen, hit_rates
from localrun.engine.planner.placement import place
from localrun.engine.planner.plain import predict_plain
from localrun.engine.planner.plan import GpuShare, Plan, PlanOptions, resident_shares
from localrun.engine.planner.sizes import ModelSizes
from localrun.engine.planner.speed import predict_decode, predict_prefill
from localrun.engine.planner.suggestions import suggestions

DEFAULT_CONTEXT = 32768
"""Default context in tokens, if the model was trained for more."""

SMALL_BYTES = 256 << 20
"""Models below run from the processor's caches and in milliseconds: no prediction."""


def plan_load(
    sizes: ModelSizes,
    options: EngineOptions,
    machine: Hardware,
    gpu: GpuShare | None = None,
    *,
    suggest: bool = False,
    learned: bool = True,
) -> Plan:
    """The plan for a load; `placement.ram_bytes` is its budget.

    Args:
        gpu: what goes to GPUs, already decided; None: nothing.
        learned: the run will use the model's routing profile.

    Raises:
        BudgetError: it can't fit; the message has the numbers, the hint the nearest setting that fits.
    """
    shapes = dict.fromkeys(sizes.shape.moe_layers, sizes.shape.n_experts)
    return make_plan(
        sizes,
        machine,
        PlanOptions.of(options),
        suggest=suggest,
        rates=hit_rates(sizes.identity, shapes, learned=learned),
        gpu=gpu or GpuShare(),
    )


def with_routing(plan: Plan, counts: Sequence[npt.NDArray[np.float64]]) -> Plan:
    """A load's plan, knowing how often its run has used each expert, by layer: hits from that, unless earlier runs have shown them.
    Predictions are made anew when asked for (`decode_at`, `prefill_of`)."""
    if not counts or plan.decode is None or isinstance(plan.rates, Scaled):
        return plan
    return replace(plan, rates=Seen(counts, plan.sizes.shape.n_used))


def make_plan(
    sizes: ModelSizes,
    machine: Hardware,
    options: PlanOptions | None = None,
    *,
    suggest: bool = True,
    rates: HitRates | None = None,
    gpu: GpuShare | None = None,
) -> Plan:
    """Places a model on a machine and predicts its speed.

    Args:
        suggest: also look for faster alternatives.
        rates: instead of the user's own or the published ones.
        gpu: what goes to GPUs; None: as much as fits.

    Raises:
        BudgetError: as `plan_load`.
    """
    options = options or PlanOptions()
    n_ctx = options.n_ctx or min(sizes.shape.n_ctx_train or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    placement = place(sizes, machine, options, n_ctx, gpu)
    if rates is None:
        rates = hit_rates(sizes.identity, dict.fromkeys(sizes.shape.moe_layers, sizes.shape.n_experts))
    decode = prefill = plain = None
    if sizes.dense_bytes + sizes.expert_file_bytes >= SMALL_BYTES:
        at = resident_shares(sizes, machine, placement, adaptive=options.adaptive)
        position = min(n_ctx // 4, 8192) if options.position is None else options.position
        decode = predict_decode(sizes, at, machine, rates, position=position, kv_type=options.kv_type)
        if sizes.n_copies:
            plain = predict_plain(
                sizes,
                machine,
                rates,
                context_bytes=placement.kv_bytes + compute_bytes(sizes, n_ctx, options.n_batch),
                vram_bytes=options.vram_bytes,
                position=position,
                kv_type=options.kv_type,
            )
        prompt_tokens = min(options.prompt_tokens, n_ctx)
        prefill = predict_prefill(
            sizes, at, machine, rates, prompt_tokens=prompt_tokens, n_batch=options.n_batch, kv_type=options.kv_type
        )
    plan = Plan(
        sizes=sizes,
        machine=machine,
        options=options,
        n_ctx=n_ctx,
        placement=placement,
        decode=decode,
        prefill=prefill,
        plain=plain,
        rates=rates,
    )
    if not suggest or decode is None:
        return plan

    def again(sizes: ModelSizes, machine: Hardware, options: PlanOptions) -> Plan:
        return make_plan(sizes, machine, options, suggest=False, rates=rates, gpu=gpu)

    return replace(plan, suggestions=tuple(suggestions(plan, again)))
