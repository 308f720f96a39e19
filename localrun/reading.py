"""Reads a complete range of a file, or a small file as a whole. Imports only `errors` from the package."""

from __future__ import annotations

from os import preadv
from pathlib import Path
from typing import Final

from localrun.errors import FormatError, StoreError

_MOST_BYTES: Final = 64 << 20
"""Per system call: Linux transfers at most 2 GiB, and interrupts should not have to wait that long."""
READ_HINT: Final = "check the drive (dmesg); if it is fine, download or convert the file again"


def read_fully(
    fd: int, where: Path | str, offset: int, out: memoryview, *, need: int | None = None, hint: str = READ_HINT
) -> None:
    """Fills `out` (bytes) from `offset` on, handling short reads.

    Args:
        where: the file and the part being read, for error messages.
        need: bytes that must exist; the rest of `out` may be past the end of the file, as in aligned reads. None: all.
        hint: for the error.

    Raises:
        StoreError: I/O error, or the file ends before that.
    """
    done, need = 0, len(out) if need is None else need
    while done < need:
        try:
            n = preadv(fd, [out[done : done + _MOST_BYTES]], offset + done)
        except OSError as error:
            raise StoreError(f"{where}: reading {len(out)} bytes at {offset}: {error.strerror}", hint=hint) from error
        if n == 0:
            raise StoreError(f"{where}: the file ended at byte {offset + done}, {need - done} bytes early", hint=hint)
        done += n


def read_small(path: Path, most_bytes: int, kind: str) -> bytes:
    """A file that no valid one of its kind makes larger than `most_bytes`.

    Args:
        kind: what it should be, for the message, such as "a recipe".

    Raises:
        StoreError: can't be read.
        FormatError: larger.
    """
    try:
        with path.open("rb") as file:
            data = file.read(most_bytes + 1)
    except OSError as error:
        raise StoreError(f"{path}: can't be read: {error.strerror or error}") from error
    if len(data) > most_bytes:
        raise FormatError(f"{path}: larger than {most_bytes} bytes: not {kind}")
    return data
