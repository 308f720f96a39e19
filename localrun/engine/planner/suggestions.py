"""Suggests what would make a model faster, by planning it on a changed machine or with changed options."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from gguf import GGMLQuantizationType

from localrun.engine.planner.hardware import Hardware
from localrun.engine.planner.placement import MIN_CONTEXT
from localrun.engine.planner.plan import Plan, PlanOptions, Suggestion
from localrun.engine.planner.quality import exactness
from localrun.engine.planner.sizes import ModelSizes, padded
from localrun.errors import BudgetError
from localrun.units import format_size

Again = Callable[[ModelSizes, Hardware, PlanOptions], Plan]
"""Plans something else."""

_SMALLER = (
    GGMLQuantizationType.MXFP4,
    GGMLQuantizationType.Q3_K,
    GGMLQuantizationType.Q2_K,
    GGMLQuantizationType.IQ2_XXS,
)
"""Formats of experts that a suggestion may go down to, one after the other."""

_SMALLER_DENSE = (GGMLQuantizationType.Q6_K, GGMLQuantizationType.Q4_K)
"""Likewise of dense matrices."""

_RAM_SIZES = tuple(n << 30 for n in (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536))

LARGE_BATCH = 2048
"""Tokens of a prompt per step that are suggested: four times the usual ones, for a few hundred MiB."""

_WORTH = 1.05
"""A suggestion must gain 5 %."""


def suggestions(plan: Plan, again: Again) -> list[Suggestion]:
    """Worthwhile changes: those that speed up answers, best first, then those for prompts."""
    assert plan.decode is not None
    assert plan.prefill is not None
    base = plan.decode.likely.tokens_per_s
    result = []
    for text, cost, changed_sizes, machine, options in _changes(plan):
        try:
            changed = again(changed_sizes, machine, options)
        except BudgetError:
            continue
        assert changed.decode is not None
        gain = changed.decode.likely.tokens_per_s / base
        if gain >= _WORTH:
            rate = changed.decode.likely.tokens_per_s
            result.append(Suggestion(text=text, cost=cost, gain=gain, tokens_per_s=rate))
    result.sort(key=lambda suggestion: -suggestion.gain)
    return result + _larger_steps(plan, again)


def _larger_steps(plan: Plan, again: Again) -> list[Suggestion]:
    """More tokens of a prompt per step than somebody has set, where that makes prompts faster and answers hardly slower."""
    assert plan.decode is not None
    assert plan.prefill is not None
    if (
        plan.batch_reason
        or "batch" in plan.options.fixed
        or plan.options.n_batch >= LARGE_BATCH
        or plan.n_ctx < LARGE_BATCH
    ):
        return []
    try:
        changed = again(plan.sizes, plan.machine, replace(plan.options, n_batch=LARGE_BATCH))
    except BudgetError:
        return []
    assert changed.decode is not None
    assert changed.prefill is not None
    rate = changed.prefill.likely.tokens_per_s
    gain = rate / plan.prefill.likely.tokens_per_s
    if gain < _WORTH or changed.decode.likely.tokens_per_s * _WORTH < plan.decode.likely.tokens_per_s:
        return []
    more = changed.placement.compute_bytes - plan.placement.compute_bytes
    cost = f"{format_size(more)} more for buffers"
    return [Suggestion(text=f"--batch {LARGE_BATCH}", cost=cost, gain=gain, tokens_per_s=rate, phase="prompts")]


def _changes(plan: Plan) -> Iterator[tuple[str, str, ModelSizes, Hardware, PlanOptions]]:
    """Each change in words, as a command or as an option, with its cost. The user's own choices are kept."""
    sizes, machine, options = plan.sizes, plan.machine, plan.options
    total = machine.total_ram_bytes
    if total is not None and machine.ram_bytes is not None and options.ram_bytes is None:
        larger = next((size for size in _RAM_SIZES if size > 1.15 * total), None)
        if larger is not None:
            more = replace(machine, ram_bytes=machine.ram_bytes + larger - total, total_ram_bytes=larger)
            yield f"with {larger >> 30} GiB of RAM", f"{format_size(larger - total)} more RAM", sizes, more, options
    if machine.n_drives == 1:
        cost = f"a copy of {format_size(sizes.expert_file_bytes + sizes.dense_bytes)} on a second drive"
        yield "--mirror DIR", cost, sizes, replace(machine, n_drives=2), options
    for kind in _SMALLER if sizes.from_checkpoint else ():
        smaller = sizes.with_experts(kind) if sizes.n_copies else sizes
        if smaller.expert_file_bytes < 0.95 * sizes.expert_file_bytes:
            cost = f"{format_size(smaller.expert_file_bytes + smaller.dense_bytes)} on the drive, {exactness(kind)}"
            yield f"convert --base {kind.name.lower()}", cost, smaller, machine, options
    for kind in _SMALLER_DENSE if sizes.from_checkpoint and "dense" not in options.fixed else ():
        smaller = sizes.with_dense(kind)
        if smaller.dense_bytes < 0.95 * sizes.dense_bytes:
            now, then = format_size(sizes.dense_bytes), format_size(smaller.dense_bytes)
            cost = f"{then} of dense matrices instead of {now}, less accurate answers"
            change = f"--dense {kind.name.lower()}"
            yield change if sizes.convertible else f"convert {change}", cost, smaller, machine, options
    if plan.n_ctx > 2 * MIN_CONTEXT and not options.n_ctx:
        less = replace(options, n_ctx=padded(plan.n_ctx // 2))
        yield f"--context {less.n_ctx}", "a shorter conversation", sizes, machine, less
    if options.kv_type in ("f16", "bf16", "f32") and "kv" not in options.fixed:
        yield "--kv q8_0", "a quantized KV cache", sizes, machine, replace(options, kv_type="q8_0")
