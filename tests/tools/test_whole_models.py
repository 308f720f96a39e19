"""Whole models on little disk: layers that share experts are what a reader and the converter would see without sharing."""

from __future__ import annotations

import filecmp
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from localrun.errors import LocalrunError, UsageError
from localrun.quant.checkpoint.mapping import ConversionOptions
from localrun.quant.convert.converter import convert
from localrun.quant.open import open_model
from tools import make_checkpoint, shared_extents
from tools.convert_whole import convert_whole
from tools.make_checkpoint import write_checkpoint
from tools.shared_extents import SharingError
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


def experts_of(folder: Path, layer: int) -> dict[str, np.ndarray[Any, Any]]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "np") as file:
            for name in file.keys():  # noqa: SIM118
                if name.startswith(f"layers.{layer}.ffn.experts.") and name.endswith("weight"):
                    found[name.split("experts.")[1]] = file.get_tensor(name)
    return found


def test_layers_share_the_experts_of_their_donor_and_nothing_else(folder: Path) -> None:
    whole, own = folder / "whole", folder / "own"
    write_checkpoint(whole, spec(), own_layers=2)
    write_checkpoint(own, spec())
    for layer in range(5):
        shared = experts_of(whole, layer)
        assert len(shared) == 16 * 3
        donor = experts_of(own, layer % 2)
        assert all(np.array_equal(shared[name], donor[name]) for name in donor)
    assert open_model(whole).moe_layers == open_model(own).moe_layers
    for name in ("token_embd.weight", "blk.4.attn_q_a.weight", "blk.4.ffn_gate_inp.weight"):
        assert np.array_equal(open_model(whole).read_tensor(name), open_model(own).read_tensor(name))


def test_the_converted_model_is_the_converters_byte_for_byte(folder: Path) -> None:
    source = folder / "source"
    write_checkpoint(source, spec(), own_layers=2)
    convert(source, folder / "plain")
    size = convert_whole(source, folder / "shared", ConversionOptions(), 2, jobs=2)
    assert size == (folder / "shared" / "model.gguf").stat().st_size
    assert sorted(path.name for path in (folder / "shared").iterdir()) == ["localrun.json", "model.gguf"]
    for name in ("localrun.json", "model.gguf"):
        assert filecmp.cmp(folder / "plain" / name, folder / "shared" / name, shallow=False), name


def test_a_file_system_without_shared_blocks_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("tools.shared_extents.fcntl.ioctl", refuse)
    with pytest.raises(SharingError, match="can't share blocks between files"):
        write_checkpoint(tmp_path / "whole", spec(), own_layers=2)
    assert list((tmp_path / "whole").iterdir()) == []
    assert make_checkpoint.main(["tiny", str(tmp_path / "again"), "--own-layers", "2"]) == 1
    assert "hint: make one in a file, as root" in capsys.readouterr().err


def test_sharing_needs_one_file_per_layer(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="where each has a file of its own"):
        write_checkpoint(tmp_path, spec(), own_layers=2, single_file=True)


def test_a_volume_is_not_made_over_a_file_that_is_there(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(b"precious")
    with pytest.raises(LocalrunError):
        shared_extents.make_volume(image, tmp_path / "folder", 400 << 20)
    assert image.read_bytes() == b"precious"
