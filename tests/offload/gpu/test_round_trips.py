"""What one layer call of one token costs beside its arithmetic, in counts: copies and bytes to the device and back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from localrun.ggml.devices import GpuDevice
from localrun.offload.device.layouts import NOTE_BYTES
from localrun.offload.gpu.graphs import size_for
from localrun.offload.gpu.stream import LONG_TOKENS
from localrun.offload.model import OffloadOptions, open_offloaded
from localrun.quant.model.shape import shape_of
from localrun.quant.model.source import ModelSource
from localrun.quant.open import open_model
from tests.gpu_shim import Shim, shim
from tests.offload.gpu.test_tier import filled
from tests.offload.models import MODEL, logits, write_model
from tests.offload.test_variants import sources as sources  # the fixture
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
    # Slots with weights and the hidden state go there, one row comes back.
    notes_bytes = NOTE_BYTES // 2 + n_used * 4
    assert spent == [2 * calls, calls * (row_bytes + notes_bytes), calls, calls * row_bytes, calls, calls]


@pytest.mark.skipif(bool(TEST_GPU), reason="the shim is made for the RPC device")
def test_two_formats_on_a_gpu_cost_one_more_graph_and_nothing_else(
    sources: tuple[ModelSource, ModelSource, Path], gpu: GpuDevice
) -> None:
    _, mixed, _ = sources
    with shim(gpu) as counts, open_offloaded(mixed, OffloadOptions(n_threads=2, gpus=[(gpu, 1 << 30)])) as model:
        filled(model)
        tokens = list(range(1, 9))
        for _ in range(2):
            logits(model, tokens, batch=1)  # makes the graphs
        before = taken(counts)
        logits(model, tokens, batch=1)
        n_in, _, n_out, bytes_out, n_launched, n_synchronized = (
            b - a for a, b in zip(before, taken(counts), strict=True)
        )
    calls = len(mixed.moe_layers) * len(tokens)
    assert (n_in, n_out, n_synchronized) == (2 * calls, calls, calls)
    assert calls < n_launched <= 2 * calls
    assert bytes_out == n_launched * MODEL.n_embd * 4


@pytest.mark.skipif(bool(TEST_GPU), reason="the shim is made for the RPC device")
def test_a_layer_with_the_dense_model_there_too_waits_once(tmp_path: Path, gpu: GpuDevice) -> None:
    """By the difference that two more layers make: a batch has inputs of its own."""
    tokens = [1, 2, 3, 4]
    spent = []
    with shim(gpu) as counts:
        for ratios in ((0, 4, 128), (0, 4, 128, 4, 4)):
            (folder := tmp_path / str(len(ratios))).mkdir()
            path = write_model(folder, replace(MODEL, ratios=ratios))
            options = OffloadOptions(n_threads=2, n_gpu_layers=99, gpus=[(gpu, 1 << 30)])
            with open_offloaded(open_model(path), options) as model:
                filled(model)
                logits(model, tokens, batch=1)
                before = taken(counts)
                logits(model, tokens, batch=1)
                spent.append([b - a for a, b in zip(before, taken(counts), strict=True)])
    n_in, bytes_in, n_out, bytes_out, n_launched, n_synchronized = (
        (b - a) // (2 * len(tokens)) for a, b in zip(*spent, strict=True)
    )
    row_bytes, choices_bytes = MODEL.n_embd * 4, MODEL.n_used * 4
    # From there: the hidden state (for what may be in RAM), ids and weights. To there: slots with weights. The sum stays.
    assert (n_out, bytes_out) == (3, row_bytes + 2 * choices_bytes)
    assert (n_in, bytes_in) == (1, NOTE_BYTES // 2 + choices_bytes)
    assert n_launched == 2
    assert n_synchronized == 1


@pytest.mark.skipif(bool(TEST_GPU), reason="the shim is made for the RPC device")
def test_a_long_call_sends_each_tokens_input_once(model_path: Path, gpu: GpuDevice) -> None:
    """Rows for the pairs are gathered on the device; a graph gets numbers of slots and rows."""
    source = open_model(model_path)
    with shim(gpu) as counts, open_offloaded(source, OffloadOptions(n_threads=2, gpus=[(gpu, 1 << 30)])) as model:
        filled(model)
        tokens = [t % MODEL.vocab for t in range(LONG_TOKENS)]
        logits(model, tokens)  # makes the graphs
        before = taken(counts)
        logits(model, tokens)
        n_in, bytes_in, n_out, bytes_out, n_launched, n_synchronized = (
            b - a for a, b in zip(before, taken(counts), strict=True)
        )
    n_layers, n_pairs, row_bytes = len(source.moe_layers), LONG_TOKENS * MODEL.n_used, MODEL.n_embd * 4
    assert n_launched == n_out == n_synchronized == n_layers
    assert n_in == 3 * n_layers
    assert bytes_out == n_layers * n_pairs * row_bytes
    assert bytes_in == n_layers * (LONG_TOKENS * row_bytes + 2 * 4 * size_for(n_pairs))
