"""Dense tensors arrive whole, in slices where that is possible, and one that can't be read ends all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from localrun.errors import StoreError
from localrun.offload import dense_reads
from localrun.offload.dense_reads import Bytes, WantedTensor, read_dense
from localrun.quant.model.source import ModelSource
from localrun.quant.open import open_model
from tests.offload.models import write_model


@pytest.fixture
def source(tmp_path: Path) -> ModelSource:
    return open_model(write_model(tmp_path))


def wanted(source: ModelSource, *, in_slices: bool) -> tuple[list[WantedTensor], dict[str, list[tuple[int, bytes]]]]:
    """All dense tensors, and where their bytes are collected."""
    got: dict[str, list[tuple[int, bytes]]] = {name: [] for name in source.tensors if "_exps" not in name}

    def taker(name: str) -> WantedTensor:
        def put(begin: int, rows: Bytes) -> None:
            got[name].append((begin, rows.tobytes()))

        return WantedTensor(name, source.tensors[name].n_bytes, put, in_slices)

    return [taker(name) for name in got], got


@pytest.mark.parametrize("in_slices", [True, False])
def test_every_tensor_arrives_in_order(
    source: ModelSource, monkeypatch: pytest.MonkeyPatch, *, in_slices: bool
) -> None:
    monkeypatch.setattr(dense_reads, "SLICE_BYTES", 1)  # as few rows as possible
    tensors, got = wanted(source, in_slices=in_slices)
    done: list[int] = []
    assert read_dense(source, tensors, progress=done.append)
    assert done == list(range(1, len(tensors) + 1))
    for name, pieces in got.items():
        assert np.array_equal(np.frombuffer(b"".join(data for _, data in pieces), np.uint8), source.read_tensor(name))
        assert [begin for begin, _ in pieces] == [sum(len(d) for _, d in pieces[:i]) for i in range(len(pieces))]
    assert all(len(pieces) == 1 for pieces in got.values()) or in_slices


def test_a_tensor_that_is_refused_ends_all_with_its_error(source: ModelSource) -> None:
    tensors, _ = wanted(source, in_slices=True)

    def admit(tensor: WantedTensor) -> None:
        if tensor.name == "output_norm.weight":
            raise StoreError("refused")

    with pytest.raises(StoreError, match="refused"):
        read_dense(source, tensors, admit=admit)
