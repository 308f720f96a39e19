"""Threads share a slice's pieces, and each contender has a rate per number of threads. How fast is not looked at."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from localrun.kernel_cache import cached_cfunc
from localrun.offload.kernels.interleaved.formats import runnable
from localrun.offload.kernels.lowlevel import ROWS, atomic_add
from localrun.offload.kernels.reading import Reading
from tools import bench_streams
from tools.bench_streams import PIECE_ROWS, SLICE, Team


@cached_cfunc(ROWS)
def _count(
    matrix: int, _extra: int, row0: int, n_rows: int, _n_in: int, _panel: int, _nt: int, _out: int, _stride: int
) -> None:
    """Counts the rows of each piece at `matrix`."""
    atomic_add(matrix + row0 // n_rows * 8, n_rows)


@pytest.mark.parametrize("n_threads", [1, 2])
def test_threads_compute_every_piece_once(n_threads: int) -> None:
    counts = np.zeros(7, np.int64)
    record = SLICE.make(
        rows=_count.address, extra=0, matrix=counts.ctypes.data, n_pieces=counts.size, panel=0, out=0, next_piece=0
    )
    team = Team(2)
    for runs in (1, 2):
        assert team.run(record, n_threads) > 0
        np.testing.assert_array_equal(counts, np.full(counts.size, runs * PIECE_ROWS))


def test_a_line_per_type_and_number_of_threads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--types", "Q8_0,Q4_K", "--threads", "1,2", "--rounds", "3", "--memory", "2MiB"]
    monkeypatch.setattr(sys, "argv", ["bench_streams", *arguments])
    bench_streams.main()
    lines = [line.split()[:2] for line in capsys.readouterr().out.splitlines() if line.startswith("Q")]
    assert lines == [["Q8_0", "1"], ["Q8_0", "2"], ["Q4_K", "1"], ["Q4_K", "2"]]


def test_ours_in_every_way_to_read(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--types", "MXFP4", "--threads", "1", "--rounds", "2", "--memory", "2MiB", "--ways"]
    monkeypatch.setattr(sys, "argv", ["bench_streams", *arguments])
    bench_streams.main()
    heading, line = (line for line in capsys.readouterr().out.splitlines() if line.startswith(("our", "MXFP4")))
    assert heading.removeprefix("our way to read here: ") in {way.value for way in Reading}
    assert all(f"   {way.value} " in line for way in Reading) or not runnable(GGMLQuantizationType.MXFP4)
