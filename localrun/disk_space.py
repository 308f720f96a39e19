"""Whether a disk holds what is about to be written."""

from __future__ import annotations

import shutil
from pathlib import Path

from localrun.errors import DiskSpaceError
from localrun.units import format_size


def check_free(folder: Path, needed_bytes: int, *, what: str = "this", otherwise: str) -> None:
    """Checks the disk of `folder`, which may not exist yet.

    Args:
        what: what needs the space, for the message.
        otherwise: what to do instead of freeing space, for the hint.

    Raises:
        DiskSpaceError: less is free.
    """
    existing = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed_bytes > free:
        raise DiskSpaceError(
            f"{folder}: {what} needs {format_size(needed_bytes)}, the disk has {format_size(free)} free",
            hint=f"free {format_size(needed_bytes - free)}, or {otherwise}",
        )
