"""Layer calls with experts on GPUs in compiled code: the same answers and counters as through Python. The GPU is an RPC device."""

from __future__ import annotations

import ctypes as C
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from localrun.errors import DecodeError
from localrun.ggml.devices import GpuDevice
from localrun.offload.cache.telemetry import Totals
from localrun.offload.device.layouts import DEVICE
from localrun.offload.gpu.graphs import slot_bytes
from localrun.offload.gpu.slots import scratch_bytes
from localrun.offload.model import OffloadedModel, OffloadOptions, open_offloaded
from localrun.quant.model.source import ModelSource
from tests.offload.gpu.test_tier import filled
from tests.offload.models import MODEL, TOKENS, logits
from tests.offload.test_variants import sources as sources  # the fixture

ALL = MODEL.n_experts * len(MODEL.ratios)
SOME = TOKENS[:24]

pytestmark = pytest.mark.usefixtures("nothing_streams")


class Everything:
    """A recorder sends all calls through Python."""

    def record(self, layer: int, ids: Any, scores: Any) -> None:
        pass


def counts(totals: Totals) -> tuple[int, ...]:
    return totals.calls, totals.tokens, totals.requests, totals.hits, totals.gpu_hits, totals.misses


def run(model: OffloadedModel, batch: int, *, python: bool) -> tuple[Any, tuple[int, ...], Any, int]:
    """Logits, counters, uses, and how many layer calls came to Python."""
    pool = model.pool
    came, ffn = [], pool.ffn

    def counted(*args: Any) -> None:
        came.append(args[0])
        ffn(*args)

    pool.ffn = counted  # type: ignore[method-assign,assignment]
    pool.record(Everything() if python else None)  # type: ignore[arg-type]
    model.telemetry.reset()
    uses = pool.residency.table.uses.copy()
    try:
        found = logits(model, SOME, batch=batch)
    finally:
        pool.ffn = ffn  # type: ignore[method-assign]
        pool.record(None)
    return found, counts(model.telemetry.totals()), pool.residency.table.uses - uses, len(came)


@pytest.mark.parametrize(("n_gpus", "n_experts"), [(1, 10_000), (1, ALL // 2), (2, ALL // 4)])
def test_compiled_calls_give_what_python_gives_bit_for_bit(
    sources: tuple[ModelSource, ModelSource, Path], gpu: GpuDevice, n_gpus: int, n_experts: int
) -> None:
    """Experts in two formats: up to four parts of a call, two of which wait for others."""
    _, mixed, _ = sources
    with open_offloaded(mixed, OffloadOptions()) as model:
        specs = [kernel.spec for kernel in model.pool.residency.kernels(0)]
    budget = max(map(scratch_bytes, specs)) + n_experts * max(slot_bytes(spec, 1, gpu) for spec in specs)
    with open_offloaded(mixed, OffloadOptions(n_threads=2, gpus=[(gpu, budget)] * n_gpus)) as model:
        n_resident = filled(model)
        assert (n_resident == ALL) == (n_experts >= ALL)
        for batch in (1, 6):
            logits(model, SOME, batch=batch)  # reads what is not on the GPU; makes the graphs
            fast, fast_counts, fast_uses, n_python = run(model, batch, python=False)
            slow, slow_counts, slow_uses, n_calls = run(model, batch, python=True)
            assert n_python == 0
            assert n_calls == slow_counts[0] > 0
            np.testing.assert_array_equal(fast, slow)
            assert fast_counts == slow_counts
            np.testing.assert_array_equal(fast_uses, slow_uses)
            assert fast_counts[4] > 0
        if n_experts >= ALL:
            _, fast_counts, _, n_python = run(model, 24, python=False)
            assert n_python == fast_counts[0]  # too many pairs for the compiled way
        model.pool.residency.check()


def test_a_device_that_fails_is_reported_and_can_be_used_again(
    sources: tuple[ModelSource, ModelSource, Path], gpu: GpuDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, _, _ = sources
    calls: list[str] = []

    def failing(who: str) -> Any:
        def refuse(backend: int, graph: int) -> int:
            calls.append(who)
            return -1

        return C.CFUNCTYPE(C.c_int, C.c_void_p, C.c_void_p)(refuse)

    with open_offloaded(base, OffloadOptions(n_threads=2, gpus=[(gpu, 1 << 30)])) as model:
        filled(model)
        expected = logits(model, SOME, batch=1)  # makes the graphs too
        tier = model.pool.residency.gpu
        assert tier is not None
        slots, compiled, python = tier.slots[0], failing("compiled"), failing("Python")
        assert slots._record is not None
        fields = slots._record.fields
        working = fields.copy()
        with monkeypatch.context() as patch:
            patch.setattr(slots._lib, "ggml_backend_graph_compute_async", python)
            fields[DEVICE.compute] = C.cast(compiled, C.c_void_p).value or 0
            with pytest.raises(DecodeError, match="computing experts failed"):
                logits(model, SOME, batch=1)
        fields[:] = working
        assert calls == ["compiled", "Python"]
        np.testing.assert_array_equal(logits(model, SOME, batch=1), expected)
