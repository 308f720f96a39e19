"""The drive probe: measured where it can be, remembered per drive, never in the way."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from localrun.offload.cache import drive_probe as probe
from localrun.offload.cache.drive_probe import (
    DEFAULT_PIECE_BYTES,
    DEFAULT_READS,
    READS,
    DiskProfile,
    probe_disk,
    probe_memory,
)


@pytest.fixture
def memory(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "disks.json"


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small file that counts as large, for a quick probe of small pieces."""
    monkeypatch.setattr(probe, "MIN_FILE_BYTES", 1 << 20)
    monkeypatch.setattr(probe, "PIECES", (1 << 13, 1 << 14, 1 << 15))
    monkeypatch.setattr(probe, "_RUN_S", 0.005)
    monkeypatch.setattr(probe, "_crowded", lambda: False)
    path = tmp_path / "model.gguf"
    path.write_bytes(os.urandom(1 << 20))
    return path


def test_measured_profile_is_one_of_the_combinations_and_has_a_rate(model: Path, memory: Path) -> None:
    before = time.time()
    profile = probe_disk([model], memory=memory)
    assert before - 1 <= profile.measured_at <= time.time() + 1  # rounded, perhaps
    assert profile.measured
    assert profile.n_reads in READS
    assert profile.piece_bytes in probe.PIECES
    assert f"{profile.n_reads} x {profile.piece_bytes >> 10}" in profile.tried
    assert 0 < profile.slowest_bytes_per_s <= (profile.bytes_per_s or 0.0) <= profile.fastest_bytes_per_s


def test_same_drive_is_measured_once(model: Path, memory: Path) -> None:
    first = probe_disk([model], memory=memory)
    other = model.with_name("other.gguf")
    other.write_bytes(b"x" * 5000)
    assert probe_disk([other], memory=memory) == first
    assert probe_disk([model.parent], memory=memory) == first  # a folder stands for its files


def test_old_profiles_and_refresh_measure_again(model: Path, memory: Path) -> None:
    first = probe_disk([model], memory=memory)
    second = probe_disk([model], memory=memory, refresh=True)
    assert second.measured_at > first.measured_at
    third = probe_disk([model], memory=memory, max_age_s=0)
    assert third.measured_at > second.measured_at
    assert probe_disk([model], memory=memory) == third


class Runs:
    """A drive whose runs take what is told, in turns; then 1 GB/s."""

    def __init__(self, *rates: float) -> None:
        self._rates = list(rates)

    def __call__(self, files: object, n_reads: int, piece_bytes: int) -> float:
        return self._rates.pop(0) if self._rates else 1e9


def test_what_lasts_decides_not_a_bad_moment(model: Path, memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers of reads 4, 8, 16, then smaller pieces with the best number, then the best two, in turns."""
    rates = (0.13e9, 1.28e9, 1.2e9, 0.7e9, 0.7e9, 1.5e9, 1.2e9, 1.7e9, 1.1e9)
    monkeypatch.setattr(probe, "_measured_bytes_per_s", Runs(*rates))
    profile = probe_disk([model], memory=memory)
    assert (profile.n_reads, profile.piece_bytes, profile.bytes_per_s) == (8, probe.PIECES[-1], 1.35e9)
    assert (profile.slowest_bytes_per_s, profile.fastest_bytes_per_s) == (1.1e9, 1.7e9)
    assert profile.spread == pytest.approx((1.1 / 1.35, 1.7 / 1.35))
    assert DiskProfile().spread == (1.0, 1.0)
    assert not profile.unsteady


def test_a_burst_is_no_rate(model: Path, memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """2.5 GB/s for a second, then 1.5."""
    monkeypatch.setattr(probe, "_measured_bytes_per_s", Runs(2.5e9, 2.5e9, 2.4e9, 1.5e9, 1.5e9, *[1.5e9] * 4))
    assert probe_disk([model], memory=memory).bytes_per_s == 1.5e9


def test_the_luck_of_one_combination_is_no_rate(model: Path, memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded on a virtual drive that gave 0.89 GB/s in the next seconds: the best combination's own runs say 1.4."""
    rates = (1.32e9, 0.92e9, 1.16e9, 0.75e9, 0.91e9, 0.96e9, 1.09e9, 0.90e9, 1.71e9)
    monkeypatch.setattr(probe, "_measured_bytes_per_s", Runs(*rates))
    profile = probe_disk([model], memory=memory)
    assert (profile.n_reads, profile.bytes_per_s) == (16, pytest.approx(0.96e9))
    assert (profile.slowest_bytes_per_s, profile.fastest_bytes_per_s) == (0.90e9, 1.71e9)


def test_combinations_that_are_clearly_slower_do_not_count(
    model: Path, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = (1.2e9, 1.8e9, 1.75e9, 0.7e9, 0.8e9, 1.8e9, 1.7e9, 1.9e9, 1.7e9)
    monkeypatch.setattr(probe, "_measured_bytes_per_s", Runs(*rates))
    assert probe_disk([model], memory=memory).bytes_per_s == pytest.approx(1.75e9)


def test_the_number_of_runs_is_bounded(model: Path, memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    n_runs = 0

    def count(*args: object) -> float:
        nonlocal n_runs
        n_runs += 1
        return 1e9 * n_runs

    monkeypatch.setattr(probe, "_measured_bytes_per_s", count)
    probe_disk([model], memory=memory)
    assert n_runs == 9


def test_later_measurements_count_as_much_as_all_before(
    model: Path, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "_measured_bytes_per_s", Runs(*[2e9] * 9))
    probe_disk([model], memory=memory)
    rates = [probe_disk([model], memory=memory, refresh=True).bytes_per_s or 0.0 for _ in range(8)]
    assert rates[:2] == [pytest.approx(1.5e9), pytest.approx(1.25e9)]
    assert rates[-1] == pytest.approx(1e9, rel=0.01)


def test_an_unsteady_measurement_is_repeated_soon_and_then_forgotten(
    model: Path, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "_measured_bytes_per_s", Runs(*[0.5e9] * 5, 0.2e9, 0.2e9, 0.7e9, 0.7e9))
    first = probe_disk([model], memory=memory)
    assert first.unsteady
    assert first.max_age_s == probe.UNSTEADY_AGE_S
    long_ago = json.loads(memory.read_text())
    long_ago["drives"][first.device]["measured_at"] -= probe.UNSTEADY_AGE_S
    memory.write_text(json.dumps(long_ago))
    monkeypatch.setattr(probe, "_measured_bytes_per_s", Runs(*[1.4e9] * 9))
    again = probe_disk([model], memory=memory)
    assert (again.bytes_per_s, again.unsteady) == (1.4e9, False)


def test_a_measurement_on_crowded_cores_is_repeated_soon(
    model: Path, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "_measured_bytes_per_s", Runs(*[0.9e9] * 9))
    monkeypatch.setattr(probe, "_crowded", lambda: True)
    assert probe_disk([model], memory=memory).max_age_s == probe.UNSTEADY_AGE_S
    monkeypatch.setattr(probe, "_crowded", lambda: False)
    monkeypatch.setattr(probe, "_measured_bytes_per_s", Runs(*[1.8e9] * 9))
    again = probe_disk([model], memory=memory, refresh=True)
    assert (again.bytes_per_s, again.max_age_s) == (1.8e9, probe.MAX_AGE_S)


def test_small_files_give_defaults_and_nothing_is_remembered(tmp_path: Path, memory: Path) -> None:
    (tmp_path / "demo.gguf").write_bytes(bytes(1 << 20))
    profile = probe_disk([tmp_path / "demo.gguf"], memory=memory)
    assert (profile.measured, profile.n_reads, profile.piece_bytes) == (False, DEFAULT_READS, DEFAULT_PIECE_BYTES)
    assert not memory.exists()


def test_files_that_are_not_there_give_defaults(tmp_path: Path, memory: Path) -> None:
    assert probe_disk([tmp_path / "gone.gguf"], memory=memory) == DiskProfile()
    assert probe_disk([], memory=memory) == DiskProfile()


def test_a_file_that_cannot_be_opened_leaves_no_other_open(
    model: Path, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = model.with_name("other.gguf")
    shutil.copy(model, other)
    opened: list[int] = []
    original = os.open

    def refusing(path: Any, *args: Any, **kwargs: Any) -> int:
        if path == other:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        fd = original(path, *args, **kwargs)
        if path == model:
            opened.append(fd)
        return fd

    monkeypatch.setattr(os, "open", refusing)
    assert not probe_disk([model, other], memory=memory).measured
    assert opened
    for fd in opened:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


def test_file_on_which_reads_fail_gives_defaults_and_a_warning(
    model: Path, memory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: object) -> int:
        raise OSError(5, os.strerror(5))

    monkeypatch.setattr(probe._Files, "read", fail)
    assert not probe_disk([model], memory=memory).measured
    assert "could not measure the drive" in caplog.text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        "[]",
        '{"version": 99, "drives": {}}',
        '{"version": VERSION, "drives": {"DEVICE": {"n_reads": "many"}}}',
        '{"version": VERSION, "drives": {"DEVICE": {"n_reads": 0, "piece_bytes": 4096, "bytes_per_s": 1.0, "measured_at": 1}}}',
        '{"version": VERSION, "drives": {"DEVICE": {"n_reads": 4, "piece_bytes": 4097, "bytes_per_s": 1.0, "measured_at": 1}}}',
        '{"version": VERSION, "drives": {"DEVICE": {"bytes_per_s": 1.0, "measured_at": 1, "tried": {"many": 1.0}}}}',
        '{"version": VERSION, "drives": {"DEVICE": 7}}',
    ],
)
def test_damaged_memory_is_a_warning_and_is_written_anew(
    model: Path, memory: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    memory.parent.mkdir()
    device = probe.device_name(model.stat().st_dev)
    memory.write_text(text.replace("DEVICE", device).replace("VERSION", str(probe._VERSION)))
    with caplog.at_level(logging.WARNING):
        profile = probe_disk([model], memory=memory)
    assert profile.measured
    assert str(memory) in caplog.text
    caplog.clear()
    assert probe_disk([model], memory=memory) == profile
    assert not caplog.records


def test_drives_are_remembered_side_by_side(model: Path, memory: Path) -> None:
    memory.parent.mkdir()
    other = {"n_reads": 4, "piece_bytes": 4096, "bytes_per_s": 1.0, "measured_at": 1.0, "device": "9:9 xfs /dev/x"}
    memory.write_text(json.dumps({"version": probe._VERSION, "drives": {"9:9 xfs /dev/x": other}}))
    profile = probe_disk([model], memory=memory)
    drives = json.loads(memory.read_text())["drives"]
    assert set(drives) == {"9:9 xfs /dev/x", profile.device}


def test_unwritable_cache_is_a_warning(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    assert probe_disk([model], memory=tmp_path / "file" / "disks.json").measured
    assert "could not save the drive profile" in caplog.text


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="needs O_DIRECT")
def test_file_system_without_direct_reads_is_measured_through_the_cache(
    model: Path, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "preadv", _refuse_direct(probe.preadv))  # type: ignore[attr-defined]
    profile = probe_disk([model], memory=memory)
    assert profile.measured
    assert not profile.direct


def _refuse_direct(real: Callable[..., int]) -> Callable[..., int]:
    """A file system such as older tmpfs: opens with O_DIRECT, then refuses to read."""
    import fcntl

    def preadv(fd: int, buffers: list[object], offset: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return int(real(fd, buffers, offset))

    return preadv


def test_the_memory_probe_tells_bytes_per_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes on 10 ms whenever it is looked at: a pass over everything lasts that long."""
    looks = itertools.count()
    monkeypatch.setattr(probe, "time", SimpleNamespace(perf_counter=lambda: next(looks) * 0.01))
    assert probe_memory(1, buffer_bytes=8 << 20) == pytest.approx((8 << 20) / 0.01)
