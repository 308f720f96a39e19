"""RAM for reads in flight, counted by hand: whole pages that a read may touch, twice where experts are put together."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from localrun.alignment import PAGE_BYTES
from localrun.offload.cache.staging import N_BUFFERS, buffers, staging_bytes, staging_bytes_aligned
from localrun.quant.model.source import Encoding, Extent


def source(*experts: list[tuple[int, int]], encoding: Encoding = Encoding.GGML, better: bool = False) -> Any:
    """A model with one layer; each expert's (offset, bytes) of its matrices."""
    recipes = [
        tuple(SimpleNamespace(encoding=encoding, extents=[Extent(0, at, n)]) for at, n in expert) for expert in experts
    ]
    layer = SimpleNamespace(better=((),) if better else (), n_experts=len(recipes))
    return SimpleNamespace(
        moe_layers={0: layer},
        base_expert=lambda layer, expert: recipes[0],
        expert=lambda layer, expert: recipes[expert],
    )


PAGES = [(0, 2 * PAGE_BYTES), (2 * PAGE_BYTES, PAGE_BYTES), (3 * PAGE_BYTES, PAGE_BYTES)]


def test_matrices_that_are_whole_pages_are_read_where_they_are_packed_from() -> None:
    assert buffers(source(PAGES)) == ((3 + 2 + 2) * PAGE_BYTES, 1)
    assert staging_bytes(source(PAGES)) == N_BUFFERS * 7 * PAGE_BYTES
    assert staging_bytes_aligned([n for _, n in PAGES]) == staging_bytes(source(PAGES))


@pytest.mark.parametrize(
    ("experts", "encoding"),
    [([(5, 100)] * 3, Encoding.GGML), ([(0, 100)] * 3, Encoding.GGML), (PAGES, Encoding.FP4)],
    ids=["in the middle of pages", "a part of a page", "to be decoded"],
)
def test_all_others_are_put_together_in_a_second_place(experts: list[tuple[int, int]], encoding: Encoding) -> None:
    assert buffers(source(experts, encoding=encoding))[1] == 2


def test_the_largest_copy_counts_wherever_it_is() -> None:
    larger = [(0, 10 * PAGE_BYTES)] * 3
    assert buffers(source(PAGES, larger)) == (7 * PAGE_BYTES, 1), "nobody reads it without a better copy"
    assert buffers(source(PAGES, larger, better=True)) == (33 * PAGE_BYTES, 1)


def test_a_model_without_experts_needs_a_page() -> None:
    nothing: Any = SimpleNamespace(moe_layers={})
    assert buffers(nothing) == (PAGE_BYTES, 1)
