"""Layer calls that lack experts: compiled code computes them, another thread fetches, and decoding never enters Python."""

from __future__ import annotations

import ctypes as C
import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from localrun import reading
from localrun.errors import DecodeError, StoppedError, StoreError
from localrun.ggml.devices import GpuDevice
from localrun.offload import layer_call
from localrun.offload.cache.slots import SlotState
from localrun.offload.device.device import expert_device
from localrun.offload.device.layouts import DEVICE, MISSES
from localrun.offload.gpu.graphs import slot_bytes
from localrun.offload.gpu.slots import scratch_bytes
from localrun.offload.kernels import futex
from localrun.offload.misses import LOOKING_CALLS, Misses, PostedCall
from localrun.offload.model import OffloadedModel, OffloadOptions, open_offloaded
from localrun.offload.residency import largest_slot
from localrun.quant.model.source import ModelSource
from localrun.quant.open import open_model
from tests.offload.device.test_compiled_gpu import Everything
from tests.offload.gpu.test_tier import filled
from tests.offload.models import F32, TOKENS, floor_ram, logits, write_model
from tests.offload.stores import early_reads_through_python
from tests.offload.test_variants import sources as sources  # the fixture

pytestmark = pytest.mark.skipif(
    not futex.is_supported(), reason="calls that lack experts go to Python without Linux's futex"
)

SOME = TOKENS[:24]


def little(gpus: list[tuple[GpuDevice, int]]) -> OffloadOptions:
    """RAM for one layer's experts of a token, so that every call reads."""
    return OffloadOptions(n_threads=2, ram_bytes=1, ram_is_advice=True, gpus=gpus)


def some_on(source: ModelSource, gpu: GpuDevice, n_experts: int) -> list[tuple[GpuDevice, int]]:
    with open_offloaded(source, OffloadOptions()) as model:
        specs = [kernel.spec for kernel in model.pool.residency.kernels(0)]
    return [(gpu, max(map(scratch_bytes, specs)) + n_experts * max(slot_bytes(spec, 1, gpu) for spec in specs))]


def is_clean(model: OffloadedModel) -> bool:
    """No slot is half filled or pinned."""
    model.pool.residency.check()
    return all(slot.state is SlotState.READY and slot.pins == 0 for slot in model.pool.residency.table)


def test_the_first_read_of_an_expert_begins_in_compiled_code(
    sources: tuple[ModelSource, ModelSource, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its place is known before any has been read; unless a call came first."""
    _, mixed, _ = sources
    with open_offloaded(mixed, little([])) as model:
        residency = model.pool.residency
        early = residency.store.early
        assert early is not None
        n_experts = sum(moe.n_experts for moe in residency.layers.values())
        deadline = time.monotonic() + 300
        while early.n_known < n_experts:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        begun: list[bool] = []
        take_over = residency.store._take_over  # type: ignore[attr-defined]
        monkeypatch.setattr(residency.store, "_take_over", lambda *at: [begun.append(True), take_over(*at)][1])
        logits(model, SOME[:1])
        assert begun


@pytest.mark.parametrize("n_on_gpu", [0, 20])
def test_a_call_that_reads_enters_no_python_and_gives_what_python_gives(
    sources: tuple[ModelSource, ModelSource, Path], gpu: GpuDevice, n_on_gpu: int
) -> None:
    """Experts in two formats; tokens one by one, and more at once than memory holds the experts of."""
    _, mixed, _ = sources
    gpus = some_on(mixed, gpu, n_on_gpu) if n_on_gpu else []
    process = expert_device().process
    with open_offloaded(mixed, little(gpus)) as model:
        if gpus:
            filled(model)
        pool = model.pool
        for batch in (1, 6):
            logits(model, SOME, batch=batch)  # makes the graphs
            found: list[F32] = []
            counted: list[Any] = []
            for recorder in (None, Everything()):
                pool.record(recorder)  # type: ignore[arg-type]
                model.telemetry.reset()
                uses, entered = pool.residency.table.uses.copy(), process.n_entered
                found.append(logits(model, SOME, batch=batch))
                totals = model.telemetry.totals()
                assert (process.n_entered - entered == 0) == (recorder is None)
                assert totals.misses > 0
                assert totals.bytes_read > 0
                touched = totals.hits + totals.misses
                counted.append((totals.calls, totals.tokens, totals.requests, touched, totals.gpu_hits))
                counted.append((pool.residency.table.uses - uses).tolist())
            pool.record(None)
            np.testing.assert_array_equal(found[0], found[1])
            assert counted[:2] == counted[2:]
        assert is_clean(model)


class Held:
    """Reads of the system that wait until they may go on, and may fail."""

    def __init__(self, patch: pytest.MonkeyPatch, model: OffloadedModel, *, fail: bool = False) -> None:
        self.begun, self.go = threading.Event(), threading.Event()
        early_reads_through_python(model.pool.residency.store)

        def held(fd: int, buffers: list[Any], offset: int) -> int:
            self.begun.set()
            assert self.go.wait(300)
            if fail:
                raise OSError(errno.EIO, "Input/output error")
            return os.preadv(fd, buffers, offset)

        patch.setattr(reading, "preadv", held)


def in_background(run: Callable[[], object]) -> tuple[threading.Thread, list[BaseException]]:
    raised: list[BaseException] = []

    def caught() -> None:
        try:
            run()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=caught)
    thread.start()
    return thread, raised


def test_a_stop_while_experts_are_read_ends_the_decode(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_model(model_path)
    with open_offloaded(source, little([])) as model:
        expected = logits(model, SOME, batch=1)
        with monkeypatch.context() as patch:
            held = Held(patch, model)
            thread, raised = in_background(lambda: logits(model, SOME, batch=1))
            assert held.begun.wait(300)
            model.request_stop()
            held.go.set()
            thread.join()
        assert [type(error) for error in raised] == [StoppedError]
        assert is_clean(model)
        model.clear_stop()
        np.testing.assert_array_equal(logits(model, SOME, batch=1), expected)


@pytest.mark.parametrize("n_on_gpu", [0, 20])
def test_a_read_that_fails_while_a_gpu_computes_is_raised(
    model_path: Path, gpu: GpuDevice, monkeypatch: pytest.MonkeyPatch, n_on_gpu: int
) -> None:
    source = open_model(model_path)
    gpus = some_on(source, gpu, n_on_gpu) if n_on_gpu else []
    with open_offloaded(source, little(gpus)) as model:
        if gpus:
            filled(model)
        expected = logits(model, SOME, batch=1)
        with monkeypatch.context() as patch:
            held = Held(patch, model, fail=True)
            held.go.set()
            with pytest.raises(StoreError, match="Input/output error"):
                logits(model, SOME, batch=1)
        assert is_clean(model)
        np.testing.assert_array_equal(logits(model, SOME, batch=1), expected)


def test_any_error_of_the_fetching_thread_is_raised(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a mistake")

    source = open_model(model_path)
    with open_offloaded(source, little([])) as model:
        expected = logits(model, SOME, batch=1)
        for where in ("run", "release"):
            with monkeypatch.context() as patch:
                if where == "run":
                    patch.setattr(model.pool.ahead, "judge", broken)  # when everything is there
                else:
                    patch.setattr(layer_call, "route", broken)
                with pytest.raises(RuntimeError, match="a mistake"):
                    logits(model, SOME, batch=1)
            assert is_clean(model)
            np.testing.assert_array_equal(logits(model, SOME, batch=1), expected)


def test_a_gpu_that_fails_while_experts_are_read_is_reported(
    model_path: Path, gpu: GpuDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled code gives the posted call up, Python repeats it and says what is wrong."""
    source = open_model(model_path)
    refuse = C.CFUNCTYPE(C.c_int, C.c_void_p, C.c_void_p)(lambda backend, graph: -1)
    with open_offloaded(source, little(some_on(source, gpu, 20))) as model:
        filled(model)
        expected = logits(model, SOME, batch=1)
        tier = model.pool.residency.gpu
        assert tier is not None
        slots = tier.slots[0]
        assert slots._record is not None
        fields = slots._record.fields
        working = fields.copy()
        with monkeypatch.context() as patch:
            patch.setattr(slots._lib, "ggml_backend_graph_compute_async", refuse)
            fields[DEVICE.compute] = C.cast(refuse, C.c_void_p).value or 0
            with pytest.raises(DecodeError, match="computing experts failed"):
                logits(model, SOME, batch=1)
        fields[:] = working
        assert is_clean(model)
        np.testing.assert_array_equal(logits(model, SOME, batch=1), expected)


def test_what_is_read_ahead_is_in_place_before_a_call_asks_for_it(tmp_path: Path) -> None:
    with open_offloaded(open_model(write_model(tmp_path)), OffloadOptions(n_threads=2)) as model:
        table, ends = model.pool.residency.table, time.monotonic() + 300
        model.pool.ahead.read(1, [3], evict=False)
        while table.resident[1, 3] == 0 and time.monotonic() < ends:
            time.sleep(0.001)
        assert table.resident[1, 3] != 0
        posted = cast("Misses", model.pool._misses).record.fields[MISSES.posted]
        assert posted == 0


@pytest.mark.parametrize("fails_to_read", [False, True])
def test_what_compiled_code_gives_up_python_computes_and_counts_once_unless_reading_fails(
    model_path: Path, gpu: GpuDevice, monkeypatch: pytest.MonkeyPatch, fails_to_read: bool
) -> None:
    source, process = open_model(model_path), expert_device().process
    refuse = C.CFUNCTYPE(C.c_int, C.c_void_p, C.c_void_p)(lambda backend, graph: -1)
    with open_offloaded(source, little(some_on(source, gpu, 20))) as model:
        filled(model)
        uses = model.pool.residency.table.uses
        before = uses.copy()
        expected = logits(model, SOME, batch=1)
        expected_uses, before = uses - before, uses.copy()
        tier = model.pool.residency.gpu
        assert tier is not None
        assert tier.slots[0]._record is not None
        fields = tier.slots[0]._record.fields
        working, entered = fields.copy(), process.n_entered
        fields[DEVICE.compute] = C.cast(refuse, C.c_void_p).value or 0
        if fails_to_read:
            with monkeypatch.context() as patch:
                Held(patch, model, fail=True).go.set()
                with pytest.raises(StoreError, match="Input/output error"):
                    logits(model, SOME, batch=1)
            assert process.n_entered == entered, "nothing is computed once more for a call that has failed"
        else:
            np.testing.assert_array_equal(logits(model, SOME, batch=1), expected)
            assert process.n_entered > entered
            assert (uses - before).tolist() == expected_uses.tolist()
        fields[:] = working
        assert is_clean(model)
        np.testing.assert_array_equal(logits(model, SOME, batch=1), expected)


def test_while_experts_are_missing_every_call_of_a_token_looks_ahead(tmp_path: Path) -> None:
    source = open_model(write_model(tmp_path))
    n_tokens, n_layers = 12, len(source.moe_layers)
    with open_offloaded(source, OffloadOptions(n_threads=2)) as model:
        floor, everything = floor_ram(model), model.ram_bytes
        logits(model, TOKENS, batch=1)
        assert model.telemetry.totals().misses > 0
        record = cast("Misses", model.pool._misses).record
        for _ in range(-(-LOOKING_CALLS // (len(TOKENS) * n_layers))):
            logits(model, TOKENS, batch=1)
        posted = int(record.fields[MISSES.posted])
        logits(model, TOKENS[:n_tokens], batch=1)
        assert record.fields[MISSES.posted] == posted
    with open_offloaded(source, OffloadOptions(n_threads=2, ram_bytes=max(5 * floor, everything // 2))) as model:
        logits(model, TOKENS[:n_tokens], batch=1)
        record = cast("Misses", model.pool._misses).record
        posted = int(record.fields[MISSES.posted])
        model.telemetry.reset()
        logits(model, TOKENS[:n_tokens], batch=1)
        assert record.fields[MISSES.posted] - posted == n_tokens * n_layers == model.telemetry.totals().calls
        assert model.telemetry.totals().hits > 0


def test_a_call_that_lacks_nothing_only_looks_ahead_and_its_experts_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_model(write_model(tmp_path))
    with open_offloaded(source, OffloadOptions(n_threads=2)) as model:
        expected = logits(model, SOME, batch=1)
        ram_bytes = floor_ram(model) + 12 * largest_slot(model.pool.residency._kernels)
    lacking, looked = list[int](), list[int]()
    with open_offloaded(source, OffloadOptions(n_threads=2, ram_bytes=ram_bytes)) as model:
        logits(model, SOME, batch=1)
        pool = model.pool
        record, table = cast("Misses", pool._misses).record, pool.residency.table
        posted, look = int(record.fields[MISSES.posted]), pool.ahead.foresight.look

        def watched(layer: int, x: F32) -> None:
            there = [slot for e in record.ids[0].tolist() if (slot := table.peek(layer, e)) is not None]
            assert all(slot.pins > 0 for slot in there)
            looked.append(layer)
            look(layer, x)

        class Counted(PostedCall):
            def run(self) -> None:
                lacking.append(record.n_missing)
                super().run()

        monkeypatch.setattr(pool.ahead.foresight, "look", watched)
        monkeypatch.setattr("localrun.offload.misses.PostedCall", Counted)
        np.testing.assert_array_equal(logits(model, SOME, batch=1), expected)
        assert len(looked) == record.fields[MISSES.posted] - posted == len(SOME) * len(source.moe_layers)
        assert 0 < len(lacking) < len(looked)
        assert min(lacking) > 0
        assert model.telemetry.totals().guesses > 0
        assert is_clean(model)
