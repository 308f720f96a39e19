"""Files opened past the page cache own their descriptors; `test_converter.py` tests reading and writing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from localrun.errors import StoreError
from localrun.quant.convert.direct_io import DirectReader, DirectWriter


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_closing_twice_closes_no_file_of_others(tmp_path: Path) -> None:
    path = tmp_path / "f"
    for file in (DirectWriter(path, 8192), DirectReader(path, 8192)):
        before = open_files()
        file.close()
        with path.open("rb") as other:  # gets one of the numbers that are free again
            file.close()
            assert len(other.read()) == 8192
        assert open_files() < before


def test_a_file_that_changed_is_refused_and_not_left_open(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(100))
    before = open_files()
    with pytest.raises(StoreError, match="size changed"):
        DirectReader(path, 99)
    assert open_files() == before
