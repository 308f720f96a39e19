"""The engine with a GPU: placed, reported, lost in the middle of an answer.

It is llama.cpp's RPC device on loopback, or for what does not need a device that can be lost, the one in LOCALRUN_TEST_GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from localrun.engine.engine import Engine
from localrun.engine.options import SamplingOptions
from localrun.engine.planner.compute_buffers import compute_bytes, exchange_bytes
from localrun.engine.planner.gpu import place_on_gpus
from localrun.engine.planner.hardware import Gpu, Hardware
from localrun.engine.planner.placement import GPU_HEADROOM_BYTES, gpu_share, whole_on_gpu
from localrun.engine.planner.plan import PlanOptions
from localrun.engine.planner.sizes import sizes_of_source
from localrun.engine.process.process import EngineProcess
from localrun.engine.process.protocol import Delta, Finished, Generate, Ready
from localrun.errors import BudgetError, EngineDiedError, LocalrunError, UsageError
from localrun.ggml.devices import DISPLAY_BYTES, GpuDevice, choose_gpus
from localrun.quant.open import open_model
from tests.engine.conftest import OPTIONS
from tests.rpc_server import TEST_GPU, a_gpu, limit_memory, rpc_server

pytestmark = pytest.mark.engine_process

QUESTION: dict[str, Any] = {
    "messages": ({"role": "user", "content": "Hello"},),
    "sampling": SamplingOptions(temperature=0),
}


@pytest.fixture(scope="module")
def gpu() -> Iterator[GpuDevice]:
    """For tests that say themselves what it has; those that lose or limit one have their own."""
    with a_gpu() as device:
        yield device


@pytest.mark.skipif(not TEST_GPU, reason="LOCALRUN_TEST_GPU names no device; the next test has all of this")
def test_answers_from_the_gpu_that_the_environment_names(chat_model_path: Path) -> None:
    with EngineProcess() as engine:
        *_, ready = engine.load(chat_model_path, replace(OPTIONS, gpu=TEST_GPU, vram_bytes=2 << 30))
        assert isinstance(ready, Ready)
        assert ready.facts.dense_on_gpu
        *_, done = engine.generate(Generate(**QUESTION, max_tokens=8))
        assert isinstance(done, Finished)
        assert engine.stats().telemetry["gpu_hits"] > 0  # type: ignore[operator]


@pytest.mark.skipif(bool(TEST_GPU), reason="the GPU that is left would be used")
def test_answer_goes_on_without_a_gpu_that_vanished(chat_model_path: Path) -> None:
    with rpc_server() as (endpoint, server), EngineProcess() as engine:
        *_, ready = engine.load(chat_model_path, replace(OPTIONS, rpc=endpoint, vram_bytes=2 << 30))
        assert isinstance(ready, Ready)
        assert ready.facts.gpus == (ready.facts.dense_gpu,)
        assert ready.facts.dense_on_gpu
        *_, done = engine.generate(Generate(**QUESTION, max_tokens=8))
        assert isinstance(done, Finished)
        stats = engine.stats().telemetry
        assert stats["gpu_hits"] > 0  # type: ignore[operator]
        assert 0 < stats["gpu_bytes"] < 1 << 30  # type: ignore[operator]

        def lose_it() -> None:
            for event in engine.generate(Generate(**QUESTION, ignore_eos=True)):
                if isinstance(event, Delta):
                    server.kill()

        with pytest.raises(EngineDiedError, match="RPC") as caught:
            lose_it()
        assert caught.value.hint is not None
        server.wait()  # the system closes its connections one after the other: the engine's may go before the one for new ones
        events = list(engine.generate(Generate(**QUESTION, max_tokens=8)))
        (again,) = (event for event in events if isinstance(event, Ready))
        assert again.facts.gpus == ()
        assert (again.facts.dense_gpu, again.facts.n_gpu_layers) == ("", 0)
        assert isinstance(events[-1], Finished)


def test_dense_model_stays_on_the_cpu_when_the_gpu_is_full_before_it_said(
    chat_model_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with rpc_server() as (endpoint, server):
        (name,) = (device.name for device in choose_gpus("auto", [endpoint]) if device.description == endpoint)
        limit_memory(server, 1 << 18)
        with Engine.open(chat_model_path, replace(OPTIONS, gpu=name, vram_bytes=2 << 30)) as engine:
            assert not engine.facts.dense_on_gpu
            engine.session().feed([1, 2, 3])
    assert "can't hold the dense model" in caplog.text


def test_memory_of_an_integrated_gpu_is_ram_and_has_to_be_given(chat_model_path: Path) -> None:
    device = GpuDevice(0, "iGPU", "", 4 << 30, 8 << 30, is_integrated=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("localrun.engine.planner.gpu.choose_gpus", lambda choice, rpc: [device])
        source = open_model(chat_model_path)
        with pytest.raises(UsageError, match="no dedicated memory"):
            place_on_gpus(source, sizes_of_source(source), replace(OPTIONS, gpu="iGPU"), 256)


def test_what_no_gpu_can_do_is_refused_with_the_way_out(chat_model_path: Path) -> None:
    with rpc_server() as (endpoint, _), EngineProcess() as engine:
        for options, error, message in (
            ({"gpu": "none", "vram_bytes": 1 << 30}, LocalrunError, "no usable GPU"),
            ({"gpu": "CUDA9"}, UsageError, "CUDA9"),
            ({"rpc": "127.0.0.1:9"}, LocalrunError, "127.0.0.1:9"),
            ({"gpu": "RPC0", "rpc": endpoint, "vram_bytes": 1 << 50}, BudgetError, "free"),
            ({"gpu": "RPC0", "rpc": endpoint, "vram_bytes": 1 << 12}, BudgetError, "too little"),
        ):
            with pytest.raises(error, match=message) as caught:
                list(engine.load(chat_model_path, replace(OPTIONS, **options)))
            assert caught.value.hint is not None


def test_each_byte_is_counted_where_it_is(
    chat_model_path: Path, gpu: GpuDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The input embedding in RAM, the rest of the dense model on the card; more is left free where a monitor is connected."""
    source = open_model(chat_model_path)
    sizes = sizes_of_source(source)
    embedding_bytes = source.tensors["token_embd.weight"].n_bytes
    left = {}
    for has_display in (False, True):
        card = replace(gpu, free_bytes=8 << 30, total_bytes=8 << 30, has_display=has_display)
        monkeypatch.setattr("localrun.engine.planner.gpu.choose_gpus", lambda choice, rpc, card=card: [card])
        placement = place_on_gpus(source, sizes, OPTIONS, 4096)
        assert placement.n_gpu_layers
        assert placement.ram_bytes == 0
        left[has_display] = placement.experts[0][1]
    assert left[False] - left[True] == DISPLAY_BYTES
    on_card = sizes.dense_bytes - embedding_bytes + sizes.kv_bytes(4096, OPTIONS.kv_type, OPTIONS.n_batch)
    on_card += compute_bytes(sizes, 4096, OPTIONS.n_batch) + exchange_bytes(sizes, 4096, OPTIONS.n_batch)
    assert left[False] == (8 << 30) - GPU_HEADROOM_BYTES - on_card
    without = place_on_gpus(source, sizes, OPTIONS, 4096, most_share=0)
    assert (without.n_gpu_layers, without.ram_bytes) == (0, 0)
    assert without.experts[0][1] == left[True] + on_card, "a card without the dense model has its bytes for experts"


@pytest.mark.parametrize("spare", [-1, 0, 4 << 20])
@pytest.mark.parametrize("with_vram", [False, True])
def test_a_plan_gives_a_card_what_a_load_gives_it(
    chat_model_path: Path, gpu: GpuDevice, monkeypatch: pytest.MonkeyPatch, spare: int, with_vram: bool
) -> None:
    """Also where a byte less is too little for all of the dense model."""
    source = open_model(chat_model_path)
    sizes = sizes_of_source(source)
    whole = whole_on_gpu(sizes, 256, OPTIONS.kv_type, OPTIONS.n_batch) + spare
    free = whole + GPU_HEADROOM_BYTES
    options = replace(OPTIONS, vram_bytes=whole if with_vram else None)
    planned_options = PlanOptions(kv_type=options.kv_type, n_batch=options.n_batch, vram_bytes=options.vram_bytes)
    machine = Hardware(ram_bytes=None, total_ram_bytes=None, n_threads=1, gpus=(Gpu(vram_bytes=free),))
    planned = gpu_share(sizes, machine, planned_options, 256)
    card = replace(gpu, free_bytes=free, total_bytes=free, has_display=False)
    monkeypatch.setattr("localrun.engine.planner.gpu.choose_gpus", lambda choice, rpc: [card])
    placement = place_on_gpus(source, sizes, options, 256)
    assert placement.dense_share == planned.dense_share
    assert (placement.dense_share == 1) is (spare >= 0)
    ((_, for_experts),) = placement.experts or ((card, 0),)
    assert for_experts in (0, planned.expert_bytes)  # 0: too little for the kernels' scratch memory


def test_a_card_too_small_for_the_dense_model_gets_layers_of_it(
    chat_model_path: Path, gpu: GpuDevice, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = open_model(chat_model_path)
    sizes = sizes_of_source(source)
    n_layers = sizes.shape.n_layers
    whole = sizes.dense_bytes + sizes.kv_bytes(256, OPTIONS.kv_type, OPTIONS.n_batch)
    for spare, some in ((-whole // (2 * n_layers), True), (-whole, False)):
        free = GPU_HEADROOM_BYTES + compute_bytes(sizes, 256, OPTIONS.n_batch) + whole + spare
        card = replace(gpu, free_bytes=free, total_bytes=free)
        monkeypatch.setattr("localrun.engine.planner.gpu.choose_gpus", lambda choice, rpc, card=card: [card])
        caplog.clear()
        placement = place_on_gpus(source, sizes, OPTIONS, 256)
        assert (0 < placement.dense_share < 1) is some
        assert placement.n_gpu_layers == (round(placement.dense_share * n_layers) + 1 if some else 0)
        assert ("layers go there" in caplog.text) is some
