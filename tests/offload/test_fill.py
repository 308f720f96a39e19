"""What llama.cpp is given for the tensors that it creates, and what is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as QT

from localrun.errors import BudgetError, FormatError, StoreError
from localrun.ggml import log as llama_log
from localrun.offload.device.device import Weight, expert_device
from localrun.offload.fill import expert_weight
from localrun.offload.model import OffloadOptions, open_offloaded
from localrun.offload.routers import Routers
from localrun.quant.model.source import ModelSource, TensorInfo
from localrun.quant.open import open_model
from tests.offload.models import logits, write_model


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("blk.3.ffn_gate_exps.weight", Weight(3, 0)),
        ("blk.3.ffn_up_exps.weight", Weight(3, 1)),
        ("blk.41.ffn_down_exps.weight", Weight(41, 2)),
        ("blk.3.ffn_gate_up_exps.weight", None),
        ("blk.3.ffn_gate_shexp.weight", None),
        ("blk.3.ffn_gate_exps.scale", None),
        ("output.weight", None),
    ],
)
def test_stacked_expert_tensors_are_told_by_their_names(name: str, expected: Weight | None) -> None:
    assert expert_weight(name) == expected


class Changed:
    """A source with other tensors than its header says."""

    def __init__(self, source: ModelSource, tensors: dict[str, TensorInfo]) -> None:
        self._source, self.tensors = source, tensors

    def __getattr__(self, name: str) -> object:
        return getattr(self._source, name)


def refused(source: ModelSource, tensors: dict[str, TensorInfo]) -> FormatError:
    with pytest.raises(FormatError) as caught:
        open_offloaded(Changed(source, tensors), OffloadOptions())  # type: ignore[arg-type]
    return caught.value


@pytest.fixture
def source(tmp_path: Path) -> ModelSource:
    return open_model(write_model(tmp_path))


def test_a_tensor_of_another_shape_or_type_than_llama_cpp_creates_is_refused(source: ModelSource) -> None:
    name = "blk.1.attn_norm.weight"
    info = source.tensors[name]
    for wrong in (replace(info, shape=(info.shape[0] // 2,)), replace(info, type=QT.F16)):
        error = refused(source, {**source.tensors, name: wrong})
        assert name in str(error)
        assert "llama.cpp expects F32" in str(error)
        assert error.hint == "the file contradicts its own metadata; convert it again"


def test_a_missing_tensor_is_named(source: ModelSource) -> None:
    name = "blk.2.ffn_norm.weight"
    error = refused(source, {key: info for key, info in source.tensors.items() if key != name})
    assert f"tensor {name}" in str(error)
    assert "is missing" in str(error)


def test_a_read_that_fails_reaches_the_caller_and_a_later_load_works(
    source: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading = source.dense_reading

    def fail(name: str, slice_bytes: int) -> object:
        if name == "output_norm.weight":
            raise StoreError("model.gguf: Input/output error")
        return reading(name, slice_bytes)

    with monkeypatch.context() as patch:
        patch.setattr(source, "dense_reading", fail)
        with pytest.raises(StoreError, match="Input/output error"):
            open_offloaded(source, OffloadOptions())
    with open_offloaded(source, OffloadOptions()) as model:
        assert np.isfinite(logits(model, [1, 2])).all()


def test_progress_counts_the_dense_tensors(source: ModelSource) -> None:
    seen: list[tuple[int, int]] = []
    n_dense = sum("_exps" not in name for name in source.tensors)
    with open_offloaded(source, OffloadOptions(progress=lambda done, total: seen.append((done, total)))):
        pass
    assert seen == [(done, n_dense) for done in range(1, n_dense + 1)]


def test_a_load_ends_with_numbers_when_other_programs_take_the_memory_meanwhile(
    source: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("localrun.offload.fill._CHECKED_BYTES", 0)
    left = iter([1 << 30] * 5)
    options = OffloadOptions(available=lambda: next(left, 100), reserve_bytes=0)
    with pytest.raises(BudgetError, match=r"taken memory while .* was loading: 5 of \d+ dense tensors were read"):
        open_offloaded(source, options)
    with open_offloaded(source, replace(options, available=lambda: 1 << 40)) as model:
        assert np.isfinite(logits(model, [1, 2])).all()


class Refusing(dict[int, Any]):
    """A device's map of its buffers that takes none, or gives none back."""

    def __init__(self, error: BaseException, at: str) -> None:
        super().__init__()
        self._error, self._at = error, at

    def __setitem__(self, key: int, value: Any) -> None:
        if self._at == "alloc_buffer":
            raise self._error
        super().__setitem__(key, value)

    def __getitem__(self, key: int) -> Any:
        if self._at == "get_base":
            raise self._error
        return super().__getitem__(key)


@pytest.mark.parametrize("at", ["alloc_buffer", "get_base"])
@pytest.mark.parametrize("error", [MemoryError("no more"), KeyboardInterrupt()])
def test_an_error_in_what_ggml_calls_reaches_the_caller_and_a_later_load_works(
    source: ModelSource, monkeypatch: pytest.MonkeyPatch, error: BaseException, at: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(expert_device(), "_memory", Refusing(error, at))
        with pytest.raises(type(error)) as caught:
            open_offloaded(source, OffloadOptions())
        assert caught.value is error
    with open_offloaded(source, OffloadOptions()) as model:
        assert np.isfinite(logits(model, [1, 2, 3])).all()


def test_what_the_device_s_functions_raise_is_kept() -> None:
    device = expert_device()
    buffer, functions = device._buffer_interface, device._device.iface
    device.take_error()
    calls: list[Callable[[], object]] = [
        lambda: buffer.get_base(0),
        lambda: buffer.set_tensor(0, 0, 0, 0, 0),
        lambda: buffer.get_tensor(0, 0, 0, 0, 0),
        lambda: functions.get_memory(0, None, None),
        lambda: functions.get_props(0, None),
    ]
    for call in calls:
        call()
        assert isinstance(device.take_error(), KeyError | TypeError | ValueError)
        assert device.take_error() is None
    assert buffer.get_base(0) != 0, "ggml ends the process at a null"
    device.take_error()


def test_an_error_while_the_log_is_received_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    llama_log.install()
    assert llama_log._callback is not None
    monkeypatch.setattr(llama_log, "_receive", fail)
    llama_log._callback(2, b"a line\n", None)
    assert isinstance(expert_device().take_error(), KeyboardInterrupt)
    assert llama_log.take_error() is None


def test_huge_pages_are_asked_for_before_tensors_in_memory_are_filled(
    model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    kept: list[int] = []

    def adopt(self: Routers, name: str, address: int) -> None:
        kept.append(address)
        assert any(base <= address < base + size for base, size in asked), name

    monkeypatch.setattr("localrun.offload.fill.ask_for_huge_pages", lambda *asked_for: asked.append(asked_for))
    monkeypatch.setattr(Routers, "adopt", adopt)
    with open_offloaded(open_model(model_path), OffloadOptions()):
        pass
    assert kept
    assert len(set(asked)) == len(asked)
