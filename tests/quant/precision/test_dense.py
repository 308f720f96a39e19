"""Dense matrices: errors against the whole product, mixes that only get better with size, and their text in manifests."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as QT

from localrun.errors import FormatError
from localrun.quant.precision.dense import (
    EMBEDDING,
    KINDS,
    MEASURED_ROWS,
    TYPES,
    DenseErrors,
    kind_of,
    measure_dense,
    possible_types,
)
from localrun.quant.precision.dense_solver import (
    SENSITIVITY,
    dense_mixes,
    types_as_text,
    types_from_text,
)
from localrun.quant.precision.error import rounded
from localrun.quant.precision.importance import DenseImportance, Importance

NAMES = [
    "blk.0.attn_q_a.weight",
    "blk.1.attn_q_a.weight",
    "blk.0.ffn_up_shexp.weight",
    "output.weight",
    "token_embd.weight",
]


class Random:
    """Matrices of normal weights, (256, 512)."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.weights = {name: rng.standard_normal((2 * MEASURED_ROWS, 512)).astype(np.float32) for name in NAMES}

    def shape(self, name: str) -> tuple[int, int]:
        n_out, n_in = self.weights[name].shape
        return n_out, n_in

    def rows(self, name: str, first: int, count: int) -> npt.NDArray[np.float32]:
        return self.weights[name][first : first + count]


def size(name: str, kind: QT) -> int:
    block, n_bytes = GGML_QUANT_SIZES[kind]
    return 2 * MEASURED_ROWS * 512 // block * n_bytes


@pytest.fixture(scope="module")
def errors() -> DenseErrors:
    return measure_dense(Random(), NAMES, {}, Importance({}, n_tokens=0))


def test_kinds_are_matrices_with_a_choice_and_the_router_is_none() -> None:
    assert kind_of("blk.12.attn_q_a.weight") == "attn_q_a"
    assert kind_of("blk.3.indexer.attn_q_b.weight") == "indexer.attn_q_b"
    assert kind_of("token_embd.weight") == EMBEDDING
    for name in (
        "blk.0.ffn_gate_inp.weight",
        "blk.0.attn_norm.weight",
        "blk.0.ffn_up_exps.weight",
        "output_norm.weight",
    ):
        assert kind_of(name) is None
    assert set(SENSITIVITY) == set(KINDS)
    assert possible_types(128) == (QT.Q8_0, QT.BF16)
    assert possible_types(256) == TYPES


def test_the_error_of_a_matrix_is_its_output_s_on_the_inputs_of_each_group_and_falls_with_bits() -> None:
    matrices, name = Random(), NAMES[0]
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, 32, 512)).astype(np.float32) * rng.permutation(np.geomspace(0.01, 10, 512, dtype="f4"))
    sums = np.square(x).sum((0, 1))
    importance = Importance({}, n_tokens=32, dense={name: DenseImportance(sums, 64.0)})
    found = measure_dense(matrices, [name], {name: x}, importance).relative[name]
    assert list(found) == list(TYPES)
    for better, worse in itertools.pairwise(reversed(list(found.values()))):
        assert better < worse
    exact = matrices.weights[name]
    q4 = rounded(exact, QT.Q4_K, importance.dense_weights(name))
    halves = [slice(0, MEASURED_ROWS), slice(MEASURED_ROWS, None)]
    wrong = sum(np.square(x[g] @ (q4 - exact)[rows].T).sum() for g, rows in enumerate(halves))
    power = sum(np.square(x[g] @ exact[rows].T).sum() for g, rows in enumerate(halves))
    assert found[QT.Q4_K] == pytest.approx(wrong / power, rel=1e-3)
    alike = measure_dense(matrices, [name], {name: x}, Importance({}, n_tokens=0)).relative[name]
    assert found[QT.Q4_K] < 0.8 * alike[QT.Q4_K], "channels that carry more are kept better where importance is known"


def test_mixes_grow_from_the_smallest_to_the_exact_one_and_get_better(errors: DenseErrors) -> None:
    mixes = dense_mixes(errors, size)
    assert set(mixes[0].types.values()) == {QT.Q4_K}
    assert set(mixes[-1].types.values()) == {QT.BF16}
    assert mixes[-1].n_bytes == len(NAMES) * size("", QT.BF16)
    for smaller, larger in itertools.pairwise(mixes):
        assert smaller.n_bytes < larger.n_bytes
        assert smaller.divergence > larger.divergence
    for mix in mixes:
        assert mix.n_bytes - mix.token_bytes == size("", mix.types["token_embd.weight"]), "a token reads one row of it"
        assert sum(mix.by_type().values()) == len(NAMES)
    # A first step that gains the most per byte.
    first = mixes[1]
    (changed,) = [name for name in NAMES if first.types[name] != mixes[0].types[name]]
    others = []
    for name in NAMES:
        layers = 2 if "attn_q_a" in name else 1
        cost = {kind: SENSITIVITY[str(kind_of(name))] / layers * error for kind, error in errors.relative[name].items()}
        others += [(cost[kind] - cost[QT.Q4_K]) / (size(name, kind) - size(name, QT.Q4_K)) for kind in TYPES[1:]]
    gained = (first.divergence - mixes[0].divergence) / (first.n_bytes - mixes[0].n_bytes)
    assert gained == pytest.approx(min(others)), changed


def test_errors_and_types_survive_being_written(errors: DenseErrors) -> None:
    assert DenseErrors.from_json(errors.to_json()) == errors
    types = {"blk.0.attn_q_a.weight": QT.Q4_K, "blk.10.attn_q_a.weight": QT.Q4_K, "output.weight": QT.Q8_0}
    assert types_as_text(types) == "q8_0: output; q4_k: blk.0.attn_q_a blk.10.attn_q_a"
    assert types_from_text(types_as_text(types), "here") == types
    assert types_from_text(None, "here") == {}
    for damaged in ("q4_k", "q4_k: ", "q1_k: output", "q4_k: blk.0.ffn_gate_inp", "q4_k: output; "):
        with pytest.raises(FormatError, match="here: types of dense matrices"):
            types_from_text(damaged, "here")
    with pytest.raises(FormatError):
        DenseErrors.from_json({"output.weight": {"q9": 1}})
