"""What llama.cpp is given for the tensors that it creates, and what is refused by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as QT

from localrun.errors import FormatError, StoreError
from localrun.offload.device.device import Weight
from localrun.offload.fill import expert_weight
from localrun.offload.model import OffloadOptions, open_offloaded
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
    read = source.read_tensor

    def fail(name: str) -> object:
        if name == "output_norm.weight":
            raise StoreError("model.gguf: Input/output error")
        return read(name)

    with monkeypatch.context() as patch:
        patch.setattr(source, "read_tensor", fail)
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
