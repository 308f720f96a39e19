"""What eviction goes by: recent and frequent use, what the running batch has used, and what is announced."""

from __future__ import annotations

import numpy as np
import pytest

from localrun.alignment import PAGE_BYTES
from localrun.offload.cache.demand import HALF_LIVES, SHIFT, Demand
from localrun.offload.cache.slots import Slot, SlotTable

N_LAYERS, N_EXPERTS = 3, 8


def estimate(history: list[int]) -> float:
    """Of an expert with so many tokens since each of its uses."""
    return sum((1 - 0.5 ** (1 / h)) * 0.5 ** (age / h) for h in HALF_LIVES for age in history)


def estimates(demand: Demand, layer: int) -> np.ndarray:
    return demand.order(layer) / 2**SHIFT / 2**20


def run(demand: Demand, uses: np.ndarray, tokens: list[list[tuple[int, int]]]) -> None:
    for token in tokens:
        demand.advance(1)
        for at in token:
            uses[at] += 1


def test_estimate_is_the_sum_of_frequencies_at_several_paces() -> None:
    uses = np.zeros((N_LAYERS, N_EXPERTS), np.int64)
    demand = Demand(uses)
    run(demand, uses, [[(0, 1), (1, 2)], [(0, 1)], [(0, 3), (1, 2)]])
    at_end = estimates(demand, N_LAYERS)  # the third token has passed all layers
    assert at_end[0, 1] == pytest.approx(estimate([1, 2]), abs=1e-5)
    assert at_end[0, 3] == pytest.approx(estimate([0]), abs=1e-5)
    assert at_end[1, 2] == pytest.approx(estimate([0, 2]), abs=1e-5)
    assert at_end[2, 2] == 0


def test_layers_to_come_are_not_a_token_older_yet() -> None:
    uses = np.zeros((N_LAYERS, N_EXPERTS), np.int64)
    demand = Demand(uses)
    run(demand, uses, [[(layer, 5) for layer in range(N_LAYERS)], []])
    now = estimates(demand, 1)[:, 5]
    assert now == pytest.approx([estimate([1]), estimate([0]), estimate([0])], abs=1e-5)
    assert estimates(demand, 0)[:, 5] == pytest.approx([estimate([0])] * 3, abs=1e-5)


def test_a_prompt_counts_by_the_share_of_its_tokens() -> None:
    uses = np.zeros((N_LAYERS, N_EXPERTS), np.int64)
    demand = Demand(uses)
    demand.advance(512)
    uses[0, :3] += [512, 256, 1]
    demand.advance(1)
    share = estimates(demand, 0)[0, :3]
    assert share[0] == pytest.approx(sum(1 - 0.5 ** (512 / h) for h in HALF_LIVES), abs=1e-5)
    assert share[1] == pytest.approx(share[0] / 2, abs=1e-5)
    assert share[2] < 0.01


def test_uses_that_no_batch_announced_stay_in_bounds() -> None:
    uses = np.zeros((N_LAYERS, N_EXPERTS), np.int64)
    demand = Demand(uses)
    uses[0, 1] = 1 << 40
    assert 0 < demand.order(1)[0, 1] < 1 << 59
    assert demand.order(1)[0, 0] == 0
    demand.advance(1)
    assert 0 < demand.order(1)[0, 1] < 1 << 59


@pytest.fixture
def table() -> SlotTable:
    """Three slots for experts 0, 1 and 2 of layer 0, used in this order."""
    table = SlotTable(3 * PAGE_BYTES, N_LAYERS, N_EXPERTS)
    for expert in range(3):
        table.begin_batch(1)
        slot = table.reserve(0, expert, PAGE_BYTES)
        assert slot is not None
        table.uses[0, expert] += 1
        table.ready(slot)
    return table


def next_to_go(table: SlotTable, newcomer: int = 7) -> int:
    before = {slot.expert for slot in table if slot.layer == 0}
    assert table.reserve(1, newcomer, PAGE_BYTES) is not None
    (gone,) = before - {slot.expert for slot in table if slot.layer == 0}
    return gone


def test_frequent_use_outweighs_a_later_one(table: SlotTable) -> None:
    for _ in range(3):
        table.begin_batch(1)
        table.uses[0, 0] += 1
    assert next_to_go(table) == 1


def test_equals_go_by_recency(table: SlotTable) -> None:
    table.uses[:] = 0
    table.demand = Demand(table.uses)
    slot = table.peek(0, 0)
    assert slot is not None
    table.touch(slot)
    assert next_to_go(table) == 1


def test_what_is_announced_stays_until_its_layer_is_computed_or_the_next_batch(table: SlotTable) -> None:
    table.announce(0, 0)
    assert next_to_go(table) == 1
    table.end_announced(0)
    assert next_to_go(table, newcomer=6) == 0


def test_what_is_announced_goes_when_nothing_else_can(table: SlotTable) -> None:
    for slot in table:
        table.announce(0, slot.expert)
        if slot.expert:
            table.pin(slot)
    assert next_to_go(table) == 0


def test_a_new_batch_forgets_announcements(table: SlotTable) -> None:
    table.announce(0, 0)
    table.begin_batch(1)
    assert next_to_go(table) == 0


def test_bytes_read_ahead_are_unused_if_given_up_before_any_use() -> None:
    table = SlotTable(2 * PAGE_BYTES, N_LAYERS, N_EXPERTS)
    for expert in range(2):
        slot = table.reserve(0, expert, PAGE_BYTES)
        assert slot is not None
        table.note_ahead(slot, 1000 + expert)
        table.ready(slot)
    table.uses[0, 1] += 1
    assert table.unused_bytes == 0
    assert next_to_go(table) == 0
    assert table.unused_bytes == 1000
    assert next_to_go(table, newcomer=6) == 1
    assert table.unused_bytes == 1000


def test_a_read_ahead_for_a_running_call_is_used_by_it() -> None:
    """The call counts its experts when it begins, before the read arrives."""
    table = SlotTable(PAGE_BYTES, N_LAYERS, N_EXPERTS)
    slot = table.reserve(0, 3, PAGE_BYTES)
    assert slot is not None
    table.note_ahead(slot, 1000)
    table.uses[0, 3] += 1
    table.ready(slot)
    assert next_to_go(table) == 3
    assert table.unused_bytes == 0


@pytest.mark.parametrize("seed", range(3))
def test_the_first_to_go_is_the_smallest_of_the_order_whatever_happened_since(seed: int) -> None:
    rng, n_slots = np.random.default_rng(seed), 10
    table = SlotTable(n_slots * PAGE_BYTES, N_LAYERS, N_EXPERTS)
    pinned: list[Slot] = []
    try:
        for step in range(300):
            layer, expert = step % 60 // 20, int(rng.integers(N_EXPERTS))
            if step % 60 == 0:
                table.begin_batch(1 + int(rng.integers(2)))
            slot = table.peek(layer, expert)
            match int(rng.integers(8)):
                case 0 | 1 if slot is None:
                    if (fresh := table.reserve(layer, expert, PAGE_BYTES)) is not None:
                        table.check()
                        table.ready(fresh)
                case 2 if slot is not None:
                    table.stamps[layer, expert] = table.tick[0] = (
                        table.tick[0] + 1
                    )  # as compiled code does, which tells nobody
                    table.uses[layer, expert] += 1
                case 3 if slot is not None:
                    table.chill(slot)
                case 4 if slot is not None:
                    table.pin(slot)
                    pinned.append(slot)
                case 5:
                    table.announce(layer, expert)
                case 6:
                    table.end_announced(layer)
                    table.keep([(layer, expert)])
                case _ if pinned:
                    table.unpin(pinned.pop())
            if step % 3 == 0:
                table.check()
    finally:
        table.close()
