"""Read-ahead: exact for hash layers, never in the way, never displacing what was used by a guess."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import pytest

from localrun.alignment import PAGE_BYTES, align_up
from localrun.offload.cache.telemetry import Telemetry
from localrun.offload.model import OffloadedModel, OffloadOptions, open_offloaded
from localrun.offload.readahead import ASKED_TOKENS, CERTAIN, ReadAhead, hash_tables
from localrun.offload.residency import Residency
from localrun.offload.routers import Routers
from localrun.quant.open import open_model
from tests.offload.models import MODEL, TOKENS, floor_ram, logits, write_model
from tests.offload.stores import EXPERT_BYTES, KERNELS, LAYERS, N_EXPERTS, MemoryStore


def wait_until_read(model: OffloadedModel) -> None:
    deadline = time.monotonic() + 300
    while model.pool.residency.settle() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert model.pool.residency.settle() == 0


@pytest.fixture
def model_path(tmp_path: Path) -> Path:
    return write_model(tmp_path)


def test_hash_layer_experts_of_the_next_tokens_are_read_before_they_run(model_path: Path) -> None:
    with open_offloaded(open_model(model_path), OffloadOptions(n_threads=2)) as model:
        ahead = ReadAhead(model.pool.residency, MODEL.n_used, hash_tables=hash_tables(model.source), depth=64)
        assert list(hash_tables(model.source)) == [0]
        started = ahead.prepare(TOKENS[:4])
        assert 0 < started <= 4 * MODEL.n_used
        wait_until_read(model)
        logits(model, TOKENS[:4], batch=4)
        hash_layer = model.telemetry.layers()[0]
        assert hash_layer["misses"] == 0
        assert hash_layer["prefetched"] == hash_layer["hits"] == started


def test_reading_ahead_does_not_change_logits(model_path: Path) -> None:
    source = open_model(model_path)
    with open_offloaded(source, OffloadOptions(n_threads=2)) as model:
        expected, floor = logits(model, batch=5), floor_ram(model)
    with open_offloaded(source, OffloadOptions(ram_bytes=floor, n_threads=2)) as model:
        ahead = ReadAhead(model.pool.residency, MODEL.n_used, hash_tables=hash_tables(source), depth=4)
        ahead.prepare(TOKENS)
        np.testing.assert_array_equal(logits(model, batch=5), expected)
        model.pool.residency.check()


def test_warming_fills_free_memory_in_order_and_evicts_nothing(model_path: Path) -> None:
    source = open_model(model_path)
    with open_offloaded(source, OffloadOptions(n_threads=2)) as model:
        floor = floor_ram(model)
    with open_offloaded(source, OffloadOptions(ram_bytes=floor, n_threads=2)) as model:
        room = model.pool.residency.table.arena.size_bytes // (
            -(-model.pool.residency.kernels(0)[0].slot_bytes // 4096) * 4096
        )
        ranking = [(2, expert) for expert in range(MODEL.n_experts)]
        ahead = ReadAhead(model.pool.residency, MODEL.n_used, hash_tables=hash_tables(source), depth=2)
        ahead.warm(ranking)
        deadline = time.monotonic() + 300
        while len(model.pool.residency.table) < room and time.monotonic() < deadline:
            time.sleep(0.01)
        ahead.close()
        wait_until_read(model)
        assert [(slot.layer, slot.expert) for slot in model.pool.residency.table] == ranking[:room]
        assert model.pool.residency.table.n_evictions == 0


def test_closing_while_warming_ends_at_once(model_path: Path) -> None:
    model = open_offloaded(open_model(model_path), OffloadOptions(n_threads=2))
    ahead = ReadAhead(model.pool.residency, MODEL.n_used, hash_tables=hash_tables(model.source), depth=1)
    ahead.warm([(layer, expert) for layer in range(4) for expert in range(MODEL.n_experts)])
    ahead.close()
    assert ahead._thread is not None
    assert not ahead._thread.is_alive()
    model.close()


def test_second_start_reads_what_the_first_one_used_most(model_path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "profiles"
    options = OffloadOptions(n_threads=2, profile_folder=folder)
    source = open_model(model_path)
    with open_offloaded(source, options) as model:
        logits(model, TOKENS[:8], batch=1)
        there = {(slot.layer, slot.expert) for slot in model.pool.residency.table}
        used = {at for at in there if model.pool.residency.table.uses[at]}  # others were guesses
    with open_offloaded(source, options) as model:
        deadline = time.monotonic() + 300
        while len(model.pool.residency.table) < len(used) and time.monotonic() < deadline:
            time.sleep(0.01)
        wait_until_read(model)
        assert {(slot.layer, slot.expert) for slot in model.pool.residency.table} == used
        model.telemetry.reset()
        logits(model, TOKENS[:8], batch=1)
        assert model.telemetry.totals().misses == 0


def test_profile_counts_each_use_once_on_both_paths(model_path: Path) -> None:
    with open_offloaded(open_model(model_path), OffloadOptions(n_threads=2)) as model:
        for n_tokens in (10, 30):  # the first pass reads (Python), the second finds everything (compiled)
            logits(model, TOKENS[:n_tokens], batch=5)
        model.learner.learn()
        totals = model.telemetry.totals()
        counted = sum(model.learner.profile.counts(layer).sum() for layer in model.pool.residency.layers)
        assert totals.requests == 4 * 40 * MODEL.n_used
        assert int(model.pool.residency.table.uses.sum()) == totals.requests
        assert counted == pytest.approx(totals.requests, rel=0.01)


def test_recorded_trace_holds_every_calls_experts(model_path: Path, tmp_path: Path) -> None:
    from localrun.offload.cache.trace import TraceHeader, TraceRecorder
    from tools.simulator.trace_file import Trace

    source = open_model(model_path)
    with open_offloaded(source, OffloadOptions(n_threads=2)) as model:
        expected = logits(model, batch=5)
        header = TraceHeader.of(source.identity, source.moe_layers, MODEL.n_used)
        with TraceRecorder(tmp_path / "trace", header) as recorder:
            model.pool.record(recorder)
            np.testing.assert_array_equal(logits(model, batch=5), expected)
            model.pool.record(None)
        calls = list(Trace(tmp_path / "trace"))
        assert len(calls) == 4 * 30
        assert sum(call.ids.size for call in calls) == 4 * 150 * MODEL.n_used
        scored = [call for call in calls if call.scores is not None]
        assert {call.layer for call in scored} == set(source.moe_layers) - set(hash_tables(source))
        for call in scored:  # the best scores are those of the chosen
            chosen = np.take_along_axis(call.scores, call.ids, axis=-1)
            best = np.sort(call.scores, axis=-1)[:, -MODEL.n_used :]
            np.testing.assert_array_equal(np.sort(chosen, axis=-1), best)


def test_a_long_prompt_reads_the_next_layers_experts_ahead_without_reading_more(tmp_path: Path) -> None:
    """A batch that uses all experts of a layer will use all of the next one's: each is still read once."""
    path = write_model(tmp_path)
    with open_offloaded(open_model(path), OffloadOptions(n_threads=2)) as model:
        expected, everything = logits(model, batch=150), model.ram_bytes
    with open_offloaded(open_model(path), OffloadOptions(n_threads=2, ram_bytes=everything // 2)) as model:
        np.testing.assert_array_equal(logits(model, batch=150), expected)
        rows = model.telemetry.layers()
        assert sum(row["prefetched"] for row in rows[1:]) > 0
        expert_bytes = model.source.moe_layers[0].expert_bytes
        assert sum(row["bytes_read"] for row in rows) <= len(rows) * MODEL.n_experts * expert_bytes
        model.pool.residency.check()


# -- alone, on a store that does as it is told ------------------------------------------------------------------------


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def residency(store: MemoryStore) -> Iterator[Residency]:
    """Twelve slots for three layers of twelve experts."""
    wanted = {layer: np.zeros(N_EXPERTS, np.int32) for layer in LAYERS}
    budget = 12 * align_up(EXPERT_BYTES, PAGE_BYTES)
    made = Residency(LAYERS, KERNELS, wanted, store, budget, 3, Telemetry(len(LAYERS)))
    yield made
    made.close()


def present(residency: Residency, layer: int) -> list[int]:
    residency.settle()
    return sorted(slot.expert for slot in residency.table if slot.layer == layer)


def test_no_more_than_the_depth_is_under_way(residency: Residency, store: MemoryStore) -> None:
    ahead = ReadAhead(residency, 3, depth=2)
    store.hold()
    assert ahead.read(0, range(5), evict=False) == 2
    assert ahead.read(0, range(5), evict=False) == 0
    store.release()
    assert [ahead.read(0, range(5), evict=False) for _ in range(3)] == [2, 1, 0]


def test_only_what_is_certain_displaces_what_was_used(residency: Residency) -> None:
    ahead = ReadAhead(residency, 3, depth=16)
    assert ahead.read(0, range(12), evict=False) == 12
    residency.settle()
    assert ahead.read(1, [4], evict=False) == 0
    assert ahead.read(1, [4], evict=True) == 1
    assert present(residency, 0) == list(range(1, 12))


def test_tokens_outside_the_hash_table_are_passed_over(residency: Residency) -> None:
    tables = {0: np.array([[0, 1, 2], [2, 3, 4]], np.int32)}
    ahead = ReadAhead(residency, 3, depth=16, hash_tables=tables)
    assert ahead.prepare([]) == 0
    assert ahead.prepare([-1, 7]) == 0
    assert ahead.prepare([1, 1]) == 3
    assert present(residency, 0) == [2, 3, 4]


def follow(ahead: ReadAhead, residency: Residency, layer: int, *, n_tokens: int = 64, share_used: float = 1.0) -> None:
    with residency.lock:
        ahead.follow(layer, n_tokens, share_used)


@pytest.mark.parametrize(
    ("layer", "n_tokens", "share_used", "expected"),
    [(0, 64, 1.0, [0, 1, 2, 3]), (0, 63, 1.0, []), (0, 64, 0.5, []), (2, 64, 1.0, [])],
    ids=["a long batch that used all", "a short one", "one that used half", "the last layer"],
)
def test_the_next_layer_follows_a_long_batch_with_a_third_of_the_slots(
    residency: Residency, layer: int, n_tokens: int, share_used: float, expected: list[int]
) -> None:
    follow(ReadAhead(residency, 3, depth=16), residency, layer, n_tokens=n_tokens, share_used=share_used)
    assert present(residency, 1) == expected


def test_experts_that_nearly_every_token_used_are_certain_as_well(residency: Residency) -> None:
    residency.table.uses[1, :4] = [100, 100, 90, 10]  # by 100 tokens of three experts each
    follow(ReadAhead(residency, 3, depth=16), residency, 0, n_tokens=64, share_used=0.3)
    assert present(residency, 1) == [0, 1, 2, 3]
    assert CERTAIN < 1 - (1 - 10 / 100) ** 64


def test_what_routers_pick_for_some_tokens_is_read_first_and_nothing_that_they_pick_for_none(
    residency: Residency,
) -> None:
    picks, asked = [7, 2, 9], list[int]()

    class Picking:
        def popular(self, layer: int, x: npt.NDArray[np.float32], n: int) -> npt.NDArray[np.int32]:
            asked.append(len(x))
            return np.array(picks if layer == 1 else [], np.int32)

    ahead = ReadAhead(residency, 3, depth=2, routers=cast("Routers", Picking()))
    x = np.zeros((100, 4), np.float32)
    with residency.lock:
        ahead.follow(0, len(x), 1.0, x)
    assert present(residency, 1) == [2, 7]
    ahead.reached(1)
    with residency.lock:
        ahead.follow(0, len(x), 1.0, x)
        ahead.follow(1, len(x), 1.0, x)
    assert present(residency, 1) == [2, 7, 9]
    assert asked == [ASKED_TOKENS] * 3
    assert present(residency, 2) == []
    hashed = ReadAhead(
        residency, 3, depth=2, hash_tables={1: np.zeros((4, 3), np.int32)}, routers=cast("Routers", Picking())
    )
    with residency.lock:
        hashed.follow(0, len(x), 0.3, x)
    assert len(asked) == 3, "a layer that chooses by token has no use for its router"


def test_popular_experts_are_those_that_are_likely_for_any_token_by_number_of_tokens(model_path: Path) -> None:
    with open_offloaded(open_model(model_path), OffloadOptions(n_threads=1)) as model:
        routers = model.pool._routers
        assert routers is not None
        layer = max(model.source.moe_layers)
        x = np.random.default_rng(3).normal(size=(4, MODEL.n_embd)).astype(np.float32)
        likely = [routers.likely(layer, row, 2) for row in x]
        counts = np.bincount(np.concatenate([row for row in likely if row is not None]), minlength=MODEL.n_experts)
        popular = routers.popular(layer, x, 2)
        assert popular is not None
        assert sorted(popular) == np.flatnonzero(counts).tolist()
        assert len(popular) < MODEL.n_experts
        assert counts[popular].tolist() == sorted(counts[popular], reverse=True)
        assert routers.popular(99, x, 3) is None


def test_wrong_guesses_go_first_unless_somebody_has_used_them_since(residency: Residency) -> None:
    ahead = ReadAhead(residency, 3, depth=16)
    follow(ahead, residency, 0)
    assert present(residency, 1) == [0, 1, 2, 3]
    slots = [slot for slot in residency.table if slot.layer == 1]
    assert all(ahead.is_guess(slot) for slot in slots)
    residency.table.touch(slots[3])
    ahead.judge(1, np.array([0], np.int32))
    assert not any(ahead.is_guess(slot) for slot in slots)
    assert [int(residency.table.stamps[1, e]) == 0 for e in range(4)] == [False, True, True, False]


def test_a_guess_that_could_not_be_read_is_forgotten(residency: Residency, store: MemoryStore) -> None:
    store.fail(1, 2)
    ahead = ReadAhead(residency, 3, depth=16)
    follow(ahead, residency, 0)
    assert present(residency, 1) == [0, 1, 3]
    ahead.judge(1, np.array([], np.int32))
    residency.table.check()


def test_a_prompt_reads_as_far_ahead_as_the_drive_gets_before_the_next_call(
    residency: Residency, store: MemoryStore
) -> None:
    def ahead_of(layer: int) -> int:
        """Reads started after a call of the layer; they stay under way while the store is held."""
        before = residency.n_ahead
        follow(ahead, residency, layer)
        return residency.n_ahead - before

    ahead = ReadAhead(residency, 3, depth=1)
    assert ahead_of(0) == 1
    residency.settle()
    ahead.reached(1)  # all had arrived: the drive was idle
    assert ahead_of(1) == 2
    residency.settle()
    ahead.reached(2)
    store.hold()
    assert ahead_of(0) == 4, "a third of the slots is the most"
    ahead.judge(2, np.arange(N_EXPERTS, dtype=np.int32))
    ahead.reached(1)  # one had been there before, none of four arrived
    assert ahead._reach == 2
    store.release()
    residency.settle()
    residency.table.check()
