"""What fits where on a machine, how fast that will be, and what would make it faster: before anything is read, on any machine.

One code for `localrun plan`, for every load (the budgets that the engine uses are decided here) and for simulations. A `Plan` is
made from sizes (`sizes.py`), a machine (`hardware.py`), hit rates (`hit_rates.py`) and rates of bytes (`speed.py`); it holds
numbers, no handles. What can't fit is refused with numbers and the nearest setting that fits.

Order of claims on memory: dense model, KV cache and llama.cpp's buffers first, then headroom, then experts; the first three go
together to the first GPU or not at all. A load decides about its GPUs itself (`gpu.py`) and tells the plan. Suggestions are plans
of the same model on a changed machine or with changed settings, never fixed sentences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from gguf import GGMLQuantizationType

from localrun.engine import memory
from localrun.engine.compute_buffers import compute_bytes
from localrun.engine.hardware import Hardware
from localrun.engine.hit_rates import HitRates, hit_rates
from localrun.engine.protocol import EngineOptions
from localrun.engine.sizes import KV_BITS, ModelSizes, padded, sizes_of_source
from localrun.engine.speed import Range, Residency, predict_decode, predict_prefill
from localrun.errors import BudgetError
from localrun.quant.source import ModelSource
from localrun.units import format_size

FORMAT = 1
"""Version of a plan's JSON."""

DEFAULT_CONTEXT = 32768
"""Tokens, when the user says nothing and the model was trained for more."""

PROCESS_BYTES = 350 << 20
"""Python, numba, llama.cpp and their code; 320 MiB resident before a model is loaded."""

GPU_HEADROOM_BYTES = 512 << 20
"""Left free on each GPU by the automatic choice: the desktop's windows and the driver's own memory."""

PROMPT_TOKENS = 2048
"""Length of the prompt whose reading is predicted."""

SMALL_BYTES = 256 << 20
"""Models below run from the processor's caches and in milliseconds: no prediction."""

_SMALLER = (
    GGMLQuantizationType.MXFP4,
    GGMLQuantizationType.Q3_K,
    GGMLQuantizationType.Q2_K,
    GGMLQuantizationType.IQ2_XXS,
)
"""Formats of experts that a suggestion may go down to, one after the other."""

_RAM_SIZES = tuple(n << 30 for n in (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536))
_MIN_CONTEXT = 4096
_WORTH = 1.05
"""A suggestion must gain 5 %."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a user may choose. None and 0: the planner chooses.

    Attributes:
        ram_bytes: for experts in RAM, reads under way included.
        vram_bytes: of GPU memory to use, all GPUs together.
        n_ctx: tokens of context.
        position: tokens in the context whose decode is predicted; None: a quarter of the context, at most 8192.
    """

    ram_bytes: int | None = None
    vram_bytes: int | None = None
    n_ctx: int = 0
    kv_type: str = "f16"
    n_batch: int = 512
    position: int | None = None
    prompt_tokens: int = PROMPT_TOKENS

    @classmethod
    def of(cls, options: EngineOptions) -> Settings:
        """Of an engine that is about to load."""
        return cls(
            ram_bytes=options.ram_bytes,
            vram_bytes=options.vram_bytes,
            n_ctx=options.n_ctx,
            kv_type=options.kv_type,
            n_batch=options.n_batch,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuShare:
    """What goes to GPUs.

    Attributes:
        dense: the dense model, its cache and buffers, on the first one.
        expert_bytes: for experts, on all of them.
    """

    dense: bool = False
    expert_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Bytes by place.

    Attributes:
        dense_bytes, kv_bytes, compute_bytes: the dense model, the KV cache, llama.cpp's buffers; on the GPU or in RAM, all three.
        ram_bytes: budget of the experts in RAM, reads under way included; None: nobody knows what is free, and all experts fit.
        headroom_bytes: of RAM, left to the desktop and the page cache.
        gpu_expert_bytes: of experts on GPUs.
        ram_experts, gpu_experts: how many have a place there.
    """

    dense_on_gpu: bool
    dense_bytes: int
    kv_bytes: int
    compute_bytes: int
    ram_bytes: int | None
    headroom_bytes: int
    gpu_expert_bytes: int
    ram_experts: int
    gpu_experts: int

    @property
    def fixed_bytes(self) -> int:
        """What must be there whole."""
        return self.dense_bytes + self.kv_bytes + self.compute_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Suggestion:
    """A change and what it would give.

    Attributes:
        text: the change.
        gain: of likely decode speed, 1.5 is half as fast again.
        tokens_per_s: likely decode.
    """

    text: str
    gain: float
    tokens_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Where a model goes and how fast it will be. Immutable.

    Attributes:
        decode, prefill: None for models too small to predict.
        rates: hit rates that were used.
    """

    sizes: ModelSizes
    machine: Hardware
    settings: Settings
    n_ctx: int
    placement: Placement
    decode: Range | None
    prefill: Range | None
    rates: HitRates = field(repr=False)
    suggestions: tuple[Suggestion, ...] = ()

    @property
    def resident_share(self) -> float:
        """Of experts that need no drive."""
        at = self.placement
        return min(1.0, (at.ram_experts + at.gpu_experts) / max(1, self.sizes.n_copies))

    def lines(self) -> list[str]:
        """Six lines for people."""
        return _lines(self)

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        return _json(self)

    def decode_at(self, position: int) -> Range:
        """Answers with so many tokens in the context."""
        residency = _residency(self.sizes, self.machine, self.placement)
        kv_type = self.settings.kv_type
        return predict_decode(self.sizes, residency, self.machine, self.rates, position=position, kv_type=kv_type)

    def prefill_of(self, prompt_tokens: int) -> Range:
        """A prompt of so many tokens."""
        residency = _residency(self.sizes, self.machine, self.placement)
        n_batch = self.settings.n_batch
        return predict_prefill(self.sizes, residency, self.machine, prompt_tokens=prompt_tokens, n_batch=n_batch)


# --- making plans -----------------------------------------------------------------------------------------------------


def plan_load(
    source: ModelSource,
    options: EngineOptions,
    machine: Hardware,
    gpu: GpuShare | None = None,
    *,
    suggest: bool = False,
) -> Plan:
    """The plan that a load follows: `placement.ram_bytes` is its budget.

    Args:
        gpu: what goes to GPUs, decided already; None: nothing.

    Raises:
        BudgetError: it can't fit; the message has the numbers, the hint the nearest setting that fits.
    """
    return make_plan(sizes_of_source(source), machine, Settings.of(options), suggest=suggest, gpu=gpu or GpuShare())


def make_plan(
    sizes: ModelSizes,
    machine: Hardware,
    settings: Settings | None = None,
    *,
    suggest: bool = True,
    rates: HitRates | None = None,
    gpu: GpuShare | None = None,
) -> Plan:
    """Places a model on a machine and predicts its speed.

    Args:
        suggest: also plan what would be faster.
        rates: instead of the user's own or the published ones.
        gpu: what goes to GPUs; None: as much as fits.

    Raises:
        BudgetError: as `plan_load`.
    """
    settings = settings or Settings()
    n_ctx = settings.n_ctx or min(sizes.n_ctx_train or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    placement = _place(sizes, machine, settings, n_ctx, gpu)
    if rates is None:
        rates = hit_rates(sizes.identity, dict.fromkeys(sizes.moe_layers, sizes.n_experts))
    decode = prefill = None
    if sizes.dense_bytes + sizes.expert_file_bytes >= SMALL_BYTES:
        residency = _residency(sizes, machine, placement)
        position = min(n_ctx // 4, 8192) if settings.position is None else settings.position
        decode = predict_decode(sizes, residency, machine, rates, position=position, kv_type=settings.kv_type)
        prompt_tokens = min(settings.prompt_tokens, n_ctx)
        prefill = predict_prefill(sizes, residency, machine, prompt_tokens=prompt_tokens, n_batch=settings.n_batch)
    plan = Plan(
        sizes=sizes,
        machine=machine,
        settings=settings,
        n_ctx=n_ctx,
        placement=placement,
        decode=decode,
        prefill=prefill,
        rates=rates,
    )
    return replace(plan, suggestions=tuple(_suggestions(plan, rates, gpu))) if suggest and decode is not None else plan


def _residency(sizes: ModelSizes, machine: Hardware, placement: Placement) -> Residency:
    n_copies = max(1, sizes.n_copies)
    return Residency(
        ram_share=placement.ram_experts / n_copies,
        gpu_share=placement.gpu_experts / n_copies,
        dense_on_gpu=placement.dense_on_gpu,
        gpu=min((gpu.rates.decode_bytes_per_s for gpu in machine.gpus), default=0.0),
    )


def headroom(available: int, total: int) -> int:
    """RAM that the automatic choice leaves: 2 GiB or a tenth of the machine, on a small one at most a quarter of what is free."""
    wanted = max(memory.HEADROOM_BYTES, total // 10)
    return min(wanted, available // 4) if available < 8 * 2**30 else wanted


def gpu_share(machine: Hardware, vram_bytes: int | None, dense_bytes: int) -> GpuShare:
    """As much as fits: the dense model and what belongs to it on the first GPU, experts in what is left on all.

    Args:
        vram_bytes: to use, of all GPUs together; None: all but some headroom on each.
        dense_bytes: cache and buffers included.
    """
    budgets = [max(0, gpu.vram_bytes - GPU_HEADROOM_BYTES) for gpu in machine.gpus]
    if vram_bytes is not None and machine.vram_bytes:
        budgets = [min(vram_bytes, machine.vram_bytes) * gpu.vram_bytes // machine.vram_bytes for gpu in machine.gpus]
    dense = bool(budgets) and budgets[0] >= dense_bytes
    return GpuShare(dense=dense, expert_bytes=sum(budgets) - (dense_bytes if dense else 0))


def _place(
    sizes: ModelSizes, machine: Hardware, settings: Settings, n_ctx: int, gpu: GpuShare | None = None
) -> Placement:
    dense = sizes.dense_bytes
    kv = sizes.kv_bytes(n_ctx, settings.kv_type, settings.n_batch)
    compute = compute_bytes(sizes, n_ctx, settings.n_batch)
    fixed = dense + kv + compute
    if gpu is None:
        gpu = gpu_share(machine, settings.vram_bytes, fixed)
    slot = max(1.0, sizes.mean_slot_bytes)
    gpu_experts = min(sizes.n_copies, int(gpu.expert_bytes / slot))
    rest = sizes.n_copies - gpu_experts
    rest_bytes = int(rest * slot + sizes.staging_bytes) if rest else 0
    spare, ram = 0, settings.ram_bytes
    if machine.ram_bytes is not None:
        left = machine.ram_bytes - PROCESS_BYTES - (0 if gpu.dense else fixed)
        if ram is None:
            spare = headroom(machine.ram_bytes, machine.total_ram_bytes or machine.ram_bytes)
            ram = max(0, left - spare)
        _check(sizes, machine, settings, n_ctx, left, min(ram, rest_bytes))
        if settings.ram_bytes is None and sizes.n_copies:
            ram = max(ram, sizes.floor_bytes)
            spare = max(0, min(spare, left - ram))
    arena = (rest_bytes if ram is None else min(ram, rest_bytes)) - sizes.staging_bytes
    return Placement(
        dense_on_gpu=gpu.dense,
        dense_bytes=dense,
        kv_bytes=kv,
        compute_bytes=compute,
        ram_bytes=ram,
        headroom_bytes=spare,
        gpu_expert_bytes=int(gpu_experts * slot),
        ram_experts=max(0, min(rest, int(arena / slot + 1e-6))),
        gpu_experts=gpu_experts,
    )


def _check(sizes: ModelSizes, machine: Hardware, settings: Settings, n_ctx: int, left: int, ram: int) -> None:
    """Refuses what can't fit.

    Args:
        left: RAM less everything but the experts.
        ram: the experts' budget.
    """
    floor = sizes.floor_bytes if sizes.n_copies else 0
    assert machine.ram_bytes is not None
    free = format_size(machine.ram_bytes)
    if settings.ram_bytes is not None and ram > left >= floor:
        raise BudgetError(
            f"--ram {format_size(settings.ram_bytes)} and {format_size(machine.ram_bytes - left)} for the dense model, "
            f"its context and buffers are more than the {free} that are free",
            hint=f"give --ram {_gib(left)} at most, or leave it out",
        )
    if left < floor:
        raise BudgetError(
            f"{sizes.name} does not fit: dense model {format_size(sizes.dense_bytes)}, KV cache of {n_ctx} tokens "
            f"{format_size(sizes.kv_bytes(n_ctx, settings.kv_type, settings.n_batch))}, buffers "
            f"{format_size(compute_bytes(sizes, n_ctx, settings.n_batch))}, process {format_size(PROCESS_BYTES)}, "
            f"experts of one layer {format_size(floor)}; free are {free}",
            hint=_nearest(sizes, machine, settings, n_ctx),
        )


def _nearest(sizes: ModelSizes, machine: Hardware, settings: Settings, n_ctx: int) -> str:
    """The mildest change with which it fits."""
    assert machine.ram_bytes is not None

    def needed(n_ctx: int, kv_type: str) -> int:
        context = sizes.kv_bytes(n_ctx, kv_type, settings.n_batch) + compute_bytes(sizes, n_ctx, settings.n_batch)
        return sizes.dense_bytes + context + PROCESS_BYTES + (sizes.floor_bytes if sizes.n_copies else 0)

    for changed, kv_type in _milder(n_ctx, settings.kv_type):
        if needed(changed, kv_type) <= machine.ram_bytes:
            return f"it fits with --context {changed}" + (f" --kv {kv_type}" if kv_type != settings.kv_type else "")
    least = min(
        needed(changed, kv_type) for changed, kv_type in [(n_ctx, settings.kv_type), *_milder(n_ctx, settings.kv_type)]
    )
    return f"{format_size(least)} must be free even with the smallest context: close other programs, or use a larger machine"


def _milder(n_ctx: int, kv_type: str) -> Iterator[tuple[int, str]]:
    if kv_type in ("f16", "bf16", "f32"):
        yield n_ctx, "q8_0"
    while n_ctx > _MIN_CONTEXT:
        n_ctx = max(_MIN_CONTEXT, padded(n_ctx // 2))
        yield n_ctx, kv_type
    if kv_type in ("f16", "bf16", "f32"):
        yield n_ctx, "q8_0"


# --- what would be faster ---------------------------------------------------------------------------------------------


def _suggestions(plan: Plan, rates: HitRates, gpu: GpuShare | None) -> list[Suggestion]:
    assert plan.decode is not None
    base = plan.decode.likely.tokens_per_s
    result = []
    for text, change in _changes(plan, gpu):
        try:
            changed = change(rates)
        except BudgetError:
            continue
        assert changed.decode is not None
        gain = changed.decode.likely.tokens_per_s / base
        if gain >= _WORTH:
            result.append(Suggestion(text=text, gain=gain, tokens_per_s=changed.decode.likely.tokens_per_s))
    return sorted(result, key=lambda suggestion: -suggestion.gain)


def _changes(plan: Plan, gpu: GpuShare | None) -> Iterator[tuple[str, Callable[[HitRates], Plan]]]:
    """Changes and the plans that they would give."""
    sizes, machine, settings = plan.sizes, plan.machine, plan.settings

    def again(rates: HitRates, **parts: Any) -> Plan:
        values: dict[str, Any] = {"sizes": sizes, "machine": machine, "settings": settings, **parts}
        return make_plan(**values, suggest=False, rates=rates, gpu=gpu)

    free = replace(settings, ram_bytes=None)
    if settings.ram_bytes is not None:
        yield "no --ram limit", lambda rates: again(rates, settings=free)
    total = machine.total_ram_bytes
    if total is not None and machine.ram_bytes is not None:
        larger = next((size for size in _RAM_SIZES if size > 1.15 * total), None)
        if larger is not None:
            more = replace(machine, ram_bytes=machine.ram_bytes + larger - total, total_ram_bytes=larger)
            yield f"{larger >> 30} GiB of RAM", lambda rates: again(rates, machine=more, settings=free)
    if machine.n_drives == 1:
        second = replace(machine, n_drives=2)
        yield "a mirror on a second drive", lambda rates: again(rates, machine=second)
    for kind in _SMALLER:
        smaller = sizes.with_experts(kind) if sizes.n_copies else sizes
        if smaller.expert_file_bytes < 0.95 * sizes.expert_file_bytes:
            yield f"experts in {kind.name}", lambda rates, smaller=smaller: again(rates, sizes=smaller)  # type: ignore[misc]
    if plan.n_ctx > 2 * _MIN_CONTEXT:
        less = replace(settings, n_ctx=padded(plan.n_ctx // 2))
        yield f"--context {less.n_ctx}", lambda rates: again(rates, settings=less)
    if settings.kv_type in ("f16", "bf16", "f32"):
        yield "--kv q8_0", lambda rates: again(rates, settings=replace(settings, kv_type="q8_0"))


# --- showing ----------------------------------------------------------------------------------------------------------


def _lines(plan: Plan) -> list[str]:
    sizes, machine, at = plan.sizes, plan.machine, plan.placement
    kinds = ", ".join(f"{group.count} in {group.name}" for group in sizes.experts)
    model = f"{sizes.name}, {sizes.n_layers} layers, dense {format_size(sizes.dense_bytes)}"
    if sizes.n_copies:
        model += f", {sizes.n_copies} experts {format_size(sizes.expert_file_bytes)} ({kinds})"
    place = "on the GPU" if at.dense_on_gpu else "in RAM"
    memory_line = (
        f"dense {format_size(at.dense_bytes)}, {plan.settings.kv_type} cache of {plan.n_ctx} tokens {format_size(at.kv_bytes)}, "
        f"buffers {format_size(at.compute_bytes)}, all {place}"
    )
    if at.headroom_bytes:
        memory_line += f"; {format_size(at.headroom_bytes)} of RAM left free"
    lines = [
        f"model    {model}",
        f"machine  {_machine(machine)}",
        f"memory   {memory_line}",
        f"experts  {_experts(plan)}",
    ]
    if plan.decode is None or plan.prefill is None:
        return [*lines, "speed    too small a model for a prediction", "faster   -"]
    lines.append(
        f"speed    answers {_span(plan.decode)}, prompts {_span(plan.prefill)} (prediction); most of the time: "
        f"{plan.decode.likely.limit}"
    )
    best = [f"{s.text}: {s.tokens_per_s:.3g} tokens/s" for s in plan.suggestions[:3]]
    lines.append(f"faster   {'; '.join(best) or 'nothing that the planner knows of'}")
    return lines


def _machine(machine: Hardware) -> str:
    def marked(name: str, text: str) -> str:
        return text + ("" if machine.origin.get(name) != "assumed" else " (assumed)")

    parts = []
    if machine.ram_bytes is not None and machine.total_ram_bytes is not None:
        parts.append(f"{format_size(machine.ram_bytes)} of {format_size(machine.total_ram_bytes)} RAM free")
    parts += [
        marked("memory", f"memory {machine.memory / 1e9:.1f} GB/s"),
        marked(
            "disk",
            f"{'drive' if machine.n_drives == 1 else f'{machine.n_drives} drives, each'} {machine.disk / 1e9:.2f} GB/s",
        ),
        f"{machine.n_threads} threads",
        *(f"{gpu.name} {format_size(gpu.vram_bytes)} free" for gpu in machine.gpus),
    ]
    return ", ".join(parts if machine.gpus else [*parts, "no GPU"])


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
        f"{text} ({plan.resident_share:.0%}); {likely.hit_rate:.0%} of requests found there ({plan.rates.source}), "
        f"{likely.disk_bytes / 1e9:.2f} GB per token from the drive"
    )


def _span(span: Range) -> str:
    low, high = span.low.tokens_per_s, span.high.tokens_per_s
    digits = 0 if low >= 20 else 1 if low >= 2 else 2
    return f"{low:.{digits}f} to {high:.{digits}f} tokens/s"


def _gib(n_bytes: int) -> str:
    return f"{max(0, n_bytes) / 2**30:.1f}GiB"


def _json(plan: Plan) -> dict[str, Any]:
    sizes, machine, at, settings = plan.sizes, plan.machine, plan.placement, plan.settings
    return {
        "format": FORMAT,
        "model": {
            "name": sizes.name,
            "architecture": sizes.architecture,
            "n_layers": sizes.n_layers,
            "dense_bytes": sizes.dense_bytes,
            "dense": dict(sizes.dense),
            "dense_token_bytes": sizes.dense_token_bytes,
            "n_experts": sizes.n_copies,
            "n_experts_per_layer": sizes.n_experts,
            "n_experts_used": sizes.n_used,
            "expert_bytes": sizes.expert_file_bytes,
            "experts": [
                {"type": g.name, "count": g.count, "file_bytes": g.file_bytes, "slot_bytes": g.slot_bytes}
                for g in sizes.experts
            ],
        },
        "machine": {
            "ram_bytes": machine.ram_bytes,
            "total_ram_bytes": machine.total_ram_bytes,
            "disk_bytes_per_s": machine.disk,
            "n_drives": machine.n_drives,
            "memory_bytes_per_s": machine.memory,
            "n_threads": machine.n_threads,
            "gpus": [
                {
                    "name": gpu.name,
                    "vram_bytes": gpu.vram_bytes,
                    **asdict(gpu.rates),
                }
                for gpu in machine.gpus
            ],
            "origin": dict(machine.origin),
        },
        "settings": {
            "n_ctx": plan.n_ctx,
            "kv_type": settings.kv_type,
            "n_batch": settings.n_batch,
            "prompt_tokens": settings.prompt_tokens,
        },
        "placement": {
            "dense_on_gpu": at.dense_on_gpu,
            "dense_bytes": at.dense_bytes,
            "kv_bytes": at.kv_bytes,
            "kv": sizes.kv(plan.n_ctx, settings.kv_type, settings.n_batch),
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
        "prefill": _range_json(plan.prefill),
        "suggestions": [
            {"change": s.text, "gain": s.gain, "decode_tokens_per_s": s.tokens_per_s} for s in plan.suggestions
        ],
    }


def _range_json(span: Range | None) -> dict[str, Any] | None:
    if span is None:
        return None
    result: dict[str, Any] = {"limit": span.likely.limit}
    for name in ("low", "likely", "high"):
        rate = getattr(span, name)
        parts: Mapping[str, float] = rate.parts
        result[name] = {
            "tokens_per_s": rate.tokens_per_s,
            "hit_rate": rate.hit_rate,
            "disk_bytes_per_token": rate.disk_bytes,
            "ms_per_token": {part: 1e3 * seconds for part, seconds in parts.items()},
        }
    return result


assert set(KV_BITS) == {"f32", "f16", "q4_0", "q8_0", "bf16"}  # those that llama.cpp's cache takes here
