"""Reads that compiled code begins: adopted by the store's ticket, dropped, or read again if they fail."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from localrun.errors import StoreError
from localrun.offload.cache.early import EarlyReads, announce, begin
from localrun.offload.cache.slots import Slot
from localrun.offload.cache.tickets import Ticket
from localrun.offload.kernels import futex
from tests.offload.stores import (
    EXPERT_BYTES,
    LAYERS,
    N_BUFFERS,
    N_EXPERTS,
    N_READS,
    OnFiles,
    Packer,
    early_reads_through_python,
    memory_of,
    on_files,
    packed,
)

pytestmark = pytest.mark.skipif(not futex.is_supported(), reason="reads begin in Python without Linux's futex")


class Rig:
    """A store on a real file, and memory for slots."""

    def __init__(self, harness: OnFiles) -> None:
        self.harness, self.store = harness, harness.store
        assert self.store.early is not None
        self.early: EarlyReads = self.store.early
        early_reads_through_python(self.store)
        self.loading: npt.NDArray[np.uint8] = np.zeros((len(LAYERS), N_EXPERTS), np.uint8)
        self.early.watch(self.loading)
        self._memory: list[npt.NDArray[np.uint8]] = []

    def begin(self, layer: int, expert: int) -> bool:
        begun: bool = begin(self.early.address, layer, expert)
        announce(self.early.address)
        return begun

    def submit(self, layer: int, expert: int, arrived: Callable[[], None] | None = None) -> Ticket:
        self._memory.append(np.zeros(EXPERT_BYTES, np.uint8))
        return self.store.submit(Slot(layer, expert, self._memory[-1].ctypes.data, EXPERT_BYTES), arrived=arrived)

    def take(self, ticket: Ticket) -> None:
        assert self.store.completions.get(timeout=300) is ticket

    def read(self, layer: int, expert: int) -> None:
        """A whole read, with which its place is known."""
        self.take(self.submit(layer, expert))

    def is_right(self, ticket: Ticket) -> bool:
        slot = ticket.slot
        return np.array_equal(memory_of(slot), packed(self.harness.rows(slot.layer, slot.expert, 0)))

    def wait(self, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 300
        while not done():
            assert time.monotonic() < deadline
            time.sleep(0.001)

    @property
    def n_held(self) -> int:
        return len(self.early.holding())


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    harness = on_files(tmp_path, monkeypatch)
    yield Rig(harness)
    harness.release()
    harness.store.close()


def test_a_read_begins_once_its_place_is_known_and_unless_it_is_under_way(rig: Rig) -> None:
    assert not rig.begin(0, 1)
    rig.read(0, 1)
    rig.loading[0, 1] = 1
    assert not rig.begin(0, 1)
    rig.loading[0, 1] = 0
    assert rig.begin(0, 1)
    assert rig.early.holding()[0][1:] == (0, 1)


def test_a_read_begins_if_its_place_is_told(rig: Rig) -> None:
    rig.store.know(0, 1, 0)
    assert rig.begin(0, 1)
    ticket = rig.submit(0, 1)
    rig.take(ticket)
    assert rig.is_right(ticket)


@pytest.mark.parametrize("is_late", [False, True])
def test_matrices_of_a_read_are_taken_over_as_they_are_there(rig: Rig, is_late: bool) -> None:
    """Also those that were there before the ticket."""
    rig.store.know(0, 5, 0)
    rig.harness.hold_one(0, 5)  # its last matrix
    assert rig.begin(0, 5)
    if is_late:
        rig.wait(lambda: 0b011 in rig.store._there.values())  # type: ignore[attr-defined]
    ticket = rig.submit(0, 5)
    third = EXPERT_BYTES // 3
    expected = packed(rig.harness.rows(0, 5, 0))
    rig.wait(lambda: np.array_equal(memory_of(ticket.slot)[: 2 * third], expected[: 2 * third]))
    assert not memory_of(ticket.slot)[2 * third :].any()
    rig.harness.release()
    rig.take(ticket)
    assert rig.is_right(ticket)
    rig.wait(lambda: rig.n_held == 0)


@pytest.mark.parametrize("is_complete", [False, True])
def test_a_ticket_takes_over_what_has_begun_and_nothing_is_read_twice(rig: Rig, is_complete: bool) -> None:
    rig.read(1, 2)
    before = rig.harness.asked_bytes
    if not is_complete:
        rig.harness.hold()
    assert rig.begin(1, 2)
    if is_complete:
        rig.wait(lambda: bool(rig.store._complete))  # type: ignore[attr-defined]
    told: list[bool] = []
    ticket = rig.submit(1, 2, lambda: told.append(rig.store.completions.empty()))
    rig.harness.release()
    rig.take(ticket)
    assert ticket.error is None
    assert told == [True]
    assert rig.is_right(ticket)
    assert rig.harness.asked_bytes - before == before
    rig.wait(lambda: rig.n_held == 0)


def test_what_cannot_be_read_is_read_again_and_says_why(rig: Rig) -> None:
    rig.read(0, 3)
    rig.harness.fail(0, 3)
    assert rig.begin(0, 3)
    told: list[bool] = []
    ticket = rig.submit(0, 3, lambda: told.append(True))
    rig.take(ticket)
    assert isinstance(ticket.error, StoreError)
    assert told == []
    rig.read(0, 4)  # readers and buffers are all right


def test_reads_that_nobody_takes_over_give_their_buffers_back(rig: Rig) -> None:
    for expert in range(N_BUFFERS + 1):
        rig.read(2, expert)
    for hold in (False, True):
        if hold:
            rig.harness.hold()
        assert [rig.begin(2, expert) for expert in range(N_BUFFERS + 1)] == [True] * N_BUFFERS + [False]
        if not hold:
            rig.wait(lambda: len(rig.store._complete) == N_BUFFERS)  # type: ignore[attr-defined]
        waiting = rig.submit(2, N_BUFFERS)
        rig.store.drop_early()
        rig.harness.release()
        rig.take(waiting)
        assert rig.is_right(waiting)
        rig.wait(lambda: rig.n_held == 0)


@pytest.mark.parametrize("is_complete", [False, True])
def test_what_a_ticket_has_taken_over_is_not_dropped(
    rig: Rig, is_complete: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not while its matrices are packed, either: the next early read into that buffer would be lost."""
    rig.store.know(0, 5, 0)
    packing, goes_on = threading.Semaphore(0), threading.Event()

    def pack_slowly(packer: Packer, which: int, raw: npt.NDArray[np.uint8], slot: int) -> None:
        packing.release()
        assert goes_on.wait(300)
        pack(packer, which, raw, slot)

    pack = Packer.pack_matrix
    monkeypatch.setattr(Packer, "pack_matrix", pack_slowly)
    if not is_complete:
        rig.harness.hold()
    assert rig.begin(0, 5)
    if is_complete:
        rig.wait(lambda: bool(rig.store._complete))  # type: ignore[attr-defined]
    ticket = rig.submit(0, 5)
    rig.harness.release()
    for _ in range(N_READS):
        assert packing.acquire(timeout=300)
    rig.store.drop_early()
    goes_on.set()
    rig.take(ticket)
    assert rig.is_right(ticket)
    rig.wait(lambda: rig.n_held == 0)
    before = rig.harness.asked_bytes
    assert rig.begin(0, 5)
    ticket = rig.submit(0, 5)
    rig.take(ticket)
    assert rig.is_right(ticket)
    rig.wait(lambda: rig.n_held == 0)
    assert rig.harness.asked_bytes == 2 * before


@pytest.mark.parametrize("is_complete", [True, False], ids=["complete", "under-way"])
def test_early_reads_do_not_keep_buffers_from_what_is_waited_for(rig: Rig, is_complete: bool) -> None:
    early, wanted = [(0, expert) for expert in range(N_BUFFERS)], (1, 0)
    for place in [*early, wanted]:
        rig.read(*place)
    if not is_complete:
        rig.harness.hold()
    for place in early:
        assert rig.begin(*place)
    if is_complete:
        rig.wait(lambda: len(rig.store._complete) == N_BUFFERS)  # type: ignore[attr-defined]
    ticket = rig.submit(*wanted)  # as with memory for one expert: the others get slots only after this one
    rig.harness.release()
    rig.take(ticket)
    assert rig.is_right(ticket)
    later = [rig.submit(*place) for place in early]
    assert {id(rig.store.completions.get(timeout=300)) for _ in later} == set(map(id, later))
    assert all(map(rig.is_right, later))
    rig.wait(lambda: rig.n_held == 0)
