"""Whole models on little disk: layers that share bytes are what a reader and the converter would see without sharing."""

from __future__ import annotations

import filecmp
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from localrun.errors import DiskSpaceError, LocalrunError, UsageError
from localrun.quant.checkpoint.mapping import BASE_TYPES, ConversionOptions
from localrun.quant.convert.converter import DENSE_NAME, MODEL_NAME, convert
from localrun.quant.open import open_model
from tools import make_checkpoint, shared_extents
from tools.convert_whole import convert_whole
from tools.convert_whole import main as convert_whole_main
from tools.make_checkpoint import write_checkpoint
from tools.shared_extents import SharingError
from tools.shared_layers import donor_name, is_dense_matrix
from tools.synthetic_config import CheckpointSpec, scaled_config

# Stacks of experts are whole blocks only from this size on, as they are in real models.
SIZES: dict[str, Any] = {"num_hidden_layers": 5, "compress_ratios": [0, 4, 128, 4, 128, 0], "vocab_size": 64}


def copy_instead(source: Path, source_offset: int, target: Path, target_offset: int, n_bytes: int) -> None:
    """What `share` does to contents, on any file system."""
    data = source.read_bytes()[source_offset : source_offset + n_bytes]
    assert source_offset % shared_extents.BLOCK_BYTES == target_offset % shared_extents.BLOCK_BYTES == 0
    with target.open("r+b") as file:
        file.seek(target_offset)
        file.write(data)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in which files can share blocks: a real one where this user may mount a file, else one that copies."""
    image, mounted = tmp_path / "disk.img", tmp_path / "mounted"
    try:
        shared_extents.make_volume(image, mounted, 400 << 20)
    except (LocalrunError, OSError):
        image.unlink(missing_ok=True)
        monkeypatch.setattr(shared_extents, "share", copy_instead)
        yield tmp_path
    else:
        yield mounted
        shared_extents.remove_volume(image, mounted)


def spec() -> CheckpointSpec:
    return CheckpointSpec(scaled_config("tiny", overrides=SIZES))


def tensors_of(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """All tensors' bytes by official name."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = np.fromfile(path, np.uint8)
        begin = 8 + int(data[:8].view("<u8")[0])
        header = json.loads(bytes(data[8:begin]))
        del header["__metadata__"]
        for name, entry in header.items():
            first, end = entry["data_offsets"]
            found[name] = data[begin + first : begin + end]
    return found


def test_layers_have_their_donors_experts_and_dense_matrices_and_nothing_else(folder: Path) -> None:
    whole, own = folder / "whole", folder / "own"
    write_checkpoint(whole, spec(), own_layers=2)
    write_checkpoint(own, spec())
    shared, plain = tensors_of(whole), tensors_of(own)
    assert shared.keys() == plain.keys()
    n_equal = {"experts": 0, "matrices": 0, "own": 0}
    for name, data in shared.items():
        kind, donor = "own", name
        if ".ffn.experts." in name:
            kind, layer = "experts", int(name.split(".")[1])
            donor = name.replace(f"layers.{layer}.", f"layers.{layer % 2}.")
        elif name.startswith("layers.3.") and is_dense_matrix(name):  # ratios 0, 4, 128, 4, 128
            kind, donor = "matrices", name.replace("layers.3.", "layers.1.")
        elif name.startswith("layers.4.") and is_dense_matrix(name):
            kind, donor = "matrices", name.replace("layers.4.", "layers.2.")
        assert np.array_equal(data, plain[donor]), name
        n_equal[kind] += 1
    assert n_equal["experts"] == 5 * 16 * 3 * 2
    # Of two layers: eight in FP8 with scales, a compressor's two; of layer 3: five of the indexer.
    assert n_equal["matrices"] == 2 * (8 * 2 + 2) + 5
    assert open_model(whole).moe_layers == open_model(own).moe_layers


@pytest.mark.parametrize(
    ("name", "donor"),
    [
        ("layers.0.attn.wo_b.weight", "layers.0.attn.wo_b.weight"),  # another gain than layer 1's
        ("layers.1.attn.wq_a.scale", "layers.1.attn.wq_a.scale"),
        ("layers.6.attn.wq_a.scale", "layers.2.attn.wq_a.scale"),
        ("layers.5.attn.compressor.wkv.weight", "layers.3.attn.compressor.wkv.weight"),
        ("layers.4.ffn.shared_experts.w2.weight", "layers.2.ffn.shared_experts.w2.weight"),
        ("layers.4.attn.kv_norm.weight", "layers.4.attn.kv_norm.weight"),
        ("layers.4.attn.compressor.ape", "layers.4.attn.compressor.ape"),
        ("layers.4.ffn.gate.weight", "layers.4.ffn.gate.weight"),
        ("layers.4.ffn.experts.0.w1.weight", "layers.4.ffn.experts.0.w1.weight"),
        ("mtp.0.attn.wq_a.weight", "mtp.0.attn.wq_a.weight"),
        ("embed.weight", "embed.weight"),
    ],
)
def test_dense_matrices_are_those_of_the_first_layer_of_the_same_kind(name: str, donor: str) -> None:
    assert donor_name([0, 0, 4, 128, 4, 128, 4], name) == donor


def test_whole_models_take_little_disk(folder: Path) -> None:
    if folder.name != "mounted":
        pytest.skip("the file system here can't share blocks: copies stand in for them")
    empty = _used(folder)
    write_checkpoint(folder / "own", spec())
    full = _used(folder)
    write_checkpoint(folder / "whole", spec(), own_layers=1)
    # One layer's experts instead of five, and three layers' dense matrices.
    assert _used(folder) - full < 0.5 * (full - empty)


def _used(folder: Path) -> int:
    os.sync()
    stat = os.statvfs(folder)
    return (stat.f_blocks - stat.f_bfree) * stat.f_frsize


@pytest.mark.parametrize(
    "options",
    [
        ConversionOptions(),
        ConversionOptions(GGMLQuantizationType.Q4_K, BASE_TYPES["q8_0"]),
        ConversionOptions(keep_experts=True),
    ],
    ids=["lossless", "smaller", "experts kept"],
)
def test_the_converted_model_is_the_converters_byte_for_byte(folder: Path, options: ConversionOptions) -> None:
    source = folder / "source"
    write_checkpoint(source, spec(), own_layers=2)
    convert(source, folder / "plain", options)
    size = convert_whole(source, folder / "shared", options, 2, jobs=2)
    name = DENSE_NAME if options.keep_experts else MODEL_NAME
    assert size == (folder / "shared" / name).stat().st_size
    assert sorted(path.name for path in (folder / "shared").iterdir()) == sorted(["localrun.json", name])
    for file in ("localrun.json", name):
        assert filecmp.cmp(folder / "plain" / file, folder / "shared" / file, shallow=False), file


def test_a_file_system_without_shared_blocks_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("tools.shared_extents.fcntl.ioctl", refuse)
    with pytest.raises(SharingError, match="can't share blocks between files"):
        write_checkpoint(tmp_path / "whole", spec(), own_layers=2)
    assert make_checkpoint.main(["tiny", str(tmp_path / "again"), "--own-layers", "2"]) == 1
    assert "hint: make one in a file, as root" in capsys.readouterr().err
    write_checkpoint(tmp_path / "plain", spec())
    with pytest.raises(SharingError):
        convert_whole(tmp_path / "plain", tmp_path / "converted", ConversionOptions(), 2, jobs=1)
    assert [path.name for path in tmp_path.iterdir()] == ["plain"]


@pytest.mark.parametrize("own_layers", [0, 6, 99])
def test_more_layers_of_their_own_than_there_are_is_refused_before_anything_is_written(
    folder: Path, own_layers: int
) -> None:
    with pytest.raises(UsageError, match=f"--own-layers {own_layers}: the model has 5 layers with experts"):
        write_checkpoint(folder / "whole", spec(), own_layers=own_layers)
    write_checkpoint(folder / "plain", spec())
    for options in (ConversionOptions(), ConversionOptions(keep_experts=True)):
        with pytest.raises(UsageError, match=f"--own-layers {own_layers}: the model has 5 layers"):
            convert_whole(folder / "plain", folder / "converted", options, own_layers, jobs=1)
    assert not (folder / "whole").exists()
    assert not (folder / "converted").exists()


def test_a_full_disk_says_what_makes_the_command_work_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(folder / "source", spec(), own_layers=2)
    command = [str(folder / "source"), str(folder / "out"), "--own-layers", "2", "--jobs", "1"]

    def full(*_: object) -> None:
        raise DiskSpaceError("model.gguf: No space left on device", hint="free space, then run the same command again")

    with monkeypatch.context() as patch:
        patch.setattr(shared_extents, "share", full)
        patch.setattr(shared_extents, "check", lambda _: None)
        assert convert_whole_main(command) == 1
    assert f"hint: delete {folder / 'out'}, then run the same command again" in capsys.readouterr().err
    assert convert_whole_main(command) == 1
    assert f"{folder / 'out'} exists already" in capsys.readouterr().err


def test_sharing_needs_one_file_per_layer(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="where each has a file of its own"):
        write_checkpoint(tmp_path, spec(), own_layers=2, single_file=True)


def test_a_volume_is_not_made_over_a_file_that_is_there(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(b"precious")
    with pytest.raises(LocalrunError):
        shared_extents.make_volume(image, tmp_path / "folder", 400 << 20)
    assert image.read_bytes() == b"precious"
