"""Long prompts' experts that pass through a GPU, which is llama.cpp's RPC device on loopback."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from gguf import GGMLQuantizationType as QT
from hypothesis import given
from hypothesis import strategies as st

from localrun.errors import ChecksumError, StoppedError, StoreError
from localrun.offload.gpu_device import GpuDevice, choose_gpus
from localrun.offload.gpu_slots import scratch_bytes, slot_bytes
from localrun.offload.gpu_stream import LEAST_GAIN, RING_SLOTS, Cost, Job, StreamCosts, choose, measure
from localrun.offload.kernels import FfnSpec, make_kernel
from localrun.offload.model import OffloadedModel, OffloadOptions, open_offloaded
from localrun.quant.source import ModelSource, open_model
from tests.offload.models import MODEL, TOKENS, floor_ram, logits, mean_kl, write_model
from tests.offload.test_gpu import exact_and_allowed, filled
from tests.offload.test_variants import TwoCopies
from tests.rpc_server import rpc_server

FAST = StreamCosts(cpu=Cost(1.0, 1.0), gpu=Cost(0.0, 1e-3))
"""Of a GPU that is worth nearly everything."""
EVEN = StreamCosts(cpu=Cost(1.0, 1.0), gpu=Cost(2.0, 0.5), unpack_s=0.5)


@pytest.fixture(autouse=True)
def short_tail(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 16 experts a prompt's last tokens use all of them, and what they use comes into RAM."""
    monkeypatch.setattr("localrun.offload.layer_call.TAIL_TOKENS", 1)


@pytest.fixture(scope="module")
def gpu() -> Iterator[GpuDevice]:
    with rpc_server() as (endpoint, _):
        yield next(device for device in choose_gpus("auto", [endpoint]) if device.description == endpoint)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def reference(model_path: Path) -> tuple[Any, float]:
    """Exact logits, and how far others may be off."""
    return exact_and_allowed(model_path)


def budget_for(path: Path, device: GpuDevice, n_experts: int) -> int:
    """Bytes that hold about so many experts and the ring, which may take a quarter of them."""
    with open_offloaded(open_model(path), OffloadOptions()) as model:
        spec = model.pool.kernels(0)[0].spec
    return max(4 * slot_bytes(spec, RING_SLOTS, device), scratch_bytes(spec) + n_experts * slot_bytes(spec, 1, device))


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
    model_path: Path, reference: tuple[Any, float], gpu: GpuDevice, costs: StreamCosts, in_ram: bool
) -> None:
    exact, allowed = reference
    with open_offloaded(open_model(model_path), OffloadOptions()) as model:
        least = floor_ram(model)
    budget = budget_for(model_path, gpu, 10)
    # A few experts more than one layer's, and what passes needs room, too.
    ram = None if in_ram else least + 8 * (least - model.pool.staging_bytes)
    with opened(model_path, gpu, budget, costs, ram_bytes=ram) as model:
        n_resident = filled(model)
        tier, telemetry = model.pool.gpu, model.telemetry
        assert tier is not None
        assert tier.used_bytes <= budget
        cold = logits(model, batch=150)  # while there is room, what is read comes into RAM and nothing passes
        telemetry.reset()
        first = logits(model, batch=150)
        passed, read = telemetry.totals().streamed, telemetry.totals().bytes_read
        assert passed > 0
        again = logits(model, batch=150)
        assert telemetry.totals().streamed >= 2 * passed
        if in_ram:
            assert telemetry.totals().bytes_read == read == 0
        assert tier.n_resident == n_resident
        model.pool.table.check()
        assert all(slot.pins == 0 for slot in model.pool.table)
        one_by_one = logits(model, batch=1)
        assert telemetry.totals().streamed < 3 * passed + 1
    assert max(mean_kl(exact, other) for other in (cold, first, again, one_by_one)) <= allowed


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
        ours = mean_kl(exact, logits(model))
    offload = OffloadOptions(n_threads=2, gpus=[(gpu, 3 * budget_for(base.path, gpu, 10))], stream=FAST)
    with open_offloaded(mixed, offload) as model:
        tier = model.pool.gpu
        assert tier is not None
        assert tier.rings is not None
        assert [kernel.spec.types[0] for kernel in tier.rings.kernels] == [MODEL.expert_type, QT.Q8_0]
        lane, rings = tier.lanes[0], set()
        submit = lane.submit

        def watch(job: Job) -> None:
            rings.update(item.ring for item in job.passing)
            submit(job)

        monkeypatch.setattr(lane, "submit", watch)
        logits(model)  # into RAM
        found = logits(model, batch=150)
        assert rings == {0, 1}
    assert mean_kl(exact, found) <= 1.2 * ours


def test_an_expert_that_cannot_be_read_fails_the_call_and_leaves_nothing_behind(
    model_path: Path, gpu: GpuDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_offloaded(open_model(model_path), OffloadOptions()) as model:
        least = floor_ram(model)
    with opened(model_path, gpu, budget_for(model_path, gpu, 10), FAST, ram_bytes=3 * least) as model:
        filled(model)
        logits(model, batch=150)
        store = model.pool.store
        fill, failed = store._fill, threading.Event()

        def fail(ticket: Any, buffer: Any) -> None:
            if ticket.receiver is not None:
                failed.set()
                raise ChecksumError("damaged")
            fill(ticket, buffer)

        monkeypatch.setattr(store, "_fill", fail)
        with pytest.raises((ChecksumError, StoreError), match="damaged"):
            logits(model, batch=150)
        assert failed.is_set()
        monkeypatch.setattr(store, "_fill", fill)
        assert all(slot.pins == 0 for slot in model.pool.table)
        model.pool.table.check()
        assert np.isfinite(logits(model, batch=150)).all()


def test_stopping_ends_a_streaming_call(model_path: Path, gpu: GpuDevice) -> None:
    with opened(model_path, gpu, budget_for(model_path, gpu, 10), FAST) as model:
        filled(model)
        logits(model)
        model.request_stop()
        with pytest.raises((StoppedError, AssertionError)):
            logits(model, batch=150)
        model.clear_stop()
        assert np.isfinite(logits(model, TOKENS, batch=150)).all()
        assert all(slot.pins == 0 for slot in model.pool.table)


def test_what_is_measured_is_what_decides(gpu: GpuDevice) -> None:
    """The stand-in shares our cores: whatever it finds must be consistent."""
    kernel = make_kernel(FfnSpec((QT.MXFP4,) * 3, 256, 512, 10.0), n_threads=2)
    costs = measure(gpu, kernel, 1)
    if costs is not None:
        n_pairs = np.full(2 * RING_SLOTS, 64, np.int32)
        assert choose(costs.cpu.of(n_pairs), costs.gpu.of(n_pairs), slowdown=costs.slowdown).size > 0
