"""Read-ahead: exact for hash layers, never in the way, never displacing what was used by a guess."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from localrun.offload.model import OffloadedModel, OffloadOptions, open_offloaded
from localrun.offload.readahead import ReadAhead, hash_tables
from localrun.quant.open import open_model
from tests.offload.models import MODEL, TOKENS, floor_ram, logits, write_model


def wait_until_read(model: OffloadedModel) -> None:
    deadline = time.monotonic() + 30
    while model.pool.residency.settle() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert model.pool.residency.settle() == 0


@pytest.fixture
def model_path(tmp_path: Path) -> Path:
    return write_model(tmp_path)


def test_hash_layer_experts_of_the_next_tokens_are_read_before_they_run(model_path: Path) -> None:
    with open_offloaded(open_model(model_path), OffloadOptions(n_threads=2)) as model:
        ahead = ReadAhead(model.pool.residency, MODEL.n_used, hash_tables=hash_tables(model.source), depth=64)
        assert ahead.hash_layers == (0,)
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
        model.pool.residency.table.check()


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
        deadline = time.monotonic() + 30
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
    model.close()


def test_second_start_reads_what_the_first_one_used_most(model_path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "profiles"
    options = OffloadOptions(n_threads=2, profile_folder=folder)
    source = open_model(model_path)
    with open_offloaded(source, options) as model:
        logits(model, TOKENS[:8], batch=1)
        used = {(slot.layer, slot.expert) for slot in model.pool.residency.table}
    with open_offloaded(source, options) as model:
        deadline = time.monotonic() + 30
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
    from localrun.offload.cache.trace import Trace, TraceHeader, TraceRecorder

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
        model.pool.residency.table.check()
