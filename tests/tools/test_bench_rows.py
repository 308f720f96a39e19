"""The contenders compute what they are compared for, and the best of their rounds counts. Their speed is not looked at."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from gguf import GGMLQuantizationType as QT

from tools import bench_rows
from tools.bench_kernels import quantized_rows
from tools.bench_rows import N_IN, best_times, contenders_for


def test_the_best_round_of_each_counts_and_they_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    now, order = 0.0, []
    lasting = {"a": iter([3.0, 1.0, 2.0, 2.0]), "b": iter([5.0, 5.0, 4.0, 4.0])}

    def run(name: str) -> None:
        nonlocal now
        order.append(name)
        now += next(lasting[name])

    monkeypatch.setattr(bench_rows, "time", SimpleNamespace(thread_time=lambda: now))
    assert best_times([lambda: run("a"), lambda: run("b")], rounds=2, repeats=2) == [2.0, 4.0]
    assert "".join(order) == "aabbaabb"


@pytest.mark.parametrize("kind", [QT.Q8_0, QT.Q4_K], ids=lambda kind: kind.name)
def test_every_row_of_the_bytes_that_are_timed_is_multiplied(kind: QT) -> None:
    plain = np.arange(100, dtype=np.int64)
    n_bytes, (ours, theirs, plainly) = contenders_for(kind, 16, plain)
    assert n_bytes == quantized_rows(kind, 16, N_IN).nbytes
    for run in (ours, theirs):
        _, activations_or_panel, out = cast("Any", run).__defaults__[0]
        assert not activations_or_panel.any()
        out[:] = np.nan
        run()
        np.testing.assert_array_equal(out, np.zeros(16), err_msg="activations are zeros")
    plainly()


def test_a_line_per_type(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_rows", "--types", "Q8_0", "--rounds", "1", "--memory", "1MiB"])
    bench_rows.main()
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("Q8_0"))
    assert line.count("%") == 2
