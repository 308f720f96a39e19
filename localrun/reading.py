"""Reads a complete range of a file. Imports only `errors` from the package."""

from __future__ import annotations

from os import preadv
from pathlib import Path
from typing import Final

from localrun.errors import StoreError

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
