"""Experts on a GPU: llama.cpp's RPC device on loopback, the same ggml interface as CUDA's, or the device in LOCALRUN_TEST_GPU."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as QT

from localrun.errors import BudgetError, LocalrunError, UsageError
from localrun.ggml.devices import GpuDevice, choose_gpus
from localrun.ggml.library import library
from localrun.ggml.structures import Tensor
from localrun.offload.gpu import graphs as gpu_graphs
from localrun.offload.gpu.graphs import MAX_SLOTS, most_slots, slot_bytes
from localrun.offload.gpu.slots import scratch_bytes
from localrun.offload.gpu.tier import LEAST_HEAT, share_out
from localrun.offload.model import OffloadedModel, OffloadOptions, open_offloaded
from localrun.quant.open import open_model
from tests.gguf_models import TinyDeepseek4
from tests.offload.models import F32, MODEL, logits, write_model
from tests.paired import median, same_but_for_rounding
from tests.reference import kl
from tests.rpc_server import TEST_GPU, limit_memory, rpc_server

pytestmark = pytest.mark.usefixtures("nothing_streams")


def filled(model: OffloadedModel) -> int:
    """Waits until every expert that was to be uploaded is on the GPU; how many there are."""
    tier = model.pool.residency.gpu
    assert tier is not None
    deadline = time.monotonic() + 300
    while tier.n_under_way:
        assert time.monotonic() < deadline
        with model.decoding([]):
            pass
        time.sleep(0.002)
    return tier.n_resident


@cache
def exact_and_rounded(path: Path, *, attention: bool = True) -> tuple[F32, F32]:
    """Logits with exact experts, and with 8-bit experts on the CPU. `attention`: that, and what stands between matrices, is ours,
    which it never is with the dense model on a GPU."""
    with open_offloaded(open_model(path), OffloadOptions(n_threads=2, math="f32")) as model:
        exact = logits(model, attention=attention)
    with open_offloaded(open_model(path), OffloadOptions(n_threads=2)) as model:
        return exact, logits(model, attention=attention)


def is_as_exact(found: F32, reference: tuple[F32, F32]) -> bool:
    """Differs from exact experts' logits as those with 8-bit experts on the CPU do."""
    exact, rounded = reference
    return same_but_for_rounding(kl(exact, found), kl(exact, rounded))


def budget_for(path: Path, device: GpuDevice, n_experts: int) -> int:
    """Bytes that hold about so many experts."""
    with open_offloaded(open_model(path), OffloadOptions()) as model:
        spec = model.pool.residency.kernels(0)[0].spec
    return scratch_bytes(spec) + n_experts * slot_bytes(spec, 1, device)


@pytest.mark.parametrize("n_experts", [20, 10_000])
def test_experts_on_a_gpu_give_the_same_answers(model_path: Path, gpu: GpuDevice, n_experts: int) -> None:
    source = open_model(model_path)
    reference = exact_and_rounded(model_path)
    with open_offloaded(source, OffloadOptions(n_threads=2)) as model:
        total = sum(moe.n_experts for moe in source.moe_layers.values())
    budget = budget_for(model_path, gpu, n_experts)
    with open_offloaded(source, OffloadOptions(n_threads=2, gpus=[(gpu, budget)])) as model:
        before = logits(model)  # while experts are on their way
        n_resident = filled(model)
        assert min(n_experts, total) <= n_resident <= total
        found, one_by_one = logits(model), logits(model, batch=1)
        tier, table = model.pool.residency.gpu, model.pool.residency.table
        assert tier is not None
        assert tier.used_bytes <= budget
        # An expert is in one place only.
        assert not (tier.where >= 0)[table.resident[: len(tier.where)] != 0].any()
        totals = model.telemetry.totals()
        assert totals.gpu_hits > 0
        assert "g" in model.expert_map()["layers"][0]["where"]
    assert all(is_as_exact(other, reference) for other in (before, found, one_by_one))


def test_dense_model_and_cache_on_the_gpu_too(model_path: Path, gpu: GpuDevice) -> None:
    source = open_model(model_path)
    reference = exact_and_rounded(model_path, attention=False)
    budget = budget_for(model_path, gpu, 30)
    with open_offloaded(source, OffloadOptions(n_threads=2, n_gpu_layers=99, gpus=[(gpu, budget)])) as model:
        filled(model)
        found = {kv: logits(model, kv_type=kv) for kv in ("f16", "q8_0")}
    assert is_as_exact(found["f16"], reference)
    exact, rounded = reference
    assert same_but_for_rounding(kl(exact, found["q8_0"]) / 2, kl(exact, rounded)), "the cache is rounded more coarsely"


@pytest.mark.parametrize(("n_gpu_layers", "n_experts"), [(1, 30), (3, 30), (len(MODEL.ratios), 10_000)])
def test_some_layers_of_the_dense_model_on_the_gpu(
    model_path: Path, gpu: GpuDevice, n_gpu_layers: int, n_experts: int
) -> None:
    """The output head alone, half of the layers, and all but the first: matrices of the others are ours."""
    budget = budget_for(model_path, gpu, n_experts)
    options = OffloadOptions(n_threads=2, n_gpu_layers=n_gpu_layers, gpus=[(gpu, budget)])
    with open_offloaded(open_model(model_path), options) as model:
        filled(model)
        assert model.dense.n_bytes > 0
        for batch in (1, 6, 64):
            assert is_as_exact(logits(model, batch=batch), exact_and_rounded(model_path, attention=False)), batch


def test_experts_that_are_used_more_take_the_places_of_others(model_path: Path, gpu: GpuDevice) -> None:
    """Only 20 of 64 experts fit; a text that keeps using the same few must bring those in."""
    source = open_model(model_path)
    with open_offloaded(source, OffloadOptions(n_threads=2)) as model:
        expected = logits(model, [3] * 20, batch=1)
    budget = budget_for(model_path, gpu, 20)
    with open_offloaded(source, OffloadOptions(n_threads=2, gpus=[(gpu, budget)])) as model:
        filled(model)
        tier = model.pool.residency.gpu
        assert tier is not None
        at_first = tier.n_resident
        ends = time.monotonic() + 300
        while tier.n_exchanged == 0 or tier.where[1, int(model.learner.heat(1).argmax())] < 0:
            assert time.monotonic() < ends
            decode_with_steps(model, [3] * 20)
            filled(model)
        found = logits(model, [3] * 20, batch=1)
        assert tier.n_resident == at_first
        assert tier.used_bytes <= budget
        model.pool.residency.check()
    assert median(kl(expected, found)) < 0.02


def decode_with_steps(model: OffloadedModel, tokens: list[int]) -> Any:
    """As a session does: between two tokens the tier may change."""
    for _ in range(16):
        with model.decoding([]):
            pass
    return logits(model, tokens, batch=1)


def test_several_formats_and_two_gpus(tmp_path: Path, gpu: GpuDevice) -> None:
    path = write_model(tmp_path, replace(MODEL, expert_type=QT.Q8_0))
    source = open_model(path)
    reference = exact_and_rounded(path)
    budget = budget_for(path, gpu, 15)
    with open_offloaded(source, OffloadOptions(n_threads=2, gpus=[(gpu, budget), (gpu, budget)])) as model:
        filled(model)
        tier = model.pool.residency.gpu
        assert tier is not None
        assert set(np.unique(tier.where)) == {-1, 0, 1}
        found = logits(model)
    assert is_as_exact(found, reference)


def test_budget_too_small_for_one_expert_is_refused_with_numbers(model_path: Path, gpu: GpuDevice) -> None:
    with pytest.raises(BudgetError, match=r"intermediate results take .* and one expert"):
        open_offloaded(open_model(model_path), OffloadOptions(gpus=[(gpu, 100_000)]))


def test_a_gpu_that_is_full_before_it_said_keeps_what_fits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    # 13 MB of experts in a layer: more than a process has in reserve without asking the system.
    wide = TinyDeepseek4(ratios=(0, 4, 128), n_embd=256, n_ff=1024, n_experts=16, expert_type=QT.Q8_0)
    source = open_model(write_model(tmp_path, wide))
    with rpc_server() as (endpoint, server):
        (device,) = (device for device in choose_gpus("auto", [endpoint]) if device.description == endpoint)
        limit_memory(server, 40_000_000)
        with open_offloaded(source, OffloadOptions(n_threads=2, gpus=[(device, 1 << 30)])) as model:
            assert 0 < filled(model) < 3 * 16
            logits(model, [1, 2, 3])
            assert model.telemetry.totals().gpu_hits > 0
    assert "out of memory: room for " in caplog.text


def test_a_bank_is_no_larger_than_the_device_can_address(
    model_path: Path, gpu: GpuDevice, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with open_offloaded(open_model(model_path), OffloadOptions()) as model:
        spec = model.pool.residency.kernels(0)[0].spec
    limit = MAX_SLOTS
    monkeypatch.setattr(gpu_graphs, "supports", lambda device, graph: first_tensor(graph).ne[2] <= limit)
    for limit in (MAX_SLOTS, MAX_SLOTS - 1, 1, 0, 13):
        assert most_slots(spec, gpu) == limit
    assert [record.getMessage() for record in caplog.records if record.name == gpu_graphs.__name__] == [
        f"{gpu.name} can't multiply experts in MXFP4: they stay in RAM and on the drive"
    ]
    tier = share_out([(gpu, 1 << 30)], {(0, 0): spec}, {0: np.zeros(64, np.int32)}, [(0, e) for e in range(64)])
    assert tier == [{(0, 0): 13}]


@pytest.mark.skipif(bool(TEST_GPU), reason="another device may have a limit")
def test_the_stand_in_has_no_limit_of_its_own(model_path: Path, gpu: GpuDevice) -> None:
    with open_offloaded(open_model(model_path), OffloadOptions()) as model:
        assert most_slots(model.pool.residency.kernels(0)[0].spec, gpu) == MAX_SLOTS


def first_tensor(graph: int) -> Tensor:
    """The weights of a graph's first product."""
    return Tensor.from_address(Tensor.from_address(library().ggml_graph_node(graph, 0)).src[0])


def test_unknown_gpus_and_dead_servers_are_named(gpu: GpuDevice) -> None:
    with pytest.raises(UsageError, match="CUDA7") as caught:
        choose_gpus("CUDA7")
    assert caught.value.hint is not None
    assert gpu.name in caught.value.hint
    with pytest.raises(LocalrunError, match=r"--rpc 127\.0\.0\.1:9"):
        choose_gpus("auto", ["127.0.0.1:9"])
    with pytest.raises(UsageError, match="HOST:PORT"):
        choose_gpus("auto", ["nonsense"])


def test_an_expert_that_cannot_be_read_costs_no_place(
    model_path: Path, gpu: GpuDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is tried once; the place it was to get goes to another one."""
    budget = budget_for(model_path, gpu, 20)
    with open_offloaded(open_model(model_path), OffloadOptions(n_threads=2, gpus=[(gpu, budget)])) as model:
        at_first = filled(model)
        tier, store = model.pool.residency.gpu, model.pool.residency.store
        assert tier is not None
        fill = store._fill  # type: ignore[attr-defined]
        failed = []

        def fail(ticket: Any, which: int, copy: int) -> None:
            if ticket.receiver is not None and which == 2:
                failed.append((ticket.slot.layer, ticket.slot.expert))
                raise OSError("unreadable")
            fill(ticket, which, copy)

        monkeypatch.setattr(model.pool.residency, "copy_rows", lambda *_: False)  # else it comes from RAM
        monkeypatch.setattr(store, "_fill", fail)
        for _ in range(3):
            decode_with_steps(model, [3] * 20)
            filled(model)
        assert failed
        assert len(set(failed)) == len(failed)
        monkeypatch.setattr(store, "_fill", fill)

        def wanted_places() -> list[int]:
            """Layers with an open place and an expert that is used enough to get it."""
            layers = [layer for slots in tier.slots for (layer, _), bank in slots.banks.items() if bank.free]
            others = {
                layer: [e for e in np.flatnonzero(tier.where[layer] < 0) if (layer, int(e)) not in failed]
                for layer in layers
            }
            return [at for at in layers if max(model.learner.heat(at)[others[at]], default=0.0) >= LEAST_HEAT]

        for _ in range(60):
            if not wanted_places():
                break
            decode_with_steps(model, [3] * 4)
            filled(model)
        assert wanted_places() == []
        n_open = sum(len(bank.free) for slots in tier.slots for bank in slots.banks.values())
        assert tier.n_resident + n_open == at_first
