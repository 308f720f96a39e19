"""Long prompts' experts that pass through a GPU, which is llama.cpp's RPC device on loopback."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from gguf import GGMLQuantizationType as QT
from hypothesis import given
from hypothesis import strategies as st

from localrun.errors import ChecksumError, StoppedError, StoreError
from localrun.ggml.devices import GpuDevice
from localrun.offload.gpu.graphs import slot_bytes
from localrun.offload.gpu.slots import scratch_bytes
from localrun.offload.gpu.stream import LEAST_GAIN, RING_SLOTS, Cost, StreamCosts, StreamJob, choose
from localrun.offload.gpu.stream_probe import _best, _costs, measure
from localrun.offload.kernels import FfnSpec, make_kernel
from localrun.offload.model import OffloadedModel, OffloadOptions, open_offloaded
from localrun.quant.model.source import ModelSource
from localrun.quant.open import open_model
from tests.offload.gpu.test_tier import exact_and_rounded, filled, is_as_exact
from tests.offload.models import F32, MODEL, TOKENS, floor_ram, logits, write_model
from tests.offload.test_variants import TwoCopies

FAST = StreamCosts(cpu=Cost(1.0, 1.0), gpu=Cost(0.0, 1e-3))
"""Of a GPU that is worth nearly everything."""
EVEN = StreamCosts(cpu=Cost(1.0, 1.0), gpu=Cost(2.0, 0.5), unpack_s=0.5)


@pytest.fixture(autouse=True)
def short_tail(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 16 experts a prompt's last tokens use all of them, and what they use comes into RAM."""
    monkeypatch.setattr("localrun.offload.layer_call.TAIL_TOKENS", 1)


@pytest.fixture(scope="module")
def reference(model_path: Path) -> tuple[F32, F32]:
    """Exact logits, and how far others may be off."""
    return exact_and_rounded(model_path)


def budget_for(path: Path, device: GpuDevice, n_experts: int) -> int:
    """Bytes that hold about so many experts and the ring, which may take a quarter of them."""
    with open_offloaded(open_model(path), OffloadOptions()) as model:
        spec = model.pool.residency.kernels(0)[0].spec
    return scratch_bytes(spec) + max(4 * slot_bytes(spec, RING_SLOTS, device), n_experts * slot_bytes(spec, 1, device))


def opened(path: Path, gpu: GpuDevice, budget: int, costs: StreamCosts, **options: Any) -> OffloadedModel:
    offload = OffloadOptions(n_threads=2, gpus=[(gpu, budget)], stream=costs, **options)
    return open_offloaded(open_model(path), offload)


@given(
    st.lists(st.tuples(st.floats(1e-6, 1), st.floats(1e-6, 1)), min_size=1, max_size=40),
    st.floats(0, 5),
    st.floats(0, 5),
    st.floats(1, 3),
)
def test_choice_makes_the_call_faster_or_streams_nothing(
    costs: list[tuple[float, float]], others_s: float, busy_s: float, slowdown: float
) -> None:
    cpu_s, gpu_s = (np.array(column) for column in zip(*costs, strict=True))
    chosen = choose(cpu_s, gpu_s, others_s=others_s, busy_s=busy_s, slowdown=slowdown)
    if chosen.size == 0:
        return
    assert (np.diff(chosen) > 0).all()  # file order
    rest = np.setdiff1d(np.arange(cpu_s.size), chosen)
    together = max(busy_s + gpu_s[chosen].sum(), others_s + cpu_s[rest].sum()) * slowdown
    assert together * LEAST_GAIN <= max(busy_s, others_s + cpu_s.sum()) * (1 + 1e-9)


def test_experts_with_most_tokens_pass_until_both_sides_end_together() -> None:
    n_pairs = np.array([1, 40, 3, 60, 50, 2], np.int32)
    assert choose(EVEN.cpu.of(n_pairs), EVEN.gpu.of(n_pairs)).tolist() == [3, 4]
    slow = Cost(1000.0, 0.5)
    assert choose(EVEN.cpu.of(n_pairs), slow.of(n_pairs)).size == 0


@pytest.mark.parametrize("costs", [FAST, EVEN])
@pytest.mark.parametrize("in_ram", [True, False])
def test_streamed_experts_give_the_same_answers(
    model_path: Path, reference: tuple[F32, F32], gpu: GpuDevice, costs: StreamCosts, in_ram: bool
) -> None:
    with open_offloaded(open_model(model_path), OffloadOptions()) as model:
        least = floor_ram(model)
    budget = budget_for(model_path, gpu, 10)
    # A few experts more than one layer's, and what passes needs room, too.
    ram = None if in_ram else least + 8 * (least - model.pool.residency.store.staging_bytes)
    with opened(model_path, gpu, budget, costs, ram_bytes=ram) as model:
        n_resident = filled(model)
        tier, telemetry = model.pool.residency.gpu, model.telemetry
        assert tier is not None
        assert tier.used_bytes <= budget
        cold = logits(model, batch=150)  # while there is room, what is read comes into RAM and nothing passes
        telemetry.reset()
        first = logits(model, batch=150)
        passed, read = telemetry.totals().streamed, telemetry.totals().bytes_read
        assert passed > 0
        again = logits(model, batch=150)
        streamed = telemetry.totals().streamed
        assert streamed > passed
        if in_ram:
            assert telemetry.totals().bytes_read == read == 0
            assert streamed == 2 * passed
        assert tier.n_resident == n_resident
        model.pool.residency.check()
        assert all(slot.pins == 0 for slot in model.pool.residency.table)
        one_by_one = logits(model, batch=1)
        assert telemetry.totals().streamed == streamed, "a single token's experts don't pass"
    assert all(is_as_exact(other, reference) for other in (cold, first, again, one_by_one))


def test_formats_of_a_layer_pass_through_rings_of_their_own(
    tmp_path: Path, gpu: GpuDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "better").mkdir()
    base = open_model(write_model(tmp_path))
    better = open_model(write_model(tmp_path / "better", replace(MODEL, expert_type=QT.Q8_0)))
    mixed = cast("ModelSource", TwoCopies(base, better))
    with open_offloaded(mixed, OffloadOptions(n_threads=2, math="f32")) as model:
        exact = logits(model)
    with open_offloaded(mixed, OffloadOptions(n_threads=2)) as model:
        ours = logits(model)
    offload = OffloadOptions(n_threads=2, gpus=[(gpu, 3 * budget_for(base.path, gpu, 10))], stream=FAST)
    with open_offloaded(mixed, offload) as model:
        tier = model.pool.residency.gpu
        assert tier is not None
        assert tier.rings is not None
        assert [kernel.spec.types[0] for kernel in tier.rings.kernels] == [MODEL.expert_type, QT.Q8_0]
        thread = tier.threads[0]
        rings: set[Any] = set()
        submit = thread.submit

        def watch(job: StreamJob) -> None:
            rings.update(item.ring for item in job.passing)
            submit(job)

        monkeypatch.setattr(thread, "submit", watch)
        logits(model)  # into RAM
        found = logits(model, batch=150)
        assert rings == {0, 1}
    assert is_as_exact(found, (exact, ours))


def test_an_expert_that_cannot_be_read_fails_the_call_and_leaves_nothing_behind(
    model_path: Path, gpu: GpuDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_offloaded(open_model(model_path), OffloadOptions()) as model:
        least = floor_ram(model)
    with opened(model_path, gpu, budget_for(model_path, gpu, 10), FAST, ram_bytes=3 * least // 2) as model:
        filled(model)
        logits(model, batch=150)
        store = model.pool.residency.store
        fill, failed = store._fill, threading.Event()  # type: ignore[attr-defined]

        def fail(ticket: Any, which: int, copy: int) -> None:
            if ticket.receiver is not None:
                failed.set()
                raise ChecksumError("damaged")
            fill(ticket, which, copy)

        monkeypatch.setattr(store, "_fill", fail)
        with pytest.raises((ChecksumError, StoreError), match="damaged"):
            logits(model, batch=150)
        assert failed.is_set()
        monkeypatch.setattr(store, "_fill", fill)
        assert all(slot.pins == 0 for slot in model.pool.residency.table)
        model.pool.residency.check()
        assert np.isfinite(logits(model, batch=150)).all()


def test_stopping_ends_a_streaming_call(model_path: Path, gpu: GpuDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """While everything is in RAM and the CPU has nothing left to do but wait."""
    with opened(model_path, gpu, budget_for(model_path, gpu, 10), FAST) as model:
        filled(model)
        logits(model)
        tier = model.pool.residency.gpu
        assert tier is not None
        thread, fetched, jobs = tier.threads[0], 0, []
        fetch = thread._fetch

        def stop_after_two(job: StreamJob, *rest: Any) -> None:
            nonlocal fetched
            fetched += 1
            if fetched == 2:
                jobs.append(job)
                model.request_stop()
                deadline = time.monotonic() + 300
                while not job.cancelled and time.monotonic() < deadline:
                    time.sleep(0.001)
            fetch(job, *rest)

        monkeypatch.setattr(thread, "_fetch", stop_after_two)
        with pytest.raises(StoppedError):
            logits(model, batch=150)
        assert [job.cancelled for job in jobs] == [True]
        assert fetched < len(jobs[0].passing)
        monkeypatch.setattr(thread, "_fetch", fetch)
        model.clear_stop()
        assert np.isfinite(logits(model, TOKENS, batch=150)).all()
        assert all(slot.pins == 0 for slot in model.pool.residency.table)


def test_an_interrupt_returns_when_nothing_uses_the_call_s_memory(
    model_path: Path, gpu: GpuDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in a measurement: llama.cpp's buffers are freed next."""
    with opened(model_path, gpu, budget_for(model_path, gpu, 10), FAST) as model:
        filled(model)
        logits(model)
        tier = model.pool.residency.gpu
        assert tier is not None
        thread, jobs = tier.threads[0], []
        submit, stream = thread.submit, thread._stream

        def interrupted(job: StreamJob) -> None:
            def wait(timeout: float | None = None) -> bool:
                monkeypatch.setattr(job.done, "wait", original)
                raise KeyboardInterrupt

            original = job.done.wait
            monkeypatch.setattr(job.done, "wait", wait)
            jobs.append(job)
            submit(job)

        def slow(job: StreamJob) -> None:
            time.sleep(0.2)
            stream(job)

        monkeypatch.setattr(thread, "submit", interrupted)
        monkeypatch.setattr(thread, "_stream", slow)
        with pytest.raises(KeyboardInterrupt):
            logits(model, batch=150)
        assert [job.done.is_set() for job in jobs] == [True]


def test_an_expert_that_nobody_can_unpack_fails_the_call(
    model_path: Path, gpu: GpuDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system may refuse another thread; waiting for what was never begun would take for ever."""
    with opened(model_path, gpu, budget_for(model_path, gpu, 10), FAST) as model:
        filled(model)
        logits(model)
        tier = model.pool.residency.gpu
        assert tier is not None

        def refuse(*_: Any) -> None:
            raise RuntimeError("can't start new thread")

        with monkeypatch.context() as patch:
            patch.setattr(tier.threads[0]._unpackers, "submit", refuse)
            with pytest.raises(RuntimeError, match="new thread"):
                logits(model, batch=150)
        assert np.isfinite(logits(model, batch=150)).all()


class Timed:
    """A bench whose seconds are these."""

    def __init__(self, gpu: Cost, slowdown: float) -> None:
        self._gpu, self._slowdown = gpu, slowdown

    def cpu(self, n_experts: int, n_pairs: int) -> float:
        return n_experts * float(EVEN.cpu.of(np.array(n_pairs, np.int32)))

    def gpu(self, n_experts: int, n_pairs: int) -> float:
        return n_experts * float(self._gpu.of(np.array(n_pairs, np.int32)))

    def both(self, n_cpu: int, n_gpu: int, n_pairs: int) -> float:
        return self._slowdown * max(self.cpu(n_cpu, n_pairs), self.gpu(n_gpu, n_pairs))

    def unpack(self) -> float:
        return 0.25


@pytest.mark.parametrize(
    ("gpu_cost", "slowdown", "pays"),
    [
        (Cost(2.0, 0.5), 1.0, True),
        (Cost(2.0, 0.5), 2.0, True),  # it gains that much
        (Cost(70.0, 0.5), 1.0, True),  # slower than the CPU, but beside it
        (Cost(70.0, 0.5), 2.0, False),
        (Cost(700.0, 0.5), 1.0, False),
    ],
)
def test_streaming_is_chosen_where_both_sides_together_gain(gpu_cost: Cost, slowdown: float, pays: bool) -> None:
    found = _costs(cast("Any", Timed(gpu_cost, slowdown)))
    assert (found is not None) == pays
    if found is not None:
        n_pairs = np.array([1, 100], np.int32)
        np.testing.assert_allclose(found.cpu.of(n_pairs), EVEN.cpu.of(n_pairs))
        np.testing.assert_allclose(found.gpu.of(n_pairs), gpu_cost.of(n_pairs))
        assert found.slowdown == pytest.approx(slowdown)
        assert found.unpack_s == 0.25


def test_a_device_is_measured_and_left_as_it_was(gpu: GpuDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything runs on the device and its thread; only the seconds are made up, because the stand-in shares our cores."""
    few, many = 8, 64
    on_cpu, on_gpu = ([RING_SLOTS * float(cost.of(np.int32(n))) for n in (few, many)] for cost in (EVEN.cpu, EVEN.gpu))
    beside = 1.5 * 11 * 34.0  # 11 of 16 experts on the GPU, the others on the CPU
    seconds = iter([*on_cpu, 1e9, on_gpu[1] / RING_SLOTS, *on_gpu, beside, 0.25])  # the third one makes graphs

    def timed(run: Callable[[], None]) -> float:
        run()
        return next(seconds)

    monkeypatch.setattr("localrun.offload.gpu.stream_probe._best", timed)
    kernel = make_kernel(FfnSpec((QT.MXFP4,) * 3, 256, 512, 10.0), n_threads=2)
    threads = set(threading.enumerate())
    costs = measure(gpu, kernel, 1)
    assert costs == StreamCosts(cpu=Cost(1.0, 1.0), gpu=Cost(2.0, 0.5), unpack_s=0.25, slowdown=1.5)
    assert next(seconds, None) is None
    assert set(threading.enumerate()) == threads


@pytest.mark.parametrize(
    ("lasting", "expected"), [([0.03, 0.01, 0.02], 0.01), ([0.2, 0.01], 0.2), ([0.06, 0.05, 0.01], 0.05)]
)
def test_the_fastest_of_three_runs_counts_and_slow_ones_are_not_repeated(
    monkeypatch: pytest.MonkeyPatch, lasting: list[float], expected: float
) -> None:
    now, steps = 0.0, iter(lasting)

    def run() -> None:
        nonlocal now
        now += next(steps)

    monkeypatch.setattr("localrun.offload.gpu.stream_probe.time", SimpleNamespace(perf_counter=lambda: now))
    assert _best(run) == pytest.approx(expected)
