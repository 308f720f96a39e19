"""Files that appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from localrun.atomic import replacing
from localrun.errors import ChecksumError, DiskSpaceError, FormatError, HostError, LocalrunError, StoreError


def test_the_old_file_is_there_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.write_bytes(b"old")
    with replacing(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_secret_is_never_readable_by_others(tmp_path: Path) -> None:
    path = tmp_path / "key"
    with replacing(path, mode=0o600) as file:
        (partial,) = tmp_path.iterdir()
        assert partial.stat().st_mode & 0o777 == 0o600
        file.write(b"key")
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_block_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.write_bytes(b"old")

    def fail() -> None:
        with replacing(path) as file:
            file.write(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_not_there_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="state: can't be written"), replacing(tmp_path / "missing" / "state"):
        pass


def test_name_that_can_not_be_written_is_the_error_that_is_told(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="can't be written: File name too long"), replacing(tmp_path / ("x" * 300)):
        pass


@pytest.mark.parametrize("kind", [StoreError, ChecksumError, DiskSpaceError, HostError, FormatError])
def test_error_of_the_block_keeps_its_class_and_hint(tmp_path: Path, kind: type[LocalrunError]) -> None:
    path = tmp_path / "state"

    def fail() -> None:
        with replacing(path):
            raise kind("2 GiB are missing", hint="make room")

    with pytest.raises(LocalrunError) as caught:
        fail()
    assert (type(caught.value), str(caught.value), caught.value.hint) == (kind, "2 GiB are missing", "make room")
    assert list(tmp_path.iterdir()) == []
