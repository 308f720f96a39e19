"""Facts about a loaded model, and the cost of an answer.

Standard library only, like `options`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Json = Any
"""A JSON value: None, bool, int, float, str, a list or a str-keyed dict of such."""

FinishReason = Literal["eos", "length", "context", "stopped", "stop"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """Facts about a loaded model. Sizes in bytes; counts of 0 mean "has none".

    `gpus` have experts; `dense_gpu` has the dense model, or `n_gpu_layers` of llama.cpp's layers, the output head being the
    last one.
    """

    path: str
    name: str
    architecture: str
    identity: str
    file_bytes: int
    n_layers: int
    n_embd: int
    n_vocab: int
    n_ctx: int
    n_ctx_train: int
    n_batch: int
    n_threads: int
    n_moe_layers: int
    n_experts: int
    n_experts_used: int
    expert_bytes: int
    ram_bytes: int
    has_tokenizer: bool
    think_modes: tuple[str, ...] = ("off",)
    gpus: tuple[str, ...] = ()
    dense_on_gpu: bool = False
    dense_gpu: str = ""
    n_gpu_layers: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Cost of one answer. Rates are None where nothing was measured.

    Attributes:
        prompt_tokens: tokens of the whole prompt.
        reused_tokens: of those, tokens whose KV state was available.
        prompt_s: time of the prefill of the rest.
        new_tokens: tokens generated.
        decode_s: time from the first sampled token to the end.
        context_used: tokens in the context afterwards.
        load_s: time that reloading the model took before this answer (0 if it was loaded).
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    prompt_s: float = 0.0
    new_tokens: int = 0
    decode_s: float = 0.0
    context_used: int = 0
    load_s: float = 0.0

    @property
    def prompt_tokens_per_s(self) -> float | None:
        n_tokens = self.prompt_tokens - self.reused_tokens
        return n_tokens / self.prompt_s if n_tokens > 0 and self.prompt_s > 0 else None

    @property
    def decode_tokens_per_s(self) -> float | None:
        return self.new_tokens / self.decode_s if self.new_tokens > 0 and self.decode_s > 0 else None
