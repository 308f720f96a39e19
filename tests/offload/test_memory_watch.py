"""When memory is given back, and when it is used again. No thread acts by itself here: the tests look."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from localrun.offload import memory_watch
from localrun.offload.memory_watch import MemoryWatch, reserve_bytes
from localrun.offload.model import OffloadOptions, open_offloaded
from localrun.offload.residency import Residency
from localrun.quant.open import open_model
from tests.offload.models import TOKENS, logits, write_model
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
    monkeypatch.setattr(memory_watch, "pause_s", lambda available, reserve: 0.0)
    monkeypatch.setattr(MemoryWatch, "_watch", lambda self: None)
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
        residency.look()
    assert len(residency.table) == 8
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "MemAvailable: what?" in caplog.text
    watching.close()


def test_the_thread_outlives_an_error(residency: Residency, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_watch, "LEAST_PAUSE_S", 0.001)
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


@pytest.mark.parametrize(
    ("total", "reserve"), [(24 << 30, 768 << 20), (4 << 30, 256 << 20), (1 << 30, 128 << 20), (512 << 30, 1 << 30)]
)
def test_reserve(total: int, reserve: int) -> None:
    assert reserve_bytes(total) == reserve


def test_it_looks_more_often_the_less_there_is() -> None:
    reserve = 768 << 20
    pauses = [memory_watch.pause_s(n << 20, reserve) for n in (0, reserve >> 20, 1600, 2400, 1 << 20)]
    assert pauses == sorted(pauses)
    assert (pauses[0], pauses[-1]) == (memory_watch.LEAST_PAUSE_S, memory_watch.MOST_PAUSE_S)
    for available in (reserve, 2 * reserve):  # at the highest rate half of the reserve is left at the next look
        fastest = memory_watch.FASTEST_BYTES_PER_S
        assert available - memory_watch.pause_s(available, reserve) * fastest >= reserve / 2 - 1


def test_it_says_once_that_nothing_is_left_to_give(
    residency: Residency, machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    watching = watch(residency, machine)
    fill(residency, 8)
    machine.available = 0
    for _ in range(20):
        watching.look()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "more memory than experts can give back: 0 B are left" in caplog.text
    watching.close()


def test_the_thread_gives_back_while_a_token_is_computed_and_the_tokens_stay_the_same(tmp_path: Path) -> None:
    """Every look finds too little or plenty, by turns, so slots go and come beside compiled code."""
    source = open_model(write_model(tmp_path))
    with open_offloaded(source, OffloadOptions(n_threads=2)) as model:
        expected = [logits(model, TOKENS, batch=batch) for batch in (1, 6)]
    looks, is_loaded = 0, False

    def available() -> int:
        nonlocal looks
        looks += 1
        return 0 if is_loaded and looks % 2 else 1 << 40

    options = OffloadOptions(n_threads=2, available=available, reserve_bytes=1 << 30)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory_watch, "LEAST_PAUSE_S", 0.0005)
        patch.setattr(memory_watch, "MOST_PAUSE_S", 0.0005)
        patch.setattr(memory_watch, "PATIENCE_S", 0.0)
        with open_offloaded(source, options) as model:
            is_loaded, table, ends = True, model.pool.residency.table, time.monotonic() + 300
            while table.n_evictions == 0 or looks < 10:  # as often as the thread gets its turn
                assert time.monotonic() < ends
                for batch, tokens in zip((1, 6), expected, strict=True):
                    np.testing.assert_array_equal(logits(model, TOKENS, batch=batch), tokens)
            model.pool.residency.check()
