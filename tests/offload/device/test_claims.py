"""A layer's FFN as one split of our device: which operations it takes, how many are left, and that sums are the same bits."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import llama_cpp
import numpy as np
import pytest

from localrun.ggml import structures as ggml
from localrun.ggml.devices import GpuDevice
from localrun.ggml.structures import Tensor
from localrun.offload.device.claims import MOST_SUMMED, supports_op
from localrun.offload.device.device import expert_device
from localrun.offload.model import OffloadedModel, OffloadOptions, open_offloaded
from localrun.quant.open import open_model
from tests.offload.models import MODEL, TOKENS, logits
from tests.reference import kl


def sums_up_experts(op: int) -> bool:
    """Weights experts' outputs, or adds them up, or their sum with the shared expert's."""
    tensor = Tensor.from_address(op)
    if tensor.op == ggml.OP_VIEW:
        return sums_up_experts(tensor.src[0])
    if tensor.op == ggml.OP_MUL:
        return bool(Tensor.from_address(tensor.src[0]).op == ggml.OP_MUL_MAT_ID)
    return tensor.op == ggml.OP_ADD and (sums_up_experts(tensor.src[0]) or sums_up_experts(tensor.src[1]))


@contextmanager
def products_only() -> Iterator[None]:
    """Meanwhile llama.cpp weights experts' outputs and adds them up itself."""
    interface = expert_device()._device.iface
    kind = dict(interface._fields_)["supports_op"]
    asked, mine = kind(supports_op.address), kind(supports_op.address)

    def refuse(device: int, op: int) -> bool:
        return not sums_up_experts(op) and bool(asked(device, op))

    refusing = kind(refuse)
    interface.supports_op = refusing
    try:
        yield
    finally:
        interface.supports_op = mine


def splits(model: OffloadedModel, caplog: pytest.LogCaptureFixture) -> tuple[int, int]:
    """Parts of llama.cpp's graph of a batch, and of one token."""
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="llama.cpp"):
        logits(model, [1])
    lines = [record.getMessage() for record in caplog.records if "splits = " in record.getMessage()]
    found = re.search(r"splits = (\d+)(?: / (\d+))?", lines[-1])
    assert found is not None
    return int(found[1]), int(found[2] or found[1])


@pytest.mark.parametrize("batch", [1, MOST_SUMMED, MOST_SUMMED + 1])
@pytest.mark.parametrize("through_python", [False, True])
def test_sums_are_llama_cpps_bit_for_bit(model_path: Path, batch: int, through_python: bool) -> None:
    with open_offloaded(open_model(model_path), OffloadOptions(n_threads=2)) as model:
        model.pool.handover.need_python("the test asks for it", through_python)
        found = logits(model, TOKENS[:40], batch=batch)
        with products_only():
            np.testing.assert_array_equal(logits(model, TOKENS[:40], batch=batch), found)


def test_a_layers_ffn_is_one_part_of_the_graph(model_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of few tokens the experts, their sum, the shared expert and the last sum; of many, llama.cpp has the sums between them. Where
    the shared expert is llama.cpp's (no vector instructions), so is what follows the experts' sum, and the parts are as many."""
    with open_offloaded(open_model(model_path), OffloadOptions(n_threads=2)) as model:
        batch, one = splits(model, caplog)
        with products_only():
            batch_before, one_before = splits(model, caplog)
        shared_is_ours = model.dense.n_bytes > 0
    assert batch == batch_before == one_before
    assert one_before - one == (2 * len(MODEL.ratios) if shared_is_ours else 0)


def test_a_callback_that_looks_at_every_operation_sees_the_same_values(
    model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp then asks for one operation at a time."""
    seen: dict[str, int] = {}

    @llama_cpp.ggml_backend_sched_eval_callback
    def look(tensor: int, ask: bool, data: object) -> bool:
        name, _, rest = Tensor.from_address(tensor).name.decode().partition("-")
        seen[name] = seen.get(name, 0) + (not ask and rest.isdecimal())
        return True

    with open_offloaded(open_model(model_path), OffloadOptions(n_threads=2)) as model:
        expected = logits(model, TOKENS[:6], batch=1)
        params = llama_cpp.llama_context_default_params()
        params.cb_eval = look
        monkeypatch.setattr(llama_cpp, "llama_context_default_params", lambda: params)
        found = logits(model, TOKENS[:6], batch=1)
    assert seen["ffn_moe_weighted"] == seen["ffn_moe_out"] == seen["ffn_out"] == 6 * len(MODEL.ratios)
    # The activation alone is computed by other code; where that flips the rounding of an 8-bit value, later ones differ visibly.
    assert np.median(kl(expected, found)) < 1e-3


def test_activations_lie_where_the_dense_model_wants_them(
    model_path: Path, gpu: GpuDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On its GPU if all of it is there; in memory from which that GPU copies if only some layers are: the RPC device has none, but
    here it says that plain memory is such."""
    device = expert_device()
    with open_offloaded(open_model(model_path), OffloadOptions(n_threads=2, n_gpu_layers=99, gpus=[(gpu, 1 << 30)])):
        assert device._activations is not None
        assert device._activations_type == device._activations.address
    monkeypatch.setattr(device._lib, "ggml_backend_dev_host_buffer_type", lambda _: int(device._cpu_buffer_type))
    device.exchange_with(gpu, all_layers=False)
    assert device._activations_type == device._cpu_buffer_type
    with open_offloaded(open_model(model_path), OffloadOptions(n_threads=2)):
        assert device._activations_type is None
