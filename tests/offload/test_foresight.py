"""What a token's next layer will likely need is read while the drive is idle: bounded, behind what is needed, harmless."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import pytest

from localrun import reading
from localrun.alignment import PAGE_BYTES, align_up
from localrun.errors import StoreError
from localrun.offload.cache.slots import Slot, SlotState
from localrun.offload.cache.telemetry import Counter, Telemetry
from localrun.offload.device.routing import Routing
from localrun.offload.foresight import ENOUGH, MOST_SLOTS, REACH, SLOTS_SHARE
from localrun.offload.kernels import FfnKernel
from localrun.offload.layer_call import LayerCall
from localrun.offload.model import OffloadOptions, open_offloaded
from localrun.offload.readahead import ReadAhead
from localrun.offload.residency import Residency
from localrun.offload.routers import Routers
from localrun.quant.open import open_model
from tests.offload.models import TOKENS, floor_ram, logits, write_model
from tests.offload.stores import EXPERT_BYTES, KERNELS, LAYERS, N_EXPERTS, Harness, MemoryStore, expert_at, on_files

N_USED = 3
N_SLOTS = 16
X = np.zeros(4, np.float32)


class Foretold:
    """Routers that say what they are told."""

    def __init__(self) -> None:
        self.experts: dict[int, Sequence[int]] = {}
        self.asked: list[int] = []

    def likely(self, layer: int, x: npt.NDArray[np.float32], n: int) -> npt.NDArray[np.int32]:
        self.asked.append(layer)
        return np.array(self.experts.get(layer, ()), np.int32)


class Rig:
    """Sixteen slots, routers that can be told what to say, and layer calls."""

    def __init__(self, harness: Harness, *, n_slots: int = N_SLOTS) -> None:
        self.harness = harness
        self.routers = Foretold()
        wanted = {layer: np.zeros(N_EXPERTS, np.int32) for layer in LAYERS}
        budget = n_slots * align_up(EXPERT_BYTES, PAGE_BYTES)
        self.residency = Residency(LAYERS, KERNELS, wanted, harness.store, budget, N_USED, Telemetry(len(LAYERS)))
        self.ahead = ReadAhead(self.residency, N_USED, depth=4, routers=cast("Routers", self.routers))

    def call(self, layer: int, *experts: int) -> LayerCall:
        """A token's whole call."""

        def compute(kernel: FfnKernel, slots: Sequence[Slot], routing: Routing) -> None:
            assert all(slot.state is SlotState.READY for slot in slots)

        ids = np.array([experts], np.int32)
        with self.residency.lock:
            self.residency.settle()
            call = LayerCall(
                self.residency,
                self.ahead,
                layer,
                ids,
                compute,
                check_stop=lambda: None,
                foresee=lambda: self.ahead.foresight.look(layer, X),
            )
            try:
                call.run()
            finally:
                call.release()
                self.residency.table.check()
        return call

    def foresee(self, layer: int, *experts: int, later: Sequence[int] = ()) -> None:
        """What a call of `layer` would cause to be read for the next one, and for the one after it."""
        self.routers.experts = {layer + 1: experts, layer + 2: later}
        with self.residency.lock:
            self.ahead.foresight.look(layer, X)

    def fill(self) -> None:
        """Other layers' experts take all the memory."""
        for expert in range(N_EXPERTS):
            for layer in (0, 2):
                self.ahead.read(layer, [expert], evict=False)
        self.residency.settle()
        assert len(self.residency.table) == N_SLOTS

    def fill_all(self, n: int) -> None:
        """So many experts of layers 0 and 2."""
        for expert in range(N_EXPERTS):
            for layer in (0, 2):
                if len(self.residency.table) < n:
                    self.ahead.read(layer, [expert], evict=False)
                    self.residency.settle()

    def under_way(self, layer: int) -> list[int]:
        return [s.expert for s in self.residency.table if s.layer == layer and s.state is SlotState.LOADING]

    def count(self, counter: Counter) -> int:
        return int(self.residency.telemetry.values[:, counter].sum())


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def rig(store: MemoryStore) -> Iterator[Rig]:
    rig = Rig(store)
    yield rig
    store.release()
    rig.residency.close()


def test_a_right_guess_is_read_once_and_counts_as_a_hit(rig: Rig, store: MemoryStore) -> None:
    rig.foresee(0, 5, 6)
    rig.routers.experts = {}
    assert rig.call(1, 5, 6, 7).n_hits == 2
    assert sorted(store.submitted) == [(1, 5), (1, 6), (1, 7)]
    assert [rig.count(c) for c in (Counter.GUESSES, Counter.GUESSES_USED, Counter.GUESSES_WASTED)] == [2, 2, 0]


def test_two_layers_are_guessed_the_next_one_first(store: MemoryStore) -> None:
    rig = Rig(store, n_slots=2 * N_SLOTS)
    rig.foresee(0, 5, later=[1, 2])
    assert rig.routers.asked == [1, 2]
    assert REACH == 2
    assert store.submitted == [(1, 5), (2, 1), (2, 2)]
    rig.residency.settle()
    rig.foresee(1, 2, 3)
    assert store.submitted[3:] == [(2, 3)]
    rig.routers.experts = {}
    assert rig.call(1, 5, 6, 7).n_hits == 1
    assert rig.call(2, 1, 2, 3).n_hits == 3
    assert [rig.count(c) for c in (Counter.GUESSES, Counter.GUESSES_USED, Counter.GUESSES_WASTED)] == [4, 4, 0]
    rig.residency.close()


def test_no_layer_further_away_is_asked_while_enough_is_under_way(rig: Rig, store: MemoryStore) -> None:
    rig.foresee(0, *range(ENOUGH), later=[7])
    assert rig.routers.asked == [1]
    rig.residency.settle()  # they are there
    rig.foresee(0, *range(ENOUGH), later=[7])
    assert rig.routers.asked == [1, 1, 2]
    assert store.submitted == [*((1, expert) for expert in range(ENOUGH)), (2, 7)]


def test_a_guess_that_a_closer_look_does_not_confirm_is_given_up_if_it_is_not_there_yet(
    rig: Rig, store: MemoryStore
) -> None:
    store.hold()
    rig.foresee(0, later=[1, 2])
    rig.foresee(1, 2)
    store.release()
    rig.residency.settle()
    assert [slot.expert for slot in rig.residency.table if slot.layer == 2] == [2]
    rig.call(2, 0, 2, 3)
    counted = (Counter.GUESSES, Counter.GUESSES_USED, Counter.GUESSES_WASTED)
    assert [rig.count(c) for c in counted] == [2, 1, 0], "nothing was read in vain"


def test_guesses_that_no_call_has_judged_are_judged_in_the_next_batch(rig: Rig) -> None:
    rig.foresee(0, 5, later=[1])
    rig.ahead.prepare([0])
    assert rig.count(Counter.GUESSES_WASTED) == 0
    rig.residency.settle()
    rig.foresee(0, 6)
    assert rig.count(Counter.GUESSES_WASTED) == 2


@pytest.mark.parametrize("n_slots", [N_SLOTS, 60])
def test_guesses_never_take_more_than_their_share_of_slots(store: MemoryStore, n_slots: int) -> None:
    rig = Rig(store, n_slots=n_slots)
    rig.foresee(0, *range(N_EXPERTS), later=range(N_EXPERTS))
    assert len(rig.residency.table) == min(MOST_SLOTS, n_slots // SLOTS_SHARE) < 2 * N_EXPERTS
    rig.residency.close()


def test_what_is_needed_overtakes_guesses_that_have_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An expert is three reads here, and two go on at once: the third of a guess waits for all that somebody waits for."""
    harness = on_files(tmp_path, monkeypatch)
    started: list[tuple[int, int]] = []

    def note(fd: int, buffers: list[memoryview], offset: int) -> int:
        started.append(expert_at(offset))
        return harness._preadv(fd, buffers, offset)

    monkeypatch.setattr(reading, "preadv", note)
    rig = Rig(harness)
    harness.hold()
    rig.foresee(0, 5)
    while len(started) < 2:
        time.sleep(0.001)
    needed = rig.residency.reserve(1, 7)
    assert needed is not None
    rig.residency.read(needed)
    harness.release()
    for _ in range(2):
        harness.store.completions.get(timeout=300)
    assert started[:4] == [(1, 5), (1, 5), (1, 7), (1, 7)]
    rig.residency.close()


def test_a_guess_under_way_that_is_needed_is_waited_for_and_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    harness = on_files(tmp_path, monkeypatch, delay_s=0.005)
    rig = Rig(harness)
    rig.foresee(0, 5, 6)
    rig.routers.experts = {}
    call = rig.call(1, 5, 6, 7)
    assert call.n_misses >= 1
    assert rig.count(Counter.GUESSES) == rig.count(Counter.GUESSES_USED) == 2
    total = call.bytes_read + int(rig.residency.telemetry.values[1, Counter.BYTES_READ])
    assert total == 3 * EXPERT_BYTES
    rig.residency.close()


def test_a_guess_under_way_that_is_not_needed_is_given_up(rig: Rig, store: MemoryStore) -> None:
    store.hold()
    rig.foresee(0, 5, 6)
    with rig.residency.lock:
        rig.ahead.foresight.begin(1, np.array([6], np.int32))
        store.release()
        rig.residency.settle()
    assert [slot.expert for slot in rig.residency.table if slot.layer == 1] == [6]
    assert rig.count(Counter.BYTES_READ) == EXPERT_BYTES
    rig.ahead.judge(1, np.array([6], np.int32))
    assert (rig.count(Counter.GUESSES_USED), rig.count(Counter.GUESSES_WASTED)) == (1, 0)


def test_one_that_was_given_up_and_is_wanted_after_all_is_read_again(rig: Rig, store: MemoryStore) -> None:
    store.hold()
    rig.foresee(0, 5)
    with rig.residency.lock:
        rig.ahead.foresight.begin(1, np.array([6], np.int32))
        ids = np.array([[5, 6, 7]], np.int32)
        call = LayerCall(rig.residency, rig.ahead, 1, ids, lambda *_: None, check_stop=lambda: None)
        store.release()
        call.run()
        call.release()
    assert {slot.expert for slot in rig.residency.table} == {5, 6, 7}
    rig.residency.table.check()


def test_what_the_next_layer_has_is_not_given_away_for_a_guess(rig: Rig) -> None:
    rig.ahead.read(1, [9], evict=False)  # the coldest of all
    rig.residency.settle()
    for layer, expert in [(0, e) for e in range(N_EXPERTS)] + [(2, e) for e in range(3)]:
        rig.ahead.read(layer, [expert], evict=False)
    rig.residency.settle()
    rig.foresee(0, 5, 9)
    rig.residency.settle()
    assert {slot.expert for slot in rig.residency.table if slot.layer == 1} == {5, 9}


def test_a_guess_displaces_the_coldest_and_nothing_pinned(rig: Rig) -> None:
    rig.fill()
    coldest = rig.residency.table.peek(0, 0)
    assert coldest is not None
    rig.residency.table.pin(coldest)
    rig.foresee(0, 5)
    assert rig.residency.table.peek(0, 0) is coldest
    assert rig.residency.table.peek(2, 0) is None  # the coldest one of the others
    rig.residency.table.unpin(coldest)


def test_a_guess_takes_no_memory_that_was_given_back_to_the_system(store: MemoryStore) -> None:
    rig = Rig(store, n_slots=4 * N_SLOTS)
    rig.fill_all(2 * N_EXPERTS)
    table = rig.residency.table
    n_withheld = table.withhold(0, 0) or table.withheld_bytes
    assert n_withheld > 0
    slots = list(table)
    for slot in slots:
        table.pin(slot)
    rig.foresee(0, *range(N_EXPERTS))
    assert table.withheld_bytes == n_withheld
    for slot in slots:
        table.unpin(slot)
    rig.residency.close()


def test_a_wrong_guess_is_the_next_to_go(rig: Rig) -> None:
    rig.fill()
    rig.foresee(0, 5)
    rig.call(1, 1, 2, 3)
    rig.foresee(1, 11)
    assert rig.residency.table.peek(1, 5) is None
    assert rig.count(Counter.GUESSES_WASTED) == 1


def test_a_layer_whose_guesses_are_mostly_wrong_is_seldom_guessed(rig: Rig) -> None:
    def n_guesses(n_tokens: int, *used: int) -> int:
        before = rig.count(Counter.GUESSES)
        for _ in range(n_tokens):
            guess = next(e for e in range(3, N_EXPERTS) if rig.residency.table.peek(1, e) is None)
            rig.foresee(0, guess)
            rig.routers.experts = {}
            rig.call(1, *used, guess if len(used) < N_USED else used[0])
            for slot in rig.residency.table:
                rig.residency.table.discard(slot)
        return rig.count(Counter.GUESSES) - before

    assert n_guesses(30, 0, 1, 2) == 30
    assert n_guesses(64, 0, 1, 2) < 32  # they are not worth reading, but get a chance now and then
    assert n_guesses(600, 0, 1) > 300  # right again


def test_nothing_is_asked_or_read_while_all_of_the_next_layer_is_in_ram(rig: Rig, store: MemoryStore) -> None:
    for expert in range(N_EXPERTS):
        rig.ahead.read(1, [expert], evict=False)
        rig.residency.settle()
    n_reads = len(store.submitted)
    rig.foresee(0, 5, 6)
    assert rig.routers.asked == [2]
    assert len(store.submitted) == n_reads


def test_a_small_memory_has_no_room_for_guesses(store: MemoryStore) -> None:
    rig = Rig(store, n_slots=2 * N_USED)
    rig.foresee(0, 5, 6)
    assert store.submitted == []
    rig.residency.close()


def test_the_last_layer_is_followed_by_nothing(rig: Rig) -> None:
    rig.foresee(max(LAYERS), 5)
    assert rig.routers.asked == []


def test_a_guess_that_can_not_be_read_fails_nothing(rig: Rig, store: MemoryStore) -> None:
    store.fail(1, 5)
    rig.foresee(0, 5, 6)
    assert rig.call(1, 6, 7, 8).n_hits == 1
    rig.foresee(0, 5)
    with pytest.raises(StoreError, match="Input/output"):  # needed, and read again: now it is an error
        rig.call(1, 5, 6, 7)
    assert [at for at in store.submitted if at == (1, 5)] == [(1, 5)] * 3


def test_experts_of_hash_layers_are_certain(store: MemoryStore) -> None:
    rig = Rig(store)
    rig.ahead = ReadAhead(rig.residency, N_USED, depth=1, hash_tables={1: np.array([[0, 1, 2], [3, 4, 5]], np.int32)})
    rig.ahead.prepare([1])  # as much as the depth allows
    rig.foresee(0)
    rig.residency.settle()
    assert {slot.expert for slot in rig.residency.table} == {3, 4, 5}
    rig.ahead.prepare([0, 1])  # of several tokens each layer's call says what it needs
    rig.foresee(0)
    assert {slot.expert for slot in rig.residency.table} - {3, 4, 5} <= {0}
    rig.residency.close()


def test_answers_are_the_same_bits_and_guesses_were_used(tmp_path: Path) -> None:
    source = open_model(write_model(tmp_path))
    with open_offloaded(source, OffloadOptions(n_threads=2)) as model:
        expected, floor, everything = logits(model, TOKENS[:60], batch=1), floor_ram(model), model.ram_bytes
        everything_once = sum(moe.n_experts * moe.expert_bytes for moe in source.moe_layers.values())
        assert model.telemetry.totals().bytes_read <= everything_once
    with open_offloaded(source, OffloadOptions(n_threads=2, ram_bytes=max(5 * floor, everything // 2))) as model:
        np.testing.assert_array_equal(logits(model, TOKENS[:60], batch=1), expected)
        totals = model.telemetry.totals()
        assert totals.guesses_used > 0
        assert totals.guesses_used + totals.guesses_wasted <= totals.guesses
        model.pool.residency.check()
    with open_offloaded(source, OffloadOptions(n_threads=2, ram_bytes=max(5 * floor, everything // 2))) as model:
        model.pool.ahead.foresight._routers = None
        np.testing.assert_array_equal(logits(model, TOKENS[:60], batch=1), expected)
        assert model.telemetry.totals().guesses <= model.telemetry.totals().prefetched
