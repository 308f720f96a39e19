"""Atomic file writes: a file appears complete or not at all."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from localrun.errors import LocalrunError, StoreError


@contextmanager
def replacing(path: Path, *, mode: int = 0o666) -> Iterator[IO[bytes]]:
    """Opens a binary file that replaces `path`, durably, when the block ends without an error.

    Until then it is called `NAME.<random>.partial`, and it is deleted if the block fails.

    Args:
        mode: the new file's permissions, before the umask.

    Raises:
        StoreError: it can't be written; the old `path` is unchanged.
    """
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with open(partial, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # otherwise a power cut may bring back the old file
        finally:
            os.close(folder)
    except LocalrunError:  # of the block: some are OSErrors, and have a hint
        raise
    except OSError as error:
        raise StoreError(f"{path}: can't be written: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):  # report the original failure, not the missing file
            partial.unlink()
