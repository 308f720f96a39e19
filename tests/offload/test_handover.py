"""What compiled code and Python hand over: when calls come to Python, and how stops and errors get through."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from localrun.errors import StoppedError
from localrun.offload.cache.slots import SlotTable
from localrun.offload.cache.telemetry import Telemetry
from localrun.offload.device.device import Weight
from localrun.offload.gpu.stream import LONG_TOKENS
from localrun.offload.handover import ANY_TOKENS, Handover
from localrun.offload.model import OffloadedModel, OffloadOptions, open_offloaded
from localrun.quant.open import open_model
from tests.offload.models import MODEL, TOKENS, logits


@pytest.fixture
def handover() -> Handover:
    """Of a model without layers."""
    return Handover({}, {}, SlotTable(1 << 16, 1, 1), Telemetry(1))


def test_calls_stay_compiled_unless_something_needs_python(handover: Handover) -> None:
    assert handover.threshold[0] == ANY_TOKENS
    handover.need_python("a trace", True)
    handover.need_python("a collector", True)
    assert handover.threshold[0] == 0
    handover.need_python("a trace", False)
    assert handover.threshold[0] == 0
    handover.need_python("a collector", False)
    assert handover.threshold[0] == ANY_TOKENS


def test_long_calls_come_to_python_where_there_are_gpus(handover: Handover) -> None:
    handover.use_gpu({})
    assert handover.threshold[0] == LONG_TOKENS
    handover.use_gpu(None)
    assert handover.threshold[0] == ANY_TOKENS


def test_a_stop_holds_until_it_is_cleared_whatever_else_changes(handover: Handover) -> None:
    handover.check_stop()
    handover.request_stop()
    handover.need_python("a trace", True)
    handover.need_python("a trace", False)
    assert handover.threshold[0] == 0
    with pytest.raises(StoppedError):
        handover.check_stop()
    handover.clear_stop()
    handover.check_stop()
    assert handover.threshold[0] == ANY_TOKENS


def test_a_stop_that_comes_in_the_middle_of_another_change_is_not_lost(
    handover: Handover, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a signal handler does it: between the look at the reasons and the writing of the threshold, on the same thread."""
    look = handover._compiled_below
    interrupted: list[bool] = []

    def looks_then_is_interrupted() -> int:
        value = look()
        if not interrupted:
            interrupted.append(True)
            handover.request_stop()
        return value

    monkeypatch.setattr(handover, "_compiled_below", looks_then_is_interrupted)
    handover.need_python("a trace", False)
    assert handover.threshold[0] == 0


def test_stops_from_many_threads_end_where_the_last_one_left_it(handover: Handover) -> None:
    def toggle(reason: str) -> None:
        for _ in range(500):
            handover.need_python(reason, True)
            handover.need_python(reason, False)

    threads = [threading.Thread(target=toggle, args=(str(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert handover.threshold[0] == ANY_TOKENS


def test_the_first_error_is_handed_over_once(handover: Handover) -> None:
    first = OSError("first")
    handover.failed(first)
    handover.failed(OSError("second"))
    assert handover.take_error() is first
    assert handover.take_error() is None


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, model_path: Path) -> Iterator[OffloadedModel]:
    """All experts that `TOKENS[:6]` need are in RAM."""
    with open_offloaded(open_model(model_path), OffloadOptions(n_threads=2)) as opened:
        logits(opened, TOKENS[:6], batch=3)
        yield opened


@pytest.fixture
def calls_in_python(model: OffloadedModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layers of the calls that come to Python."""
    layers: list[int] = []
    ffn = model.pool.ffn

    def noted(layer: int, *rest: object) -> None:
        layers.append(layer)
        ffn(layer, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(model.pool, "ffn", noted)
    return layers


def test_tensors_are_adopted_with_layer_and_projection(model: OffloadedModel) -> None:
    adopted = list(model.pool.handover._weights.values())
    assert len(adopted) == 3 * len(MODEL.ratios)
    assert set(adopted) == {Weight(layer, p) for layer in range(len(MODEL.ratios)) for p in range(3)}
    assert model.pool.weight(1) is None


def test_no_call_comes_to_python_when_all_experts_are_in_ram(model: OffloadedModel, calls_in_python: list[int]) -> None:
    logits(model, TOKENS[:6], batch=3)
    assert calls_in_python == []


def test_every_call_comes_to_python_for_a_reason_with_the_same_results(
    model: OffloadedModel, calls_in_python: list[int]
) -> None:
    expected = logits(model, TOKENS[:6], batch=3)
    model.pool.handover.need_python("a test", True)
    try:
        np.testing.assert_array_equal(logits(model, TOKENS[:6], batch=3), expected)
    finally:
        model.pool.handover.need_python("a test", False)
    assert calls_in_python == 2 * list(range(len(MODEL.ratios)))


def test_the_threshold_counts_tokens_of_a_call(model: OffloadedModel, calls_in_python: list[int]) -> None:
    model.pool.handover.threshold[0] = 3
    try:
        logits(model, TOKENS[:6], batch=2)
        assert calls_in_python == []
        logits(model, TOKENS[:6], batch=3)
        assert len(calls_in_python) == 2 * len(MODEL.ratios)
    finally:
        model.pool.handover.threshold[0] = ANY_TOKENS


def test_a_stop_request_fails_the_decode_and_clearing_it_lets_the_next_one_run(model: OffloadedModel) -> None:
    expected = logits(model, TOKENS[:6], batch=3)
    model.request_stop()
    with pytest.raises(StoppedError):
        logits(model, TOKENS[:6], batch=3)
    model.clear_stop()
    np.testing.assert_array_equal(logits(model, TOKENS[:6], batch=3), expected)
