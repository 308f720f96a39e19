"""A load with a GPU that has less than it said, at every step: a smaller plan, a line that says so, and answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest

from localrun.engine.engine import Engine
from localrun.engine.options import EngineOptions
from localrun.engine.planner.gpu import DRIVER_BYTES
from localrun.engine.planner.placement import whole_on_gpu
from localrun.engine.planner.sizes import sizes_of_source
from localrun.ggml.devices import GpuDevice, choose_gpus
from localrun.quant.open import open_model
from tests.engine.conftest import OPTIONS
from tests.gpu_shim import Shim, shim
from tests.reference import kl
from tests.rpc_server import TEST_GPU, rpc_server

pytestmark = pytest.mark.skipif(bool(TEST_GPU), reason="the shim is made for the RPC device")

TOKENS = [1, 2, 3, 4, 5]

ROUNDING = 0.1
"""Bound for the divergence of two answers of which some parts rounded differently; without its experts this model is 0.4 away."""


@pytest.fixture(scope="module")
def gpu() -> Iterator[GpuDevice]:
    with rpc_server() as (endpoint, _):
        yield next(device for device in choose_gpus("auto", [endpoint]) if device.description == endpoint)


@pytest.fixture
def shimmed(gpu: GpuDevice) -> Iterator[Shim]:
    with shim(gpu) as state:
        yield state


@pytest.fixture
def options(gpu: GpuDevice) -> EngineOptions:
    return replace(OPTIONS, gpu=gpu.name, vram_bytes=1 << 30, n_batch=256)


class Outcome(NamedTuple):
    """What a load ended in.

    Attributes:
        dense: the dense model is on the GPU.
        n_batch: most tokens of a batch.
        n_experts: experts that are on GPUs, or on their way there.
        n_later: buffers that were allocated on the GPU after the load.
        logits: after some tokens.
    """

    dense: bool
    n_batch: int
    n_experts: int
    n_later: int
    logits: npt.NDArray[np.float32]


def outcome(path: Path, options: EngineOptions, shimmed: Shim) -> Outcome:
    with Engine.open(path, options) as engine:
        n_allocations = shimmed.n_allocations
        session = engine.session()
        session.feed(TOKENS)
        stats = engine.stats()
        n_experts = int(stats.get("gpu_experts", 0)) + int(stats.get("gpu_under_way", 0))  # type: ignore[arg-type]
        n_later = shimmed.n_allocations - n_allocations
        return Outcome(engine.facts.dense_on_gpu, engine.facts.n_batch, n_experts, n_later, session.logits)


def lines_about(gpu: GpuDevice, caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if gpu.name in record.getMessage()]


def test_every_allocation_of_a_load_may_fail(
    model_path: Path, gpu: GpuDevice, shimmed: Shim, options: EngineOptions, caplog: pytest.LogCaptureFixture
) -> None:
    whole = outcome(model_path, options, shimmed)
    assert (whole.dense, whole.n_batch) == (True, options.n_batch)
    assert whole.n_experts > 0
    assert whole.n_later == 0, "what is allocated later can't be given way to"
    n_allocations = shimmed.n_allocations
    given_up, halved = Counter[str](), 0
    for number in range(1, n_allocations + 1):
        caplog.clear()
        shimmed.n_allocations, shimmed.fail_allocation = 0, number
        found = outcome(model_path, options, shimmed)
        what = {
            "dense": not found.dense,
            "batch": found.n_batch < whole.n_batch,
            "experts": found.n_experts < whole.n_experts,
            "streaming": any("streaming was not measured" in line for line in lines_about(gpu, caplog)),
        }
        gone = [name for name, is_gone in what.items() if is_gone]
        assert len(gone) == 1, (number, gone)
        assert lines_about(gpu, caplog), number
        assert kl(whole.logits, found.logits) < ROUNDING, number
        given_up[gone[0]] += 1
        halved += "trying half of it" in caplog.text
        assert ("trying half of it" in caplog.text) == (not found.dense), number
    assert set(given_up) == {"dense", "batch", "experts", "streaming"}
    assert halved == given_up["dense"] > 0


def test_a_context_that_never_fits_leaves_the_dense_model_on_the_cpu(
    model_path: Path, gpu: GpuDevice, shimmed: Shim, options: EngineOptions, caplog: pytest.LogCaptureFixture
) -> None:
    shimmed.fail_from = 5  # three are what streaming is measured with, the fourth one is the dense model
    found = outcome(model_path, options, shimmed)
    assert (found.dense, found.n_batch, found.n_experts) == (False, options.n_batch, 0)
    assert f"{gpu.name} has no room for the dense model and a context" in caplog.text
    assert "batches of 64 tokens" in caplog.text


def test_a_cache_that_does_not_fit_stays_in_ram_alone(
    model_path: Path, gpu: GpuDevice, shimmed: Shim, options: EngineOptions, caplog: pytest.LogCaptureFixture
) -> None:
    """Where it is larger than the buffers; the whole model is on the GPU then, with batches as large as they were."""
    options = replace(options, n_ctx=4096, n_batch=64)
    whole = outcome(model_path, options, shimmed)
    on_device, n_gone = shimmed.bytes_allocated, 0
    for number in range(1, shimmed.n_allocations + 1):
        caplog.clear()
        shimmed.n_allocations, shimmed.bytes_allocated, shimmed.fail_allocation = 0, 0, number
        found = outcome(model_path, options, shimmed)
        if not any("trying with the cache in RAM" in line for line in lines_about(gpu, caplog)):
            continue
        n_gone += 1
        assert (found.dense, found.n_batch, found.n_experts) == (True, 64, whole.n_experts), number
        assert kl(whole.logits, found.logits) < ROUNDING, number
    assert n_gone >= 2, "of the cache's parts and the buffers"
    assert on_device > 0


def test_a_cache_in_ram_takes_nothing_on_the_gpu(
    model_path: Path,
    gpu: GpuDevice,
    shimmed: Shim,
    options: EngineOptions,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A GPU whose free memory is known to be too little for it, at once. It is copied there for every batch, so llama.cpp's buffer
    is larger by what one layer has of it."""
    options = replace(options, n_ctx=16384, n_batch=64)
    monkeypatch.setattr("localrun.engine.planner.gpu._least_for_experts", lambda *_: 1 << 40)
    whole = outcome(model_path, options, shimmed)
    assert whole.n_experts == 0
    sizes = sizes_of_source(open_model(model_path))
    cache = sizes.kv_bytes(16384, options.kv_type, 64)
    needed = whole_on_gpu(sizes, 16384, options.kv_type, 64)
    taken = shimmed.bytes_allocated
    monkeypatch.setattr("localrun.engine.planner.placement._cache_in_ram_s", lambda *_: 0.0)
    shimmed.n_allocations = shimmed.bytes_allocated = 0
    found = outcome(model_path, replace(options, vram_bytes=needed - cache // 2), shimmed)
    assert (found.dense, found.n_batch) == (True, 64)
    assert any("the cache stays in RAM" in line for line in lines_about(gpu, caplog))
    assert kl(whole.logits, found.logits) < ROUNDING
    assert shimmed.bytes_allocated < taken - cache / 2


def test_experts_get_what_is_left_after_the_first_tokens(
    model_path: Path, gpu: GpuDevice, shimmed: Shim, options: EngineOptions, caplog: pytest.LogCaptureFixture
) -> None:
    shimmed.free_bytes = 2 << 30
    whole = outcome(model_path, options, shimmed)
    assert not any("after the first tokens" in line for line in lines_about(gpu, caplog))
    for room, has_some in ((9 << 18, True), (1 << 10, False)):
        caplog.clear()
        shimmed.n_launched, shimmed.free_after_launch = 0, DRIVER_BYTES + room
        with Engine.open(model_path, options) as engine:
            used = int(engine.stats().get("gpu_bytes", 0))  # type: ignore[arg-type]
            assert engine.facts.dense_on_gpu
            assert bool(used) is has_some
            assert used <= room
        assert any("are left for experts" in line for line in lines_about(gpu, caplog))
        shimmed.n_launched = 0
        found = outcome(model_path, options, shimmed)
        assert found.n_experts < whole.n_experts
        assert kl(whole.logits, found.logits) < ROUNDING


def test_a_card_that_cannot_be_opened_costs_only_its_own_experts(
    model_path: Path, gpu: GpuDevice, options: EngineOptions, caplog: pytest.LogCaptureFixture
) -> None:
    with rpc_server() as (endpoint, _):
        other = next(device for device in choose_gpus("auto", [endpoint]) if device.description == endpoint)
        both = replace(options, gpu=f"{gpu.name},{other.name}")
        for lost, kept in ((gpu, other), (other, gpu)):
            caplog.clear()
            with shim(lost) as state:
                state.opens = False
                with Engine.open(model_path, both) as engine:
                    engine.session().feed(TOKENS)
                    assert engine.facts.gpus == (kept.name,)
            assert f"{lost.name}: ggml can't open this device; it gets no experts" in caplog.text


def test_a_slow_card_changes_nothing_but_the_time(model_path: Path, shimmed: Shim, options: EngineOptions) -> None:
    expected = outcome(model_path, options, shimmed)
    shimmed.delay_s = 0.0005
    found = outcome(model_path, options, shimmed)
    assert found[:4] == expected[:4]
    assert kl(expected.logits, found.logits) < ROUNDING
