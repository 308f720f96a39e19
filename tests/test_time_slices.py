"""Time slices: what is asked for is what the system reports, for present and later threads, and nothing else changes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from localrun import time_slices

_SCRIPT = """
import os, threading
from localrun import time_slices

os.nice(3)
before = time_slices.slice_ns()
granted = time_slices.shorten()
later = []
thread = threading.Thread(target=lambda: later.append(time_slices.slice_ns()))
thread.start()
thread.join()
print(int(granted), before, time_slices.slice_ns(), later[0], os.nice(0), time_slices.SLICE_NS)
"""


def test_threads_get_what_the_system_grants_and_keep_their_priority() -> None:
    done = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True, check=True)
    granted, before, now, later, nice, wanted = map(int, done.stdout.split())
    assert now == later == (wanted if granted else before)
    assert nice == min(19, os.nice(0) + 3)


def test_a_thread_that_does_not_exist_has_no_slice() -> None:
    assert time_slices.slice_ns(2**22 + 1) == 0


def test_without_proc_nothing_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = time_slices.slice_ns()
    monkeypatch.setattr(time_slices, "_THREADS", str(tmp_path / "task"))
    assert not time_slices.shorten()
    assert time_slices.slice_ns() == before
