"""The dense model on a GPU: a token's experts are computed in llama.cpp's own queue there, and what the CPU computes comes to it.

The GPU is an RPC device.
"""

from __future__ import annotations

import ctypes as C
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest

from localrun.engine.llama import Context
from localrun.engine.options import EngineOptions
from localrun.engine.planner.compute_buffers import exchange_bytes
from localrun.engine.planner.sizes import sizes_of_source
from localrun.errors import LocalrunError
from localrun.ggml.devices import GpuDevice, HostMemory, choose_gpus
from localrun.ggml.library import library
from localrun.ggml.structures import Tensor
from localrun.offload.device import shadow
from localrun.offload.device.device import expert_device
from localrun.offload.device.layouts import NOTE_BYTES, PROCESS
from localrun.offload.device.shadow import Activations
from localrun.offload.gpu.graphs import slot_bytes
from localrun.offload.gpu.slots import scratch_bytes
from localrun.offload.model import OffloadedModel, OffloadOptions, open_offloaded
from localrun.quant.model.source import ModelSource
from localrun.quant.open import open_model
from tests.gpu_shim import shim
from tests.offload.gpu.test_tier import budget_for, exact_and_rounded, filled, is_as_exact
from tests.offload.models import MODEL, TOKENS, logits
from tests.offload.test_variants import sources as sources  # the fixture
from tests.reference import kl
from tests.rpc_server import TEST_GPU, rpc_server

ALL = MODEL.n_experts * len(MODEL.ratios)
ROW_BYTES = MODEL.n_embd * 4


def on(gpu: GpuDevice, budget: int) -> OffloadOptions:
    return OffloadOptions(n_threads=2, n_gpu_layers=99, gpus=[(gpu, budget)])


@pytest.mark.parametrize("n_experts", [ALL // 3, 10_000])
def test_answers_are_the_same(model_path: Path, gpu: GpuDevice, n_experts: int) -> None:
    """One token, a few whose sums are ours, and many."""
    reference = exact_and_rounded(model_path, attention=False)
    with open_offloaded(open_model(model_path), on(gpu, budget_for(model_path, gpu, n_experts))) as model:
        assert (filled(model) == ALL) == (n_experts > ALL)
        for batch in (1, 1, 6, 64):
            assert is_as_exact(logits(model, batch=batch), reference), batch
        assert model.telemetry.totals().gpu_hits > 0


def test_without_experts_there_answers_are_the_same(model_path: Path, gpu: GpuDevice) -> None:
    options = OffloadOptions(n_threads=2, n_gpu_layers=99, gpus=[(gpu, 0)])
    with open_offloaded(open_model(model_path), options) as model:
        for batch in (1, 6, 64):
            assert is_as_exact(logits(model, batch=batch), exact_and_rounded(model_path, attention=False)), batch


def test_formats_are_added_up_there(sources: tuple[ModelSource, ModelSource, Path], gpu: GpuDevice) -> None:
    """Two formats, some experts of both in RAM: up to two launches and a share."""
    _, mixed, _ = sources
    with open_offloaded(mixed, OffloadOptions(n_threads=2)) as model:
        expected = logits(model, TOKENS[:48], batch=1)
        specs = [kernel.spec for kernel in model.pool.residency.kernels(0)]
    for n_experts in (ALL // 2, 10 * ALL):
        budget = max(map(scratch_bytes, specs)) + n_experts * max(slot_bytes(spec, 1, gpu) for spec in specs)
        with open_offloaded(mixed, on(gpu, budget)) as model:
            filled(model)
            found = logits(model, TOKENS[:48], batch=1)
            found = logits(model, TOKENS[:48], batch=1)  # graphs exist, and experts are in RAM or there
        assert np.median(kl(expected, found)) < 0.02


@pytest.mark.skipif(bool(TEST_GPU), reason="two devices are needed")
def test_another_gpus_experts_are_part_of_the_share(model_path: Path, gpu: GpuDevice) -> None:
    reference = exact_and_rounded(model_path, attention=False)
    budget = budget_for(model_path, gpu, ALL // 3)
    with rpc_server() as (endpoint, _):
        other = next(device for device in choose_gpus("auto", [endpoint]) if device.description == endpoint)
        options = OffloadOptions(n_threads=2, n_gpu_layers=99, gpus=[(gpu, budget), (other, budget)])
        with open_offloaded(open_model(model_path), options) as model:
            filled(model)
            tier = model.pool.residency.gpu
            assert tier is not None
            assert set(np.unique(tier.where)) == {-1, 0, 1}
            for _ in range(2):
                assert is_as_exact(logits(model, batch=1), reference)


@pytest.mark.skipif(bool(TEST_GPU), reason="the shim is made for the RPC device")
def test_a_share_of_the_cpu_costs_one_more_copy_and_launch_and_no_wait(model_path: Path, gpu: GpuDevice) -> None:
    """Per layer and token: the hidden state, ids and weights come; notes and the share go."""
    tokens = [1, 2, 3, 4]
    with shim(gpu) as counts:
        spent = []
        for n_experts in (ALL // 3, 10_000):
            with open_offloaded(open_model(model_path), on(gpu, budget_for(model_path, gpu, n_experts))) as model:
                filled(model)
                for _ in range(2):
                    logits(model, tokens, batch=1)
                before = _taken(counts)
                logits(model, tokens, batch=1)
                spent.append([b - a for a, b in zip(before, _taken(counts), strict=True)])
                assert _calls_with_share(model, tokens) == (n_experts < ALL)
    some, all_there = (np.array(row) for row in spent)
    n_in, bytes_in, n_out, bytes_out, n_launched, n_waits = some - all_there
    calls = len(MODEL.ratios) * len(tokens)
    assert (n_out, bytes_out, n_waits) == (0, 0, 0)
    # A call without any expert there sends the sum but no notes.
    assert -calls <= n_in <= calls
    assert -calls <= n_launched <= calls
    assert bytes_in <= calls * ROW_BYTES + NOTE_BYTES


def _taken(counts: Any) -> list[int]:
    return [
        counts.n_in,
        counts.bytes_in,
        counts.n_out,
        counts.bytes_out,
        counts.n_launched,
        counts.n_synchronized,
    ]


def _calls_with_share(model: OffloadedModel, tokens: list[int]) -> bool:
    model.telemetry.reset()
    logits(model, tokens, batch=1)
    totals = model.telemetry.totals()
    return totals.gpu_hits < totals.requests


def test_a_reader_on_the_cpu_waits_for_what_is_queued(
    model_path: Path, gpu: GpuDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A callback that looks at every node gets each operation alone, and reads our results from the GPU."""
    with open_offloaded(open_model(model_path), OffloadOptions(n_threads=2)) as model:
        expected = logits(model, TOKENS[:6], batch=1)
    lib, sums = library(), []
    with open_offloaded(open_model(model_path), on(gpu, budget_for(model_path, gpu, 10_000))) as model:
        filled(model)
        logits(model, TOKENS[:6], batch=1)
        seen: list[bytes] = []

        @llama_cpp.ggml_backend_sched_eval_callback
        def look(node: int, ask: bool, _: object) -> bool:
            tensor = Tensor.from_address(C.cast(node, C.c_void_p).value or 0)
            if not ask and tensor.name.startswith(b"ffn_moe_out"):
                row = np.full(MODEL.n_embd, np.nan, np.float32)
                lib.ggml_backend_tensor_get(C.addressof(tensor), row.ctypes.data, 0, row.nbytes)
                sums.append(row)
                seen.append(tensor.name)
            return True

        params = llama_cpp.llama_context_default_params()
        params.cb_eval = look
        monkeypatch.setattr(llama_cpp, "llama_context_default_params", lambda: params)
        found = logits(model, TOKENS[:6], batch=1)
    assert len(seen) == 6 * len(MODEL.ratios)
    assert all(np.isfinite(row).all() and row.any() for row in sums)
    assert np.median(kl(expected, found)) < 0.02


def test_nothing_is_under_way_after_a_decode_and_a_model_leaves_nothing(model_path: Path, gpu: GpuDevice) -> None:
    device = expert_device()
    with open_offloaded(open_model(model_path), on(gpu, budget_for(model_path, gpu, 10_000))) as model:
        filled(model)
        logits(model, [1, 2, 3], batch=1)
        assert device.process.fields[PROCESS.shadow] != 0
        assert device.process.fields[PROCESS.behind] == 0
    if not device._memory:
        assert device.process.fields[PROCESS.shadow] == 0
    with open_offloaded(open_model(model_path), OffloadOptions(n_threads=2)) as model:
        assert np.isfinite(logits(model, [1, 2, 3], batch=1)).all()


def test_a_shadow_that_cannot_grow_leaves_what_other_contexts_have(
    model_path: Path, gpu: GpuDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No RAM for a larger context's activations: it isn't made, its buffer is freed, and another context goes on."""
    lib = library()
    allocated: list[int] = []
    freed: list[int] = []
    monkeypatch.setattr(shadow, "library", lambda: Noting(lib, allocated, freed))

    def no_memory(device: GpuDevice, n_bytes: int) -> HostMemory:
        raise MemoryError(f"no {n_bytes} bytes")

    with open_offloaded(open_model(model_path), on(gpu, budget_for(model_path, gpu, 10_000))) as model:
        context = Context(model.model, EngineOptions(n_batch=8), n_ctx=256, n_threads=1, all_logits=False)
        decoded(context, 0)
        before = expert_device().process.fields[PROCESS.shadow]
        assert before != 0
        with monkeypatch.context() as patch:
            patch.setattr(shadow, "HostMemory", no_memory)
            allocated.clear()
            with pytest.raises(LocalrunError, match=r"can't make a context of 512 tokens: no \d+ bytes") as caught:
                Context(model.model, EngineOptions(n_batch=256), n_ctx=512, n_threads=1, all_logits=False)
        assert isinstance(caught.value.__cause__, MemoryError)
        assert allocated
        assert freed == allocated
        assert expert_device().process.fields[PROCESS.shadow] == before
        decoded(context, 1)
        assert model.take_error() is None
        context.close()


class Noting:
    """llama.cpp's library, and which buffers a shadow has had of it."""

    def __init__(self, lib: Any, allocated: list[int], freed: list[int]) -> None:
        self._lib, self._allocated, self._freed = lib, allocated, freed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lib, name)

    def ggml_backend_buft_alloc_buffer(self, kind: int, size: int) -> int:
        buffer: int = self._lib.ggml_backend_buft_alloc_buffer(kind, size)
        self._allocated.append(buffer)
        return buffer

    def ggml_backend_buffer_free(self, buffer: int) -> None:
        self._freed.append(buffer)
        self._lib.ggml_backend_buffer_free(buffer)


def decoded(context: Context, at: int) -> None:
    assert context.decode([5], at, all_logits=False) == 0
    assert np.isfinite(context.logits(0)).all()


def test_an_error_while_results_are_read_back_is_kept_as_the_decodes_cause(model_path: Path, gpu: GpuDevice) -> None:
    with open_offloaded(open_model(model_path), on(gpu, 0)) as model:
        context = Context(model.model, EngineOptions(n_batch=8), n_ctx=256, n_threads=1, all_logits=False)
        decoded(context, 0)
        activations = expert_device()._activations
        assert activations is not None
        activations._read_back(0, 0, 0, 0, 0)  # of a buffer that it doesn't know
        assert isinstance(model.take_error(), KeyError)
        assert model.take_error() is None
        context.close()


def test_the_planner_knows_what_the_buffer_takes(
    model_path: Path, gpu: GpuDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, allocate, taken = open_model(model_path), Activations._alloc_buffer, []

    def noting(activations: Activations, kind: int, size: int) -> int | None:
        taken.append(size)
        return allocate(activations, kind, size)

    monkeypatch.setattr(Activations, "_alloc_buffer", noting)
    sizes = sizes_of_source(source)
    with open_offloaded(source, on(gpu, 0)) as model:
        for n_batch in (64, 256):
            taken.clear()
            Context(model.model, EngineOptions(n_batch=n_batch), n_ctx=512, n_threads=1, all_logits=False).close()
            assert 0.97 < sum(taken) / exchange_bytes(sizes, 512, n_batch) <= 1
