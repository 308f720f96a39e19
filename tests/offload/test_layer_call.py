"""One layer call on every kind of store: each pair is computed once, from complete bytes, whatever arrives when."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt
import pytest

from localrun.alignment import PAGE_BYTES, align_up
from localrun.errors import BudgetError, DecodeError, StoppedError, StoreError
from localrun.offload.cache.slots import TAIL_TOKENS, Slot, SlotState
from localrun.offload.cache.telemetry import Telemetry
from localrun.offload.device.routing import Routing
from localrun.offload.kernels import FfnKernel
from localrun.offload.layer_call import LayerCall, tail_tokens
from localrun.offload.misses import PostedCall
from localrun.offload.readahead import ReadAhead
from localrun.offload.residency import Residency
from tests.offload.stores import (
    EXPERT_BYTES,
    KERNELS,
    KINDS,
    LAYERS,
    N_EXPERTS,
    Harness,
    MemoryStore,
    make_harness,
    memory_of,
    packed,
    rows_of,
)

SLOT_BYTES = align_up(EXPERT_BYTES, PAGE_BYTES)
N_USED = 3
LAYER = 1


def no_stop() -> None:
    """Nobody wants to stop."""


@dataclass
class Bench:
    """Residency with room for `n_slots` experts, and a `compute` that notes what it was given."""

    harness: Harness
    residency: Residency
    ahead: ReadAhead
    order: list[int] = field(default_factory=list)
    expert_of_pair: dict[int, int] = field(default_factory=dict)

    def compute(self, kernel: FfnKernel, slots: Sequence[Slot], routing: Routing) -> None:
        for i, (slot, expert) in enumerate(zip(slots, routing.experts, strict=True)):
            assert (slot.layer, slot.expert, slot.state) == (LAYER, expert, SlotState.READY)
            np.testing.assert_array_equal(memory_of(slot), packed(rows_of(LAYER, int(expert))))
            self.order.append(int(expert))
            for row in routing.out_rows[routing.starts[i] : routing.starts[i + 1]]:
                assert int(row) not in self.expert_of_pair
                self.expert_of_pair[int(row)] = int(expert)

    def call(self, ids: npt.NDArray[np.int32], check_stop: object = no_stop) -> LayerCall:
        """A whole call; afterwards nothing is pinned or half filled, whatever happened."""
        self.order.clear()
        self.expert_of_pair.clear()
        with self.residency.lock:
            call = LayerCall(self.residency, self.ahead, LAYER, ids, self.compute, check_stop=check_stop)  # type: ignore[arg-type]
            try:
                call.run()
            finally:
                call.release()
                self.residency.table.check()
                assert all(slot.pins == 0 for slot in self.residency.table)
        assert self.expert_of_pair == {row: int(expert) for row, expert in enumerate(ids.flat)}
        return call

    @property
    def present(self) -> set[int]:
        return {slot.expert for slot in self.residency.table if slot.layer == LAYER}


def make_bench(harness: Harness, n_slots: int) -> Bench:
    telemetry = Telemetry(len(LAYERS))
    wanted = {layer: np.zeros(N_EXPERTS, np.int32) for layer in LAYERS}
    residency = Residency(LAYERS, KERNELS, wanted, harness.store, n_slots * SLOT_BYTES, N_USED, telemetry)
    return Bench(harness, residency, ReadAhead(residency, N_USED, depth=4))


@pytest.fixture(params=KINDS)
def harness(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Harness:
    """Closed by the bench's residency."""
    return make_harness(request.param, tmp_path, monkeypatch)


@pytest.fixture
def bench(harness: Harness) -> Iterator[Bench]:
    """Six slots on a store of each kind."""
    bench = make_bench(harness, 6)
    yield bench
    harness.release()
    bench.residency.close()


@pytest.fixture
def in_memory() -> Iterator[Bench]:
    """Six slots on the store that does as it is told at once."""
    bench = make_bench(MemoryStore(), 6)
    yield bench
    bench.residency.close()


def ids(*rows: Sequence[int]) -> npt.NDArray[np.int32]:
    return np.array(rows, np.int32)


def test_missing_experts_are_read_and_computed_then_found(bench: Bench) -> None:
    first = bench.call(ids([3, 1, 5]))
    assert (first.n_hits, first.n_misses, first.bytes_read) == (0, 3, 3 * EXPERT_BYTES)
    second = bench.call(ids([5, 3, 1]))
    assert (second.n_hits, second.n_misses, second.bytes_read) == (3, 0, 0)
    assert bench.order == [1, 3, 5]  # at once, in file order


def test_what_is_there_is_computed_before_what_must_be_read(bench: Bench) -> None:
    bench.call(ids([4, 8, 9]))
    call = bench.call(ids([0, 4, 9], [2, 4, 8]))
    assert bench.order[:3] == [4, 8, 9]
    assert sorted(bench.order[3:]) == [0, 2]
    assert (call.n_distinct, call.n_hits, call.n_misses) == (5, 3, 2)


def test_reads_go_on_while_many_experts_that_are_there_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    store = MemoryStore()
    bench = make_bench(store, N_EXPERTS)
    bench.call(ids([0, 1, 2], [3, 4, 5]))
    monkeypatch.setattr(LayerCall, "most_at_once", 2)
    n_submitted: list[int] = []
    compute = bench.compute

    def noting(kernel: FfnKernel, slots: Sequence[Slot], routing: Routing) -> None:
        n_submitted.append(len(store.submitted))
        compute(kernel, slots, routing)

    bench.compute = noting  # type: ignore[method-assign]
    bench.call(np.arange(N_EXPERTS, dtype=np.int32).reshape(-1, N_USED))
    assert n_submitted[:2] == [6 + 2 * store.depth, N_EXPERTS]
    assert bench.order[:2] == [0, 1]
    bench.residency.close()


def test_a_call_of_more_experts_than_slots_goes_in_waves_and_reads_each_once(bench: Bench) -> None:
    call = bench.call(np.arange(N_EXPERTS, dtype=np.int32).reshape(-1, N_USED))
    assert sorted(bench.order) == list(range(N_EXPERTS))
    assert call.bytes_read == N_EXPERTS * EXPERT_BYTES
    assert len(bench.present) == 6


def test_experts_of_the_running_call_are_not_evicted_for_one_another(bench: Bench) -> None:
    bench.call(ids([0, 1, 2], [3, 4, 5]))
    bench.call(ids([0, 1, 2], [3, 4, 6]))
    assert bench.present == {0, 1, 2, 3, 4, 6}


def test_only_a_prompts_last_tokens_count_as_use(in_memory: Bench) -> None:
    prompt = np.full((40, N_USED), 0, np.int32)
    prompt[:] = [0, 1, 2]
    prompt[-16:] = [3, 4, 5]
    in_memory.call(prompt)
    in_memory.call(ids([6, 7, 8]))
    assert in_memory.present == {3, 4, 5, 6, 7, 8}


def test_a_failed_read_ends_the_call_with_its_cause_and_the_rest_stays_usable(bench: Bench) -> None:
    bench.harness.fail(LAYER, 2)
    with pytest.raises(StoreError, match="Input/output error"):
        bench.call(ids([1, 2, 3]))
    assert 2 not in bench.present
    assert all(slot.state is SlotState.READY for slot in bench.residency.table)
    bench.call(ids([1, 3, 4]))


def test_a_stop_ends_the_call_before_the_next_wave(in_memory: Bench) -> None:
    def stop() -> None:
        raise StoppedError("stopped")

    with pytest.raises(StoppedError):
        in_memory.call(np.arange(N_EXPERTS, dtype=np.int32).reshape(-1, N_USED), stop)
    assert 0 < len(in_memory.order) < N_EXPERTS


def test_a_read_that_the_store_refuses_is_an_error_and_not_waited_for() -> None:
    store = MemoryStore()
    bench = make_bench(store, 6)
    store.refused = {(LAYER, 2)}
    with pytest.raises(StoreError, match="refused"):
        bench.call(ids([1, 2, 3]))
    assert 2 not in bench.present
    store.refused = set()
    bench.call(ids([1, 2, 3]))
    bench.residency.close()


def test_an_error_in_the_kernel_leaves_nothing_pinned(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("kernel broke")

    with monkeypatch.context() as patch:
        patch.setattr(bench, "compute", broken)
        with pytest.raises(ZeroDivisionError):
            bench.call(ids([1, 2, 3]))
    bench.call(ids([1, 2, 3]))


def test_an_expert_outside_the_layer_is_refused(in_memory: Bench) -> None:
    with pytest.raises(DecodeError, match=r"outside 0\.\.11"):
        in_memory.call(ids([1, 2, N_EXPERTS]))


def test_an_expert_that_is_being_read_ahead_is_waited_for_and_not_read_again(bench: Bench) -> None:
    bench.harness.hold()
    assert bench.ahead.read(LAYER, [1, 2], evict=False) == 2
    bench.harness.release()
    call = bench.call(ids([1, 2, 3]))
    assert call.n_hits + call.n_misses == 3
    assert call.bytes_read == EXPERT_BYTES
    assert bench.residency.settle() == 0


def test_memory_that_guesses_are_being_read_into_is_taken_when_there_is_no_other(bench: Bench) -> None:
    with bench.residency.lock:
        for expert in range(6):
            slot = bench.residency.reserve(0, expert, evict=False)
            assert slot is not None
            bench.residency.read_ahead(slot)
    call = bench.call(ids([1, 2, 3]))
    assert sorted(bench.order) == [1, 2, 3]
    assert call.bytes_read == 3 * EXPERT_BYTES
    assert bench.order[-1] in bench.present  # what was computed before may have had to make room for it


def test_pinned_slots_everywhere_are_a_clear_error(in_memory: Bench) -> None:
    in_memory.call(ids([0, 1, 2], [3, 4, 5]))
    slots = list(in_memory.residency.table)
    for slot in slots:
        in_memory.residency.table.pin(slot)
    with in_memory.residency.lock, pytest.raises(BudgetError, match=r"blk\.1: no room"):
        LayerCall(
            in_memory.residency, in_memory.ahead, LAYER, ids([6, 7, 8]), in_memory.compute, check_stop=no_stop
        ).run()


def test_a_prompt_leaves_every_layer_what_its_last_tokens_used() -> None:
    """Slots for two tokens in all layers: of a prompt as long as you like each layer keeps its last two tokens' experts."""
    assert tail_tokens(2 * N_USED * len(LAYERS), len(LAYERS), N_USED) == 2
    assert tail_tokens(1, len(LAYERS), N_USED) == 1
    assert tail_tokens(1 << 20, len(LAYERS), N_USED) == TAIL_TOKENS
    bench = make_bench(MemoryStore(), 2 * N_USED * len(LAYERS))
    rng = np.random.default_rng(0)
    prompts = {
        layer: np.stack([rng.choice(N_EXPERTS, N_USED, replace=False) for _ in range(40)]).astype(np.int32)
        for layer in LAYERS
    }
    with bench.residency.lock:
        for layer, ids in prompts.items():
            call = LayerCall(bench.residency, bench.ahead, layer, ids, lambda *_: None, check_stop=no_stop)
            try:
                call.run()
            finally:
                call.release()
    for layer, ids in prompts.items():
        there = {slot.expert for slot in bench.residency.table if slot.layer == layer}
        assert set(ids[-2:].flat) <= there, f"layer {layer}"
    bench.residency.close()


class Posted:
    """A call that compiled code has posted, and whose experts it computes as soon as they are answered."""

    layer = LAYER

    def __init__(self, ids: npt.NDArray[np.int32], missing: list[int]) -> None:
        self.ids, self.missing = ids, missing
        self.answers: dict[int, int] = {}

    @property
    def n_computed(self) -> int:
        return 1 + len(self.answers)

    def answer(self, index: int, word: int) -> None:
        self.answers[self.missing[index]] = word


def test_a_posted_call_that_fills_memory_goes_on_once_its_experts_in_ram_are_computed(bench: Bench) -> None:
    bench.call(np.array([[0, 1, 2], [3, 4, 5]], np.int32))
    posted = Posted(np.array([[0, 1, 2], [3, 4, 5], [6, 7, 0]], np.int32), [6, 7])
    with bench.residency.lock:
        call = PostedCall(bench.residency, bench.ahead, posted, SimpleNamespace(check_stop=no_stop))  # type: ignore[arg-type]
        try:
            call.run()
            where = {expert: bench.residency.table.peek(LAYER, expert) for expert in posted.missing}
            assert posted.answers == {expert: slot.address for expert, slot in where.items() if slot is not None}
            assert len(posted.answers) == 2
        finally:
            call.release()
        bench.residency.check()
        assert all(slot.pins == 0 for slot in bench.residency.table)
