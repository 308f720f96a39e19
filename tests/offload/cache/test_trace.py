"""Routing traces: what goes in comes out, and damage is noticed or survived."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localrun.errors import FormatError, StoreError
from localrun.offload.cache.trace import TraceHeader, TraceRecorder
from tools.simulator.trace_file import Trace

HEADER = TraceHeader("abc", {0: (8, 2), 3: (300, 6)}, 1.5)


def calls(n: int, seed: int = 0) -> list[tuple[int, np.ndarray]]:
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(n):
        layer = int(rng.choice([0, 3]))
        n_experts, n_used = HEADER.layers[layer]
        made.append((layer, rng.integers(0, n_experts, (int(rng.integers(1, 5)), n_used), np.int32)))
    return made


def record(path: Path, made: list[tuple[int, np.ndarray]], **options: int) -> None:
    with TraceRecorder(path, HEADER, **options) as recorder:
        for layer, ids in made:
            recorder.record(layer, ids)


def assert_holds(path: Path, made: list[tuple[int, np.ndarray]]) -> None:
    read = list(Trace(path))
    assert [call.layer for call in read] == [layer for layer, _ in made]
    for call, (_, ids) in zip(read, made, strict=True):
        np.testing.assert_array_equal(call.ids, ids)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(0, 60), seed=st.integers(0, 5), buffer_bytes=st.sampled_from([1, 100, 1 << 20]))
def test_calls_come_back_as_recorded(
    tmp_path_factory: pytest.TempPathFactory, n: int, seed: int, buffer_bytes: int
) -> None:
    path = tmp_path_factory.mktemp("trace") / "t"
    made = calls(n, seed)
    record(path, made, buffer_bytes=buffer_bytes)
    assert_holds(path, made)
    assert Trace(path).header == HEADER


def test_strided_ids_are_copied_before_the_caller_reuses_them(tmp_path: Path) -> None:
    memory = np.array([[0, 1, 2, 3], [4, 5, 6, 7]], np.int32)
    with TraceRecorder(tmp_path / "t", HEADER) as recorder:
        recorder.record(0, memory[:, 1::2])
        memory[:] = 0
    assert_holds(tmp_path / "t", [(0, np.array([[1, 3], [5, 7]]))])


def test_scores_of_the_last_tokens_come_back_with_their_calls(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 300, (5, 6))
    scores = rng.standard_normal((2, 300)).astype(np.float16)
    with TraceRecorder(tmp_path / "t", HEADER) as recorder:
        recorder.record(3, ids, scores)
        recorder.record(0, ids[:, :2] % 8)
    scored, plain = Trace(tmp_path / "t")
    np.testing.assert_array_equal(scored.ids, ids)
    np.testing.assert_array_equal(scored.scores, scores)
    assert plain.scores is None


def test_more_scored_tokens_than_tokens_are_refused(tmp_path: Path) -> None:
    with TraceRecorder(tmp_path / "t", HEADER) as recorder:
        recorder.record(0, np.zeros((1, 2), np.int32), np.zeros((2, 8)))
    with pytest.raises(FormatError, match="1 x 2 ids"):
        list(Trace(tmp_path / "t"))


def test_recording_goes_on_in_the_same_file(tmp_path: Path) -> None:
    first, second = calls(20, 1), calls(30, 2)
    record(tmp_path / "t", first)
    record(tmp_path / "t", second)
    assert_holds(tmp_path / "t", first + second)


def test_block_cut_off_by_a_crash_is_left_out_and_overwritten(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, first, second, third = tmp_path / "t", calls(20, 1), calls(20, 2), calls(20, 3)
    record(path, first)
    whole = path.stat().st_size
    record(path, second)
    for size in (whole + 3, path.stat().st_size - 1):
        with path.open("r+b") as file:
            file.truncate(size)
        with caplog.at_level(logging.WARNING):
            assert_holds(path, first)
        assert "incomplete" in caplog.text
        record(path, third)
        assert_holds(path, first + third)
        with path.open("r+b") as file:
            file.truncate(whole)
        record(path, second)


def test_every_flipped_byte_behind_the_header_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "t"
    record(path, calls(4))
    good = path.read_bytes()
    header_end = 12 + int.from_bytes(good[8:12], "little")
    for at in range(header_end + 4, len(good)):  # behind the length: a longer block looks like a crash's
        path.write_bytes(good[:at] + bytes([good[at] ^ 0x10]) + good[at + 1 :])
        with pytest.raises(FormatError, match="damaged"):
            list(Trace(path))


@pytest.mark.parametrize(
    "content", [b"", b"LRTRACE2", b"LRTRACE2\x02\0\0\0{}", b"LRTRACE2\x05\0\0\0[1,2]", b"GGUF" * 9]
)
def test_other_files_are_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other.bin"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=r"other\.bin"):
        Trace(path)


def test_ids_beyond_the_layer_are_refused(tmp_path: Path) -> None:
    record(tmp_path / "t", [(0, np.array([[1, 8]], np.int32))])
    with pytest.raises(FormatError, match="expert 8 of layer 0"):
        list(Trace(tmp_path / "t"))


def test_trace_of_another_model_is_not_continued(tmp_path: Path) -> None:
    record(tmp_path / "t", calls(3))
    before = (tmp_path / "t").read_bytes()
    with pytest.raises(FormatError, match="another model"):
        TraceRecorder(tmp_path / "t", TraceHeader("other", HEADER.layers, 0.0))
    assert (tmp_path / "t").read_bytes() == before


def test_size_limit_ends_the_recording_and_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = calls(200)
    with TraceRecorder(tmp_path / "t", HEADER, buffer_bytes=64, max_bytes=2000) as recorder:
        for layer, ids in made:
            recorder.record(layer, ids)
        assert not recorder.recording
    assert (tmp_path / "t").stat().st_size <= 2000
    n_kept = len(list(Trace(tmp_path / "t")))
    assert 0 < n_kept < 200
    assert_holds(tmp_path / "t", made[:n_kept])
    assert "ends here" in caplog.text


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_ends_the_recording_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recorder = TraceRecorder(tmp_path / "t", HEADER, buffer_bytes=1)
    assert recorder._file is not None
    recorder._file.close()
    recorder._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115 (closed by the recorder)
    recorder.record(*calls(1)[0])
    assert not recorder.recording
    assert os.strerror(errno.ENOSPC) in caplog.text
    recorder.record(*calls(1)[0])
    recorder.close()


def test_missing_folder_is_an_error_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="nowhere") as caught:
        TraceRecorder(tmp_path / "nowhere" / "t", HEADER)
    assert caught.value.hint
