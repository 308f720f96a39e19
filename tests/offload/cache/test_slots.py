"""The arena's promise (never beyond its size, nothing lost) and the order of eviction."""

from __future__ import annotations

import ctypes

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localrun.alignment import PAGE_BYTES
from localrun.errors import BudgetError
from localrun.offload.cache.slots import Arena, SlotState, SlotTable

PAGE = PAGE_BYTES


def filled(table: SlotTable, *experts: int, size: int = PAGE) -> None:
    for expert in experts:
        slot = table.reserve(0, expert, size)
        assert slot is not None
        table.ready(slot)


def test_arena_smaller_than_a_page_is_refused() -> None:
    with pytest.raises(BudgetError):
        Arena(100)


def test_released_neighbours_become_one_hole() -> None:
    arena = Arena(4 * PAGE)
    a, b, c = (arena.allocate(PAGE) for _ in range(3))
    assert a is not None
    assert b is not None
    assert c is not None
    arena.release(a, PAGE)
    arena.release(c, PAGE)
    assert arena.allocate(3 * PAGE) is None
    arena.release(b, PAGE)
    assert arena.allocate(4 * PAGE) == a
    arena.close()


def test_least_recently_used_expert_goes_first() -> None:
    table = SlotTable(3 * PAGE, 4, 10)
    filled(table, 1, 2, 3)
    table.find(0, 1)
    filled(table, 4)
    assert table.peek(0, 2) is None
    assert table.peek(0, 1) is not None
    assert table.n_evictions == 1
    table.close()


def test_pinned_and_loading_slots_are_never_evicted() -> None:
    table = SlotTable(2 * PAGE, 4, 10)
    loading = table.reserve(0, 1, PAGE)
    filled(table, 2)
    pinned = table.find(0, 2)
    assert loading is not None
    assert pinned is not None
    table.pin(pinned)
    assert table.reserve(0, 3, PAGE) is None
    table.ready(loading)
    assert table.reserve(0, 3, PAGE) is not None
    assert table.peek(0, 1) is None
    table.close()


def test_guess_takes_free_memory_only() -> None:
    table = SlotTable(2 * PAGE, 4, 10)
    filled(table, 1)
    assert table.reserve(0, 2, PAGE, evict=False) is not None
    assert table.reserve(0, 3, PAGE, evict=False) is None
    assert table.peek(0, 1) is not None
    table.close()


def test_room_for_a_larger_slot_is_made_where_it_costs_least() -> None:
    """Six small slots in a row, 0 the coldest: beside it lies the hottest, so the pair 3, 4 goes instead."""
    table = SlotTable(6 * PAGE, 4, 10)
    filled(table, *range(6))
    for expert in (0, 3, 4, 2, 5, 1):
        table.find(0, expert)
    filled(table, 9, size=2 * PAGE)
    assert {slot.expert for slot in table} == {0, 1, 2, 5, 9}
    assert table.n_evictions == 2
    table.check()
    table.close()


def test_upgrade_replaces_the_smaller_copy_or_leaves_it() -> None:
    table = SlotTable(5 * PAGE, 4, 10)
    filled(table, 1, 2)
    old = table.peek(0, 1)
    assert old is not None
    new = table.begin_upgrade(old, 3 * PAGE, 1)
    assert new is not None
    assert table.reserve(0, 3, PAGE) is not None  # 2 goes: the upgraded one is protected, in both forms
    assert table.peek(0, 2) is None
    table.check()
    table.end_upgrade(new, complete=True)
    assert table.peek(0, 1) is new
    assert table.variants[0, 1] == 1
    assert table.resident[0, 1] == new.address + 1, "address and variant change in one store"
    again = table.begin_upgrade(new, PAGE, 2)
    assert again is not None
    table.end_upgrade(again, complete=False)
    assert table.peek(0, 1) is new
    table.check()
    table.close()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(1, 5 * PAGE), st.booleans()), max_size=120))
def test_any_mixture_of_sizes_keeps_slots_apart_and_counts_every_byte(steps: list[tuple[int, int, int, bool]]) -> None:
    table = SlotTable(16 * PAGE, 4, 10)
    for layer, expert, size, pin in steps:
        slot = table.find(layer, expert) or table.reserve(layer, expert, size)
        if slot is not None:
            if slot.state is SlotState.LOADING:
                table.ready(slot)
            if pin and sum(s.pins for s in table) < 2:
                table.pin(slot)
            elif slot.pins:
                table.unpin(slot)
            ctypes.memset(slot.address, 0xA5, slot.size_bytes)  # faults if the range is not ours
        table.check()
    table.close()


# --- memory that other programs need ----------------------------------------------------------------------------------


def test_the_coldest_are_given_back_and_nothing_takes_their_place_until_it_may() -> None:
    table = SlotTable(6 * PAGE, 1, 10)
    filled(table, 1, 2, 3, 4)  # two pages are free
    assert table.withhold(2 * PAGE, keep_bytes=PAGE) == 2 * PAGE
    table.check()
    assert {slot.expert for slot in table} == {3, 4}
    assert (table.withheld_bytes, table.used_bytes, table.arena.free_bytes) == (4 * PAGE, 2 * PAGE, 0)
    filled(table, 5)  # in the place of the coldest that is left
    assert {slot.expert for slot in table} == {4, 5}
    assert table.reserve(0, 6, PAGE, evict=False) is None
    table.use_again(PAGE)
    table.check()
    assert (table.withheld_bytes, table.arena.free_bytes) == (3 * PAGE, PAGE)
    table.use_again(100 * PAGE)
    assert (table.withheld_bytes, table.arena.free_bytes) == (0, 4 * PAGE)
    filled(table, 6, 7, 8, 9)
    assert {slot.expert for slot in table} == {4, 5, 6, 7, 8, 9}
    table.check()
    table.close()


def test_what_is_given_back_has_no_pages() -> None:
    table = SlotTable(4 * PAGE, 1, 10)
    filled(table, 1, 2)
    slots = {slot.expert: slot for slot in table}
    for slot in slots.values():
        ctypes.memset(slot.address, 7, PAGE)
    table.withhold(PAGE, keep_bytes=0)
    assert ctypes.string_at(slots[1].address, PAGE) == bytes(PAGE)  # of a private mapping: the page is gone
    assert ctypes.string_at(slots[2].address, PAGE) == bytes([7]) * PAGE
    table.close()


def test_what_a_token_needs_and_what_is_pinned_stays() -> None:
    table = SlotTable(4 * PAGE, 1, 10)
    filled(table, 1, 2, 3, 4)
    assert table.withhold(100 * PAGE, keep_bytes=3 * PAGE) == PAGE
    for slot in table:
        table.pin(slot)
    assert table.withhold(PAGE, keep_bytes=0) == 0
    assert {slot.expert for slot in table} == {2, 3, 4}
    table.close()


def test_a_large_slot_may_use_what_was_withheld_rather_than_find_no_place() -> None:
    table = SlotTable(4 * PAGE, 1, 10)
    filled(table, 1, 2, 3, 4)
    table.find(0, 2)
    table.find(0, 4)
    table.withhold(2 * PAGE, keep_bytes=2 * PAGE)
    assert {slot.expert for slot in table} == {2, 4}  # with a withheld page on both sides
    filled(table, 5, size=2 * PAGE)
    assert table.peek(0, 5) is not None
    table.check()
    table.close()


@given(st.lists(st.tuples(st.sampled_from(["use", "give", "take"]), st.integers(0, 9), st.integers(1, 3))))
@settings(max_examples=60, deadline=None)
def test_no_byte_is_lost_whatever_is_given_and_taken(steps: list[tuple[str, int, int]]) -> None:
    table = SlotTable(8 * PAGE, 1, 10)
    for what, expert, n in steps:
        if what == "give":
            table.withhold(n * PAGE, keep_bytes=3 * PAGE)
        elif what == "take":
            table.use_again(n * PAGE)
        elif table.find(0, expert) is None:
            filled(table, expert, size=(1 + expert % 3) * PAGE)
        table.check()
    table.close()
