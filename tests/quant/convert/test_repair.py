"""Splitting, interrupted verification and repair: models that travel on small, bad media."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as QT

from localrun import cli, paths
from localrun.errors import FormatError, UsageError
from localrun.quant.checkpoint.directory import Checkpoint
from localrun.quant.convert.converter import convert
from localrun.quant.convert.integrity import verify
from localrun.quant.convert.overlay import write_overlay
from localrun.quant.convert.split import split_model
from localrun.quant.convert.verify_journal import VerifyJournal
from localrun.quant.gguf.source import GgufSource
from localrun.quant.model.manifest import MANIFEST_NAME, checksum
from localrun.quant.precision.copies import BetterCopies
from tests.checkpoints import write_small
from tests.quant.convert.test_quantized_base import WIDE

PART_BYTES = 700_000
TIERS = BetterCopies({0: {3: QT.BF16, 1: QT.BF16}, 2: {0: QT.Q8_0}})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("source") / "small", **WIDE)


@pytest.fixture(scope="module")
def whole(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("whole") / "model"
    convert(checkpoint, target)
    return target


@pytest.fixture(scope="module")
def finished(checkpoint: Path, whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Split, with an overlay."""
    target = Path(shutil.copytree(whole, tmp_path_factory.mktemp("finished") / "model"))
    split_model(target, PART_BYTES)
    write_overlay(Checkpoint.open(checkpoint), TIERS, target)
    return target


@pytest.fixture
def model(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "model"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def opened(folder: Path) -> GgufSource:
    source = GgufSource.open(folder)
    assert source.manifest is not None
    return source


def damage(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        old = file.read(1)
        file.seek(offset)
        file.write(bytes([old[0] ^ 0x40]))


# --- split -----------------------------------------------------------------------------------------------------------


def test_a_split_model_has_the_same_tensors_in_files_of_bounded_size(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "model"))
    parts = split_model(folder, PART_BYTES)
    names = [part.name for part in parts]
    assert len(parts) > 2
    assert names == [f"model-{i + 1:05}-of-{len(parts):05}.gguf" for i in range(len(parts))]
    assert sorted(path.name for path in folder.iterdir()) == sorted([*names, MANIFEST_NAME])
    assert all((folder / name).stat().st_size <= PART_BYTES for name in names)
    split, one = opened(folder), opened(whole)
    assert split.manifest is not None
    assert verify(split, split.manifest) == []
    assert split.gguf_header() == one.gguf_header()
    assert all(
        split.read_tensor(name).tobytes() == one.read_tensor(name).tobytes()
        for name in one.tensors
        if "_exps" not in name
    )
    assert GgufSource.open(folder / names[1]).identity == split.identity


def test_a_tensor_that_fits_no_file_is_named_and_nothing_is_touched(whole: Path) -> None:
    before = contents(whole)
    with pytest.raises(UsageError, match=r"alone takes") as caught:
        split_model(whole, 10_000)
    assert "--split" in (caught.value.hint or "")
    assert contents(whole) == before


def test_a_small_model_stays_whole_and_a_split_one_is_not_split_again(whole: Path, finished: Path) -> None:
    assert split_model(whole, 1 << 40) == []
    with pytest.raises(UsageError, match="already split"):
        split_model(finished, PART_BYTES)


def test_the_command_splits_what_it_converts_and_what_an_earlier_run_converted(
    checkpoint: Path, whole: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    earlier = Path(shutil.copytree(whole, tmp_path / "earlier"))
    for target in (tmp_path / "new", earlier):
        assert cli.main(["convert", str(checkpoint), str(target), "--split", f"{PART_BYTES}B"]) == 0
        assert "split into" in capsys.readouterr().err
        parts = {path.name: path.read_bytes() for path in target.glob("*.gguf")}
        assert parts == {path.name: path.read_bytes() for path in finished.glob("model-*.gguf")}
        assert cli.main(["verify", str(target)]) == 0
    assert cli.main(["convert", str(checkpoint), str(tmp_path / "no"), "--split", "10kB"]) == 2
    assert not (tmp_path / "no").exists(), "refused before anything is converted"


# --- resume ----------------------------------------------------------------------------------------------------------


def interrupted(source: GgufSource, folder: Path, at: float) -> None:
    """Verifies up to a share of the bytes, as Ctrl-C would end it."""
    manifest = source.manifest
    assert manifest is not None

    def stop(done: int, total: int) -> None:
        if done > at * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify(source, manifest, stop, journal_of(source, folder))


def journal_of(source: GgufSource, folder: Path) -> VerifyJournal:
    assert source.manifest is not None
    return VerifyJournal(folder, source.files, checksum(source.manifest.to_json().encode()))


def test_an_interrupted_verification_goes_on_and_keeps_what_it_found(model: Path, tmp_path: Path) -> None:
    source = opened(model)
    assert source.manifest is not None
    damage(source.files[0], source.headers[0].data_offset + 5)
    source = opened(model)
    assert source.manifest is not None
    interrupted(source, tmp_path / "journal", 0.6)
    journal = journal_of(source, tmp_path / "journal")
    seen: list[int] = []
    found = verify(source, source.manifest, lambda done, total: seen.append(done * 100 // total), journal)
    assert [d.path for d in found] == [source.files[0]]
    assert seen[0] > 60
    assert seen[-1] == 100
    assert journal_of(source, tmp_path / "journal").next_check == 0, "a finished run leaves nothing behind"


def test_changed_files_are_read_from_the_beginning(model: Path, tmp_path: Path) -> None:
    source = opened(model)
    interrupted(source, tmp_path / "journal", 0.6)
    os.utime(source.files[1], ns=(1, 1))
    assert journal_of(source, tmp_path / "journal").next_check == 0


@pytest.mark.parametrize("text", ["", "[]", '{"key": 3}', '{"key": "K", "next": -1, "damaged": []}', "[" * 9999])
def test_a_damaged_journal_counts_for_nothing(text: str, model: Path, tmp_path: Path) -> None:
    source = opened(model)
    interrupted(source, tmp_path / "journal", 0.6)
    (path,) = (tmp_path / "journal").iterdir()
    path.write_text(text)
    assert journal_of(source, tmp_path / "journal").next_check == 0


# --- repair ----------------------------------------------------------------------------------------------------------


def _expert(folder: Path) -> None:
    source = opened(folder)
    extent = source.base_expert(2, 1)[1].extents[0]
    damage(source.files[extent.file], extent.offset + extent.n_bytes - 1)


def _overlay(folder: Path) -> None:
    source = opened(folder)
    extent = source.expert(2, 0)[2].extents[0]
    assert source.files[extent.file].name.startswith("overlay")
    damage(source.files[extent.file], extent.offset)


def _dense(folder: Path) -> None:
    source = opened(folder)
    extent = source.tensor_extent("token_embd.weight")
    damage(source.files[extent.file], extent.offset + 77)


def _header(folder: Path) -> None:
    path = opened(folder).files[0]
    damage(path, path.read_bytes().index(b"deepseek4.context_length"))


def _short(folder: Path) -> None:
    path = opened(folder).files[1]
    os.truncate(path, path.stat().st_size // 3)


def _unwritten(folder: Path) -> None:
    path = opened(folder).files[1]
    size = path.stat().st_size
    os.truncate(path, size // 3)
    os.truncate(path, size)
    with pytest.raises(FormatError, match="were never written"):
        opened(folder)


def _missing(folder: Path) -> None:
    opened(folder).files[-1].unlink()  # the overlay
    opened_base = sorted(folder.glob("model-*.gguf"))
    opened_base[1].unlink()


@pytest.mark.parametrize("harm", [_expert, _overlay, _dense, _header, _short, _unwritten, _missing])
def test_repair_makes_every_file_as_it_was(
    harm: Callable[[Path], None],
    model: Path,
    finished: Path,
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    harm(model)
    assert cli.main(["verify", str(model)]) == 1
    assert cli.main(["verify", str(model), "--repair", str(checkpoint)]) == 0, capsys.readouterr().err
    assert contents(model) == contents(finished)


def test_repair_refuses_another_checkpoint(
    model: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _dense(model)
    before = contents(model)
    other = write_small(tmp_path / "other", seed=5, **WIDE)
    assert cli.main(["verify", str(model), "--repair", str(other)]) == 2
    assert "not the checkpoint this model was made from" in capsys.readouterr().err
    assert contents(model) == before


def test_the_command_names_the_file_and_goes_on_after_an_interruption(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCALRUN_CACHE_DIR", str(tmp_path / "cache"))
    _expert(model)
    source = opened(model)
    interrupted(source, paths.cache_dir() / "verify", 0.5)
    assert cli.main(["verify", str(model)]) == 1
    err = capsys.readouterr().err
    assert "resuming after" in err
    assert "file to restore: model-0000" in err
