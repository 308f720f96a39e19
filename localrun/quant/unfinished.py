"""Detects files that are not what their name says: unfinished downloads, pointers, web pages, pieces of a split file.

Knows nothing about formats beyond their first bytes. The file system tells which ranges of a file were never written: space
reserved by download programs reads as zeros, and a model of zeros would load and produce nonsense.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from localrun.errors import FormatError

_UNFINISHED = (".incomplete", ".part", ".partial", ".crdownload", ".download", ".aria2", ".tmp", ".!qB")
_LFS = b"version https://git-lfs.github.com/spec/"
_PIECE = re.compile(
    r"""(?P<whole>.+\.gguf)
        (?:\.part[-_.]?[0-9a-z]{1,4}(?:of[0-9]+)?   # .part1of2, .part00, .partaa
          |[-_.]split[-_.]?[0-9a-z]{1,4}
          |\.[0-9]{1,4})""",
    re.VERBOSE | re.IGNORECASE,
)
_HOLE_BYTES = 64 << 10
"""Programs that copy files make holes of shorter runs of zeros too; a matrix has no such run."""
_PROBE_BYTES = 4096


def refuse_unfinished(path: Path) -> None:
    """Raises FormatError if `path` is recognisably a piece, a pointer, a page or a download that never ended."""
    name = path.name
    if (piece := _PIECE.fullmatch(name)) is not None:
        whole = piece["whole"]
        raise FormatError(
            f"{path}: one piece of {whole}, which was split into pieces",
            hint=f"join them in order: cat {whole}.* > {whole}",
        )
    if name.endswith(_UNFINISHED):
        raise FormatError(f"{path}: an unfinished download", hint="finish it, then give the file's final name")
    for beside in (path.with_name(name + ".aria2"), path.with_name(name + ".st")):
        if beside.is_file():
            raise FormatError(f"{path}: an unfinished download ({beside.name})", hint="finish the download")
    try:
        with path.open("rb") as file:
            head = file.read(256)
    except OSError:
        return  # opening it reports the problem
    if head.startswith(_LFS):
        raise FormatError(
            f"{path}: a Git LFS pointer instead of the file itself", hint="run 'git lfs pull' in that folder"
        )
    if head.lstrip()[:15].lower().startswith((b"<!doctype html", b"<html")):
        raise FormatError(f"{path}: a web page instead of a model", hint="download the file itself, not its page")


def refuse_holes(path: Path, fd: int, start: int, end: int) -> None:
    """Raises FormatError if a part of the bytes from `start` to `end` was never written."""
    for offset, n_bytes in _holes(fd, start, end):
        if n_bytes >= _HOLE_BYTES and not any(os.pread(fd, _PROBE_BYTES, offset)):
            raise FormatError(
                f"{path}: {n_bytes} bytes from {offset} on were never written and read as zeros",
                hint="the download is incomplete: finish it",
            )


def _holes(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """(offset, size) of ranges without data; none where the file system can't tell."""
    position = start
    while position < end:
        try:
            hole = os.lseek(fd, position, os.SEEK_HOLE)
            if hole >= end:
                return
            try:
                data = min(end, os.lseek(fd, hole, os.SEEK_DATA))
            except OSError as error:
                if error.errno != errno.ENXIO:
                    return
                data = end  # nothing but a hole up to the end of the file
        except OSError:
            return
        yield hole, data - hole
        position = data
