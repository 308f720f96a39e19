"""RAM for reading experts. Buffers are counted by hand: whole pages that a read may touch, and rows that are decoded from them.
What is remembered of places is compared with what a store really takes for it."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from sys import getsizeof
from types import FunctionType, MappingProxyType, ModuleType, SimpleNamespace
from typing import Any

import pytest

from localrun.alignment import PAGE_BYTES
from localrun.offload.cache.slots import SlotTable
from localrun.offload.cache.staging import N_BUFFERS, buffers, places_bytes, staging_bytes, staging_bytes_aligned
from localrun.offload.cache.store import ExpertStore
from localrun.quant.model.source import Encoding, Extent
from tests.offload.model_stores import MODEL_KINDS, write_model


def source(*experts: list[tuple[int, int]], encoding: Encoding = Encoding.GGML, better: bool = False) -> Any:
    """A model with one layer; each expert's (offset, bytes) of its matrices."""
    recipes = [
        tuple(SimpleNamespace(encoding=encoding, extents=[Extent(0, at, n)], n_bytes=n + 7) for at, n in expert)
        for expert in experts
    ]
    layer = SimpleNamespace(better=((),) if better else (), n_experts=len(recipes))
    return SimpleNamespace(
        moe_layers={0: layer},
        base_expert=lambda layer, expert: recipes[0],
        expert=lambda layer, expert: recipes[expert],
    )


PAGES = [(0, 2 * PAGE_BYTES), (2 * PAGE_BYTES, PAGE_BYTES), (3 * PAGE_BYTES, PAGE_BYTES)]


def test_matrices_are_packed_from_where_they_are_read() -> None:
    assert buffers(source(PAGES)) == ((3 + 2 + 2) * PAGE_BYTES, 0)
    assert buffers(source([(5, 100)] * 3)) == ((2 + 2 + 2) * PAGE_BYTES, 0), "in the middle of a page"
    assert staging_bytes(source(PAGES)) == N_BUFFERS * 7 * PAGE_BYTES + places_bytes(source(PAGES))
    assert staging_bytes_aligned([n for _, n in PAGES], (0,), 1) == staging_bytes(source(PAGES))


@pytest.mark.parametrize("encoding", [Encoding.FP4, Encoding.FP8])
def test_official_formats_are_decoded_beside_what_was_read(encoding: Encoding) -> None:
    assert buffers(source(PAGES, encoding=encoding))[1] == 4 * PAGE_BYTES + 3 * 7


def test_the_largest_copy_counts_wherever_it_is() -> None:
    larger = [(0, 10 * PAGE_BYTES)] * 3
    assert buffers(source(PAGES, larger)) == (7 * PAGE_BYTES, 0), "nobody reads it without a better copy"
    assert buffers(source(PAGES, larger, better=True)) == (33 * PAGE_BYTES, 0)


def test_a_model_without_experts_needs_a_page() -> None:
    nothing: Any = SimpleNamespace(moe_layers={})
    assert buffers(nothing) == (PAGE_BYTES, 0)


class Copied:
    """A kernel whose slots hold rows as they are."""

    slot_bytes, raw_is_packed = 0, True

    def pack_matrix(self, which: int, raw: Any, slot: int) -> None:
        raise AssertionError


def reachable(root: object, *, but: Mapping[int, object] = MappingProxyType({})) -> dict[int, object]:
    """All objects that root keeps alive, by identity; classes, functions and what the program has once anyway left out."""
    found: dict[int, object] = {}
    left = [root]
    while left:
        item = left.pop()
        if id(item) in found or id(item) in but or isinstance(item, (type, ModuleType, FunctionType, Enum)):
            continue
        found[id(item)] = item
        left += gc.get_referents(item)
    return found


@pytest.mark.parametrize("kind", MODEL_KINDS)
def test_a_store_remembers_no_more_of_places_than_is_counted(kind: str, tmp_path: Path) -> None:
    model = write_model(kind, tmp_path).source
    shared = reachable(model)
    moe = model.moe_layers
    copies = [
        (layer, expert, variant)
        for layer in moe
        for expert in range(moe[layer].n_experts)
        for variant in {0, model.expert(layer, expert) != model.base_expert(layer, expert)}
    ]
    store = ExpertStore(model, {layer: [Copied()] * len(moe[layer].variants) for layer in moe})
    table = SlotTable(1 << 20, max(moe) + 1, moe[0].n_experts)

    def read(layer: int, expert: int, variant: int) -> None:
        projections = model.expert(layer, expert) if variant else model.base_expert(layer, expert)
        slot = table.reserve(layer, expert, sum(p.n_bytes for p in projections), variant=variant)
        assert slot is not None
        store.submit(slot)
        assert store.completions.get(timeout=300).error is None
        table.discard(slot)

    try:
        for copy in copies:
            read(*copy)
        assert len(store._known) == len(copies)
        places = sum(map(getsizeof, reachable(store._known, but=shared).values()))
        recipes = store.early._recipes.nbytes if store.early is not None else 0
    finally:
        store.close()
        table.close()
    counted = places_bytes(model)
    assert counted / 2 <= places + recipes <= counted
    assert store.staging_bytes == staging_bytes(model)


def test_layers_with_better_copies_have_two_places_of_each_expert() -> None:
    plain, both = places_bytes(source(PAGES, PAGES)), places_bytes(source(PAGES, PAGES, better=True))
    assert plain < both < 2 * plain  # compiled code only knows of one
