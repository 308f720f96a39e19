"""Choosing the next token: llama.cpp's sampler chain built from `SamplingOptions`.

Order as in llama.cpp: biases and penalties modify the distribution, top-k, top-p and min-p truncate it, then temperature, then
sampling.
"""

from __future__ import annotations

import secrets
from typing import Any

import llama_cpp as L

from localrun.engine.options import SamplingOptions
from localrun.errors import UsageError
from localrun.options import MAX_SEED, check_fields

PENALTY_TOKENS = 4096
"""Number of recent tokens that penalties count. llama.cpp scans all of them for every token."""


def check(options: SamplingOptions) -> None:
    """Raises UsageError for values out of bounds, by name."""
    check_fields("sampling", options)


class Sampler:
    """A sampler chain with its random state: one per answer, closed after it.

    Attributes:
        seed: the one given, or a random one.
    """

    def __init__(self, options: SamplingOptions, n_vocab: int = 0) -> None:
        """
        Args:
            n_vocab: needed for biases and penalties.
        """
        check(options)
        for token, _ in options.logit_bias:
            if not 0 <= token < n_vocab:
                raise UsageError(f"logit_bias: token {token} is not in the vocabulary of {n_vocab}")
        self._n_vocab = n_vocab
        self.seed = secrets.randbelow(MAX_SEED + 1) if options.seed is None else options.seed
        self._chain: Any = L.llama_sampler_chain_init(L.llama_sampler_chain_default_params())
        for link in self._links(options):
            L.llama_sampler_chain_add(self._chain, link)  # the chain owns its links

    def _links(self, options: SamplingOptions) -> list[Any]:
        links = self._changes(options)
        if options.temperature == 0:
            return [*links, L.llama_sampler_init_greedy()]
        if options.top_k > 0:
            links.append(L.llama_sampler_init_top_k(options.top_k))
        if options.top_p < 1:
            links.append(L.llama_sampler_init_top_p(options.top_p, 1))
        if options.min_p > 0:
            links.append(L.llama_sampler_init_min_p(options.min_p, 1))
        if options.temperature != 1:
            links.append(L.llama_sampler_init_temp(options.temperature))
        return [*links, L.llama_sampler_init_dist(self.seed)]

    def _changes(self, options: SamplingOptions) -> list[Any]:
        """Links that change logits. Penalties look at what the chain has sampled: the answer, not the prompt."""
        links = []
        if options.logit_bias:
            biases = (L.llama_logit_bias * len(options.logit_bias))()
            for place, (token, bias) in zip(biases, options.logit_bias, strict=True):
                place.token, place.bias = token, float("-inf") if bias <= -100 else bias
            links.append(L.llama_sampler_init_logit_bias(self._n_vocab, len(biases), biases))
        if (options.repeat_penalty, options.presence_penalty, options.frequency_penalty) != (1.0, 0.0, 0.0):
            links.append(
                L.llama_sampler_init_penalties(
                    self._n_vocab,
                    PENALTY_TOKENS,
                    options.repeat_penalty,
                    options.frequency_penalty,
                    options.presence_penalty,
                )
            )
        return links

    def sample(self, context: Any) -> int:
        """The next token from the context's last logits; advances the random state."""
        return int(L.llama_sampler_sample(self._chain, context, -1))

    def close(self) -> None:
        if self._chain:
            L.llama_sampler_free(self._chain)
            self._chain = None

    def __enter__(self) -> Sampler:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
