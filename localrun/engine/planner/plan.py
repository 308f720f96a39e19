"""A plan and its parts: options, placement, estimates, suggestions. Plain data, made by `planner.py`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from localrun.engine.options import EngineOptions
from localrun.engine.planner.hardware import Hardware
from localrun.engine.planner.hit_rates import HitRates
from localrun.engine.planner.sizes import ModelSizes
from localrun.engine.planner.speed import (
    Range,
    Rate,
    ResidentShares,
    predict_decode,
    predict_prefill,
    slowest,
)
from localrun.engine.planner.text import plan_json, plan_lines

AS_FAST = 0.95
"""From this share of our predicted speed on, llama.cpp counts as equally fast."""

PROMPT_TOKENS = 2048
"""Length of the prompt whose reading is predicted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions:
    """The user's choices. None and 0: the planner chooses.

    Attributes:
        ram_bytes: for experts in RAM, including reads in flight.
        vram_bytes: of GPU memory to use, across all GPUs.
        n_ctx: tokens of context.
        n_batch: prompt tokens per batch.
        adaptive: misses are served from the base's copies.
        position: context length at which decode is predicted; None: a quarter of the context, at most 8192.
        fixed: options (`kv`, `batch`, ...) set by the user, which suggestions don't change.
    """

    ram_bytes: int | None = None
    vram_bytes: int | None = None
    n_ctx: int = 0
    kv_type: str = "f16"
    n_batch: int = 0
    position: int | None = None
    adaptive: bool = False
    prompt_tokens: int = PROMPT_TOKENS
    fixed: frozenset[str] = frozenset()

    @classmethod
    def of(cls, options: EngineOptions) -> PlanOptions:
        """Of an engine that is about to load."""
        return cls(
            ram_bytes=options.ram_bytes,
            vram_bytes=options.vram_bytes,
            n_ctx=options.n_ctx,
            kv_type=options.kv_type,
            n_batch=options.n_batch,
            adaptive=options.adaptive,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuShare:
    """What goes to GPUs.

    Attributes:
        dense_share: of the dense model's layers with their cache, on the first one; 1: all of it, with the output head.
        expert_bytes: for experts, on all of them.
        cache_in_ram: the KV cache is not on the first one although all layers are.
    """

    dense_share: float = 0.0
    expert_bytes: int = 0
    cache_in_ram: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Bytes by place.

    Attributes:
        dense_share: of the dense model's layers with their cache that are on the GPU; 0: none, 1: everything.
        cache_in_ram: the KV cache is in RAM although the layers are on the GPU.
        dense_bytes, kv_bytes, compute_bytes: the dense model, the KV cache, llama.cpp's buffers (and on the GPU those for our
            activations, in RAM the copies that routers are ranked by), wherever they are.
        embedding_bytes: of the dense model, what stays in RAM although all layers are on the GPU.
        ram_bytes: budget for experts in RAM, including reads in flight; None: free memory is unknown, and all experts are
            assumed to fit.
        headroom_bytes: RAM left for the desktop and the page cache.
        gpu_expert_bytes: of experts on GPUs.
        ram_experts, gpu_experts: how many fit there.
    """

    dense_share: float
    cache_in_ram: bool = False
    dense_bytes: int
    embedding_bytes: int
    kv_bytes: int
    compute_bytes: int
    ram_bytes: int | None
    headroom_bytes: int
    gpu_expert_bytes: int
    ram_experts: int
    gpu_experts: int

    @property
    def dense_on_gpu(self) -> bool:
        """All of the dense model is on the GPU."""
        return self.dense_share >= 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Suggestion:
    """A change and its gain.

    Attributes:
        text: the change, as an option, as a command's arguments, or, of the machine, in words.
        cost: what it costs.
        gain: factor on the likely speed of its phase.
        tokens_per_s: that speed.
        phase: the phase that gets faster.
    """

    text: str
    gain: float
    tokens_per_s: float
    cost: str
    phase: Literal["answers", "prompts"] = "answers"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Where a model goes and how fast it will be. Immutable.

    Attributes:
        decode, prefill: None for models too small to predict.
        plain: decode with stock llama.cpp, experts on the CPU (`plain.py`); None: unknown.
        rates: the hit rates used.
        batch_reason: why `options.n_batch` is what it is, if the planner chose it.
    """

    sizes: ModelSizes
    machine: Hardware
    options: PlanOptions
    n_ctx: int
    placement: Placement
    decode: Range | None
    prefill: Range | None
    plain: Rate | None = None
    rates: HitRates = field(repr=False)
    batch_reason: str = ""
    suggestions: tuple[Suggestion, ...] = ()

    @property
    def resident_share(self) -> float:
        """Of experts that need no drive."""
        at = self.placement
        return min(1.0, (at.ram_experts + at.gpu_experts) / max(1, self.sizes.n_copies))

    @property
    def decode_now(self) -> Range | None:
        """`decode`, as long as other programs use what they used when the machine was looked at."""
        if self.decode is None or not self.machine.is_busy:
            return self.decode
        asked = self.options.position
        return self.decode_at(usual_position(self.n_ctx) if asked is None else asked, now=True)

    @property
    def plain_is_as_fast(self) -> bool:
        """Whether, as far as the planner knows, localrun gains nothing for this model on this machine."""
        if self.plain is None or self.decode is None:
            return False
        return self.plain.tokens_per_s >= AS_FAST * self.decode.likely.tokens_per_s

    def lines(self, *, faster: bool = True) -> list[str]:
        """Six lines for people; without the one of suggestions, five."""
        return plan_lines(self, faster=faster)

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        return plan_json(self)

    def decode_at(self, position: int, *, now: bool = False) -> Range:
        """Answers with so many tokens in the context.

        Args:
            now: as long as other programs use what they used when the machine was looked at.
        """
        return predict_decode(
            self.sizes,
            resident_shares(self.sizes, self.machine, self.placement, adaptive=self.options.adaptive),
            self.machine,
            self.rates,
            position=position,
            kv_type=self.options.kv_type,
            company=self.machine.company_factor if now else 1.0,
        )

    def prefill_of(self, prompt_tokens: int) -> Range:
        """A prompt of so many tokens."""
        shares = resident_shares(self.sizes, self.machine, self.placement, adaptive=self.options.adaptive)
        n_batch = self.options.n_batch
        return predict_prefill(
            self.sizes,
            shares,
            self.machine,
            self.rates,
            prompt_tokens=prompt_tokens,
            n_batch=n_batch,
            kv_type=self.options.kv_type,
        )


def usual_position(n_ctx: int) -> int:
    """Tokens in the context for which answers are predicted, unless said otherwise."""
    return min(n_ctx // 4, 8192)


def resident_shares(
    sizes: ModelSizes, machine: Hardware, placement: Placement, *, adaptive: bool = False
) -> ResidentShares:
    """A placement as shares."""
    n_copies = max(1, sizes.n_copies)
    return ResidentShares(
        miss_bytes=sizes.miss_bytes(adaptive=adaptive),
        ram_share=placement.ram_experts / n_copies,
        gpu_share=placement.gpu_experts / n_copies,
        dense_share=placement.dense_share,
        cache_in_ram=placement.cache_in_ram,
        gpu=slowest([gpu.rates for gpu in machine.gpus]),
        bus_bytes_per_s=min((gpu.bus_bytes_per_s for gpu in machine.gpus), default=math.inf),
    )
