"""The context that a load creates while GPUs hold the dense model but no experts, to find out how much memory llama.cpp takes
there.

A context reserves its buffers on creation, but CUDA's scratch memory, kernels loaded on first use and recorded graphs come with
the first tokens. So it computes a full batch and single tokens before experts get the remaining memory, and the first session
takes it over. If it does not fit, smaller batches, which need smaller buffers, and a cache in RAM are tried first.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from localrun.engine.llama import Context
from localrun.engine.options import EngineOptions
from localrun.errors import GpuMemoryError, LocalrunError
from localrun.ggml import log as llama_log

log = logging.getLogger(__name__)

LEAST_BATCH = 64
"""Tokens; below that, prompts are faster on a CPU that computes large batches."""

SINGLE_TOKENS = 3
"""CUDA records a graph when it sees it for the third time."""


class FirstContext:
    """Creates the context at load, keeps it for the first session, or closes it.

    Args:
        device: name of the GPU that has the dense model, for messages.
        options: the engine's.
        n_ctx, n_threads: see `Context`.
        cache_bytes, buffer_bytes: about what cache and buffers take there; the larger gives way first; a cache of 0 bytes stays.
    """

    def __init__(
        self,
        device: str,
        options: EngineOptions,
        *,
        n_ctx: int,
        n_threads: int,
        cache_bytes: int = 0,
        buffer_bytes: int = 0,
    ) -> None:
        self._device, self._n_ctx, self._n_threads = device, n_ctx, n_threads
        self._wanted = options
        self._cache_may_go = cache_bytes > 0 and not options.cache_in_ram
        self._cache_goes_first = cache_bytes > buffer_bytes
        self.options = options
        """With the batch, and the place of the cache, that fit."""
        self._context: Context | None = None

    def make(self, model: Any) -> FirstContext:
        """Creates it and computes with it; the experts must be idle.

        Raises:
            GpuMemoryError: no context fits next to the dense model.
        """
        while True:
            try:
                self._context = _computing(model, self.options, n_ctx=self._n_ctx, n_threads=self._n_threads)
            except LocalrunError as error:
                smaller, change = self._smaller()
                if smaller is None:
                    raise GpuMemoryError(
                        f"{self._device} has no room for the dense model and a context of {self._n_ctx} tokens: {error}",
                        hint="--gpu none",
                    ) from error
                log.warning("%s: %s; trying %s", self._device, error, change)
                self.options = smaller
            else:
                return self

    def _smaller(self) -> tuple[EngineOptions | None, str]:
        """What to try next, also in words: halved batches, and the whole batch with the cache in RAM."""
        n_batch = min(self.options.n_batch, self._n_ctx) // 2
        if self._cache_may_go and (self._cache_goes_first or n_batch < LEAST_BATCH):
            self._cache_may_go = False
            return replace(self._wanted, cache_in_ram=True), "with the cache in RAM"
        if n_batch >= LEAST_BATCH:
            return replace(self.options, n_batch=n_batch), f"batches of {n_batch} tokens"
        return None, ""

    def take(self) -> Context | None:
        """The context, once; its new owner closes it."""
        context, self._context = self._context, None
        return context

    def close(self) -> None:
        """Frees the context if no session took it; call before freeing the model."""
        if (context := self.take()) is not None:
            context.close()


def _computing(model: Any, options: EngineOptions, *, n_ctx: int, n_threads: int) -> Context:
    """A context that has computed, empty again."""
    context = Context(model, options, n_ctx=n_ctx, n_threads=n_threads, all_logits=False)
    n_first = max(1, min(context.n_batch, context.n_ctx - SINGLE_TOKENS))
    position = 0
    try:
        for n_tokens in (n_first, *[1] * SINGLE_TOKENS):
            code = context.decode([0] * n_tokens, position, all_logits=False)
            if code != 0:
                raise LocalrunError(
                    f"llama.cpp can't compute {n_tokens} tokens (code {code}): {llama_log.recent_errors()}"
                )
            position += n_tokens
        context.clear()
    except BaseException:
        context.close()
        raise
    return context
