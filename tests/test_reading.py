"""Reading ranges of files, however little the system gives at a time."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from localrun import reading
from localrun.errors import StoreError
from localrun.reading import read_fully

CONTENT = bytes(range(200))


@pytest.fixture
def fd(tmp_path: Path) -> Any:
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    with path.open("rb") as file:
        yield file.fileno()


def test_short_reads_are_continued(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "preadv", lambda fd, buffers, offset: os.preadv(fd, [buffers[0][:7]], offset))
    out = bytearray(100)
    read_fully(fd, "file", 33, memoryview(out))
    assert out == CONTENT[33:133]


def test_the_end_of_the_file_says_where_it_came_and_how_much_is_missing(fd: int) -> None:
    with pytest.raises(StoreError, match=r"^file: norm: the file ended at byte 200, 30 bytes early$") as caught:
        read_fully(fd, "file: norm", 150, memoryview(bytearray(80)), hint="copy it again")
    assert caught.value.hint == "copy it again"


def test_what_an_aligned_read_has_beyond_its_need_may_lie_past_the_end(fd: int) -> None:
    out = bytearray(128)
    read_fully(fd, "file", 128, memoryview(out), need=72)
    assert out == CONTENT[128:] + bytes(56)


def test_an_io_error_names_the_range(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_args: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(reading, "preadv", broken)
    with pytest.raises(StoreError, match=r"^file: reading 10 bytes at 5: Input/output error$"):
        read_fully(fd, "file", 5, memoryview(bytearray(10)))
