"""`localrun verify`: finds every damaged byte that has a checksum, and says where."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from localrun import cli
from localrun.errors import ChecksumError, StoreError
from localrun.quant.convert.integrity import HEADER, planned_checks, verify
from localrun.quant.gguf.source import GgufSource
from localrun.quant.model.manifest import MANIFEST_NAME, Manifest
from tests.checkpoints import write_small
from tests.gguf_models import write_deepseek4
from tests.quant.gguf.test_source import manifest_of, put_manifest


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A split model with a manifest: ranges that are no whole pages, several files."""
    folder = tmp_path / "model"
    folder.mkdir()
    write_deepseek4(folder / "m.gguf", split_max_tensors=40)
    put_manifest(folder, manifest_of(GgufSource.open(folder)))
    return folder


def opened(folder: Path) -> tuple[GgufSource, Manifest]:
    source = GgufSource.open(folder)
    assert source.manifest is not None
    return source, source.manifest


def damage(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        old = file.read(1)
        file.seek(offset)
        file.write(bytes([old[0] ^ 0x40]))


def test_a_sound_model_has_no_damage(model: Path) -> None:
    source, manifest = opened(model)
    seen: list[tuple[int, int]] = []
    assert verify(source, manifest, lambda done, total: seen.append((done, total))) == []
    total = sum(check.n_bytes for check in planned_checks(source, manifest))
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_checks_cover_every_byte_but_padding(model: Path) -> None:
    source, manifest = opened(model)
    checks = planned_checks(source, manifest)
    for file, part in enumerate(source.headers):
        end = 0
        for check in (check for check in checks if check.file == file):
            assert end <= check.offset < end + part.alignment, "a gap that is more than padding"
            end = check.offset + check.n_bytes
        assert part.size_bytes - end < part.alignment


def test_every_kind_of_damage_is_named(model: Path) -> None:
    source, manifest = opened(model)
    first, second = source.expert(1, 5)[0].extents[0], source.expert(2, 7)[2].extents[0]
    norm = source.tensor_extent("blk.2.ffn_norm.weight")
    for extent, at in ((first, 0), (second, second.n_bytes - 1), (norm, 17)):
        damage(source.files[extent.file], extent.offset + at)
    found = verify(source, manifest)
    assert {(d.check.tensor, d.check.expert) for d in found} == {
        ("blk.1.ffn_gate_exps.weight", 5),
        ("blk.2.ffn_down_exps.weight", 7),
        ("blk.2.ffn_norm.weight", None),
    }
    assert {d.path for d in found} == {source.files[e.file] for e in (first, second, norm)}
    assert all(d.found != d.check.digest for d in found)


def test_damage_of_a_header_is_found(model: Path) -> None:
    source, manifest = opened(model)
    damage(source.files[0], source.files[0].read_bytes().index(b"deepseek4.context_length"))
    (found,) = verify(source, manifest)
    assert (found.check.tensor, found.check.file) == (HEADER, 0)


def test_a_dense_tensor_is_compared_whenever_it_is_read(model: Path) -> None:
    source, _ = opened(model)
    norm = source.tensor_extent("blk.2.ffn_norm.weight")
    damage(source.files[norm.file], norm.offset + 5)
    with pytest.raises(
        ChecksumError, match=rf"{source.files[norm.file]}: blk.2.ffn_norm.weight does not match"
    ) as caught:
        source.read_tensor("blk.2.ffn_norm.weight")
    assert "localrun verify" in str(caught.value.hint)
    assert GgufSource.open(model, unchecked=True).read_tensor("blk.2.ffn_norm.weight").size == norm.n_bytes


def test_a_header_is_compared_when_a_model_is_opened(model: Path) -> None:
    source, _ = opened(model)
    key = b"deepseek4.context_length"
    damage(source.files[0], source.files[0].read_bytes().index(key) + len(key) + 4)  # the value, behind its type
    with pytest.raises(ChecksumError, match=rf"{source.files[0]}: its header does not match its checksum"):
        GgufSource.open(model)


def test_a_file_that_has_become_shorter_is_a_store_error(model: Path) -> None:
    source, manifest = opened(model)
    with source.files[1].open("r+b") as file:
        file.truncate(source.headers[1].size_bytes - 100)
    with pytest.raises(StoreError, match="size changed"):
        verify(source, manifest)


def test_command_says_fine(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(model)]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "checksums are correct" in err


def test_command_fails_and_names_the_damage(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    extent = GgufSource.open(model).expert(0, 3)[1].extents[0]
    path = GgufSource.open(model).files[extent.file]
    damage(path, extent.offset + 9)
    assert cli.main(["verify", str(model), "--json"]) == 1
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert (report["ok"], report["checksums"]) == (False, True)
    (entry,) = report["damaged"]
    assert (entry["file"], entry["tensor"], entry["expert"]) == (path.name, "blk.0.ffn_up_exps.weight", 3)
    assert f"{path}: blk.0.ffn_up_exps.weight, expert 3: checksum differs" in err
    assert "hint:" in err


def test_command_says_when_there_are_no_checksums(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / MANIFEST_NAME).unlink()
    for path in (model, write_small(tmp_path / "checkpoint")):
        assert cli.main(["verify", str(path), "--json"]) == 0
        out, err = capsys.readouterr()
        assert json.loads(out)["checksums"] is False
        assert "weights not verified" in err


def test_command_on_something_else_fails_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(tmp_path / "nothing")]) == 2
    assert "no such file" in capsys.readouterr().err
