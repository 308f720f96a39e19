"""Choosing the next token: llama.cpp's sampler chain built from `SamplingOptions`.

Order as in llama.cpp: top-k, top-p, min-p cut on the model's own distribution, then the temperature, then the draw.
"""

from __future__ import annotations

import secrets
from typing import Any

import llama_cpp as L

from localrun.engine.options import SamplingOptions
from localrun.options import MAX_SEED, check_fields


def check(options: SamplingOptions) -> None:
    """Raises UsageError for values out of bounds, by name."""
    check_fields("sampling", options)


class Sampler:
    """A sampler chain with its random state: one per answer, closed after it.

    Attributes:
        seed: the one given, or the one drawn.
    """

    def __init__(self, options: SamplingOptions) -> None:
        check(options)
        self.seed = secrets.randbelow(MAX_SEED + 1) if options.seed is None else options.seed
        self._chain: Any = L.llama_sampler_chain_init(L.llama_sampler_chain_default_params())
        for link in self._links(options):
            L.llama_sampler_chain_add(self._chain, link)  # the chain owns its links

    def _links(self, options: SamplingOptions) -> list[Any]:
        if options.temperature == 0:
            return [L.llama_sampler_init_greedy()]
        links = []
        if options.top_k > 0:
            links.append(L.llama_sampler_init_top_k(options.top_k))
        if options.top_p < 1:
            links.append(L.llama_sampler_init_top_p(options.top_p, 1))
        if options.min_p > 0:
            links.append(L.llama_sampler_init_min_p(options.min_p, 1))
        if options.temperature != 1:
            links.append(L.llama_sampler_init_temp(options.temperature))
        return [*links, L.llama_sampler_init_dist(self.seed)]

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
