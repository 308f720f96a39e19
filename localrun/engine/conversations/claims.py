"""What a program has open, so that another one with the same conversations leaves it alone.

A claim is a lock on one byte of a file beside the database, at the number claimed. It ends with its program, however that ends.
Where a file system has no such locks, every claim is granted: then two programs may open one conversation.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from pathlib import Path

SUFFIX = ".open"

WINDOWS_AT = 1 << 40
"""Above the ids of all conversations: the bytes of windows."""

MAX_WINDOWS = 64

_SET_LOCK = getattr(fcntl, "F_OFD_SETLK", None)
"""Locks of an open file, not of a process: Linux has them."""

_FLOCK = "hhqqi4x"
"""`struct flock` of 64-bit Linux: type, from where, start, length, process."""


class Claims:
    """The claims of one window. Not thread-safe.

    Args:
        database: the file of conversations; None: nothing is shared, and every claim granted.

    Attributes:
        window: the lowest number, from 1, that no other window has.
    """

    def __init__(self, database: Path | None) -> None:
        self._file: int | None = None
        if database is not None and _SET_LOCK is not None:
            with contextlib.suppress(OSError):
                name = database.with_name(database.name + SUFFIX)
                self._file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._conversation: int | None = None
        numbers = range(1, MAX_WINDOWS)
        self.window = next((n for n in numbers if self._lock(WINDOWS_AT + n, fcntl.F_WRLCK)), MAX_WINDOWS)

    def take(self, conversation_id: int) -> bool:
        """Claims a conversation in place of the one before; False: another window has it, and nothing changes."""
        if conversation_id == self._conversation:
            return True
        if not self._lock(conversation_id, fcntl.F_WRLCK):
            return False
        self.leave()
        self._conversation = conversation_id
        return True

    @contextlib.contextmanager
    def held(self, conversation_id: int) -> Iterator[bool]:
        """Claims a conversation beside the one before, for a while; gives False: another window has it."""
        beside = conversation_id != self._conversation
        taken = not beside or self._lock(conversation_id, fcntl.F_WRLCK)
        try:
            yield taken
        finally:
            if beside and taken:
                self._lock(conversation_id, fcntl.F_UNLCK)

    def is_free(self, conversation_id: int) -> bool:
        """Whether no other window has it."""
        if self._file is None:
            return True
        asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, conversation_id, 1, 0)
        with contextlib.suppress(OSError):
            told: int = struct.unpack(_FLOCK, fcntl.fcntl(self._file, fcntl.F_OFD_GETLK, asked))[0]
            return told == fcntl.F_UNLCK
        return True

    def leave(self) -> None:
        """Others may have the conversation."""
        if self._conversation is not None:
            self._lock(self._conversation, fcntl.F_UNLCK)
            self._conversation = None

    def close(self) -> None:
        """Gives everything up."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _lock(self, byte: int, kind: int) -> bool:
        if self._file is None:
            return True
        assert _SET_LOCK is not None
        wanted = struct.pack(_FLOCK, kind, os.SEEK_SET, byte, 1, 0)
        try:
            fcntl.fcntl(self._file, _SET_LOCK, wanted)
        except OSError as error:
            return error.errno not in (errno.EAGAIN, errno.EACCES)
        return True
