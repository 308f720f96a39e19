"""Options for callers of the engine: how to load a model, and how to choose the next token.

Bounds, defaults and meanings are declared in `localrun.options`. Standard library only, so a user interface can import it
without loading numpy, numba or llama.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from localrun.errors import UsageError
from localrun.options import BY_NAME

ThinkMode = str
"""`off`, `high`, `max`, or another one of `ModelFacts.think_modes`."""
GpuName = str
"""`auto`, `none`, or the name of a ggml device."""


DEFAULT_BATCH = 512
"""Prompt tokens per batch where neither anybody says nor a plan chooses: models that are too small to predict, stock llama.cpp."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How a model is loaded.

    Attributes:
        ram_bytes: budget of the expert slots in RAM; None: chosen from the memory that is available.
        vram_bytes: budget on the GPU; None: chosen from the free GPU memory.
        gpu: `auto`, `none` or the name of a ggml device.
        rpc: comma-separated `HOST:PORT` of llama.cpp rpc-servers on other machines; their devices count as GPUs.
        n_ctx: tokens that the context holds; 0: as many as the model was trained for, at most `DEFAULT_CONTEXT`.
        n_threads: CPU threads; 0: one per physical core.
        n_batch: maximum tokens per forward pass during prefill; 0: chosen by the plan (`planner/batch.py`).
        kv_type: number format of the KV cache, one of `KV_TYPES`.
        dense: type that an official checkpoint's FP8 dense matrices are converted to, by name; None: `q8_0`. Only for those.
        keep_dense_bytes: most space in the cache folder for official checkpoints' dense matrices as they were converted; 0: none.
        math: arithmetic of the experts: int8 activations (fast) or exact float32 (for comparisons).
        cache_in_ram: the KV cache is not on the GPU although the layers are; a load decides that.
        mirror: a second copy of the model, ideally on another drive; experts are read from both.
        adaptive: on a miss, use the base's smaller copy and fetch the better one later; the same seed may then give different
            tokens.
    """

    ram_bytes: int | None = None
    vram_bytes: int | None = None
    gpu: GpuName = BY_NAME["gpu"].default
    rpc: str | None = None
    n_ctx: int = BY_NAME["context"].default
    n_threads: int = BY_NAME["threads"].default
    n_batch: int = BY_NAME["batch"].default
    kv_type: str = BY_NAME["kv"].default
    dense: str | None = None
    keep_dense_bytes: int = BY_NAME["keep_dense"].default
    math: Literal["int8", "f32"] = "int8"
    cache_in_ram: bool = False
    mirror: str | None = None
    adaptive: bool = BY_NAME["adaptive"].default


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """How to choose the next token. The defaults are DeepSeek's.

    Attributes:
        temperature: 0 picks the most likely token.
        top_p: smallest set of tokens with at least this probability; 1 keeps all.
        top_k: the k most likely tokens; 0 keeps all.
        min_p: tokens at least this fraction as likely as the most likely one; 0 keeps all.
        seed: random seed; the same seed, model and prompt give the same answer. None picks a random one (reported in `Finished`).
        repeat_penalty: divides the logits of tokens already in the answer; 1 has no effect.
        presence_penalty: subtracted from the logits of tokens already in the answer.
        frequency_penalty: the same, once per occurrence.
        logit_bias: (token id, value to add to its logit); -100 and below ban it.
    """

    temperature: float = BY_NAME["temperature"].default
    top_p: float = BY_NAME["top_p"].default
    top_k: int = BY_NAME["top_k"].default
    min_p: float = BY_NAME["min_p"].default
    seed: int | None = None
    repeat_penalty: float = BY_NAME["repeat_penalty"].default
    presence_penalty: float = BY_NAME["presence_penalty"].default
    frequency_penalty: float = BY_NAME["frequency_penalty"].default
    logit_bias: tuple[tuple[int, float], ...] = ()


def check_context(n_ctx: int, trained: int) -> None:
    """Raises UsageError for a context longer than the model was trained for; `trained` 0 means unknown."""
    if trained and n_ctx > trained:
        raise UsageError(
            f"a context of {n_ctx} tokens exceeds the {trained} tokens this model was trained for",
            hint=f"use --context {trained} or less",
        )


def check_lengths(trained: int, *, n_ctx: int, n_batch: int) -> None:
    """Raises UsageError for a context or steps beyond what a model was trained for (`trained` 0: nobody knows), and for steps
    longer than the context (`n_ctx` 0: as the model likes). `n_batch` 0 is none: the plan chooses.
    """
    check_context(n_ctx, trained)
    if n_ctx and n_batch > n_ctx:
        raise UsageError(
            f"steps of {n_batch} tokens are longer than a context of {n_ctx}",
            hint=f"use --batch {n_ctx} or less, or a longer --context",
        )
    if trained and n_batch > trained:
        raise UsageError(
            f"steps of {n_batch} tokens are longer than the {trained} that this model was trained for",
            hint=f"--batch {trained} is the most",
        )


def check_answer(max_tokens: int | None, n_ctx: int) -> None:
    """Raises UsageError for an answer that the context can't hold."""
    if max_tokens is not None and max_tokens > n_ctx:
        raise UsageError(
            f"an answer of {max_tokens} tokens does not fit a context of {n_ctx}",
            hint=f"leave out --max-tokens, or give at most {n_ctx}; --context sets how long a conversation may be",
        )
