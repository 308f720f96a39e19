"""An official checkpoint served as it lies gives the bytes that the converter writes."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as QT

from localrun.errors import FormatError, StoreError
from localrun.quant.checkpoint.mapping import ConversionOptions
from localrun.quant.checkpoint.source import CheckpointSource
from localrun.quant.convert.converter import convert
from localrun.quant.formats.transcode import decode_projection
from localrun.quant.model.source import Encoding, Extent, ModelSource
from localrun.quant.open import open_model
from tests.checkpoints import write_small
from tests.reference import read_safetensors, unpack, write_f32, write_safetensors


def read(source: ModelSource, extent: Extent) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    with source.files[extent.file].open("rb") as file:
        file.seek(extent.offset)
        return np.frombuffer(file.read(extent.n_bytes), np.uint8)


def same_model(source: ModelSource, converted: ModelSource) -> None:
    assert source.gguf_header() == converted.gguf_header()
    assert source.tensors == converted.tensors
    assert source.moe_layers == converted.moe_layers
    for name in source.tensors:
        if "_exps" not in name:
            np.testing.assert_array_equal(source.read_tensor(name), converted.read_tensor(name), name)
    for layer, shape in source.moe_layers.items():
        for expert in range(shape.n_experts):
            for ours, theirs in zip(source.expert(layer, expert), converted.expert(layer, expert), strict=True):
                raw = [read(source, extent) for extent in ours.extents]
                rows = decode_projection(ours, raw[0], raw[-1])
                np.testing.assert_array_equal(rows, read(converted, theirs.extents[0]))
                assert (ours.type, ours.n_out, ours.n_in, ours.n_bytes) == (
                    theirs.type,
                    theirs.n_out,
                    theirs.n_in,
                    theirs.n_bytes,
                )


@pytest.mark.parametrize("name", ["flash-1", "other-1"])
def test_serves_what_the_converter_writes(name: str, tmp_path: Path) -> None:
    oracle = unpack(name, tmp_path)
    convert(oracle.path, tmp_path / "out")
    source = open_model(oracle.path)
    assert isinstance(source, CheckpointSource)
    assert source.expert(0, 0)[0].encoding is Encoding.FP4
    same_model(source, open_model(tmp_path / "out"))


@pytest.mark.parametrize("dense", [QT.Q8_0, QT.BF16])
def test_fp8_experts_follow_the_dense_type(dense: QT, tmp_path: Path) -> None:
    folder = write_small(tmp_path / "base", fp8_experts=True)
    convert(folder, tmp_path / "out", ConversionOptions(dense, dense))
    source = open_model(folder, dense=dense)
    assert source.moe_layers[0].types == (dense,) * 3
    assert source.expert(0, 0)[0].encoding is Encoding.FP8
    same_model(source, open_model(tmp_path / "out"))


def test_f32_experts_are_ready_as_they_lie(tmp_path: Path) -> None:
    write_f32(unpack("flash-1", tmp_path).path, tmp_path / "f32")
    convert(tmp_path / "f32", tmp_path / "out")
    source = open_model(tmp_path / "f32")
    assert source.expert(1, 2)[2].encoding is Encoding.GGML
    same_model(source, open_model(tmp_path / "out"))


def test_large_tensors_are_decoded_in_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_small(tmp_path / "m", q_lora_rank=320, num_attention_heads=8, vocab_size=1000)
    whole = {name: open_model(folder).read_tensor(name) for name in ("blk.0.attn_q_b.weight", "token_embd.weight")}
    monkeypatch.setattr("localrun.quant.checkpoint.source._SLICE_BYTES", 4096)
    source = open_model(folder)
    for name, expected in whole.items():
        np.testing.assert_array_equal(source.read_tensor(name), expected)


def test_identity_depends_on_weights_and_type(tmp_path: Path) -> None:
    folder, other = write_small(tmp_path / "m"), write_small(tmp_path / "other" / "m", seed=1)
    assert open_model(folder).identity == open_model(folder).identity
    assert (
        len({open_model(folder).identity, open_model(other).identity, open_model(folder, dense=QT.BF16).identity}) == 3
    )


def test_damage_that_appears_later_is_an_error_when_reading(tmp_path: Path) -> None:
    folder = write_small(tmp_path / "m", single_file=True)
    source = open_model(folder)
    file = folder / "model.safetensors"
    with file.open("ab") as handle:
        handle.write(b"x")
    with pytest.raises(StoreError, match="changed"):
        source.read_tensor("output_norm.weight")


def test_nan_weights_are_found_when_reading(tmp_path: Path) -> None:
    folder = write_small(tmp_path / "m", single_file=True)
    file = folder / "model.safetensors"
    tensors = read_safetensors(file)
    dtype, shape, data = tensors["norm.weight"]
    tensors["norm.weight"] = (dtype, shape, b"\xff\xff" + data[2:])
    shutil.copy(file, tmp_path / "before")
    write_safetensors(file, tensors)
    with pytest.raises(FormatError, match=r"norm\.weight: weight 0 is NaN"):
        open_model(folder).read_tensor("output_norm.weight")


def test_expert_table_with_an_expert_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    folder = write_small(tmp_path / "m", single_file=True)
    file = folder / "model.safetensors"
    tensors = read_safetensors(file)
    name = "layers.0.ffn.gate.tid2eid"
    dtype, shape, data = tensors[name]
    tensors[name] = (dtype, shape, (4).to_bytes(8, "little") + data[8:])
    write_safetensors(file, tensors)
    with pytest.raises(FormatError, match="entry 0 is 4, expected 0 to 3"):
        open_model(folder).read_tensor("blk.0.ffn_gate_tid2eid.weight")
