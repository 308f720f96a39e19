"""Dense matrices of a checkpoint in F32: as the formats' definitions say, whichever rows are asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from localrun.quant.checkpoint.directory import Checkpoint
from localrun.quant.checkpoint.exact import ExactMatrices
from tests.checkpoints import write_small
from tests.reference import dequantize, read_safetensors


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint.open(write_small(tmp_path_factory.mktemp("checkpoint") / "small"))


def test_every_matrix_is_exact(checkpoint: Checkpoint) -> None:
    matrices, stored = ExactMatrices(checkpoint), {}
    for file in Path(checkpoint.path).glob("*.safetensors"):
        stored.update(read_safetensors(file))
    official = {tensor.spec.gguf: tensor.spec.name for tensor in checkpoint.tensors if tensor.spec.expert is None}
    kinds = set()
    for name in matrices.names:
        dtype, shape, data = stored[official[name]]
        if dtype == "I64":
            continue  # a table of experts' numbers
        kinds.add(dtype)
        scale = stored.get(official[name].removesuffix(".weight") + ".scale")
        assert matrices.shape(name) == tuple(shape)
        expected = dequantize(dtype, shape, data, scale[2] if scale else None)
        np.testing.assert_array_equal(matrices.rows(name, 0, shape[0]), expected, name)
        if shape[0] > 128:
            np.testing.assert_array_equal(matrices.rows(name, 128, shape[0] - 128), expected[128:], name)
    assert {"F8_E4M3", "BF16"} <= kinds


def test_vectors_and_experts_are_no_matrices(checkpoint: Checkpoint) -> None:
    names = ExactMatrices(checkpoint).names
    assert "token_embd.weight" in names
    assert not [name for name in names if "norm" in name or "_exps" in name]
