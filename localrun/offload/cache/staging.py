"""How much RAM reading a model's experts takes, in addition to their slots."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from localrun.alignment import PAGE_BYTES, ceil_div
from localrun.quant.model.source import Encoding, ModelSource, Projection

N_BUFFERS = 6
"""Default number of experts being read concurrently."""


def staging_bytes(source: ModelSource) -> int:
    """Default RAM for reading this model's experts, in addition to their slots."""
    buffer_bytes, halves = buffers(source)
    return N_BUFFERS * buffer_bytes * halves


def staging_bytes_aligned(matrix_bytes: Sequence[int]) -> int:
    """The same for experts whose matrices begin and end at pages, as they do in a conversion of an official checkpoint."""
    return N_BUFFERS * sum(_read_bytes(n_bytes) for n_bytes in matrix_bytes)


def buffers(source: ModelSource) -> tuple[int, int]:
    """Largest space that an expert's aligned reads can take, and how often an expert that is being read needs it."""
    samples = list(_samples(source))
    needed = (
        sum(_read_bytes(extent.n_bytes) for projection in sample for extent in projection.extents) for sample in samples
    )
    # Decoded or unaligned experts are put together in a second buffer before they are packed.
    return max(needed, default=PAGE_BYTES), 1 if all(map(_reads_contiguously, samples)) else 2


def _read_bytes(n_bytes: int) -> int:
    """Pages that so many bytes touch at most."""
    return (ceil_div(n_bytes, PAGE_BYTES) + 1) * PAGE_BYTES


def _samples(source: ModelSource) -> Iterator[tuple[Projection, Projection, Projection]]:
    """One expert of every kind: of each layer's base, and all that have a better copy."""
    for layer, moe in source.moe_layers.items():
        yield source.base_expert(layer, 0)
        if moe.better:
            yield from (source.expert(layer, expert) for expert in range(moe.n_experts))


def _reads_contiguously(projections: tuple[Projection, Projection, Projection]) -> bool:
    return all(
        projection.encoding is Encoding.GGML and extent.offset % PAGE_BYTES == 0 and extent.n_bytes % PAGE_BYTES == 0
        for projection in projections
        for extent in projection.extents
    )
