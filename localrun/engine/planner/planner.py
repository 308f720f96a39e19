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

from localrun.engine.options import DEFAULT_BATCH, EngineOptions
from localrun.engine.planner.batch import PROMPT_TOKENS as TYPICAL_PROMPT
from localrun.engine.planner.batch import BatchChoice, Candidate, choose_batch
from localrun.engine.planner.compute_buffers import compute_bytes
from localrun.engine.planner.hardware import Hardware
from localrun.engine.planner.hit_rates import HitRates, Scaled, Seen, hit_rates
from localrun.engine.planner.placement import place
from localrun.engine.planner.plain import predict_plain
from localrun.engine.planner.plan import GpuShare, Plan, PlanOptions, resident_shares, usual_position
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
    batch: BatchChoice | None = None,
    suggest: bool = False,
    learned: bool = True,
) -> Plan:
    """The plan for a load; `placement.ram_bytes` is its budget.

    Args:
        gpu: what goes to GPUs, already decided; None: nothing.
        batch: already chosen; None: as `options` say, or by this plan.
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
        batch=batch,
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
    batch: BatchChoice | None = None,
) -> Plan:
    """Places a model on a machine and predicts its speed.

    Args:
        suggest: also look for faster alternatives.
        rates: instead of the user's own or the published ones.
        gpu: what goes to GPUs; None: as much as fits.
        batch: instead of the options' or, if they leave it to the planner, of `batch_for`.

    Raises:
        BudgetError: as `plan_load`.
    """
    options = options or PlanOptions()
    n_ctx = options.n_ctx or min(sizes.shape.n_ctx_train or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    if rates is None:
        rates = hit_rates(sizes.identity, dict.fromkeys(sizes.shape.moe_layers, sizes.shape.n_experts))
    if not options.n_batch and batch is None:
        batch = batch_for(sizes, machine, options, rates, gpu)
    if batch is not None:
        options = replace(options, n_batch=batch.n_batch)
    placement = place(sizes, machine, options, n_ctx, gpu)
    decode = prefill = plain = None
    if is_large(sizes):
        at = resident_shares(sizes, machine, placement, adaptive=options.adaptive)
        position = usual_position(n_ctx) if options.position is None else options.position
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
        batch_reason=batch.reason if batch is not None else "",
    )
    if not suggest or decode is None:
        return plan

    def again(sizes: ModelSizes, machine: Hardware, options: PlanOptions) -> Plan:
        return make_plan(sizes, machine, options, suggest=False, rates=rates, gpu=gpu)

    return replace(plan, suggestions=tuple(suggestions(plan, again)))


def is_large(sizes: ModelSizes) -> bool:
    """Large enough to predict its speed."""
    return sizes.dense_bytes + sizes.expert_file_bytes >= SMALL_BYTES


def batch_for(
    sizes: ModelSizes, machine: Hardware, options: PlanOptions, rates: HitRates, gpu: GpuShare | None = None
) -> BatchChoice:
    """The batch for prompts that suits a model on a machine (`batch.py`).

    Args:
        options: the others.
        gpu: what goes to GPUs; None: as much as fits.

    Raises:
        BudgetError: the model fits with none.
    """
    n_ctx = options.n_ctx or min(sizes.shape.n_ctx_train or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    if not is_large(sizes):
        return BatchChoice(n_batch=min(DEFAULT_BATCH, n_ctx), reason="")
    position = min(n_ctx // 4, 8192)

    def predict(n_batch: int) -> Candidate:
        placement = place(sizes, machine, replace(options, n_batch=n_batch), n_ctx, gpu)
        at, kv_type = resident_shares(sizes, machine, placement, adaptive=options.adaptive), options.kv_type
        n_tokens = min(TYPICAL_PROMPT, n_ctx)
        prompts = predict_prefill(sizes, at, machine, rates, prompt_tokens=n_tokens, n_batch=n_batch, kv_type=kv_type)
        answers = predict_decode(sizes, at, machine, rates, position=position, kv_type=kv_type)
        return Candidate(
            n_batch=n_batch,
            prompt_tokens_per_s=prompts.likely.tokens_per_s,
            answer_tokens_per_s=answers.likely.tokens_per_s,
            buffer_bytes=placement.compute_bytes + placement.kv_bytes,
        )

    return choose_batch(n_ctx, predict)
