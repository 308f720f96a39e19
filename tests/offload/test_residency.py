"""Where experts are: budgets, reads, better copies, and what the GPU tier asks for."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGMLQuantizationType as QT

from localrun.alignment import PAGE_BYTES, align_up
from localrun.errors import BudgetError, StoreError
from localrun.offload.cache.slots import Slot, SlotState
from localrun.offload.cache.telemetry import Counter, Telemetry
from localrun.offload.cache.tickets import Ticket
from localrun.offload.kernels import FfnKernel
from localrun.offload.residency import Residency, floor_bytes, largest_slot
from tests.offload.stores import (
    EXPERT_BYTES,
    KERNELS,
    LAYERS,
    N_EXPERTS,
    MemoryStore,
    Packer,
    memory_of,
    packed,
    rows_of,
)

SLOT_BYTES = align_up(EXPERT_BYTES, PAGE_BYTES)
N_USED = 2


class LargerPacker(Packer):
    """Of better copies."""

    slot_bytes = EXPERT_BYTES + PAGE_BYTES

    def unpack(self, slot: int, raw: npt.NDArray[np.uint8]) -> None:
        memory = memory_of(Slot(0, 0, slot, raw.size))
        raw[:] = packed(memory)


TWO_KERNELS = cast("Mapping[int, Sequence[FfnKernel]]", {layer: [Packer(), LargerPacker()] for layer in LAYERS})


class FakeTier:
    """As much of a GPU tier as residency asks: which experts are there."""

    def __init__(self) -> None:
        self.where = np.full((len(LAYERS), N_EXPERTS), -1, np.int16)
        self.closed = False

    def begin(self, in_ram: object, *, n_unpackers: int) -> None:
        self.in_ram = in_ram

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


def make(store: MemoryStore, n_slots: int = 6, *, adaptive: bool = False, better: Sequence[int] = ()) -> Residency:
    """With `better` experts wanted in the second variant, in every layer."""
    wanted = {layer: np.zeros(N_EXPERTS, np.int32) for layer in LAYERS}
    for variants in wanted.values():
        variants[list(better)] = 1
    layers = {n: replace(moe, better=((QT.F32, QT.F32, QT.F16),)) for n, moe in LAYERS.items()} if better else LAYERS
    kernels = TWO_KERNELS if better else KERNELS
    budget = n_slots * largest_slot(kernels)
    return Residency(layers, kernels, wanted, store, budget, N_USED, Telemetry(len(LAYERS)), adaptive=adaptive)


@pytest.fixture
def residency(store: MemoryStore) -> Iterator[Residency]:
    made = make(store)
    yield made
    made.close()


def fill(residency: Residency, layer: int, *experts: int) -> None:
    with residency.lock:
        for expert in experts:
            slot = residency.reserve(layer, expert)
            assert slot is not None
            assert residency.read(slot) == EXPERT_BYTES
    residency.settle()


def test_a_budget_below_one_tokens_experts_is_refused_with_the_one_that_works(store: MemoryStore) -> None:
    floor = floor_bytes(KERNELS, N_USED)
    assert floor == N_USED * SLOT_BYTES
    with pytest.raises(BudgetError, match="2 experts of one layer") as caught:
        Residency(LAYERS, KERNELS, {}, store, floor - 1, N_USED, Telemetry(1))
    assert caught.value.hint is not None
    assert "--ram to at least" in caught.value.hint


def test_a_read_makes_its_slot_ready_and_visible_to_compiled_code(residency: Residency, store: MemoryStore) -> None:
    store.hold()
    with residency.lock:
        slot = residency.reserve(2, 5)
        assert slot is not None
        residency.read(slot)
    assert residency.is_here(2, 5)
    assert residency.table.resident[2, 5] == 0
    store.release()
    residency.settle()
    assert residency.table.resident[2, 5] == slot.address
    np.testing.assert_array_equal(memory_of(slot), packed(rows_of(2, 5)))


def test_reads_ahead_are_counted_until_they_end(residency: Residency, store: MemoryStore) -> None:
    store.hold()
    with residency.lock:
        for expert in (1, 2):
            slot = residency.reserve(0, expert, evict=False)
            assert slot is not None
            residency.read_ahead(slot)
    assert residency.settle() == 2
    row = residency.telemetry.values[0]
    assert (row[Counter.PREFETCHED], row[Counter.BYTES_READ]) == (2, 0)
    store.release()
    assert residency.wait_for_read_ahead()
    assert residency.settle() == 0
    assert (row[Counter.PREFETCHED], row[Counter.BYTES_READ]) == (2, 2 * EXPERT_BYTES)
    assert not residency.wait_for_read_ahead()


def test_a_failed_read_ahead_frees_its_slot_and_is_only_logged(
    residency: Residency, store: MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    store.fail(1, 1)
    with residency.lock:
        slot = residency.reserve(1, 1, evict=False)
        assert slot is not None
        residency.read_ahead(slot)
    assert residency.settle() == 0
    assert not residency.is_here(1, 1)
    assert residency.table.used_bytes == 0
    assert "reading ahead failed: experts: Input/output error" in caplog.text
    assert residency.telemetry.values[1, Counter.BYTES_READ] == 0


def test_a_read_ahead_that_the_store_refuses_leaves_no_trace(residency: Residency, store: MemoryStore) -> None:
    store.refused = {(1, 1)}
    with residency.lock:
        slot = residency.reserve(1, 1, evict=False)
        assert slot is not None
        with pytest.raises(StoreError, match="refused"):
            residency.read_ahead(slot)
    assert (residency.settle(), residency.table.used_bytes) == (0, 0)
    assert not residency.is_here(1, 1)
    row = residency.telemetry.values[1]
    assert (row[Counter.PREFETCHED], row[Counter.BYTES_READ]) == (0, 0)
    residency.table.check()


def test_a_better_copy_that_the_store_refuses_leaves_the_smaller_one(store: MemoryStore) -> None:
    residency = make(store, better=[3], adaptive=True)
    fill(residency, 0, 3)
    used = residency.table.used_bytes
    store.refused = {(0, 3)}
    with pytest.raises(StoreError, match="refused"):
        residency.upgrade()
    small = residency.table.peek(0, 3)
    assert small is not None
    assert (small.pins, small.state, residency.table.used_bytes) == (0, SlotState.READY, used)
    store.refused = set()
    residency.upgrade()
    residency.settle()
    residency.upgrade()
    assert residency.variants_of(0)[3] == 1
    residency.table.check()
    residency.close()


def test_room_counts_free_memory_only(residency: Residency) -> None:
    assert residency.room(0) == 6 * SLOT_BYTES // EXPERT_BYTES
    fill(residency, 0, 0, 1, 2, 3, 4, 5)
    assert residency.room(0) == 0
    assert not residency.has_room(1, 0)
    with residency.lock:
        assert residency.reserve(1, 0, evict=False) is None
        assert residency.reserve(1, 0) is not None
    assert not residency.is_here(0, 0)


def test_an_expert_is_read_in_its_better_copy_unless_somebody_waits_in_adaptive_mode(store: MemoryStore) -> None:
    plain = make(store, better=[3])
    assert [plain.variant_to_read(0, e) for e in (2, 3)] == [0, 1]
    plain.close()
    adaptive = make(MemoryStore(), better=[3], adaptive=True)
    assert [adaptive.variant_to_read(0, e) for e in (2, 3)] == [0, 0]
    with adaptive.lock:
        waited_for, guessed = adaptive.reserve(0, 3), adaptive.reserve(1, 3, evict=False)
    assert waited_for is not None
    assert guessed is not None
    assert (waited_for.variant, guessed.variant) == (0, 1)
    adaptive.close()


def test_better_copies_take_the_smaller_ones_places_one_at_a_time_the_last_used_first(store: MemoryStore) -> None:
    residency = make(store, better=[3, 4], adaptive=True)
    fill(residency, 0, 3, 4, 5)
    assert residency.variants_of(0)[[3, 4, 5]].tolist() == [0, 0, 0]
    residency.upgrade()  # starts
    assert residency.settle() == 0
    residency.upgrade()  # takes 4, starts 3
    assert residency.variants_of(0)[[3, 4, 5]].tolist() == [0, 1, 0]
    residency.settle()
    residency.upgrade()
    assert residency.variants_of(0)[[3, 4, 5]].tolist() == [1, 1, 0]
    residency.table.check()
    residency.close()


def test_a_better_copy_that_cannot_be_read_is_not_tried_again(
    store: MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    residency = make(store, better=[3], adaptive=True)
    fill(residency, 0, 3)
    store.fail(0, 3)
    for _ in range(3):
        residency.upgrade()
        residency.settle()
    assert store.submitted == [(0, 3), (0, 3)]
    assert residency.variants_of(0)[3] == 0
    assert "keeping the smaller one" in caplog.text
    residency.table.check()
    residency.close()


def test_an_expert_on_a_gpu_is_here_and_its_copy_in_ram_goes(residency: Residency) -> None:
    tier = FakeTier()
    residency.use_gpu(cast("Any", tier))
    fill(residency, 0, 1, 2)
    tier.where[0, 1] = tier.where[2, 7] = 0
    assert residency.on_gpu(2, 7)
    assert residency.is_here(2, 7)
    with residency.lock:
        residency.drop_copies(tier.where >= 0)
    assert residency.table.peek(0, 1) is None
    assert residency.table.peek(0, 2) is not None


def test_copies_that_a_call_uses_or_that_are_being_read_stay(residency: Residency, store: MemoryStore) -> None:
    fill(residency, 0, 1)
    pinned = residency.table.peek(0, 1)
    assert pinned is not None
    residency.table.pin(pinned)
    store.hold()
    with residency.lock:
        loading = residency.reserve(0, 2)
        assert loading is not None
        residency.read(loading)
        residency.drop_copies(np.ones((len(LAYERS), N_EXPERTS), bool))
    assert {slot.expert for slot in residency.table} == {1, 2}


def test_rows_come_from_the_copy_in_ram_where_its_format_is_the_wanted_one(store: MemoryStore) -> None:
    residency = make(store, better=[3])
    fill(residency, 0, 3)
    rows = np.zeros(EXPERT_BYTES, np.uint8)
    assert not residency.copy_rows(0, 3, 0, rows)
    assert not residency.copy_rows(0, 4, 0, rows)
    assert residency.copy_rows(0, 3, 1, rows)
    np.testing.assert_array_equal(rows, rows_of(0, 3))
    slot = residency.table.peek(0, 3)
    assert slot is not None
    assert (slot.pins, slot.state) == (0, SlotState.READY)
    residency.close()


def test_rows_are_not_taken_from_ram_that_hardly_holds_a_token(store: MemoryStore) -> None:
    residency = make(store, 2 * N_USED - 1, better=[3])
    fill(residency, 0, 3)
    assert not residency.copy_rows(0, 3, 1, np.zeros(EXPERT_BYTES, np.uint8))
    residency.close()


def test_rows_that_are_read_do_not_touch_the_table(residency: Residency) -> None:
    memory = np.zeros(EXPERT_BYTES, np.uint8)
    received: queue.SimpleQueue[Ticket] = queue.SimpleQueue()
    residency.read_rows(Slot(1, 6, memory.ctypes.data, memory.size), received.put)
    assert received.get_nowait().error is None
    np.testing.assert_array_equal(memory, rows_of(1, 6))
    assert len(residency.table) == 0
    residency.settle()
    assert residency.telemetry.values[1, Counter.BYTES_READ] == EXPERT_BYTES


def test_closing_closes_the_gpus_first(store: MemoryStore) -> None:
    residency, tier, order = make(store), FakeTier(), []
    residency.use_gpu(cast("Any", tier))
    tier.close = lambda: order.append("gpu")  # type: ignore[method-assign]
    store.close = lambda: order.append("store")  # type: ignore[method-assign]
    residency.close()
    assert order == ["gpu", "store"]
