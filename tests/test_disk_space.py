"""The disk is asked before a long job writes to it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from localrun.disk_space import check_free
from localrun.errors import DiskSpaceError


def test_the_message_names_what_is_missing_and_both_ways_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def usage(path: Path) -> shutil._ntuple_diskusage:
        asked.append(path)
        return shutil._ntuple_diskusage(10**6, 10**6 - 1024, 1024)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    target = tmp_path / "not" / "there yet"
    check_free(target, 1024, otherwise="ask for less")
    with pytest.raises(DiskSpaceError) as refused:
        check_free(target, 3072, what="splitting", otherwise="ask for less")
    assert str(refused.value) == f"{target}: splitting needs 3.00 KiB, the disk has 1.00 KiB free"
    assert refused.value.hint == "free 2.00 KiB, or ask for less"
    assert asked == [tmp_path, tmp_path], "the folder that will hold it"
