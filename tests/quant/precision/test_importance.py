"""Importance, its files in both of llama.cpp's forms, and what must be refused."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as QT

from localrun.errors import FormatError, LocalrunError
from localrun.quant.model.source import MoeLayer
from localrun.quant.precision.imatrix import read_imatrix, write_imatrix
from localrun.quant.precision.importance import PRIOR_ROWS, Importance, LayerImportance

E, D, F = 4, 8, 6


def model(*layers: int, n_experts: int = E, n_embd: int = D) -> dict[int, MoeLayer]:
    return {i: MoeLayer(i, n_experts, n_embd, F, (QT.F32,) * 3, 0) for i in layers}


def make(*layers: int, route_power: bool = True) -> Importance:
    rng = np.random.default_rng(3)
    counts = np.array([5.0, 0.0, 200.0, 1.0])
    made = {
        i: LayerImportance(
            counts,
            (rng.random((E, D)) * counts[:, None]).astype(np.float32),
            (rng.random((E, F)) * counts[:, None]).astype(np.float32),
            rng.random(E) * counts if route_power else None,
        )
        for i in layers
    }
    return Importance(made, n_tokens=103, datasets=("a text",), text_digest="abc")


def test_unused_experts_get_the_layers_average_and_used_ones_mostly_their_own() -> None:
    importance = make(2)
    layer = importance.layers[2]
    average = layer.x.sum(0) / layer.counts.sum()
    np.testing.assert_allclose(importance.weights(2, 1, 0), average, rtol=1e-5)
    own = layer.activated[2] / 200
    mixed = (200 * own + PRIOR_ROWS * layer.activated.sum(0) / layer.counts.sum()) / (200 + PRIOR_ROWS)
    np.testing.assert_allclose(importance.weights(2, 2, 2), mixed, rtol=1e-5)
    summary = importance.summary()
    assert (summary.n_experts, summary.n_unused, summary.n_rare) == (4, 1, 2)
    assert summary.unused_by_layer == ((2, 1),)
    assert importance.route_weights(2).sum() == pytest.approx(1)
    assert importance.route_weights(2)[1] > 0


def test_a_layer_without_any_use_says_nothing() -> None:
    zeros = LayerImportance(np.zeros(E), np.zeros((E, D), np.float32), np.zeros((E, F), np.float32))
    importance = Importance({0: zeros}, n_tokens=0)
    assert importance.weights(0, 0, 0) is None
    np.testing.assert_allclose(importance.route_weights(0), np.full(E, 1 / E))


@pytest.mark.parametrize("route_power", [True, False])
def test_files_keep_everything_and_llama_cpp_finds_its_tensors(tmp_path: Path, route_power: bool) -> None:
    importance, path = make(0, 3, route_power=route_power), tmp_path / "imatrix.gguf"
    write_imatrix(importance, path)
    again = read_imatrix(path, model(0, 3))
    assert again.digest == importance.digest
    assert again.summary() == importance.summary()
    assert (again.n_tokens, again.text_digest) == (103, "abc")
    np.testing.assert_allclose(again.route_weights(3), importance.route_weights(3), rtol=1e-6)
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.datasets"].contents() == ["a text"]
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    sums, counts = (tensors[f"blk.3.ffn_down_exps.weight.{end}"] for end in ("in_sum2", "counts"))
    assert (sums.shape.tolist(), counts.shape.tolist()) == ([F, E], [1, E])
    np.testing.assert_array_equal(counts.data.ravel(), [5, 0, 200, 1])
    np.testing.assert_array_equal(tensors["blk.0.ffn_up_exps.weight.in_sum2"].data, importance.layers[0].x)
    assert list(tmp_path.iterdir()) == [path]


def legacy(importance: Importance, *, calls: int = 7) -> bytes:
    """As llama-imatrix writes it with --output-format dat, a dense entry among the others."""
    entries = [("blk.0.attn_q.weight", np.ones(5, np.float32))]
    for number, layer in importance.layers.items():
        for name, sums in (("gate", layer.x), ("up", layer.x), ("down", layer.activated)):
            means = np.where(layer.counts[:, None] > 0, sums / np.maximum(layer.counts, 1)[:, None], 1)
            entries.append((f"blk.{number}.ffn_{name}_exps.weight", (means * calls).astype(np.float32)))
    data = struct.pack("<i", len(entries))
    for name, values in entries:
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, values.size) + values.tobytes()
    return data + struct.pack("<ii", 11, 6) + b"wiki.t"


def test_the_older_form_is_read(tmp_path: Path) -> None:
    importance, path = make(0), tmp_path / "imatrix.dat"
    path.write_bytes(legacy(importance))
    again = read_imatrix(path, model(0))
    assert again.datasets == ("wiki.t",)
    assert again.summary().n_unused == 1
    layer = importance.layers[0]
    np.testing.assert_allclose(again.weights(0, 2, 0), layer.x[2] / 200, atol=0.005)
    for length in range(0, path.stat().st_size - 4, 41):
        path.write_bytes(legacy(importance)[:length])
        with pytest.raises(LocalrunError):
            read_imatrix(path, model(0))


@pytest.mark.parametrize(
    "moe", [model(0), model(0, 3, 4), model(0, 4), model(0, 3, n_experts=3), model(0, 3, n_embd=16)]
)
@pytest.mark.parametrize("form", ["gguf", "dat"])
def test_importance_of_another_model_is_refused(tmp_path: Path, form: str, moe: dict[int, MoeLayer]) -> None:
    path = tmp_path / f"imatrix.{form}"
    if form == "gguf":
        write_imatrix(make(0, 3), path)
    else:
        path.write_bytes(legacy(make(0, 3)))
    with pytest.raises(FormatError, match=r"imatrix\..*importance of another model") as caught:
        read_imatrix(path, moe)
    assert caught.value.hint


def _write(path: Path, change: Callable[[dict[str, np.ndarray]], None], kind: str = "imatrix") -> Path:
    tensors: dict[str, np.ndarray] = {}
    for name, width in (("gate", D), ("up", D), ("down", F)):
        tensors[f"blk.0.ffn_{name}_exps.weight.in_sum2"] = np.ones((E, width), np.float32)
        tensors[f"blk.0.ffn_{name}_exps.weight.counts"] = np.ones((E, 1), np.float32)
    change(tensors)
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_type(kind)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


GATE = "blk.0.ffn_gate_exps.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[f"{GATE}.in_sum2"].__setitem__((2, 1), np.nan), "row 2 holds negative or infinite values or NaN"),
        (lambda t: t[f"{GATE}.in_sum2"].__setitem__((1, 1), -1), "row 1 holds negative"),
        (lambda t: t[f"{GATE}.counts"].__setitem__(0, np.inf), "infinite"),
        (lambda t: t[f"{GATE}.counts"].__setitem__(0, 3), "have different counts"),
        (lambda t: t.pop(f"{GATE}.counts"), "no tensor"),
        (lambda t: t.update({f"{GATE}.in_sum2": np.ones((E, D), np.float16)}), "expected F32"),
    ],
)
def test_damaged_sums_are_refused(
    tmp_path: Path, change: Callable[[dict[str, np.ndarray]], None], message: str
) -> None:
    with pytest.raises(FormatError, match=message):
        read_imatrix(_write(tmp_path / "bad.gguf", change), model(0))


def test_other_files_are_no_importance(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="not an importance matrix"):
        read_imatrix(_write(tmp_path / "model.gguf", lambda t: None, kind="model"), model(0))
    (tmp_path / "text").write_text("Once upon a time there was a text of some length.")
    with pytest.raises(FormatError, match="not an importance matrix"):
        read_imatrix(tmp_path / "text", model(0))
    with pytest.raises(LocalrunError, match="can't be read"):
        read_imatrix(tmp_path / "missing", model(0))
