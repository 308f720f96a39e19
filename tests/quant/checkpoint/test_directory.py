"""Checkpoint directories: sound ones of every kind, and damage that must be named before any work."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from localrun.errors import CheckpointError, FormatError, LocalrunError, UnsupportedModelError
from localrun.quant.checkpoint.directory import CONFIG_NAME, INDEX_NAME, SINGLE_NAME, Checkpoint
from tests.checkpoints import edit_json, write_small
from tests.reference import NAMES, read_safetensors, unpack, write_f32, write_safetensors

Stored = dict[str, tuple[str, list[int], bytes]]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("sharded"))


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("single"), single_file=True)


@pytest.fixture
def copy(sharded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sharded, tmp_path / "copy"))


def edit(folder: Path, change: Callable[[Stored], object]) -> None:
    """Rewrites a single-file checkpoint's tensors."""
    tensors = read_safetensors(folder / SINGLE_NAME)
    change(tensors)
    write_safetensors(folder / SINGLE_NAME, tensors)


def test_sharded_and_single_file_checkpoints_are_the_same_model(sharded: Path, single: Path) -> None:
    a, b = Checkpoint.open(sharded), Checkpoint.open(single)
    assert [t.spec for t in a.tensors] == [t.spec for t in b.tensors]
    assert len(a.shards) == 5
    assert len(b.shards) == 1
    for left, right in zip(a.tensors, b.tensors, strict=True):
        assert a.read(left.weight).tobytes() == b.read(right.weight).tobytes()


@pytest.mark.parametrize("name", NAMES)
def test_oracle_checkpoints_open_in_official_dtypes_and_in_f32(name: str, tmp_path: Path) -> None:
    oracle = unpack(name, tmp_path)
    write_f32(oracle.path, tmp_path / "f32")
    official, f32 = Checkpoint.open(oracle.path), Checkpoint.open(tmp_path / "f32")
    assert {t.dtype for t in official.tensors} == {"I8", "F8_E4M3", "BF16", "F32", "I64"}
    assert {t.dtype for t in f32.tensors} == {"F32", "I64"}
    assert [t.spec.name for t in official.tensors] == [t.spec.name for t in f32.tensors]


def test_fp8_experts_are_recognised_by_their_dtype_not_by_the_config(tmp_path: Path) -> None:
    folder = write_small(tmp_path / "base", fp8_experts=True)
    edit_json(folder / CONFIG_NAME, expert_dtype="fp4")
    experts = [t for t in Checkpoint.open(folder).tensors if t.spec.expert is not None]
    assert {t.dtype for t in experts} == {"F8_E4M3"}


def test_mtp_tensors_are_recognised_and_reported(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_small(tmp_path / "m", mtp=True))
    assert checkpoint.mtp is not None
    assert (checkpoint.mtp.kind, checkpoint.mtp.n_blocks) == ("MTP", 1)
    assert not any(t.spec.name.startswith("mtp.") for t in checkpoint.tensors)


def test_dspark_tensors_are_recognised_and_reported(single: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(single, tmp_path / "d"))
    edit_json(folder / CONFIG_NAME, dspark_target_layer_ids=[0, 1, 2], dspark_markov_rank=8)
    config = Checkpoint.open(folder).config

    def add_stages(tensors: Stored) -> None:
        from localrun.quant.checkpoint.schema import mtp_tensors

        for spec in mtp_tensors(config, 3, dspark=True):
            shape, scale = spec.stored(spec.dtype)
            tensors[spec.name] = (spec.dtype, list(shape), bytes(n_bytes(spec.dtype, shape)))
            if scale is not None:
                tensors[spec.scale_name] = ("F8_E8M0", list(scale), bytes(n_bytes("F8_E8M0", scale)))

    edit(folder, add_stages)
    mtp = Checkpoint.open(folder).mtp
    assert mtp is not None
    assert (mtp.kind, mtp.n_blocks) == ("DSpark", 3)


def n_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    from math import prod

    from localrun.quant.checkpoint.safetensors import DTYPE_BYTES

    return prod(shape) * DTYPE_BYTES[dtype]


def test_identity_follows_contents_and_not_place(copy: Path, sharded: Path) -> None:
    assert Checkpoint.open(copy).identity == Checkpoint.open(sharded).identity
    shard = sorted(copy.glob("*.safetensors"))[1]
    with shard.open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    assert Checkpoint.open(copy).identity != Checkpoint.open(sharded).identity


def damage(folder: Path) -> str:
    with pytest.raises(LocalrunError) as caught:
        Checkpoint.open(folder)
    return str(caught.value)


def test_missing_tensors_are_counted_and_the_first_are_named(single: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(single, tmp_path / "d"))
    edit(folder, lambda t: [t.pop(f"layers.1.ffn.experts.{e}.w2.weight") for e in range(4)])
    message = damage(folder)
    assert "4 tensors (layers.1.ffn.experts.0.w2.weight, " in message
    assert "missing" in message


def test_missing_scale_is_named(single: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(single, tmp_path / "d"))
    edit(folder, lambda t: t.pop("layers.0.attn.wq_a.scale"))
    assert "1 tensor (layers.0.attn.wq_a.scale) missing" in damage(folder)


def test_unknown_tensor_is_named(single: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(single, tmp_path / "d"))
    edit(folder, lambda t: t.update(extra=("F32", [1], bytes(4))))
    assert "1 tensor (extra) unknown" in damage(folder)


def test_wrong_shape_and_wrong_dtype_say_what_was_expected(single: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(single, tmp_path / "d"))

    def change(tensors: Stored) -> None:
        tensors["norm.weight"] = ("BF16", [32], bytes(64))
        tensors["hc_head_base"] = ("I64", [4], bytes(32))

    edit(folder, change)
    message = damage(folder)
    assert "norm.weight has shape [32], expected [64]" in message
    assert "hc_head_base has dtype I64, expected F32 or BF16" in message


def test_experts_of_one_layer_must_be_stored_alike(single: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(single, tmp_path / "d"))

    def change(tensors: Stored) -> None:
        tensors["layers.0.ffn.experts.2.w1.weight"] = ("F32", [32, 64], bytes(32 * 64 * 4))
        del tensors["layers.0.ffn.experts.2.w1.scale"]

    edit(folder, change)
    assert "layers.0.ffn.experts.2.w1.weight has dtype F32" in damage(folder)


def test_nan_scale_of_a_dense_matrix_is_found_when_opening(single: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(single, tmp_path / "d"))

    def change(tensors: Stored) -> None:
        dtype, shape, data = tensors["layers.2.attn.wo_b.scale"]
        tensors["layers.2.attn.wo_b.scale"] = (dtype, shape, b"\xff" + data[1:])

    edit(folder, change)
    assert "layers.2.attn.wo_b.scale: 1 scales are NaN" in damage(folder)


def test_truncated_shard_is_named(copy: Path) -> None:
    shard = sorted(copy.glob("*.safetensors"))[2]
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size - 5)
    message = damage(copy)
    assert shard.name in message
    assert "truncated" in message


def test_missing_shard_is_named(copy: Path) -> None:
    shard = sorted(copy.glob("*.safetensors"))[2]
    shard.unlink()
    assert f"1 shard ({shard.name}) missing" in damage(copy)


def change_map(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    path = folder / INDEX_NAME
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def test_index_that_puts_a_tensor_into_another_shard_is_refused(copy: Path) -> None:
    shards = sorted(path.name for path in copy.glob("*.safetensors"))
    change_map(copy, lambda m: m.update({"norm.weight": shards[0]}))
    assert "norm.weight" in damage(copy)


def test_index_that_forgets_a_tensor_is_refused(copy: Path) -> None:
    change_map(copy, lambda m: m.pop("norm.weight"))
    assert "in this shard, but the index says otherwise" in damage(copy)


def test_index_with_a_tensor_that_no_shard_has_is_refused(copy: Path) -> None:
    shards = sorted(path.name for path in copy.glob("*.safetensors"))
    change_map(copy, lambda m: m.update(ghost=shards[0]))
    assert "1 tensor (ghost) not in the shard" in damage(copy)


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "x\0y", "x" * 256, "\ud800"]
)
def test_index_can_not_leave_the_folder(copy: Path, name: str) -> None:
    change_map(copy, lambda m: m.update({"norm.weight": name}))
    with pytest.raises(FormatError, match="points outside the checkpoint's folder"):
        Checkpoint.open(copy)


def test_shards_may_be_links_as_in_download_caches(copy: Path, tmp_path: Path) -> None:
    blob = tmp_path / "blob"
    shard = sorted(copy.glob("*.safetensors"))[0]
    shard.rename(blob)
    shard.symlink_to(blob)
    assert Checkpoint.open(copy).n_tensors > 0


def test_wrong_total_size_is_only_a_warning(copy: Path) -> None:
    path = copy / INDEX_NAME
    index = json.loads(path.read_text())
    index["metadata"]["total_size"] += 1
    path.write_text(json.dumps(index))
    (warning,) = Checkpoint.open(copy).warnings
    assert "total_size" in warning


@pytest.mark.parametrize(
    "name", ["vision.blocks.0.weight", "aligner.weight", "image_start", "layers.0.ffn.gate.bias_vl"]
)
def test_vision_variants_are_refused_as_such(single: Path, tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(single, tmp_path / "d"))
    edit(folder, lambda t: t.update({name: ("F32", [1], bytes(4))}))
    with pytest.raises(UnsupportedModelError, match="vision variant"):
        Checkpoint.open(folder)


def test_transformers_export_is_named_as_such(single: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(single, tmp_path / "d"))
    renamed = {f"model.{key}": value for key, value in read_safetensors(folder / SINGLE_NAME).items()}
    write_safetensors(folder / SINGLE_NAME, renamed)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    assert "transformers export" in str(caught.value.hint)


def test_a_config_that_asks_for_more_experts_than_there_are_is_cheap_to_refuse(copy: Path) -> None:
    edit_json(copy / CONFIG_NAME, n_routed_experts=1024, num_hidden_layers=500, compress_ratios=[0, 4, 128] * 170)
    assert "need 1536000 expert tensors" in damage(copy)


@pytest.mark.parametrize("name", [CONFIG_NAME, INDEX_NAME])
def test_files_that_are_not_json_are_named(copy: Path, name: str) -> None:
    (copy / name).write_bytes(b"{")
    assert name in damage(copy)


def test_empty_directory_says_what_is_missing(tmp_path: Path, sharded: Path) -> None:
    assert CONFIG_NAME in damage(tmp_path)
    shutil.copy(sharded / CONFIG_NAME, tmp_path)
    assert INDEX_NAME in damage(tmp_path)


def unwritten(shard: Path) -> None:
    data = shard.read_bytes()
    half = len(data) // 2
    shard.write_bytes(data[:half])
    os.truncate(shard, len(data))


def pointer(shard: Path) -> None:
    shard.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 49400000000\n")


def web_page(shard: Path) -> None:
    shard.write_text("<!doctype html><html>Sign in</html>" * 10)


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [(unwritten, "were never written"), (pointer, "a Git LFS pointer"), (web_page, "a web page instead of a model")],
)
def test_shards_that_have_not_arrived_are_refused(copy: Path, spoil: Callable[[Path], None], problem: str) -> None:
    shard = max(copy.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    assert shard.stat().st_size > 150_000
    spoil(shard)
    with pytest.raises(FormatError, match=problem) as caught:
        Checkpoint.open(copy)
    assert str(shard) in str(caught.value)
    assert caught.value.hint
