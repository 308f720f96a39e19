"""Progress of a verification, so that an interrupted one resumes instead of rereading 150 GB.

A small JSON file in the cache, named after the model's folder, valid for exactly these files (sizes, modification times,
manifest): a model that has changed is read from the start. Losing the file only costs time, so nothing here fails.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import xxhash

from localrun.atomic import replacing

_SAVE_SECONDS = 2.0
_MAX_BYTES = 64 << 20


class VerifyJournal:
    """State of one model's verification. One thread.

    Attributes:
        next_check: checks before this one are done.
        damaged: failed ones: number, digest found (None: unreadable), problem.
    """

    def __init__(self, folder: Path, files: Sequence[Path], manifest_digest: str) -> None:
        """
        Args:
            folder: where journals are kept.
            files: the model's files.
            manifest_digest: identifies the expected contents.
        """
        self._key = _key(files, manifest_digest)
        self._path = folder / f"{xxhash.xxh3_64_hexdigest(os.fsencode(files[0].resolve()))}.json"
        self._saved_at = time.monotonic()
        self.next_check, self.damaged = _read(self._path, self._key)

    def done(self, next_check: int, damage: tuple[int, str | None, str] | None) -> None:
        """Records that all checks before `next_check` are done; written to disk periodically."""
        self.next_check = next_check
        if damage is not None:
            self.damaged.append(damage)
        if time.monotonic() - self._saved_at >= _SAVE_SECONDS:
            self.save()

    def restart(self) -> None:
        """Forgets what an earlier run did."""
        self.next_check, self.damaged = 0, []

    def save(self) -> None:
        """Writes the state down."""
        self._saved_at = time.monotonic()
        state = {"key": self._key, "next": self.next_check, "damaged": self.damaged}
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self._path) as file:
                file.write(json.dumps(state).encode())

    def clear(self) -> None:
        """Forgets the state: all is done."""
        with contextlib.suppress(OSError):
            self._path.unlink()


def _key(files: Sequence[Path], manifest_digest: str) -> str:
    digest = xxhash.xxh3_128(manifest_digest.encode())
    for path in files:
        status = os.stat(path)
        digest.update(os.fsencode(path.name))
        digest.update(f" {status.st_size} {status.st_mtime_ns} {status.st_dev} {status.st_ino}\n".encode())
    return digest.hexdigest()


def _read(path: Path, key: str) -> tuple[int, list[tuple[int, str | None, str]]]:
    """What an earlier run wrote for the same files, else nothing."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            return 0, []
        state: Any = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(state, dict) or state.get("key") != key:
            return 0, []
        n, entries = state["next"], state["damaged"]
        damaged = [(int(number), None if found is None else str(found), str(why)) for number, found, why in entries]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return 0, []
    if type(n) is not int or n < 0 or any(not 0 <= number < n for number, _, _ in damaged):
        return 0, []
    return n, damaged
