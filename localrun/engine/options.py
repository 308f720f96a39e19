"""How a model is loaded, and how its next token is chosen: what callers of the engine decide.

Standard library only, so that a user interface can use it without loading numpy, numba or llama.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ThinkMode = str
"""`off`, `high`, `max`, or another one of `ModelFacts.think_modes`."""
Gpu = str
"""`auto`, `none`, or the name of a ggml device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How a model is loaded.

    Attributes:
        ram_bytes: budget of the expert slots in RAM; None: chosen from the memory that is available.
        vram_bytes: budget on the GPU; None: chosen from the free GPU memory.
        gpu: `auto`, `none` or the name of a ggml device.
        rpc: `HOST:PORT` of llama.cpp's rpc-server on other machines, separated by commas; their devices count as GPUs.
        n_ctx: tokens that the context holds; 0: as many as the model was trained for, at most `DEFAULT_CONTEXT`.
        n_threads: CPU threads; 0: one per physical core.
        n_batch: most tokens per forward pass during prefill.
        kv_type: number format of the KV cache: f16, bf16, q8_0, q4_0 or f32.
        math: arithmetic of the experts: int8 activations (fast) or exact float32 (for comparisons).
        mirror: a second copy of the model, best on another drive; experts are read from both.
        adaptive: answer a miss from the base's smaller copy and fetch the better one later; the same seed may give other tokens.
    """

    ram_bytes: int | None = None
    vram_bytes: int | None = None
    gpu: Gpu = "auto"
    rpc: str | None = None
    n_ctx: int = 0
    n_threads: int = 0
    n_batch: int = 512
    kv_type: str = "f16"
    math: Literal["int8", "f32"] = "int8"
    mirror: str | None = None
    adaptive: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """How the next token is chosen. The defaults are DeepSeek's own; ranges are checked by `sampling.py`.

    Attributes:
        temperature: 0 takes the most likely token.
        top_p: smallest set of tokens with at least this probability; 1 keeps all.
        top_k: the k most likely tokens; 0 keeps all.
        min_p: tokens at least this fraction as likely as the most likely one; 0 keeps all.
        seed: same seed, same model, same prompt: same answer. None draws one (reported in `Finished`).
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
