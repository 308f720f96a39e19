"""Saved session states, so that a conversation that goes on, goes back or is opened again is not read a second time.

llama.cpp can't cut a deepseek4 sequence: its rings and compressor frontiers hold only the present. So a session that must go
back restores the longest saved state that its prompt begins with and feeds the rest. States lie in RAM, newest first, and as files
of the same bytes; both have a budget, and the least recently used go first. A state is named by its token ids and by what it
was computed with (model, KV type), and carries a checksum: nothing is restored into another model.

Knows bytes and token ids only; `session.py` makes and takes them. One owner thread, plus one that writes files.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import re
import threading
import uuid
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xxhash

log = logging.getLogger(__name__)

RAM_BYTES = 1 << 30
DISK_BYTES = 8 << 30
"""Default budgets. A 10,000-token state of Flash in f16 takes about 70 MB by deepseek-v4's row sizes (6,880 bytes a token)."""

_FILE_NAME = re.compile(r"(?P<n>[0-9]{1,9})-(?P<digest>[0-9a-f]{32})\.snapshot")


class SnapshotStore:
    """States of one model's sessions by token prefix.

    Args:
        folder: where files lie, one folder per `key`; None: RAM only.
        key: names model and KV type; states of other keys are never seen.
        ram_bytes, disk_bytes: budgets; 0 switches that place off.
    """

    def __init__(
        self, folder: Path | None, key: str, *, ram_bytes: int = RAM_BYTES, disk_bytes: int = DISK_BYTES
    ) -> None:
        self._ram: OrderedDict[tuple[int, str], bytes] = OrderedDict()  # (n_tokens, digest), least recently used first
        self._ram_bytes, self._disk_bytes = ram_bytes, disk_bytes
        self._folder = folder / key if folder is not None and disk_bytes > 0 else None
        self._files: OrderedDict[tuple[int, str], int] = OrderedDict()  # -> size, least recently used first
        self._lock = threading.Lock()
        self._writes: queue.SimpleQueue[tuple[tuple[int, str], bytes] | None] = queue.SimpleQueue()
        self._writer: threading.Thread | None = None
        if self._folder is not None:
            self._scan(self._folder)

    @property
    def ram_used(self) -> int:
        """Bytes of states in RAM."""
        return sum(len(data) for data in self._ram.values())

    @property
    def disk_used(self) -> int:
        """Bytes of states in files."""
        with self._lock:
            return sum(self._files.values())

    def has(self, tokens: Sequence[int]) -> bool:
        """A state of exactly these tokens is saved."""
        name = _name(tokens)
        with self._lock:
            return name in self._ram or name in self._files

    def put(self, tokens: Sequence[int], data: bytes) -> None:
        """Saves a state; the file is written in the background."""
        name = _name(tokens)
        if len(data) <= self._ram_bytes:
            self._ram[name] = data
            self._ram.move_to_end(name)
            while self.ram_used > self._ram_bytes:
                self._ram.popitem(last=False)
        if self._folder is not None and len(data) <= self._disk_bytes:
            if self._writer is None:
                self._writer = threading.Thread(target=self._write_all, name="localrun-snapshots", daemon=True)
                self._writer.start()
            self._writes.put((name, data))

    def longest_prefix(self, tokens: Sequence[int]) -> tuple[int, bytes] | None:
        """The longest saved state that `tokens` begins with and goes on from: (n_tokens, state)."""
        with self._lock:
            names = {*self._ram, *self._files}
        lengths = sorted({n for n, _ in names if 0 < n < len(tokens)})
        hasher, at, found = xxhash.xxh3_128(), 0, []
        ids = np.asarray(tokens, np.int32)
        for n in lengths:
            hasher.update(ids[at:n].tobytes())
            at = n
            if (n, hasher.hexdigest()) in names:
                found.append((n, hasher.hexdigest()))
        for name in reversed(found):
            data = self._get(name)
            if data is not None:
                return name[0], data
        return None

    def drop(self, n_tokens: int, tokens: Sequence[int]) -> None:
        """Forgets the state of `tokens[:n_tokens]`: it turned out to be damaged."""
        name = _name(tokens[:n_tokens])
        self._ram.pop(name, None)
        self._forget_file(name)

    def close(self) -> None:
        """Waits until all files are written."""
        if self._writer is not None:
            self._writes.put(None)
            self._writer.join()
            self._writer = None

    def _get(self, name: tuple[int, str]) -> bytes | None:
        if name in self._ram:
            self._ram.move_to_end(name)
            return self._ram[name]
        assert self._folder is not None
        path = self._folder / _file_name(name)
        try:
            data = path.read_bytes()
            os.utime(path)
        except OSError as error:
            log.warning("%s: the saved state can't be read: %s", path, error.strerror)
            self._forget_file(name)
            return None
        with self._lock:
            if name in self._files:
                self._files.move_to_end(name)
        return data

    def _scan(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            files = [(path, path.stat()) for path in folder.iterdir()]
        except OSError as error:
            log.warning("%s: saved states can't be used: %s", folder, error.strerror)
            self._folder = None
            return
        for path, stat in sorted(files, key=lambda file: file[1].st_mtime):
            match = _FILE_NAME.fullmatch(path.name)
            if match:
                self._files[int(match["n"]), match["digest"]] = stat.st_size
            elif path.suffix == ".partial":
                with contextlib.suppress(OSError):
                    path.unlink()

    def _write_all(self) -> None:
        while (item := self._writes.get()) is not None:
            self._write(*item)

    def _write(self, name: tuple[int, str], data: bytes) -> None:
        assert self._folder is not None
        self._make_room(len(data))
        partial = self._folder / f"{uuid.uuid4().hex}.partial"
        try:
            with open(partial, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, self._folder / _file_name(name))
        except OSError as error:
            log.warning("%s: a conversation's state could not be saved: %s", self._folder, error.strerror)
            with contextlib.suppress(OSError):
                partial.unlink()
            return
        with self._lock:
            self._files[name] = len(data)
            self._files.move_to_end(name)

    def _make_room(self, n_bytes: int) -> None:
        while True:
            with self._lock:
                if not self._files or sum(self._files.values()) + n_bytes <= self._disk_bytes:
                    return
                oldest = next(iter(self._files))
            self._forget_file(oldest)

    def _forget_file(self, name: tuple[int, str]) -> None:
        with self._lock:
            known = self._files.pop(name, None)
        if known is not None and self._folder is not None:
            with contextlib.suppress(OSError):
                (self._folder / _file_name(name)).unlink()


def _name(tokens: Sequence[int]) -> tuple[int, str]:
    return len(tokens), xxhash.xxh3_128_hexdigest(np.asarray(tokens, np.int32).tobytes())


def _file_name(name: tuple[int, str]) -> str:
    return f"{name[0]}-{name[1]}.snapshot"
