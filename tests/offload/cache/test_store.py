"""What every store promises (`cache.tickets.Store`): the real one on every kind of model and on faulty, short, slow and doubled
reads, and the fake with which calls and residency are tested."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import xxhash
from gguf import GGMLQuantizationType as QT

from localrun import reading
from localrun.alignment import PAGE_BYTES, align_up
from localrun.errors import ChecksumError, StoreError
from localrun.offload.cache.drive_probe import DEFAULT_PIECE_BYTES
from localrun.offload.cache.early import announce
from localrun.offload.cache.early import begin as begin_early
from localrun.offload.cache.slots import Slot, SlotTable
from localrun.offload.cache.staging import places_bytes
from localrun.offload.cache.store import ExpertStore
from localrun.offload.cache.tickets import AbandonedError, Ticket, most_ahead
from localrun.offload.kernels import futex
from localrun.quant.model.source import Encoding, Extent, ModelSource, MoeLayer, Projection
from tests.offload.model_stores import MODEL_KINDS, Stored, write_model
from tests.offload.stores import (
    EXPERT_BYTES,
    KERNELS,
    KINDS,
    N_EMBD,
    N_EXPERTS,
    Bytes,
    ExpertsInAFile,
    Harness,
    OnFiles,
    early_reads_through_python,
    expert_at,
    make_harness,
    memory_of,
    packed,
)

TIMEOUT_S = 300
MOST_AHEAD = most_ahead(DEFAULT_PIECE_BYTES)
WITH_CHECKSUMS = {*KINDS, "converted", "base and better copies"}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Stored]:
    """A model of one of `MODEL_KINDS`; nobody changes its files, so each is written once."""
    models: dict[str, Stored] = {}

    def of(kind: str) -> Stored:
        if kind not in models:
            models[kind] = write_model(kind, tmp_path_factory.mktemp("model"))
        return models[kind]

    return of


@pytest.fixture
def harness(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stored: Callable[[str], Stored],
) -> Iterator[Harness]:
    """A store of the kind that the parameter names."""
    harness: Harness
    if request.param in MODEL_KINDS:
        model = stored(request.param)
        harness = OnFiles(model.source, monkeypatch, rows=model.rows, file_bytes=model.file_bytes)
    else:
        harness = make_harness(request.param, tmp_path, monkeypatch)
    assert harness.checksums == (request.param in WITH_CHECKSUMS)
    yield harness
    harness.release()
    harness.store.close()


@pytest.fixture
def desk(harness: Harness) -> Iterator[Desk]:
    """Room for all experts of the store."""
    desk = Desk(harness)
    yield desk
    harness.release()
    harness.store.close()  # before the table: reads under way write into it
    desk.table.close()


class Desk:
    """Slots for a store's experts, and what came back."""

    def __init__(self, harness: Harness) -> None:
        self.harness, self.store = harness, harness.store
        self.experts = [(n, expert) for n, layer in harness.layers.items() for expert in range(layer.n_experts)]
        self.per_layer = harness.layers[0].n_experts
        largest = max(harness.rows(*at, harness.best(*at)).size for at in self.experts)
        self.table = SlotTable(len(self.experts) * (largest + PAGE_BYTES), len(harness.layers), self.per_layer)

    def slot(self, layer: int, expert: int) -> Slot:
        variant = self.harness.best(layer, expert)
        slot = self.table.reserve(
            layer, expert, self.harness.rows(layer, expert, variant).size, variant=variant, evict=False
        )
        assert slot is not None
        return slot

    def submit(self, layer: int, expert: int, *, ahead: bool = False) -> Ticket:
        return self.store.submit(self.slot(layer, expert), ahead=ahead)

    def take(self) -> Ticket:
        return self.store.completions.get(timeout=TIMEOUT_S)

    def is_right(self, slot: Slot) -> bool:
        rows = self.harness.rows(slot.layer, slot.expert, slot.variant)
        return np.array_equal(memory_of(slot), packed(rows))


@pytest.mark.parametrize("harness", [*KINDS, *MODEL_KINDS], indirect=True)
class TestEveryStore:
    def test_every_expert_comes_back_once_right_and_read_once(self, desk: Desk) -> None:
        submitted = [desk.submit(*at, ahead=i % 3 == 0) for i, at in enumerate(desk.experts)]
        arrived = [desk.take() for _ in submitted]
        assert sorted(map(id, arrived)) == sorted(map(id, submitted))
        assert desk.store.completions.empty()
        assert [ticket.error for ticket in arrived] == [None] * len(arrived)
        assert all(desk.is_right(ticket.slot) for ticket in arrived)
        sizes = {at: desk.harness.file_bytes(*at, desk.harness.best(*at)) for at in desk.experts}
        assert {(t.slot.layer, t.slot.expert): t.read_bytes for t in arrived} == sizes
        n_reads = sum(len(p.extents) for ticket in arrived for p in ticket.projections)
        total = sum(sizes.values())
        assert total <= desk.harness.asked_bytes < total + n_reads * 2 * PAGE_BYTES, "no more than whole pages"

    def test_a_receiver_gets_rows_of_the_copy_it_asked_for_and_completions_get_nothing(self, desk: Desk) -> None:
        received: queue.SimpleQueue[Ticket] = queue.SimpleQueue()
        for variant in range(desk.harness.best(0, 3) + 1):
            rows = desk.harness.rows(0, 3, variant)
            memory = np.zeros(rows.size, np.uint8)
            slot = Slot(0, 3, memory.ctypes.data, memory.size, variant)
            submitted = desk.store.submit(slot, receiver=received.put)
            ticket = received.get(timeout=TIMEOUT_S)
            assert ticket is submitted
            assert (ticket.error, ticket.read_bytes) == (None, desk.harness.file_bytes(0, 3, variant))
            np.testing.assert_array_equal(memory, rows)
        assert desk.store.completions.empty()

    def test_nothing_appears_while_reads_are_late(self, desk: Desk) -> None:
        desk.harness.hold()
        submitted = desk.submit(0, 1)
        with pytest.raises(queue.Empty):
            desk.store.completions.get(timeout=0.02)
        desk.harness.release()
        assert desk.take() is submitted

    def test_a_slow_read_delays_nobody_else(self, desk: Desk) -> None:
        desk.harness.hold_one(0, 0)
        slow = desk.submit(0, 0)
        others = [desk.submit(*at) for at in desk.experts[1:6]]
        assert [desk.take().slot for _ in others] == [ticket.slot for ticket in others]
        assert all(desk.is_right(ticket.slot) for ticket in others)
        assert desk.store.completions.empty()
        desk.harness.release()
        assert desk.take() is slow
        assert desk.is_right(slow.slot)

    def test_what_is_wanted_overtakes_what_is_read_ahead(self, desk: Desk) -> None:
        desk.harness.hold()
        for expert in range(desk.per_layer):
            desk.submit(0, expert, ahead=True)
        desk.harness.wait_until_held()
        desk.submit(1, 0)
        self.goes_next(desk, 1, 0)

    def test_a_hurried_read_goes_first(self, desk: Desk) -> None:
        desk.harness.hold()
        tickets = [desk.submit(0, expert, ahead=True) for expert in range(desk.per_layer)]
        desk.harness.wait_until_held()
        desk.store.hurry(tickets[-1].slot)
        self.goes_next(desk, 0, desk.per_layer - 1)

    def test_a_hurried_read_says_that_it_is_there_unless_it_is_over(self, desk: Desk) -> None:
        told: list[bool] = []
        desk.harness.hold()
        slot = desk.submit(0, 0, ahead=True).slot
        assert desk.store.hurry(slot, lambda: told.append(desk.is_right(slot)))
        desk.harness.release()
        desk.take()
        assert told == [True]
        assert not desk.store.hurry(slot, lambda: told.append(False))
        assert told == [True]

    def test_only_what_nobody_waits_for_is_announced_once_it_can_be_taken(self, desk: Desk) -> None:
        arrivals: queue.SimpleQueue[bool] = queue.SimpleQueue()
        desk.store.ahead_arrived = lambda: arrivals.put(not desk.store.completions.empty())
        desk.harness.hold()
        desk.harness.fail(0, 2)
        tickets = [desk.submit(0, expert, ahead=expert > 0) for expert in range(5)]
        desk.store.hurry(tickets[1].slot)
        desk.store.abandon(tickets[3].slot)
        desk.harness.release()
        assert arrivals.get(timeout=TIMEOUT_S)
        assert {id(desk.take()) for _ in tickets} == set(map(id, tickets))
        desk.submit(0, 5)
        desk.take()
        assert arrivals.empty()

    def goes_next(self, desk: Desk, layer: int, expert: int) -> None:
        """Of all that wait, this expert is read next, in one go. Others that have a buffer have begun, but do not go on."""
        harness, awaited = desk.harness, (layer, expert)
        while harness.begun.count(awaited) < harness.reads_per_expert:
            harness.step()
        order = list(harness.begun)
        first = order.index(awaited)
        assert set(order[:first]) <= {(0, early) for early in range(desk.store.depth)}
        assert order[:first].count((0, desk.store.depth - 1)) < harness.reads_per_expert
        assert order[first:] == [awaited] * harness.reads_per_expert

    def test_an_abandoned_read_ends_early_and_others_go_on(self, desk: Desk) -> None:
        desk.harness.hold()
        submitted = [desk.submit(0, expert, ahead=True) for expert in range(6)]
        for expert in (0, 5):  # begun, and not begun
            desk.store.abandon(submitted[expert].slot)
        desk.harness.release()
        tickets = {ticket.slot.expert: ticket for ticket in (desk.take() for _ in range(6))}
        assert [expert for expert in range(6) if isinstance(tickets[expert].error, AbandonedError)] == [0, 5]
        assert all(desk.is_right(tickets[expert].slot) for expert in range(1, 5))
        desk.store.abandon(submitted[1].slot)  # over: too late
        assert desk.store.completions.empty()

    @pytest.mark.parametrize(
        ("fault", "kind", "words"),
        [
            ("fail", StoreError, "Input/output error"),
            ("end_early", StoreError, "the file ended at byte"),
            ("damage", ChecksumError, "blk.0.ffn_up_exps.weight: expert 3 does not match its checksum"),
        ],
        ids=["EIO", "end of file", "damage"],
    )
    def test_a_read_that_fails_names_file_and_cause_and_others_go_on(
        self, desk: Desk, fault: str, kind: type[StoreError], words: str
    ) -> None:
        getattr(desk.harness, fault)(0, 3)
        submitted = [desk.submit(0, expert) for expert in range(6)]
        for _ in submitted:
            desk.take()
        assert all(
            ticket.error is None and desk.is_right(ticket.slot) for ticket in submitted if ticket.slot.expert != 3
        )
        error = submitted[3].error
        if fault == "damage" and not desk.harness.checksums:
            assert error is None, "nobody can tell"
            assert not desk.is_right(submitted[3].slot)
            return
        assert type(error) is kind
        assert words in str(error)
        assert error.hint is not None
        assert str(error).split(":")[0] in map(str, desk.harness.files)

    def test_closing_ends_what_has_begun_and_waits_for_nothing_else(self, desk: Desk) -> None:
        desk.harness.hold()
        tickets = [desk.submit(*at, ahead=i % 2 == 0) for i, at in enumerate(desk.experts)]
        closing = threading.Thread(target=desk.store.close, daemon=True)
        closing.start()
        desk.harness.release()
        closing.join(TIMEOUT_S)
        assert not closing.is_alive()
        arrived = {id(desk.store.completions.get_nowait()) for _ in range(desk.store.completions.qsize())}
        for ticket in tickets:  # each slot is whole or untouched: nobody writes into it now
            assert desk.is_right(ticket.slot) if id(ticket) in arrived else not memory_of(ticket.slot).any()


@pytest.mark.parametrize("harness", ["on files", "on two copies", "converted", "base and better copies"], indirect=True)
def test_a_matrix_is_in_the_slot_before_the_next_one_is_read(desk: Desk) -> None:
    desk.harness.hold_one(0, 0)  # its last matrix
    ticket = desk.submit(0, 0)
    third = ticket.slot.size_bytes // 3
    expected = packed(desk.harness.rows(0, 0, ticket.slot.variant))
    deadline = time.monotonic() + TIMEOUT_S
    while not np.array_equal(memory_of(ticket.slot)[: 2 * third], expected[: 2 * third]):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert not memory_of(ticket.slot)[2 * third :].any()
    assert desk.store.completions.empty()
    desk.harness.release()
    assert desk.take() is ticket
    assert desk.is_right(ticket.slot)


@pytest.mark.parametrize("harness", ["on two copies"], indirect=True)
def test_the_other_copy_serves_what_one_cannot_read(
    desk: Desk, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a" / "experts").write_bytes(b"")
    tickets = [desk.submit(0, expert) for expert in range(N_EXPERTS)]
    assert [desk.take().error for _ in tickets] == [None] * N_EXPERTS
    assert all(desk.is_right(ticket.slot) for ticket in tickets)
    assert "reading the other copy" in caplog.text


@pytest.mark.parametrize("harness", ["on two copies"], indirect=True)
def test_time_counts_as_reading_while_a_read_is_under_way(desk: Desk) -> None:
    assert desk.store.reading_s == 0
    desk.harness.hold()
    desk.submit(0, 0)
    deadline = time.monotonic() + TIMEOUT_S
    while (before := desk.store.reading_s) == 0 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.001)
    assert desk.store.reading_s > before > 0
    desk.harness.release()
    assert desk.take().error is None
    assert desk.store.reading_s == desk.store.reading_s, "nothing is read"


@pytest.mark.parametrize("harness", ["on two copies"], indirect=True)
def test_a_read_that_ended_before_the_last_one_counts_no_time_twice(desk: Desk) -> None:
    """An early read may have been complete for a while when a ticket takes it over."""
    store = desk.store
    assert isinstance(store, ExpertStore)
    start = time.perf_counter() - 100
    for begin, end in ((0, 10), (2, 5), (4, 12), (11, 12)):
        with store._lock:
            store._note_begin(start + begin)
            store._note_end(start + end)
    assert store.reading_s == pytest.approx(12)


def test_staging_holds_the_pages_that_experts_touch(tmp_path: Path) -> None:
    model: Any = ExpertsInAFile(tmp_path)
    store = ExpertStore(model, KERNELS, n_buffers=3)
    pages_of_a_matrix = -(-(EXPERT_BYTES // 3) // PAGE_BYTES) + 1
    assert store.staging_bytes == 3 * 3 * pages_of_a_matrix * PAGE_BYTES + places_bytes(model)
    store.close()


class Gate:
    """Reads of the system begin, and wait until they may go on."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.begun: list[tuple[int, int]] = []
        self.goes = threading.Event()
        self._changed = threading.Condition()
        patch.setattr(reading, "preadv", self._preadv)

    def _preadv(self, fd: int, buffers: list[memoryview], offset: int) -> int:
        with self._changed:
            self.begun.append(expert_at(offset))
            self._changed.notify_all()
        assert self.goes.wait(TIMEOUT_S)
        return os.preadv(fd, buffers, offset)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, TIMEOUT_S)


def test_reads_ahead_leave_readers_and_buffers_to_what_somebody_waits_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    source = cast("ModelSource", ExpertsInAFile(tmp_path))
    kernels = {layer: [KERNELS[layer][0]] for layer in source.moe_layers}
    store = ExpertStore(source, kernels, n_reads=MOST_AHEAD + 3, n_buffers=6)
    table = SlotTable(N_EXPERTS * 8 * align_up(EXPERT_BYTES, PAGE_BYTES), len(source.moe_layers), N_EXPERTS)

    def submit(expert: int, *, ahead: bool) -> None:
        slot = table.reserve(0, expert, EXPERT_BYTES)
        assert slot is not None
        store.submit(slot, ahead=ahead)

    for expert in range(5):
        submit(expert, ahead=True)
    gate.wait_for(lambda: len(gate.begun) == MOST_AHEAD)
    submit(7, ahead=False)
    gate.wait_for(lambda: gate.begun.count((0, 7)) == 3)  # an expert is three reads
    assert len(gate.begun) == MOST_AHEAD + 3
    gate.goes.set()
    assert len({store.completions.get(timeout=TIMEOUT_S).slot.expert for _ in range(6)}) == 6
    store.close()
    table.close()


@pytest.mark.parametrize("early", [True, False])
def test_what_a_call_waits_for_wakes_readers_that_rested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, early: bool
) -> None:
    """They had left the pieces of reads ahead alone, because enough were in flight."""
    gate = Gate(monkeypatch)
    if not early:
        monkeypatch.setattr(futex, "is_supported", lambda: False)
    source = cast("ModelSource", ExpertsInAFile(tmp_path))
    store = ExpertStore(source, {layer: [KERNELS[layer][0]] for layer in source.moe_layers}, n_reads=8, n_buffers=6)
    table = SlotTable(N_EXPERTS * 8 * align_up(EXPERT_BYTES, PAGE_BYTES), len(source.moe_layers), N_EXPERTS)
    slots = [table.reserve(0, expert, EXPERT_BYTES) for expert in range(3)]
    for slot in slots:
        assert slot is not None
        store.submit(slot, ahead=True)
    gate.wait_for(lambda: len(gate.begun) == MOST_AHEAD)
    time.sleep(0.05)  # the others go to sleep
    for slot in slots:
        assert slot is not None
        store.hurry(slot)
    gate.wait_for(lambda: len(gate.begun) == 8)  # 9 pieces, 8 readers
    gate.goes.set()
    for _ in slots:
        assert store.completions.get(timeout=TIMEOUT_S).error is None
    store.close()
    table.close()


class NeighboursInAFile:
    """Experts as a conversion lays them: whole pages, one matrix after the other."""

    def __init__(self, path: Path, n_pages: int, apart: tuple[int, int, int]) -> None:
        """apart: pages before each matrix."""
        self.files, self._pages, self._apart = [path], n_pages, apart
        shape = n_pages * PAGE_BYTES // 4 // N_EMBD
        types = (QT.F32, QT.F32, QT.F32)
        self.moe_layers = {0: MoeLayer(0, 2, N_EMBD, shape, types, 3 * n_pages * PAGE_BYTES)}
        self.bytes = np.random.default_rng(5).integers(0, 256, 2 * (3 * n_pages + sum(apart)) * PAGE_BYTES, np.uint8)
        path.write_bytes(self.bytes.tobytes())

    def base_expert(self, _layer: int, expert: int) -> tuple[Projection, ...]:
        extents, n_bytes = [], self._pages * PAGE_BYTES
        at = expert * (3 * n_bytes + sum(self._apart) * PAGE_BYTES)
        for gap in self._apart:
            extents.append(Extent(0, at + gap * PAGE_BYTES, n_bytes))
            at = extents[-1].offset + n_bytes
        rows = [self.bytes[extent.offset : extent.offset + n_bytes] for extent in extents]
        return tuple(
            Projection(QT.F32, 1, n_bytes // 4, Encoding.GGML, (e,), n_bytes, xxhash.xxh3_64_hexdigest(r))
            for e, r in zip(extents, rows, strict=True)
        )

    expert = base_expert

    def rows(self, expert: int) -> Bytes:
        return np.concatenate(
            [self.bytes[p.extents[0].offset :][: p.extents[0].n_bytes] for p in self.base_expert(0, expert)]
        )


@pytest.mark.parametrize(
    ("apart", "pages"), [((0, 0, 0), [4, 4, 4, 3]), ((0, 1, 0), [3, 2, 4, 4, 2]), ((0, 2, 1), [3, 2, 3, 2, 3, 2])]
)
@pytest.mark.parametrize("early", [True, False])
def test_neighbours_are_read_in_even_pieces_across_matrices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, apart: tuple[int, int, int], pages: list[int], early: bool
) -> None:
    """Pieces of at most four pages, of an expert of three times five."""
    source = NeighboursInAFile(tmp_path / "experts", 5, apart)
    size = 15 * PAGE_BYTES
    store = ExpertStore(cast("ModelSource", source), {0: KERNELS[0]}, n_reads=1, piece_bytes=4 * PAGE_BYTES)
    sizes: list[int] = []

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        sizes.append(len(buffers[0]))
        return os.preadv(fd, buffers, offset)

    monkeypatch.setattr(reading, "preadv", preadv)
    if early and store.early is not None:
        early_reads_through_python(store)
    table = SlotTable(3 * size, 1, 2)
    slots = [slot for expert in (0, 1) if (slot := table.reserve(0, expert, size)) is not None]
    for slot in slots:
        store.submit(slot)
        assert store.completions.get(timeout=TIMEOUT_S).error is None
        assert np.array_equal(memory_of(slot), packed(source.rows(slot.expert)))
    assert sizes == [n * PAGE_BYTES for n in pages] * 2
    if early and store.early is not None:
        store.early.watch(np.zeros((1, 2), np.uint8))
        assert begin_early(store.early.address, 0, 1)
        announce(store.early.address)
        memory_of(slots[1])[:] = 0
        store.submit(slots[1])
        assert store.completions.get(timeout=TIMEOUT_S).error is None
        assert np.array_equal(memory_of(slots[1]), packed(source.rows(1)))
        assert sizes == [n * PAGE_BYTES for n in pages] * 3
    store.close()
    table.close()
