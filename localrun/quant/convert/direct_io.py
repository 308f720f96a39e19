"""Positional reads and writes of large files that bypass the page cache.

Converting 150 GB through the page cache would evict everything else from memory and, under a memory limit, cause page reclaim
for every page. So both sides use O_DIRECT where the file system supports it and the range is aligned, and otherwise ordinary
calls followed by POSIX_FADV_DONTNEED. Source ranges already in the page cache are read from there.

Alignment is 4096 throughout: offsets, lengths and buffers.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from localrun.alignment import PAGE_BYTES, align_up
from localrun.errors import DiskSpaceError, StoreError
from localrun.pages import HUGE_PAGE_BYTES, anonymous
from localrun.reading import read_fully

_CACHESTAT = 451
"""System call of Linux 6.5, the same number on every architecture but alpha."""

_libc = ctypes.CDLL(None, use_errno=True)
# Linux only; elsewhere files grow as they are written and the page cache is not controlled.
_fallocate = getattr(_libc, "fallocate", None)
_fdatasync = getattr(os, "fdatasync", os.fsync)
if _fallocate is not None:
    _fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


def _drop_cache(fd: int, offset: int = 0, n_bytes: int = 0) -> None:
    """Asks the kernel to forget clean pages of a range (0 bytes: to the end)."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, offset, n_bytes, os.POSIX_FADV_DONTNEED)


class AlignedBuffer:
    """A page-aligned buffer that grows. Owned by one thread; arrays that `array` returned are invalid after it grew.

    Large ones are in huge pages: reading past the page cache into small ones costs three times the CPU time (2 MiB reads, Zen 4).
    """

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)

    def array(self, n_bytes: int) -> npt.NDArray[np.uint8]:
        """At least `n_bytes` bytes, rounded up to whole pages, contents undefined."""
        size = max(PAGE_BYTES, align_up(n_bytes, PAGE_BYTES))
        if self._memory.size < size:
            page = HUGE_PAGE_BYTES if size >= HUGE_PAGE_BYTES else PAGE_BYTES
            size = align_up(size, page)
            memory = np.frombuffer(anonymous(size + page), np.uint8)
            head = -memory.ctypes.data % page
            self._memory = memory[head : head + size]
        return self._memory


def _open_direct(path: Path, flags: int) -> int | None:
    """A descriptor with O_DIRECT, or None where the file system has none."""
    direct = getattr(os, "O_DIRECT", 0)
    if not direct:
        return None
    try:
        return os.open(path, flags | os.O_CLOEXEC | direct)
    except OSError as e:
        if e.errno in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP):
            return None
        raise


class _CacheStatRange(ctypes.Structure):
    _fields_ = [("offset", ctypes.c_uint64), ("length", ctypes.c_uint64)]


class _CacheStat(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("cached", "dirty", "writeback", "evicted", "recently_evicted")]


def is_cached(fd: int, offset: int, n_bytes: int) -> bool:
    """Whether all pages of a range are in the page cache; False where the kernel can't tell."""
    where, answer = _CacheStatRange(offset, n_bytes), _CacheStat()
    if sys.platform != "linux":
        return False
    if _libc.syscall(_CACHESTAT, fd, ctypes.byref(where), ctypes.byref(answer), 0) != 0:
        return False
    pages = (offset + n_bytes - 1) // PAGE_BYTES - offset // PAGE_BYTES + 1
    return bool(answer.cached >= pages)


class _DirectFile:
    """Owns two descriptors of one file, with the page cache and without (None where the file system has no O_DIRECT)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._plain = -1
        self._direct: int | None = None

    def close(self) -> None:
        """Closes both; again does nothing."""
        plain, direct, self._plain, self._direct = self._plain, self._direct, -1, None
        for fd in (plain, direct):
            if fd is not None and fd >= 0:
                os.close(fd)


class DirectReader(_DirectFile):
    """A file to read from. Safe to use from several threads, each with its own buffer.

    Args:
        path: the file.
        size: its size when it was checked.

    Raises:
        StoreError: can't be opened, or has changed since.
    """

    def __init__(self, path: Path, size: int) -> None:
        super().__init__(path)
        try:
            self._plain = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as e:
            raise StoreError(f"{path}: can't be opened: {e.strerror}") from e
        try:
            self._direct = _open_direct(path, os.O_RDONLY)
            if os.fstat(self._plain).st_size != size:
                raise StoreError(f"{path}: size changed since it was checked", hint="start again")
        except BaseException:
            self.close()
            raise

    def read(self, offset: int, n_bytes: int, buffer: AlignedBuffer) -> npt.NDArray[np.uint8]:
        """Reads a range; the result is a view into `buffer`.

        Raises:
            StoreError: I/O error, or the file was truncated.
        """
        head = offset % PAGE_BYTES
        memory = buffer.array(head + n_bytes)
        wanted = memory[head : head + n_bytes]
        if self._direct is None:
            read_fully(self._plain, self.path, offset, wanted.data)
            _drop_cache(self._plain, offset, n_bytes)
        elif is_cached(self._plain, offset, n_bytes) or not self._read_direct(offset - head, head + n_bytes, memory):
            read_fully(self._plain, self.path, offset, wanted.data)
        return wanted

    def _read_direct(self, offset: int, n_bytes: int, memory: npt.NDArray[np.uint8]) -> bool:
        """Fills at least `n_bytes` from the page-aligned `offset`; False if the file system refuses after all."""
        assert self._direct is not None
        done, end = 0, align_up(n_bytes, PAGE_BYTES)
        try:
            while done < n_bytes:
                n = os.preadv(self._direct, [memory.data[done:end]], offset + done)
                if n == 0:
                    raise StoreError(f"{self.path}: ends {n_bytes - done} bytes early")
                done += n
                if n % PAGE_BYTES and done < n_bytes:
                    return False
        except StoreError:
            raise
        except OSError as e:
            if e.errno == errno.EINVAL:
                return False
            raise StoreError(f"{self.path}: reading {n_bytes} bytes at {offset} failed: {e.strerror}") from e
        return True


class DirectWriter(_DirectFile):
    """A file of known size, written in any order. Safe to use from several threads on disjoint ranges.

    Args:
        path: created if it does not exist.
        size: final size; unwritten ranges read as zeros.
        reserve: allocate everything up front, so a full disk is detected before anything is written.

    Raises:
        DiskSpaceError: the disk can't hold it.
        StoreError: can't be created.
    """

    def __init__(self, path: Path, size: int, *, reserve: bool = True) -> None:
        super().__init__(path)
        with write_errors(path):
            self._plain = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                self._direct = _open_direct(path, os.O_WRONLY)
                if reserve:
                    self._reserve(size)
                os.ftruncate(self._plain, size)
            except BaseException:
                self.close()
                raise

    def _reserve(self, size: int) -> None:
        # Not os.posix_fallocate: where the file system can't reserve, it writes a byte into every block instead.
        result = 0 if _fallocate is None else _fallocate(self._plain, 0, 0, size)
        error = ctypes.get_errno()
        if result != 0 and error not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise OSError(error, os.strerror(error))

    def write(self, offset: int, data: npt.NDArray[np.uint8]) -> None:
        """Writes a range; data is safe only after `sync`.

        Raises:
            DiskSpaceError, StoreError
        """
        aligned = offset % PAGE_BYTES == 0 and data.size % PAGE_BYTES == 0 and data.ctypes.data % PAGE_BYTES == 0
        direct = self._direct if aligned else None
        with write_errors(self.path):
            done = 0
            while done < data.size:
                fd = self._plain if direct is None else direct
                try:
                    done += os.pwritev(fd, [data.data[done:]], offset + done)
                except OSError as e:
                    if e.errno != errno.EINVAL or direct is None:
                        raise
                    direct = None
                if done % PAGE_BYTES:
                    direct = None

    def sync(self) -> None:
        """Makes everything written so far durable and drops it from the page cache."""
        with write_errors(self.path):
            _fdatasync(self._plain)
            _drop_cache(self._plain)


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Errors of writing `path` become ours."""
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DiskSpaceError(f"{path}: {e.strerror}", hint="free space, then run the same command again") from e
        raise StoreError(f"{path}: writing failed: {e.strerror or e}") from e
