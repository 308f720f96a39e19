"""How much RAM reading a model's experts takes, in addition to their slots."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Final

from localrun.alignment import PAGE_BYTES, ceil_div
from localrun.offload.cache.early import RECIPE
from localrun.quant.model.source import Encoding, ModelSource, Projection

N_BUFFERS = 6
"""Default number of experts being read concurrently."""

PLACE_BYTES: Final = 1000
"""Of one copy's `Projection`s, which the store keeps once it has looked them up: [m] up to 931, by kind of model."""


def staging_bytes(source: ModelSource) -> int:
    """Default RAM for reading this model's experts, in addition to their slots."""
    return N_BUFFERS * sum(buffers(source)) + places_bytes(source)


def staging_bytes_aligned(matrix_bytes: Sequence[int], layers: Collection[int], n_experts: int) -> int:
    """The same for experts whose matrices begin and end at pages, as they do in a conversion of an official checkpoint.

    Args:
        matrix_bytes: of gate, up and down.
        layers: that have experts.
        n_experts: of each layer.
    """
    buffer_bytes = sum(_read_bytes(n_bytes) for n_bytes in matrix_bytes)
    return N_BUFFERS * buffer_bytes + _places_bytes(layers, n_experts, len(layers) * n_experts)


def places_bytes(source: ModelSource) -> int:
    """RAM for remembering where experts are, all of them; in layers with better copies, two of each."""
    moe = source.moe_layers
    n_experts = max((layer.n_experts for layer in moe.values()), default=0)
    return _places_bytes(moe, n_experts, sum(layer.n_experts * (2 if layer.better else 1) for layer in moe.values()))


def _places_bytes(layers: Collection[int], n_experts: int, n_copies: int) -> int:
    """What Python and compiled code know of copies; the latter has room for every layer and expert."""
    n_recipes = (max(layers, default=-1) + 1) * n_experts
    return n_copies * PLACE_BYTES + n_recipes * RECIPE.size * 8


def buffers(source: ModelSource) -> tuple[int, int]:
    """Bytes that an expert's aligned reads can take, and those of its ggml rows where they are decoded before they are packed."""
    samples = list(_samples(source))
    read = (
        sum(_read_bytes(extent.n_bytes) for projection in sample for extent in projection.extents) for sample in samples
    )
    decoded = (
        sum(projection.n_bytes for projection in sample if projection.encoding is not Encoding.GGML)
        for sample in samples
    )
    return max(read, default=PAGE_BYTES), max(decoded, default=0)


def _read_bytes(n_bytes: int) -> int:
    """Pages that so many bytes touch at most."""
    return (ceil_div(n_bytes, PAGE_BYTES) + 1) * PAGE_BYTES


def _samples(source: ModelSource) -> Iterator[tuple[Projection, Projection, Projection]]:
    """One expert of every kind: of each layer's base, and all that have a better copy."""
    for layer, moe in source.moe_layers.items():
        yield source.base_expert(layer, 0)
        if moe.better:
            yield from (source.expert(layer, expert) for expert in range(moe.n_experts))
