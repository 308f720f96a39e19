"""Files that are not what their name says are refused with what to do."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from localrun.errors import FormatError
from localrun.quant.unfinished import refuse_holes, refuse_unfinished


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("m.gguf.part1of2", "join them in order: cat m.gguf.* > m.gguf"),
        ("m.gguf.partaa", "join them in order: cat m.gguf.* > m.gguf"),
        ("m.gguf-split-b", "join them in order: cat m.gguf.* > m.gguf"),
        ("m.gguf.001", "join them in order: cat m.gguf.* > m.gguf"),
        ("m.gguf.part", "finish it, then give the file's final name"),
        ("m.gguf.crdownload", "finish it, then give the file's final name"),
        ("0123abcd.incomplete", "finish it, then give the file's final name"),
    ],
)
def test_names_tell_pieces_from_downloads(tmp_path: Path, name: str, hint: str) -> None:
    with pytest.raises(FormatError) as caught:
        refuse_unfinished(tmp_path / name)
    assert caught.value.hint == hint
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a Git LFS pointer instead of the file itself"),
        (b"\n <!DOCTYPE html><html>", "a web page instead of a model"),
        (b"<HTML>", "a web page instead of a model"),
    ],
)
def test_first_bytes_tell_pointers_and_pages(tmp_path: Path, head: bytes, message: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(head)
    with pytest.raises(FormatError) as caught:
        refuse_unfinished(path)
    assert str(caught.value) == f"{path}: {message}"


@pytest.mark.parametrize("beside", [".aria2", ".st"])
def test_a_download_program_s_notes_beside_a_file_mean_that_it_is_not_finished(tmp_path: Path, beside: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF")
    refuse_unfinished(path)
    (tmp_path / f"m.gguf{beside}").touch()
    with pytest.raises(FormatError, match=rf"an unfinished download \(m\.gguf\{beside}\)"):
        refuse_unfinished(path)


def test_what_is_missing_is_for_others_to_say(tmp_path: Path) -> None:
    assert refuse_unfinished(tmp_path / "m-00001-of-00002.gguf") is None


def test_a_range_that_was_never_written_is_refused_and_zeros_that_were_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The holes are made up: not every file system tells where they are."""
    path, size, holes = tmp_path / "m.gguf", 1 << 20, [(1 << 18, 1 << 19)]

    def lseek(fd: int, position: int, whence: int) -> int:
        inside = [end for begin, end in holes if begin <= position < end]
        if whence == os.SEEK_DATA:
            return inside[0] if inside else position
        return position if inside else min((begin for begin, _ in holes if begin >= position), default=size)

    monkeypatch.setattr("localrun.quant.unfinished.os.lseek", lseek)
    path.write_bytes(bytes(size))
    with path.open("rb") as file:
        with pytest.raises(FormatError, match=rf"{1 << 18} bytes from {1 << 18} on were never written"):
            refuse_holes(path, file.fileno(), 0, size)
        refuse_holes(path, file.fileno(), 0, 1 << 18)
        refuse_holes(path, file.fileno(), 1 << 19, size)
        holes = [(4096, 4096 + (64 << 10) - 1)]
        refuse_holes(path, file.fileno(), 0, size)
        holes = [(4096, 4096 + (64 << 10))]
        with pytest.raises(FormatError, match=r"65536 bytes from 4096 on"):
            refuse_holes(path, file.fileno(), 0, size)
    path.write_bytes(b"x" * size)
    with path.open("rb") as file:
        refuse_holes(path, file.fileno(), 0, size)
