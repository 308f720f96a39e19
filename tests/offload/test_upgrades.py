"""Which expert gets its better copy next, and what becomes of one that can't be read."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from localrun.alignment import PAGE_BYTES
from localrun.offload.cache.slots import Slot, SlotTable
from localrun.offload.cache.tickets import Ticket
from localrun.offload.upgrades import Upgrades


@pytest.fixture
def table() -> Iterator[SlotTable]:
    """Experts 0 to 3 of layer 1 in base form, the last one used last."""
    table = SlotTable(6 * PAGE_BYTES, 2, 4)
    for expert in range(4):
        slot = table.reserve(1, expert, PAGE_BYTES)
        assert slot is not None
        table.ready(slot)
    yield table
    table.close()


def upgrade(table: SlotTable, upgrades: Upgrades, base: Slot, error: Exception | None = None) -> Slot:
    """Begins to read the better copy of an expert, and ends it."""
    better = table.begin_upgrade(base, PAGE_BYTES, 1)
    assert better is not None
    upgrades.started()
    upgrades.arrived(Ticket(better, (), error=error))
    return better


def test_the_expert_used_last_of_those_that_are_wanted_better_comes_next(table: SlotTable) -> None:
    upgrades = Upgrades(table, {1: np.array([1, 1, 1, 0], np.int32)})
    assert upgrades.step() is table.peek(1, 2)
    table.find(1, 0)
    assert upgrades.step() is table.peek(1, 0)


def test_one_at_a_time_until_all_are_done(table: SlotTable) -> None:
    upgrades = Upgrades(table, {1: np.array([1, 0, 1, 0], np.int32)})
    order = []
    while (base := upgrades.step()) is not None:
        order.append(base.expert)
        upgrades.started()
        assert upgrades.step() is None, "one is under way"
        upgrade(table, upgrades, base)
    assert order == [2, 0]
    assert upgrades.n_done == 2
    assert table.variants[1].tolist() == [1, 0, 1, 0]
    table.check()


def test_a_better_copy_takes_the_place_and_the_recency_of_the_base(table: SlotTable) -> None:
    upgrades = Upgrades(table, {1: np.array([1, 0, 0, 0], np.int32)})
    base = upgrades.step()
    assert base is not None
    stamp = table.stamps[1, 0]
    better = upgrade(table, upgrades, base)
    assert table.peek(1, 0) is base, "between two decodes only"
    assert upgrades.step() is None
    assert table.peek(1, 0) is better
    assert table.stamps[1, 0] == stamp
    assert len(table) == 4


def test_a_copy_that_cannot_be_read_is_not_tried_again(table: SlotTable, caplog: pytest.LogCaptureFixture) -> None:
    upgrades = Upgrades(table, {1: np.array([1, 1, 0, 0], np.int32)})
    base = upgrades.step()
    assert base is table.peek(1, 1)
    upgrade(table, upgrades, base, OSError("damaged"))
    assert upgrades.step() is table.peek(1, 0)
    assert table.peek(1, 1) is base
    assert base is not None
    assert base.pins == 0
    assert upgrades.n_done == 0
    assert caplog.messages == ["can't read a better copy, keeping the smaller one: damaged"]
    table.check()
