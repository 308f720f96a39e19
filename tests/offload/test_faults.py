"""Faults in the middle of an answer: the cause is named, the cache keeps no half-filled slot, and the model goes on."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from localrun import reading
from localrun.errors import CheckpointError, ChecksumError, FormatError, StoreError
from localrun.offload.cache.slots import SlotState
from localrun.offload.cache.store import ExpertStore, _read_from
from localrun.offload.cache.tickets import ReadPiece
from localrun.offload.model import OffloadedModel, OffloadOptions, open_offloaded
from localrun.quant.convert.converter import convert
from localrun.quant.open import open_model
from tests.checkpoints import write_small
from tests.offload.models import F32, TOKENS, floor_ram, logits, write_model
from tests.offload.stores import early_reads_through_python
from tools.make_moe_gguf import MoeDims, write_moe_gguf

TEXT = TOKENS[:40]


@contextmanager
def opened(path: Path) -> Iterator[OffloadedModel]:
    """A model whose RAM holds one layer's experts, so that every call reads."""
    source = open_model(path)
    with open_offloaded(source, OffloadOptions(n_threads=2)) as probe:
        floor = floor_ram(probe)
    with open_offloaded(source, OffloadOptions(ram_bytes=floor, n_threads=2)) as model:
        early_reads_through_python(model.pool.residency.store)
        yield model


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For tests that leave the file as it is."""
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(path: Path) -> Iterator[OffloadedModel]:
    with opened(path) as model:
        yield model


@pytest.fixture(scope="module")
def expected(model: OffloadedModel) -> F32:
    return logits(model, TEXT, batch=5)


@pytest.fixture
def own(tmp_path: Path) -> Iterator[OffloadedModel]:
    """For tests that don't."""
    with opened(write_model(tmp_path)) as model:
        yield model


class FailingReads:
    """`os.preadv` that does as told at the n-th call, and where that one read from then on; real otherwise."""

    def __init__(self, at: int, what: Callable[..., int]) -> None:
        self.calls, self._at, self._what = 0, at, what
        self._place: tuple[int, int] | None = None

    def __call__(self, fd: int, buffers: list[Any], offset: int) -> int:
        self.calls += 1
        if self.calls == self._at:
            self._place = fd, offset
        return self._what(fd, buffers, offset) if (fd, offset) == self._place else os.preadv(fd, buffers, offset)


def io_error(fd: int, buffers: list[Any], offset: int) -> int:
    raise OSError(errno.EIO, "Input/output error")


def end_of_file(fd: int, buffers: list[Any], offset: int) -> int:
    return 0


@pytest.mark.parametrize("at", [1, 5, 40])
@pytest.mark.parametrize(
    ("what", "message"), [(io_error, "Input/output error"), (end_of_file, "the file ended at byte")]
)
def test_failed_read_ends_the_answer_and_leaves_a_clean_cache(
    model: OffloadedModel,
    expected: F32,
    monkeypatch: pytest.MonkeyPatch,
    what: Callable[..., int],
    message: str,
    at: int,
) -> None:
    reads = FailingReads(at, what)
    with monkeypatch.context() as patch:
        patch.setattr(reading, "preadv", reads)
        with pytest.raises(StoreError, match=message) as caught:
            logits(model, TEXT, batch=5)
    assert "model.gguf" in str(caught.value)
    assert caught.value.hint is not None
    model.pool.residency.check()
    assert all(slot.state is SlotState.READY and slot.pins == 0 for slot in model.pool.residency.table)
    np.testing.assert_array_equal(logits(model, TEXT, batch=5), expected)


def test_short_reads_are_continued(model: OffloadedModel, expected: F32, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(fd: int, buffers: list[Any], offset: int) -> int:
        size = max(4096, len(buffers[0]) // 2 // 4096 * 4096)
        return os.preadv(fd, [buffers[0][:size]], offset)

    monkeypatch.setattr(reading, "preadv", half)
    np.testing.assert_array_equal(logits(model, TEXT, batch=5), expected)


def test_file_cut_off_while_open_is_a_clear_error(own: OffloadedModel) -> None:
    path = own.source.files[0]
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(StoreError, match="the file ended at byte"):
        logits(own)


def test_vanished_file_does_not_disturb_an_open_model(own: OffloadedModel, expected: F32) -> None:
    own.source.files[0].unlink()
    np.testing.assert_array_equal(logits(own, TEXT, batch=5), expected)


def test_damaged_expert_is_found_by_its_checksum_on_first_read(path: Path) -> None:
    source = open_model(path)
    real = source.base_expert

    def wrong(layer: int, expert: int) -> Any:
        gate, up, down = real(layer, expert)
        return gate, replace(up, checksum="0" * 16), down

    source.base_expert = wrong  # type: ignore[method-assign]
    with (
        open_offloaded(source, OffloadOptions(n_threads=2)) as model,
        pytest.raises(ChecksumError, match=r"ffn_up_exps\.weight: expert \d+ does not match its checksum"),
    ):
        logits(model)


def test_missing_file_is_reported_at_load(tmp_path: Path) -> None:
    source = open_model(write_model(tmp_path))
    source.files[0].unlink()
    with pytest.raises(StoreError, match="No such file"):
        open_offloaded(source, OffloadOptions(n_threads=2))


def test_mirror_gives_the_same_answers_and_takes_over_when_a_copy_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    path = write_model(tmp_path / "a")
    copy = tmp_path / "b" / path.name
    copy.write_bytes(path.read_bytes())
    source = open_model(path)
    with open_offloaded(source, OffloadOptions(n_threads=2)) as model:
        expected = logits(model)
    used: set[str] = set()

    def noting(fd: int, buffers: list[Any], offset: int) -> int:
        used.add(os.readlink(f"/proc/self/fd/{fd}"))
        return os.preadv(fd, buffers, offset)

    with open_offloaded(source, OffloadOptions(n_threads=2, mirror=copy)) as model, monkeypatch.context() as patch:
        patch.setattr(reading, "preadv", noting)
        np.testing.assert_array_equal(logits(model), expected)
    assert used == {str(path), str(copy)}
    with open_offloaded(source, OffloadOptions(n_threads=2, mirror=copy)) as model:
        os.truncate(copy, 4096)
        np.testing.assert_array_equal(logits(model), expected)


def read_up_from(model: OffloadedModel, which: int, *, all_of_it: bool) -> None:
    """From now on the pieces of `up` come from this copy, however busy it is.

    Args:
        all_of_it: and so do the others; if not, they come from the other copy.
    """
    store = model.pool.residency.store
    assert isinstance(store, ExpertStore)

    def read(piece: ReadPiece) -> None:
        up = piece.ticket.projections[1].extents[0]
        is_near = up.offset < piece.offset + len(piece.target) and piece.offset < up.offset + up.n_bytes
        copy = which if (piece.file == up.file and is_near) or all_of_it else 1 - which
        _read_from(store._files[piece.file][copy], piece)
        with piece.ticket._lock:
            piece.ticket._copies.add(copy)

    store._read = read  # type: ignore[method-assign]


@pytest.mark.parametrize("all_of_it", [True, False], ids=["from one", "from both"])
@pytest.mark.parametrize("broken", ["checksum", "zeros"])
@pytest.mark.parametrize("which", [0, 1])
def test_a_damaged_copy_is_named_and_the_other_one_is_read(
    tmp_path: Path, broken: str, which: int, all_of_it: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Zeros in a file without checksums, and other bytes in one with them; then in both copies."""
    paths = [tmp_path / name / "m.gguf" for name in "ab"]
    for path in paths:
        path.parent.mkdir()
    if broken == "zeros":
        write_moe_gguf(paths[0], "olmoe", MoeDims(n_layers=1, n_embd=512, n_ff=512, n_experts=4))
        models = paths
    else:
        small = write_small(tmp_path / "source", n_routed_experts=16, num_experts_per_tok=3)
        convert(small, tmp_path / "a" / "model", jobs=1)
        shutil.copytree(tmp_path / "a" / "model", tmp_path / "b" / "model")
        models = [path.parent / "model" for path in paths]
    if broken == "zeros":
        paths[1].write_bytes(paths[0].read_bytes())
    source = open_model(models[0])
    layer = min(source.moe_layers)
    tokens = list(range(2, 14))
    with open_offloaded(source, OffloadOptions(n_threads=1)) as model:
        expected = logits(model, tokens, batch=12)

    def damage(files: Sequence[Path]) -> None:
        for expert in range(source.moe_layers[layer].n_experts):
            extent = source.base_expert(layer, expert)[1].extents[0]
            with files[extent.file].open("r+b") as file:
                file.seek(extent.offset + extent.n_bytes // 8 + 7)  # in the middle of a row
                file.write(bytes(extent.n_bytes // 2))

    files = [source.files, open_model(models[1]).files]
    mirrored = OffloadOptions(n_threads=1, mirror=models[1])
    with open_offloaded(source, mirrored) as model, open_offloaded(source, mirrored) as later:
        damage(files[which])
        read_up_from(model, which, all_of_it=all_of_it)
        np.testing.assert_array_equal(logits(model, tokens, batch=12), expected)
        damage(files[1 - which])
        with pytest.raises((ChecksumError, FormatError), match=r"ffn_up_exps\.weight: expert \d+"):
            logits(later, tokens, batch=12)
    named = [record.getMessage() for record in caplog.records if "the other copy was read" in record.getMessage()]
    assert named
    assert all(message.startswith(tuple(f"{path}: blk." for path in files[which])) for message in named)


def test_mirror_of_another_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    other = write_model(tmp_path / "b", seed=9)
    with pytest.raises(FormatError, match="not a copy"):
        open_offloaded(open_model(write_model(tmp_path / "a")), OffloadOptions(n_threads=2, mirror=other))


@pytest.mark.parametrize("kind", [CheckpointError, OSError])
def test_an_expert_that_cannot_even_be_described_ends_the_answer_only(path: Path, kind: type[Exception]) -> None:
    """Recipes of official checkpoints are checked when they are used; an error there must reach whoever waits."""
    source = open_model(path)
    real, broken = source.base_expert, True

    def refuse(layer: int, expert: int) -> Any:
        if broken and (layer, expert) == (1, 3):
            raise kind("no such recipe")
        return real(layer, expert)

    source.base_expert = refuse  # type: ignore[method-assign]
    with open_offloaded(source, OffloadOptions(n_threads=2)) as model:
        with pytest.raises(kind, match="no such recipe"):
            logits(model)
        model.pool.residency.check()
        assert all(slot.pins == 0 for slot in model.pool.residency.table)
        broken = False
        assert np.isfinite(logits(model)).all()


def test_wrong_bytes_are_found_at_any_read_not_at_an_expert_s_first_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(write_small(tmp_path / "source", n_routed_experts=16, num_experts_per_tok=3), tmp_path / "model", jobs=1)
    source = open_model(tmp_path / "model")
    with open_offloaded(source, OffloadOptions(n_threads=1)) as probe:
        floor = floor_ram(probe)

    def wrong(fd: int, buffers: list[Any], offset: int) -> int:
        done = os.preadv(fd, buffers, offset)
        buffers[0][:done] = bytes(byte ^ 1 for byte in buffers[0][:done])
        return done

    tokens = list(range(2, 14))
    with open_offloaded(source, OffloadOptions(ram_bytes=floor, n_threads=1)) as model:
        expected = logits(model, tokens, batch=12)
        early_reads_through_python(model.pool.residency.store)
        with monkeypatch.context() as patch:
            patch.setattr(reading, "preadv", wrong)
            with pytest.raises(ChecksumError, match="does not match its checksum"):
                logits(model, tokens, batch=12)
        np.testing.assert_array_equal(logits(model, tokens, batch=12), expected)
