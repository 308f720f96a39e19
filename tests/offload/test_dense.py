"""Which dense matrices are ours, and the pattern by which llama.cpp places exactly those."""

from __future__ import annotations

import ctypes as C
import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGMLQuantizationType as QT

from localrun.offload.dense import DenseMatrices, dense_pattern, dense_tensors
from localrun.offload.device.layouts import WEIGHT
from localrun.offload.model import OffloadOptions, open_offloaded
from localrun.pages import HUGE_PAGE_BYTES
from localrun.quant.open import open_model
from tests.offload.models import TOKENS, logits


def test_the_pattern_finds_these_names_and_no_others(model_path: Path) -> None:
    source = open_model(model_path)
    ours = dense_tensors(source)
    assert "blk.0.attn_q_a.weight" in ours
    assert "output.weight" in ours
    assert not [name for name in ours if "_exps" in name or "norm" in name or "gate_inp" in name]
    pattern = dense_pattern(ours)
    assert pattern is not None
    assert {name for name in source.tensors if re.search(pattern, name)} == set(ours)
    assert re.search(pattern, "blk.10.attn_q_a.weight") is None
    assert re.search(pattern, "my_output.weight") is None


def test_no_matrices_need_no_pattern() -> None:
    assert dense_pattern({}) is None


def test_memory_is_counted_and_given_back() -> None:
    dense = DenseMatrices(n_threads=1)
    n_in, n_out, n_groups = 64, 32, 2
    rows = np.zeros(n_groups * n_out * n_in // 32 * 34, np.uint8)
    record = dense.add(QT.Q8_0, (n_in, n_out, n_groups), rows)
    assert dense.n_bytes >= rows.size
    assert dense.scratch_bytes > 0
    assert record.dtype == np.int64
    dense.close()
    assert dense.n_bytes == 0


def test_matrices_share_memory_that_begins_with_a_huge_page() -> None:
    """Memory in mappings of one matrix each is in small pages at both ends."""
    dense = DenseMatrices(n_threads=1)
    rows = np.zeros(32 * 64 // 32 * 34, np.uint8)
    records = [dense.add(QT.Q8_0, (64, 32), rows) for _ in range(3)]
    first, second, third = (C.c_uint64.from_address(int(record[WEIGHT.packed])).value for record in records)
    assert first % HUGE_PAGE_BYTES == 0
    assert third - second == second - first == dense.n_bytes // 3
    dense.close()


@pytest.mark.parametrize("batch", [1, 3])
def test_matrices_in_groups_give_the_same_bits_in_one_call_and_one_by_one(model_path: Path, batch: int) -> None:
    """Of one token, compiled code multiplies all groups in one call; Python, which shows inputs, takes them in turn."""
    groups: set[int] = set()

    def look(name: str, rows: npt.NDArray[np.float32]) -> None:
        if "attn_output_a" in name:
            groups.add(len(rows))

    with open_offloaded(open_model(model_path), OffloadOptions(n_threads=2)) as model:
        expected = logits(model, TOKENS[:12], batch=batch)
        model.dense.show(look)
        np.testing.assert_array_equal(logits(model, TOKENS[:12], batch=batch), expected)
        model.dense.show(None)
    assert min(groups) > 1
