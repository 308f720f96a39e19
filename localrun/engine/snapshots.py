"""Saved session states, so that continuing, reverting or reopening a conversation does not require rereading it.

llama.cpp can't truncate a deepseek4 sequence: its rings and compressor frontiers hold only the current position. So to go back,
a session restores the longest saved state that is a prefix of its prompt and feeds the rest. States are kept in RAM, newest
first, and as files of the same bytes; both have a budget, and the least recently used are dropped first. The RAM budget
includes states waiting to be written, the disk budget the files of all models and running programs. A state is identified by
its token ids and what it was computed with (model, KV type), and has a checksum, so it is never restored into another model.

Knows only bytes and token ids; `session.py` creates and restores states. One owner thread, plus one that writes files: a
hanging drive costs saved states, never an answer.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import re
import shutil
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import xxhash

from localrun.atomic import replacing

log = logging.getLogger(__name__)

RAM_BYTES = 1 << 30
DISK_BYTES = 8 << 30
"""Default budgets. A 10,000-token state of Flash in f16 takes about 70 MB by deepseek-v4's row sizes (6,880 bytes a token)."""

MEMORY_BYTES = 256 << 20
"""A larger state is written to its file by the thread that makes it, and read back from there, without being in memory as a whole.
It waits for the drive, so a drive that hangs costs more than the state."""

MIN_FREE_BYTES = 1 << 30
"""Nothing is written that would leave less than this free on the drive: it is the user's home."""

SLOW_DRIVE_S = 5.0
"""How long an answer waits for earlier states to be written; after that its own is not saved."""

CLOSE_S = 15.0
"""What closing waits for the last states; a drive that hangs must not keep a whole model in memory."""

_ABANDONED_S = 600.0
"""A partial file older than this has no writer; a younger one may be another program's."""

Data = bytes | bytearray
State = Data | Path
"""As `states.pack` makes it, or the file that has it."""

_FILE_NAME = re.compile(r"(?P<n>[0-9]{1,9})-(?P<digest>[0-9a-f]{32})\.snapshot")


class SnapshotStore:
    """States of one model's sessions by token prefix.

    Args:
        folder: for the files, with one subfolder per `key`; None: RAM only.
        key: identifies model and KV type; states of other keys are invisible.
        ram_bytes, disk_bytes: budgets; 0 disables that location.
        memory_bytes: see `MEMORY_BYTES`.
    """

    def __init__(
        self,
        folder: Path | None,
        key: str,
        *,
        ram_bytes: int = RAM_BYTES,
        disk_bytes: int = DISK_BYTES,
        memory_bytes: int = MEMORY_BYTES,
    ) -> None:
        self._ram: OrderedDict[tuple[int, str], Data] = OrderedDict()  # (n_tokens, digest), least recently used first
        self._ram_bytes, self._disk_bytes, self._memory_bytes = ram_bytes, disk_bytes, memory_bytes
        self._root = folder
        self._folder = folder / key if folder is not None and disk_bytes > 0 else None
        self._files: dict[tuple[int, str], int] = {}  # -> size; this model's
        self._lock = (
            threading.Lock()
        )  # guards _files and _unwritten; held for moments, never while a file is read or written
        self._written = threading.Condition(self._lock)
        self._unwritten: dict[tuple[int, str], Data] = {}
        self._writes: queue.SimpleQueue[tuple[tuple[int, str], Data] | None] = queue.SimpleQueue()
        self._writer: threading.Thread | None = None
        self._can_save = True  # as far as is known
        if self._folder is not None:
            self._scan(self._folder)

    @property
    def ram_used(self) -> int:
        """Bytes of states in RAM, those that wait for being written among them."""
        with self._lock:
            return sum(len(data) for data in {**self._unwritten, **self._ram}.values())

    def has(self, tokens: Sequence[int]) -> bool:
        """A state of exactly these tokens is saved."""
        name = _name(tokens)
        with self._lock:
            return name in self._ram or name in self._files or name in self._unwritten

    def holds_in_memory(self, n_bytes: int) -> bool:
        """A state of this size is to be given to `put`, a larger one to `put_file`."""
        return n_bytes <= (self._ram_bytes if self._folder is None else self._memory_bytes)

    def put_file(self, tokens: Sequence[int], n_bytes: int, write: Callable[[Path], None]) -> bool:
        """Has a large state written; True if that was possible.

        Args:
            n_bytes: at most.
            write: writes the file that it is given the path of.
        """
        if self._folder is None or n_bytes > self._disk_bytes:
            return False
        name = _name(tokens)
        path = self._folder / _file_name(name)
        partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
        try:
            if not self._has_room(n_bytes):
                return False
            write(partial)
            partial.replace(path)  # not flushed: after a power cut its checksum tells
            _note_use(path)
            size = path.stat().st_size
        except OSError as error:
            self._complain(str(error))
            return False
        finally:
            with contextlib.suppress(OSError):
                partial.unlink()
        self._can_save = True
        with self._lock:
            self._files[name] = size
        return True

    def put(self, tokens: Sequence[int], data: Data) -> bool:
        """Saves a state, which the store owns from now on; True if that was possible. The file is written in the background; if the
        RAM budget would be exceeded, waits for earlier ones, and gives up after `SLOW_DRIVE_S`."""
        name = _name(tokens)
        if self._folder is not None and len(data) <= self._disk_bytes:
            if self._writer is None:
                self._writer = threading.Thread(target=self._write_all, name="localrun-snapshots", daemon=True)
                self._writer.start()
            with self._written:
                fits = self._written.wait_for(
                    lambda: not self._unwritten or self._waiting_bytes() + len(data) <= self._ram_bytes, SLOW_DRIVE_S
                )
                if not fits:
                    log.warning("%s: a conversation's state was not saved: the drive is too slow", self._folder)
                    return False
                self._unwritten[name] = data
            self._writes.put((name, data))
        if len(data) <= self._ram_bytes:
            self._ram[name] = data
            self._ram.move_to_end(name)
        while self._ram and self.ram_used > self._ram_bytes:
            if len(self._ram) == 1 and name in self._ram:
                break  # the excess is still being written, and room for it was made above
            self._ram.popitem(last=False)
        return self.has(tokens)

    def _waiting_bytes(self) -> int:
        return sum(len(data) for data in self._unwritten.values())

    def longest_prefix(self, tokens: Sequence[int]) -> tuple[int, State] | None:
        """The longest saved state that is a proper prefix of `tokens`: (n_tokens, state)."""
        with self._lock:
            names = {*self._ram, *self._files, *self._unwritten}
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
        with self._lock:
            self._unwritten.pop(name, None)
        self._forget_file(name)

    def close(self) -> None:
        """Waits until all files are written, `CLOSE_S` at most."""
        if self._writer is not None:
            self._writes.put(None)
            self._writer.join(CLOSE_S)
            if self._writer.is_alive():
                log.warning("%s: conversation states are not saved: the drive is too slow", self._folder)
            self._writer = None

    def _get(self, name: tuple[int, str]) -> State | None:
        if name in self._ram:
            self._ram.move_to_end(name)
            return self._ram[name]
        with self._lock:
            if name in self._unwritten:
                return self._unwritten[name]
        assert self._folder is not None
        path = self._folder / _file_name(name)
        try:
            data = path if self._is_large(name) else path.read_bytes()
            _note_use(path)
        except OSError as error:
            log.warning("%s: the saved state can't be read: %s", path, error.strerror)
            self._forget_file(name)
            return None
        return data

    def _scan(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            files = [(path, path.stat()) for path in folder.iterdir()]
        except OSError as error:
            log.warning("%s: can't use saved states: %s", folder, error.strerror)
            self._folder = None
            return
        for path, stat in files:
            match = _FILE_NAME.fullmatch(path.name)
            if match:
                self._files[int(match["n"]), match["digest"]] = stat.st_size
            elif path.suffix == ".partial" and time.time() - stat.st_mtime > _ABANDONED_S:
                with contextlib.suppress(OSError):
                    path.unlink()

    def _write_all(self) -> None:
        while (item := self._writes.get()) is not None:
            name, data = item
            with self._lock:
                wanted = name in self._unwritten
            try:
                if wanted:
                    self._write(name, data)
            except Exception:  # on any error: waiters for this thread must not wait forever
                log.exception("%s: a conversation's state could not be saved", self._folder)
            del item, data  # else the last state stays in memory until the next one comes
            with self._written:
                self._unwritten.pop(name, None)
                self._written.notify_all()

    def _is_large(self, name: tuple[int, str]) -> bool:
        with self._lock:
            return not self.holds_in_memory(self._files.get(name, 0))

    def _has_room(self, n_bytes: int) -> bool:
        """Makes room within the budget; False, with a warning, if the drive itself has none."""
        assert self._folder is not None
        self._make_room(n_bytes)
        if shutil.disk_usage(self._folder).free < n_bytes + MIN_FREE_BYTES:
            self._complain(f"{self._folder}: the drive is nearly full")
            return False
        return True

    def _complain(self, why: str) -> None:
        """Once, until saving succeeds again: a full drive is full at every answer."""
        if self._can_save:
            log.warning(
                "a conversation's state could not be saved: %s; answers go on, but the conversation is read again when it is "
                "continued later",
                why,
            )
        self._can_save = False

    def _write(self, name: tuple[int, str], data: Data) -> None:
        assert self._folder is not None
        try:
            if not self._has_room(len(data)):
                return
            path = self._folder / _file_name(name)
            with replacing(path) as file:
                file.write(data)
            _note_use(path)
        except OSError as error:
            self._complain(str(error))
            return
        self._can_save = True
        with self._lock:
            self._files[name] = len(data)

    def _make_room(self, n_bytes: int) -> None:
        """Scans the drive each time, because other programs write there too; a file's timestamp is its last use."""
        files = self._all_files()
        used = sum(size for _, _, size in files)
        for _, path, size in files:
            if used + n_bytes <= self._disk_bytes:
                return
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
            used -= size
            match = _FILE_NAME.fullmatch(path.name)
            if match and path.parent == self._folder:
                with self._lock:
                    self._files.pop((int(match["n"]), match["digest"]), None)

    def _all_files(self) -> list[tuple[float, Path, int]]:
        """(time of last use, path, size) of all models' states, least recently used first."""
        files = []
        for path in self._root.glob("*/*.snapshot") if self._root is not None and self._folder is not None else ():
            with contextlib.suppress(FileNotFoundError):
                stat = path.stat()
                files.append((stat.st_mtime, path, stat.st_size))
        return sorted(files)

    def _forget_file(self, name: tuple[int, str]) -> None:
        with self._lock:
            known = self._files.pop(name, None)
        if known is not None and self._folder is not None:
            with contextlib.suppress(OSError):
                (self._folder / _file_name(name)).unlink()


def _note_use(path: Path) -> None:
    """Now. The kernel's own clock for this goes on in milliseconds: a written file would seem older than one read before."""
    os.utime(path, ns=(time.time_ns(),) * 2)


def _name(tokens: Sequence[int]) -> tuple[int, str]:
    return len(tokens), xxhash.xxh3_128_hexdigest(np.asarray(tokens, np.int32).tobytes())


def _file_name(name: tuple[int, str]) -> str:
    return f"{name[0]}-{name[1]}.snapshot"
