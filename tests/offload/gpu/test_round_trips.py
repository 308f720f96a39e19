"""What one layer call of one token costs beside its arithmetic, in counts: copies and bytes to the device and back."""

from __future__ import annotations

from pathlib import Path

import pytest

from localrun.ggml.devices import GpuDevice
from localrun.offload.model import OffloadOptions, open_offloaded
from localrun.quant.model.shape import shape_of
from localrun.quant.open import open_model
from tests.gpu_shim import Shim, shim
from tests.offload.gpu.test_tier import filled
from tests.offload.models import MODEL, logits
from tests.rpc_server import TEST_GPU


def taken(counts: Shim) -> list[int]:
    """What was counted until now."""
    copies = [counts.n_in, counts.bytes_in, counts.n_out, counts.bytes_out]
    return [*copies, counts.n_launched, counts.n_synchronized]


@pytest.mark.skipif(bool(TEST_GPU), reason="the shim is made for the RPC device")
def test_a_token_costs_two_copies_in_and_one_out_per_layer(model_path: Path, gpu: GpuDevice) -> None:
    source = open_model(model_path)
    n_layers, n_used = len(source.moe_layers), shape_of(source).n_used
    with shim(gpu) as counts, open_offloaded(source, OffloadOptions(n_threads=2, gpus=[(gpu, 1 << 30)])) as model:
        filled(model)
        tokens = [1, 2, 3, 4]
        logits(model, tokens, batch=1)  # makes the graphs
        before = taken(counts)
        logits(model, tokens, batch=1)
        after = taken(counts)
    calls = n_layers * len(tokens)
    row_bytes = MODEL.n_embd * 4
    spent = [b - a for a, b in zip(before, after, strict=True)]
    # Numbers of slots and the hidden state go there, one row for each expert comes back.
    assert spent == [2 * calls, calls * (row_bytes + n_used * 4), calls, calls * n_used * row_bytes, calls, calls]
