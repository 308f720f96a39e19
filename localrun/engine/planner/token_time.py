"""What a token takes on a box that is only described by its memory: enough to compare formats of one model with each other.

The planner's arithmetic (`speed.py`) on totals. The rates are those that a plan assumes of an unknown machine, so that the same
request gives the same formats everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

from localrun.engine.planner.hardware import (
    ASSUMED_DISK_BYTES_PER_S,
    ASSUMED_MEMORY_BYTES_PER_S,
    ASSUMED_VRAM_BYTES_PER_S,
)
from localrun.engine.planner.hit_rates import Curve
from localrun.engine.planner.speed import LAYER_S, LAYER_VALUE_S, TOKEN_S, waiting
from localrun.offload.kernels.rates import MEMORY_SHARE
from localrun.quant.model.shape import ModelShape
from localrun.quant.precision.solver import Target


@dataclass(frozen=True, slots=True)
class TokenTime:
    """A model on a box.

    Attributes:
        shape: the model's.
        target: the box's memory.
    """

    shape: ModelShape
    target: Target

    def seconds(self, *, dense_bytes: int, dense_token_bytes: int, expert_bytes: int) -> float:
        """Of one token.

        Args:
            dense_bytes: of the dense model, with what else must be in memory.
            dense_token_bytes: that every token reads of it.
            expert_bytes: of all copies that are used.
        """
        memory, vram = MEMORY_SHARE * ASSUMED_MEMORY_BYTES_PER_S, ASSUMED_VRAM_BYTES_PER_S
        on_gpu = dense_bytes <= self.target.vram_bytes
        vram_left = self.target.vram_bytes - (dense_bytes if on_gpu else 0)
        ram_left = self.target.ram_bytes - (0 if on_gpu else dense_bytes)
        n_layers = len(self.shape.moe_layers)
        used_bytes = expert_bytes * self.shape.n_used / max(1, self.shape.n_experts) if n_layers else 0.0
        gpu_hits = Curve().hottest(min(1.0, max(0, vram_left) / max(1, expert_bytes))) if vram_left > 0 else 0.0
        hits = max(gpu_hits, Curve().steady(min(1.0, max(0, vram_left + ram_left) / max(1, expert_bytes))))
        computing_s = dense_token_bytes / (vram if on_gpu else memory) + TOKEN_S
        computing_s += self.shape.n_layers * (LAYER_S + (0.0 if on_gpu else LAYER_VALUE_S * self.shape.n_embd))
        computing_s += max(gpu_hits * used_bytes / vram, (1 - gpu_hits) * used_bytes / memory)
        return computing_s + waiting((1 - hits) * used_bytes / ASSUMED_DISK_BYTES_PER_S, computing_s)
