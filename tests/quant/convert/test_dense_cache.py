"""The dense part of official checkpoints, kept between loads: what is written, found, refused and deleted."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xxhash

from localrun.errors import DiskSpaceError
from localrun.offload.model import OffloadOptions, open_offloaded
from localrun.quant.checkpoint.mapping import ConversionOptions
from localrun.quant.checkpoint.source import CheckpointSource
from localrun.quant.convert import dense_cache
from localrun.quant.convert.converter import DENSE_NAME, convert
from localrun.quant.convert.dense_cache import DenseCache
from localrun.quant.convert.direct_io import DirectWriter
from localrun.quant.model.manifest import MANIFEST_NAME, read_manifest
from tests.checkpoints import write_small
from tests.offload.models import logits

MOST = 1 << 30


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("cached") / "source")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DenseCache:
    monkeypatch.setattr(dense_cache, "_SPARE_BYTES", 0)
    return DenseCache(tmp_path / "dense", MOST, least_bytes=0)


def load(source: CheckpointSource, cache: DenseCache | None, note: Callable[[str], None] | None = None) -> np.ndarray:
    with open_offloaded(source, OffloadOptions(dense_cache=cache, note=note)) as model:
        return logits(model, [1, 2, 3])


def decodes(source: CheckpointSource, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of tensors that are read from the checkpoint from now on."""
    names: list[str] = []
    reading = source.dense_reading

    def count(name: str, slice_bytes: int) -> object:
        names.append(name)
        return reading(name, slice_bytes)

    monkeypatch.setattr(source, "dense_reading", count)
    return names


def test_the_second_load_reads_what_the_first_one_converted(
    checkpoint: Path, cache: DenseCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, notes = CheckpointSource.open(checkpoint), list[str]()
    names = decodes(source, monkeypatch)
    first = load(source, cache, notes.append)
    n_dense = sum("_exps" not in name for name in source.tensors)
    assert len(names) == n_dense
    assert len(notes) == 1
    assert str(cache.folder) in notes[0]
    names.clear()
    assert np.array_equal(load(source, cache, notes.append), first)
    assert names == []
    assert len(notes) == 1
    # The same file and checksums as `convert --keep-experts` writes.
    convert(checkpoint, tmp_path / "small", ConversionOptions(keep_experts=True))
    ((folder, size),) = cache.copies()
    assert (folder / DENSE_NAME).read_bytes() == (tmp_path / "small" / DENSE_NAME).read_bytes()
    ours, theirs = (read_manifest(path / MANIFEST_NAME) for path in (folder, tmp_path / "small"))
    assert (ours.tensors, ours.files, ours.kept) == (theirs.tensors, theirs.files, theirs.kept)
    assert size == (folder / DENSE_NAME).stat().st_size


def test_a_damaged_copy_is_replaced_by_what_the_checkpoint_says(checkpoint: Path, cache: DenseCache) -> None:
    source = CheckpointSource.open(checkpoint)
    first = load(source, cache)
    ((folder, size),) = cache.copies()
    with (folder / DENSE_NAME).open("r+b") as file:
        file.seek(source.plan.tensors["blk.0.attn_q_b.weight"].offset + 64)
        file.write(b"\xff" * 16)
    assert np.array_equal(load(source, cache), first)
    assert cache.copies() == []
    load(source, cache)
    assert [size for _, size in cache.copies()] == [size]


@pytest.mark.parametrize("name", [MANIFEST_NAME, DENSE_NAME])
def test_a_copy_that_is_cut_short_is_not_used(checkpoint: Path, cache: DenseCache, name: str) -> None:
    source = CheckpointSource.open(checkpoint)
    first = load(source, cache)
    ((folder, _),) = cache.copies()
    os.truncate(folder / name, 100)
    assert cache.find(source) is None
    assert cache.copies() == []
    assert np.array_equal(load(source, cache), first)


def test_a_full_drive_leaves_nothing_behind_and_the_load_goes_on(
    checkpoint: Path, cache: DenseCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = CheckpointSource.open(checkpoint)

    def full(self: DirectWriter, offset: int, data: object) -> None:
        if offset:
            raise DiskSpaceError(f"{self.path}: No space left on device")

    with monkeypatch.context() as patch, caplog.at_level("INFO"):
        patch.setattr(DirectWriter, "write", full)
        first = load(source, cache)
    assert sum("not kept" in record.message for record in caplog.records) == 1
    assert list(cache.folder.iterdir()) == []
    assert np.array_equal(load(source, None), first)


def test_a_load_that_fails_keeps_nothing(checkpoint: Path, cache: DenseCache) -> None:
    source = CheckpointSource.open(checkpoint)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_offloaded(source, OffloadOptions(dense_cache=cache, progress=stop))
    assert list(cache.folder.iterdir()) == []


def test_two_copies_are_kept_and_the_one_unused_for_longest_goes(
    cache: DenseCache, tmp_path: Path, checkpoint: Path
) -> None:
    sources = [CheckpointSource.open(checkpoint)]
    sources += [CheckpointSource.open(write_small(tmp_path / str(seed), seed=seed)) for seed in (5, 6)]
    for number, source in enumerate(sources[:2]):
        load(source, cache)
        for folder, _ in cache.copies()[:1]:
            os.utime(folder / MANIFEST_NAME, (number, number))
    with cache.find(sources[0]) or pytest.fail("not kept"):
        pass
    load(sources[2], cache)
    found = [cache.find(source) for source in sources]
    assert [copy is not None for copy in found] == [True, False, True]
    for copy in filter(None, found):
        copy.close()


def test_old_copies_stay_where_even_without_them_there_is_no_room(
    cache: DenseCache, tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(CheckpointSource.open(checkpoint), cache)
    ((_, size),) = cache.copies()
    another = CheckpointSource.open(write_small(tmp_path / "5", seed=5))
    small = DenseCache(cache.folder, size * 3 // 2, least_bytes=0)
    usage = namedtuple("usage", "total used free")
    free = dense_cache._SPARE_BYTES - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1 << 41, 1 << 41, free))
    assert small.keep(another) is None
    assert len(cache.copies()) == 1
    free += 1 + (64 << 10)  # with the old copy's bytes it is enough, unless somebody reads it
    with cache.find(CheckpointSource.open(checkpoint)) or pytest.fail("not kept"):
        assert small.keep(another) is None
    assert len(cache.copies()) == 1
    keeper = small.keep(another)
    assert keeper is not None
    keeper.close()
    assert cache.copies() == []


def test_what_another_process_reads_is_not_deleted(cache: DenseCache, checkpoint: Path) -> None:
    source = CheckpointSource.open(checkpoint)
    load(source, cache)
    copy = cache.find(source)
    assert copy is not None
    copy.discard()
    assert len(cache.copies()) == 1
    copy.close()
    copy.discard()
    assert cache.copies() == []


@pytest.mark.parametrize("deletes", [False, True], ids=["found", "deleted"])
def test_what_another_process_has_just_put_there_is_neither_used_unlocked_nor_deleted(
    cache: DenseCache, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, deletes: bool
) -> None:
    """Between opening a copy and locking it, another process may delete it and keep its own."""
    source = CheckpointSource.open(checkpoint)
    load(source, cache)
    ((folder, _),) = cache.copies()
    flock = fcntl.flock

    def late(fd: int, how: int) -> None:
        shutil.copy(folder / DENSE_NAME, folder / "other")
        (folder / "other").replace(folder / DENSE_NAME)
        flock(fd, how)

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", late)
        if deletes:
            dense_cache._delete(folder)
        else:
            assert cache.find(source) is None
    found = cache.find(source)
    assert found is not None
    found.close()


def test_remains_of_a_crash_are_removed(cache: DenseCache, checkpoint: Path) -> None:
    remains = cache.folder / "0.1234.partial"
    remains.mkdir(parents=True)
    (remains / DENSE_NAME).write_bytes(b"GGUF")
    load(CheckpointSource.open(checkpoint), cache)
    assert not remains.exists()


def test_nothing_is_kept_beyond_the_limit_or_without_one(cache: DenseCache, checkpoint: Path) -> None:
    source = CheckpointSource.open(checkpoint)
    for most_bytes in (0, 1000):
        load(source, DenseCache(cache.folder, most_bytes, least_bytes=0))
        assert not cache.folder.exists()
    load(source, cache)
    assert DenseCache(cache.folder, 0).find(source) is None
    assert DenseCache(cache.folder, MOST).keep(source) is None  # too small to be worth it


def test_other_types_and_another_version_have_copies_of_their_own(
    cache: DenseCache, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = CheckpointSource.open(checkpoint)
    load(source, cache)
    from gguf import GGMLQuantizationType

    assert cache.find(CheckpointSource.open(checkpoint, dense=GGMLQuantizationType.BF16)) is None
    monkeypatch.setattr("localrun.__version__", "another")
    assert cache.find(source) is None
    monkeypatch.undo()
    monkeypatch.setattr(dense_cache, "_SPARE_BYTES", 0)
    with cache.find(source) or pytest.fail("not kept"):
        pass
    monkeypatch.setattr(dense_cache, "FORMAT", dense_cache.FORMAT + 1)
    assert cache.find(source) is None


def test_what_a_conversion_writes_has_the_number_of_its_format(checkpoint: Path, tmp_path: Path) -> None:
    """Where this fails, copies that were kept before are out of date: count `FORMAT` up, and enter the new digest."""
    convert(checkpoint, tmp_path / "small", ConversionOptions(keep_experts=True))
    digest = xxhash.xxh3_64_hexdigest((tmp_path / "small" / DENSE_NAME).read_bytes())
    assert (dense_cache.FORMAT, digest) == (1, "7fee55f595877fd3")
