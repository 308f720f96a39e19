"""A device that gives less than it said, or nothing: a load ends with fewer experts there and a line that says so."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from localrun.ggml.devices import GpuDevice
from localrun.offload.gpu.stream import RING_SLOTS
from localrun.offload.model import OffloadOptions, open_offloaded
from localrun.quant.open import open_model
from tests.gpu_shim import Shim, shim
from tests.offload.gpu.test_tier import exact_and_rounded, filled, is_as_exact
from tests.offload.models import logits
from tests.rpc_server import TEST_GPU

pytestmark = [
    pytest.mark.skipif(bool(TEST_GPU), reason="the shim is made for the RPC device"),
    pytest.mark.usefixtures("nothing_streams"),
]

BUDGET = 1 << 30


@pytest.fixture
def shimmed(gpu: GpuDevice) -> Iterator[Shim]:
    with shim(gpu) as state:
        yield state


def load(path: Path, gpu: GpuDevice) -> int:
    """Experts on the GPU after a load; 0: it has none."""
    with open_offloaded(open_model(path), OffloadOptions(n_threads=2, gpus=[(gpu, BUDGET)])) as model:
        logits(model, [1, 2, 3])
        return filled(model) if model.pool.residency.gpu is not None else 0


def test_every_allocation_may_fail(
    model_path: Path, gpu: GpuDevice, shimmed: Shim, caplog: pytest.LogCaptureFixture
) -> None:
    all_of_them = load(model_path, gpu)
    n_allocations = shimmed.n_allocations
    assert shimmed.n_cleared > 0, "what lies beyond a slot's rows must be finite"
    assert n_allocations > 3
    assert all_of_them > 0
    for number in range(1, n_allocations + 1):
        caplog.clear()
        shimmed.n_allocations, shimmed.fail_allocation = 0, number
        found = load(model_path, gpu)
        lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith(f"{gpu.name}: ")]
        room, *others = lines
        end = "the others stay in RAM and on the drive"
        if others:  # a buffer of the measurement of streaming, which a load can do without
            assert others == [f"{gpu.name}: streaming was not measured: out of memory"]
            assert room == f"{gpu.name}: out of memory: room for 0 experts instead of {RING_SLOTS}; {end}"
            assert found == all_of_them
        else:
            assert room == f"{gpu.name}: out of memory: room for {found} experts instead of {all_of_them}; {end}"
            assert found < all_of_them, f"buffer {number} of {n_allocations}"


def test_answers_are_the_same_where_the_device_gives_only_some(model_path: Path, gpu: GpuDevice, shimmed: Shim) -> None:
    reference = exact_and_rounded(model_path)
    load(model_path, gpu)
    shimmed.fail_from, shimmed.n_allocations = shimmed.n_allocations, 0
    with open_offloaded(open_model(model_path), OffloadOptions(n_threads=2, gpus=[(gpu, BUDGET)])) as model:
        filled(model)
        assert is_as_exact(logits(model), reference)


def test_a_device_that_cannot_be_opened_gets_no_experts(
    model_path: Path, gpu: GpuDevice, shimmed: Shim, caplog: pytest.LogCaptureFixture
) -> None:
    shimmed.opens = False
    assert load(model_path, gpu) == 0
    assert "no experts go to GPUs" in caplog.text
