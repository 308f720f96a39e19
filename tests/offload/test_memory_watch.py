"""When memory is given back, and when it is used again. No thread acts by itself here: the tests look."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from localrun.offload import memory_watch
from localrun.offload.memory_watch import MemoryWatch, reserve_bytes
from localrun.offload.residency import Residency
from tests.offload.stores import MemoryStore
from tests.offload.test_residency import N_USED, SLOT_BYTES, make

RESERVE = 2 * SLOT_BYTES


class Machine:
    """Free RAM and time as a test says."""

    def __init__(self) -> None:
        self.available: int | None = 10 * SLOT_BYTES
        self.now = 100.0


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(memory_watch, "INTERVAL_S", 0.0)
    monkeypatch.setattr(MemoryWatch, "_idle", lambda self: None)
    monkeypatch.setattr("localrun.offload.memory_watch.time.monotonic", lambda: machine.now)
    return machine


@pytest.fixture
def residency() -> Iterator[Residency]:
    residency = make(MemoryStore(), n_slots=8)
    yield residency
    residency.close()


def fill(residency: Residency, n: int) -> None:
    for expert in range(n):
        slot = residency.reserve(0, expert)
        assert slot is not None
        residency.table.ready(slot)


def watch(residency: Residency, machine: Machine) -> MemoryWatch:
    return MemoryWatch(residency, lambda: machine.available, RESERVE)


def test_experts_go_as_far_as_the_reserve_lacks_and_come_back_after_a_while(
    residency: Residency, machine: Machine
) -> None:
    watching = watch(residency, machine)
    fill(residency, 8)
    watching.look()
    assert len(residency.table) == 8
    machine.available = RESERVE - SLOT_BYTES
    watching.look()
    assert (len(residency.table), residency.table.withheld_bytes) == (7, SLOT_BYTES)
    machine.available = 10 * SLOT_BYTES
    watching.look()
    assert residency.table.withheld_bytes == SLOT_BYTES
    machine.now += memory_watch.PATIENCE_S
    watching.look()
    assert (residency.table.withheld_bytes, residency.table.arena.free_bytes) == (0, SLOT_BYTES)
    watching.close()


def test_no_more_is_used_than_leaves_twice_the_reserve(residency: Residency, machine: Machine) -> None:
    watching = watch(residency, machine)
    fill(residency, 8)
    machine.available = 0
    watching.look()
    assert residency.table.withheld_bytes == RESERVE
    machine.available, machine.now = 2 * RESERVE + SLOT_BYTES, machine.now + memory_watch.PATIENCE_S
    for _ in range(3):  # what is free but not filled yet counts as used
        watching.look()
        assert residency.table.withheld_bytes == RESERVE - SLOT_BYTES
    watching.close()


def test_what_the_running_token_needs_stays(residency: Residency, machine: Machine) -> None:
    watching = watch(residency, machine)
    fill(residency, 8)
    machine.available = -100 * SLOT_BYTES
    for _ in range(3):
        watching.look()
    assert len(residency.table) == 2 * N_USED
    watching.close()


def test_a_system_that_does_not_say_changes_nothing(residency: Residency, machine: Machine) -> None:
    watching = watch(residency, machine)
    fill(residency, 8)
    machine.available = None
    watching.look()
    assert len(residency.table) == 8
    watching.close()


def test_an_error_is_logged_once_and_changes_nothing(
    residency: Residency, machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    def available() -> int:
        raise ValueError("MemAvailable: what?")

    watching = MemoryWatch(residency, available, RESERVE)
    fill(residency, 8)
    for _ in range(3):
        with watching.decoding():
            residency.look()
    assert len(residency.table) == 8
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "MemAvailable: what?" in caplog.text
    watching.close()


def test_the_thread_outlives_an_error(residency: Residency, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_watch, "INTERVAL_S", 0.001)
    n_asked, again = 0, threading.Event()

    def available() -> int:
        nonlocal n_asked
        n_asked += 1
        if n_asked == 1:
            raise OSError("too many open files")
        again.set()
        return 10 * SLOT_BYTES

    watching = MemoryWatch(residency, available, RESERVE)
    assert again.wait(300)
    watching.close()


def test_nobody_looks_after_the_end(residency: Residency, machine: Machine) -> None:
    watching = watch(residency, machine)
    fill(residency, 8)
    watching.close()
    machine.available = 0
    residency.look()
    assert len(residency.table) == 8


def test_between_answers_a_thread_looks_and_during_a_decode_it_does_not(
    residency: Residency, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_watch, "INTERVAL_S", 0.001)
    looked: list[str] = []
    done = threading.Event()

    def available() -> int:
        looked.append(threading.current_thread().name)
        done.set()
        return 10 * SLOT_BYTES

    watching = MemoryWatch(residency, available, RESERVE)
    assert done.wait(300)
    with watching.decoding():
        looked.clear()
        time.sleep(0.05)
        assert set(looked) <= {threading.current_thread().name}
        with residency.lock:
            residency.look()
        assert looked[-1] == threading.current_thread().name
    done.clear()
    assert done.wait(300)
    watching.close()
    assert looked[-1] == "localrun-memory"


@pytest.mark.parametrize(
    ("total", "reserve"), [(24 << 30, 768 << 20), (4 << 30, 256 << 20), (1 << 30, 128 << 20), (512 << 30, 1 << 30)]
)
def test_reserve(total: int, reserve: int) -> None:
    assert reserve_bytes(total) == reserve
