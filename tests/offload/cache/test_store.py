"""What every store promises (`cache.store.Store`): the real one on files, with short and slow reads and two copies, and the fake
with which calls and residency are tested."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from localrun.alignment import PAGE_BYTES
from localrun.errors import StoreError
from localrun.offload.cache.slots import Slot, SlotTable
from localrun.offload.cache.store import AbandonedError, ExpertStore, Ticket
from tests.offload.stores import (
    EXPERT_BYTES,
    KERNELS,
    KINDS,
    N_EXPERTS,
    N_LAYERS,
    ExpertsInAFile,
    Harness,
    OnFiles,
    make_harness,
    memory_of,
    packed,
    rows_of,
)

TIMEOUT_S = 30


class StoreContract:
    """A store of any kind: `store` gives a fresh one, open until the test's end."""

    @pytest.fixture
    def table(self) -> Iterator[SlotTable]:
        table = SlotTable(64 * 6 * PAGE_BYTES, N_LAYERS, N_EXPERTS)
        yield table
        table.close()

    @pytest.fixture
    def harness(
        self, table: SlotTable, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[Harness]:
        """Closed before the table: reads under way write into it."""
        harness = make_harness(request.param, tmp_path, monkeypatch)
        yield harness
        harness.release()
        harness.store.close()


def reserve(table: SlotTable, layer: int, expert: int) -> Slot:
    slot = table.reserve(layer, expert, EXPERT_BYTES)
    assert slot is not None
    return slot


def take(harness: Harness) -> Ticket:
    return harness.store.completions.get(timeout=TIMEOUT_S)


@pytest.mark.parametrize("harness", KINDS, indirect=True)
class TestEveryStore(StoreContract):
    def test_a_ticket_appears_when_its_slot_is_filled(self, harness: Harness, table: SlotTable) -> None:
        slot = reserve(table, 1, 4)
        submitted = harness.store.submit(slot)
        ticket = take(harness)
        assert ticket is submitted
        assert ticket.error is None
        np.testing.assert_array_equal(memory_of(slot), packed(rows_of(1, 4)))

    def test_each_read_comes_back_once(self, harness: Harness, table: SlotTable) -> None:
        slots = [reserve(table, layer, expert) for layer in range(N_LAYERS) for expert in range(N_EXPERTS)]
        for i, slot in enumerate(slots):
            harness.store.submit(slot, ahead=i % 3 == 0)
        arrived = [take(harness).slot for _ in slots]
        assert {(slot.layer, slot.expert) for slot in arrived} == {(slot.layer, slot.expert) for slot in slots}
        assert harness.store.completions.empty()
        for slot in slots:
            np.testing.assert_array_equal(memory_of(slot), packed(rows_of(slot.layer, slot.expert)))

    def test_read_bytes_are_the_experts_own(self, harness: Harness, table: SlotTable) -> None:
        assert harness.store.submit(reserve(table, 0, 0)).read_bytes == EXPERT_BYTES

    def test_a_receiver_gets_rows_and_completions_get_nothing(self, harness: Harness) -> None:
        memory = np.zeros(EXPERT_BYTES, np.uint8)
        received: queue.SimpleQueue[Ticket] = queue.SimpleQueue()
        submitted = harness.store.submit(Slot(2, 7, memory.ctypes.data, memory.size), receiver=received.put)
        assert received.get(timeout=TIMEOUT_S) is submitted
        np.testing.assert_array_equal(memory, rows_of(2, 7))
        assert harness.store.completions.empty()

    def test_nothing_appears_while_reads_are_late(self, harness: Harness, table: SlotTable) -> None:
        harness.hold()
        harness.store.submit(reserve(table, 0, 1))
        with pytest.raises(queue.Empty):
            harness.store.completions.get(timeout=0.02)
        harness.release()
        assert take(harness).slot.expert == 1

    def test_what_is_wanted_overtakes_what_is_read_ahead(self, harness: Harness, table: SlotTable) -> None:
        harness.hold()
        for expert in range(N_EXPERTS):
            harness.store.submit(reserve(table, 0, expert), ahead=True)
        harness.store.submit(reserve(table, 1, 0))
        harness.release()
        order = [take(harness).slot for _ in range(N_EXPERTS + 1)]
        # Those that had begun, and one that ends at the same time.
        assert [slot.layer for slot in order].index(1) <= harness.store.depth + 1

    def test_a_hurried_read_goes_first(self, harness: Harness, table: SlotTable) -> None:
        harness.hold()
        slots = [reserve(table, 0, expert) for expert in range(N_EXPERTS)]
        for slot in slots:
            harness.store.submit(slot, ahead=True)
        harness.store.hurry(slots[-1])
        harness.release()
        order = [take(harness).slot.expert for _ in slots]
        assert order.index(N_EXPERTS - 1) <= harness.store.depth + 1

    def test_an_abandoned_read_ends_early_and_others_go_on(self, harness: Harness, table: SlotTable) -> None:
        harness.hold()
        slots = [reserve(table, 0, expert) for expert in range(6)]
        for slot in slots:
            harness.store.submit(slot, ahead=True)
        for slot in (slots[0], slots[5]):  # begun, and not begun
            harness.store.abandon(slot)
        harness.release()
        tickets = {ticket.slot.expert: ticket for ticket in (take(harness) for _ in slots)}
        assert [expert for expert in range(6) if isinstance(tickets[expert].error, AbandonedError)] == [0, 5]
        for expert in range(1, 5):
            np.testing.assert_array_equal(memory_of(tickets[expert].slot), packed(rows_of(0, expert)))
        harness.store.abandon(slots[1])  # over: too late
        assert harness.store.completions.empty()

    def test_a_failed_read_names_its_cause_and_others_go_on(self, harness: Harness, table: SlotTable) -> None:
        harness.fail(0, 3)
        for expert in range(6):
            harness.store.submit(reserve(table, 0, expert))
        tickets = {ticket.slot.expert: ticket for ticket in (take(harness) for _ in range(6))}
        assert {expert for expert, ticket in tickets.items() if ticket.error is not None} == {3}
        error = tickets[3].error
        assert isinstance(error, StoreError)
        assert "experts" in str(error)
        assert "Input/output error" in str(error)
        assert error.hint is not None
        for expert in (0, 1, 2, 4, 5):
            np.testing.assert_array_equal(memory_of(tickets[expert].slot), packed(rows_of(0, expert)))

    def test_closing_does_not_wait_for_reads_that_have_not_begun(self, harness: Harness, table: SlotTable) -> None:
        harness.hold()
        for expert in range(N_EXPERTS):
            harness.store.submit(reserve(table, 0, expert), ahead=expert % 2 == 0)
        harness.release()
        harness.store.close()  # a second `close` follows in the fixture
        n_arrived = 0
        while not harness.store.completions.empty():
            n_arrived += harness.store.completions.get().error is None
        assert n_arrived <= N_EXPERTS


def test_the_other_copy_serves_what_one_cannot_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    harness = OnFiles(tmp_path, monkeypatch, mirrored=True)
    (tmp_path / "a" / "experts").write_bytes(b"")
    table = SlotTable(64 * 6 * PAGE_BYTES, N_LAYERS, N_EXPERTS)
    slots = [reserve(table, 0, expert) for expert in range(N_EXPERTS)]
    for slot in slots:
        harness.store.submit(slot)
    assert [take(harness).error for _ in slots] == [None] * N_EXPERTS
    for slot in slots:
        np.testing.assert_array_equal(memory_of(slot), packed(rows_of(0, slot.expert)))
    assert "reading the other copy" in caplog.text
    harness.store.close()
    table.close()


def test_staging_holds_the_pages_that_experts_touch_twice_where_they_must_be_put_together(tmp_path: Path) -> None:
    store = ExpertStore(ExpertsInAFile(tmp_path), KERNELS, n_buffers=3)  # type: ignore[arg-type]
    pages_of_a_matrix = -(-(EXPERT_BYTES // 3) // PAGE_BYTES) + 1
    assert store.staging_bytes == 3 * 2 * 3 * pages_of_a_matrix * PAGE_BYTES
    store.close()
