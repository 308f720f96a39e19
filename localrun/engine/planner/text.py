"""A plan in six lines for people, and as JSON for programs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from localrun.engine.planner.bars import bars_json
from localrun.engine.planner.hardware import Hardware
from localrun.engine.planner.speed import Range
from localrun.offload.kernels.rates import CpuRates
from localrun.units import format_rate, format_size

if TYPE_CHECKING:
    from localrun.engine.planner.plan import Plan

FORMAT = 1
"""Version of a plan's JSON."""


def plan_lines(plan: Plan, *, faster: bool = True) -> list[str]:
    """Model, machine, memory, experts, speed, and, if `faster`, what would be faster."""
    sizes, machine, at = plan.sizes, plan.machine, plan.placement
    kinds = ", ".join(f"{group.count} in {group.name}" for group in sizes.experts)
    model = f"{sizes.name}, {sizes.shape.n_layers} layers, dense {format_size(sizes.dense_bytes)}"
    if sizes.n_copies:
        model += f", {sizes.n_copies} experts {format_size(sizes.expert_file_bytes)} ({kinds})"
    place = "all on the GPU" if at.dense_on_gpu else "all in RAM"
    if at.cache_in_ram:
        place = "all on the GPU but the cache"
    if 0 < at.dense_share < 1:
        n_layers = sizes.shape.n_layers
        place = f"{round(at.dense_share * n_layers)} of {n_layers} layers on the GPU, the others in RAM"
    memory_line = (
        f"dense {format_size(at.dense_bytes)}, {plan.options.kv_type} cache of {plan.n_ctx} tokens {format_size(at.kv_bytes)}, "
        f"buffers {format_size(at.compute_bytes)} (estimated from the model's shape), {place}"
    )
    batch = f"in batches of {plan.options.n_batch}" + (f" ({plan.batch_reason})" if plan.batch_reason else "")
    if at.headroom_bytes:
        memory_line += f"; {format_size(at.headroom_bytes)} of RAM left free"
    lines = [
        f"model    {model}",
        f"machine  {_machine(machine)}",
        f"memory   {memory_line}",
        f"experts  {_experts(plan)}",
    ]
    if plan.decode is None or plan.prefill is None:
        return [*lines, "speed    model too small to predict", *(["faster   -"] if faster else [])]
    lines.append(
        f"speed    answers {_span(plan.decode)}, prompts {_span(plan.prefill)} {batch} (prediction from "
        f"{'measured' if machine.cpu is not None else 'assumed'} kernels); most of the time: {plan.decode.likely.limit}"
        + _busy(plan)
        + _plain(plan)
    )
    return [*lines, _faster(plan)] if faster else lines


def _faster(plan: Plan) -> str:
    best = [
        f"{s.text}: {format_rate(s.tokens_per_s)} tokens/s, {s.cost}" for s in plan.suggestions if s.phase == "answers"
    ][:3]
    best += [
        f"{s.text}: prompts {format_rate(s.tokens_per_s)} tokens/s, {s.cost}"
        for s in plan.suggestions
        if s.phase == "prompts"
    ]
    return f"faster   {'; '.join(best) or 'nothing the planner knows of'}"


def _busy(plan: Plan) -> str:
    machine, now = plan.machine, plan.decode_now
    if now is None or not machine.is_busy:
        return ""
    return f"; busy now: other programs use {machine.others:.1f} of {machine.n_cores} cores, answers {_span(now)} meanwhile"


def _plain(plan: Plan) -> str:
    if plan.plain is None or not plan.plain_is_as_fast:
        return ""
    return (
        "; plain llama.cpp with the experts on the CPU would be just as fast here "
        f"({format_rate(plan.plain.tokens_per_s)} tokens/s, derived)"
    )


def _machine(machine: Hardware) -> str:
    def marked(name: str, text: str) -> str:
        how = machine.origin.get(name)
        # What is given needs no word; RAM and threads are asked of the system, not measured.
        told = (
            ("assumed", "this machine's")
            if name in ("ram_bytes", "n_threads")
            else ("assumed", "this machine's", "measured")
        )
        return text + (f" ({how})" if how in told else "")

    parts = []
    if machine.ram_bytes is not None and machine.total_ram_bytes is not None:
        free = f"{format_size(machine.ram_bytes)} of {format_size(machine.total_ram_bytes)} RAM free"
        parts.append(marked("ram_bytes", free))
    parts += [
        marked("memory_bytes_per_s", f"memory {machine.memory_bytes_per_s / 1e9:.1f} GB/s"),
        marked(
            "disk_bytes_per_s",
            f"{'drive' if machine.n_drives == 1 else f'{machine.n_drives} drives, each'} {_drive_rate(machine)} GB/s",
        ),
        marked("n_threads", f"{machine.n_threads} threads"),
        *(f"{gpu.name} {format_size(gpu.vram_bytes)} free (rates {gpu.rates_from})" for gpu in machine.gpus),
    ]
    return ", ".join(parts if machine.gpus else [*parts, "no GPU"])


def _drive_rate(machine: Hardware) -> str:
    """`1.43`, or `1.19 to 1.64` of a drive that is not steady."""
    slowest, fastest = (share * machine.disk_bytes_per_s / 1e9 for share in machine.disk_spread)
    if fastest < STEADY * slowest:
        return f"{machine.disk_bytes_per_s / 1e9:.2f}"
    return f"{slowest:.2f} to {fastest:.2f}"


STEADY = 1.15
"""A drive whose fastest run is less than so many times its slowest has one rate."""


def _experts(plan: Plan) -> str:
    sizes, at = plan.sizes, plan.placement
    if not sizes.n_copies:
        return "none"
    text = f"{at.ram_experts} of {sizes.n_copies} in {format_size(at.ram_experts * sizes.mean_slot_bytes)} of RAM"
    if at.gpu_experts:
        text += f", {at.gpu_experts} on the GPU"
    if plan.decode is None:
        return text
    likely = plan.decode.likely
    return (
        f"{text} ({plan.resident_share:.0%}); {likely.hit_rate:.0%} hit rate ({plan.rates.source}), "
        f"{likely.disk_bytes / 1e9:.2f} GB read per token"
        + (
            " (--adaptive: from the base's copies; better ones follow)"
            if plan.options.adaptive and sizes.base_bytes
            else ""
        )
    )


def _span(span: Range) -> str:
    low, high = span.low.tokens_per_s, span.high.tokens_per_s
    digits = 0 if low >= 20 else 1 if low >= 2 else 2
    return f"{low:.{digits}f} to {high:.{digits}f} tokens/s"


def plan_json(plan: Plan) -> dict[str, Any]:
    """Everything."""
    sizes, machine, at, options = plan.sizes, plan.machine, plan.placement, plan.options
    return {
        "format": FORMAT,
        "model": {
            "name": sizes.name,
            "architecture": sizes.shape.architecture,
            "n_layers": sizes.shape.n_layers,
            "dense_bytes": sizes.dense_bytes,
            "dense": dict(sizes.dense),
            "dense_token_bytes": sizes.dense_token_bytes,
            "n_experts": sizes.n_copies,
            "n_experts_per_layer": sizes.shape.n_experts,
            "n_experts_used": sizes.shape.n_used,
            "expert_bytes": sizes.expert_file_bytes,
            "experts": [
                {"type": g.name, "count": g.count, "file_bytes": g.file_bytes, "slot_bytes": g.slot_bytes}
                for g in sizes.experts
            ],
        },
        "machine": {
            "ram_bytes": machine.ram_bytes,
            "total_ram_bytes": machine.total_ram_bytes,
            "disk_bytes_per_s": machine.disk_bytes_per_s,
            "disk_spread": list(machine.disk_spread),
            "n_drives": machine.n_drives,
            "memory_bytes_per_s": machine.memory_bytes_per_s,
            "n_threads": machine.n_threads,
            "cpu": _cpu_json(machine.cpu),
            "others": machine.others,
            "n_cores": machine.n_cores,
            "company_factor": machine.company_factor,
            "gpus": [
                {
                    "name": gpu.name,
                    "vram_bytes": gpu.vram_bytes,
                    "bus_bytes_per_s": gpu.bus_bytes_per_s,
                    "rates_from": gpu.rates_from,
                    **asdict(gpu.rates),
                }
                for gpu in machine.gpus
            ],
            "origin": dict(machine.origin),
        },
        "settings": {
            "n_ctx": plan.n_ctx,
            "kv_type": options.kv_type,
            "n_batch": options.n_batch,
            "batch_reason": plan.batch_reason,
            "prompt_tokens": options.prompt_tokens,
        },
        "placement": {
            "dense_on_gpu": at.dense_on_gpu,
            "dense_share": at.dense_share,
            "cache_in_ram": at.cache_in_ram,
            "dense_bytes": at.dense_bytes,
            "kv_bytes": at.kv_bytes,
            "kv": sizes.kv(plan.n_ctx, options.kv_type, options.n_batch),
            "compute_bytes": at.compute_bytes,
            "ram_bytes": at.ram_bytes,
            "headroom_bytes": at.headroom_bytes,
            "gpu_expert_bytes": at.gpu_expert_bytes,
            "ram_experts": at.ram_experts,
            "gpu_experts": at.gpu_experts,
            "resident_share": plan.resident_share,
        },
        "hit_rates": plan.rates.source,
        "decode": _range_json(plan.decode),
        "decode_now": _range_json(plan.decode_now),
        "prefill": _range_json(plan.prefill),
        "plain_llama_cpp": None
        if plan.plain is None
        else {"tokens_per_s": plan.plain.tokens_per_s, "as_fast": plan.plain_is_as_fast},
        "bars": bars_json(plan),
        "suggestions": [
            {
                "change": s.text,
                "cost": s.cost,
                "gain": s.gain,
                {"answers": "decode_tokens_per_s", "prompts": "prefill_tokens_per_s"}[s.phase]: s.tokens_per_s,
            }
            for s in plan.suggestions
        ],
    }


def _cpu_json(cpu: CpuRates | None) -> dict[str, Any] | None:
    if cpu is None:
        return None
    experts = {"/".join(kind.name for kind in types): asdict(rates) for types, rates in cpu.experts.items()}
    return {"dense_bytes_per_s": cpu.dense_bytes_per_s, "dense_macs_per_s": cpu.dense_macs_per_s, "experts": experts}


def _range_json(span: Range | None) -> dict[str, Any] | None:
    if span is None:
        return None
    result: dict[str, Any] = {"limit": span.likely.limit}
    for name in ("low", "likely", "high"):
        rate = getattr(span, name)
        seconds: Mapping[str, float] = rate.seconds
        result[name] = {
            "tokens_per_s": rate.tokens_per_s,
            "hit_rate": rate.hit_rate,
            "disk_bytes_per_token": rate.disk_bytes,
            "ms_per_token": {name: 1e3 * s for name, s in seconds.items()},
        }
    return result
