"""Keeps the dense part of official checkpoints as it was converted by a load, so that the next one only reads it.

FOLDER/KEY/dense.gguf      what `localrun convert --keep-experts` writes, by the same plan
FOLDER/KEY/localrun.json   its manifest, with a checksum for every tensor; written last
FOLDER/KEY.XXXX.partial/   while it is written, or after a crash

KEY names the checkpoint's weights, all types, the program's version and `FORMAT`, so nothing that has changed is found. A copy
that differs from its checksums is deleted, and what it lacks comes from the checkpoint. Whoever reads or writes `dense.gguf` holds
a lock on it (`flock`, shared or exclusive), so nobody deletes what another process is using.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import shutil
import threading
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Final

import numpy as np
import xxhash

import localrun
from localrun.alignment import align_up
from localrun.errors import LocalrunError
from localrun.quant.checkpoint.kept import KeptSource
from localrun.quant.checkpoint.mapping import ALIGNMENT, ConversionPlan, make_plan
from localrun.quant.checkpoint.source import CheckpointSource
from localrun.quant.convert.converter import DENSE_NAME, described_options
from localrun.quant.convert.direct_io import DirectWriter
from localrun.quant.convert.journal import PartResult
from localrun.quant.convert.report import build_manifest
from localrun.quant.gguf.file import read_gguf
from localrun.quant.model.manifest import MANIFEST_NAME, read_manifest, write_manifest
from localrun.quant.model.source import Bytes
from localrun.units import format_size

log = logging.getLogger(__name__)

MOST_COPIES: Final = 2
"""More are rarely used again before they are out of date."""

LEAST_BYTES: Final = 64 << 20
"""Converting less takes no noticeable time."""

FORMAT: Final = 1
"""Counts changes to what a conversion writes for the same checkpoint and types, between two versions of the program."""

_SPARE_BYTES: Final = 4 << 30
"""Left free on the drive, for whatever else is kept there."""


class DenseCopy:
    """A copy in use: `source` presents it. Locked until `close`; a context manager."""

    def __init__(self, folder: Path, fd: int, source: KeptSource) -> None:
        self._folder, self._fd = folder, fd
        self.source = source

    def discard(self) -> None:
        """It is damaged."""
        _delete(self._folder)

    def close(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> DenseCopy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class DenseCache:
    """Copies in one folder, at most `MOST_COPIES` and `most_bytes` of them; beyond that, the one that went unused for longest is
    deleted.

    Args:
        folder: created when something is kept.
        most_bytes: of all copies together; 0: nothing is kept, and what is there is not used.
        least_bytes: smaller dense parts are not kept.
    """

    def __init__(self, folder: Path, most_bytes: int, *, least_bytes: int = LEAST_BYTES) -> None:
        self.folder = folder
        self._most_bytes, self._least_bytes = most_bytes, least_bytes

    def find(self, source: CheckpointSource) -> DenseCopy | None:
        """The copy of a checkpoint's dense part, if there is one; counts as a use."""
        folder = self.folder / _key(source)
        if not self._most_bytes or not (folder / MANIFEST_NAME).is_file():
            return None
        with contextlib.ExitStack() as opened:
            try:
                fd = _lock(folder / DENSE_NAME, fcntl.LOCK_SH)
                opened.callback(os.close, fd)
                manifest = read_manifest(folder / MANIFEST_NAME)
                kept = KeptSource(folder, read_gguf(folder / DENSE_NAME), manifest, source, None)
            except BlockingIOError:  # somebody is deleting or replacing it
                return None
            except (LocalrunError, OSError) as error:
                log.info("a kept dense part can't be used: %s", error)
                opened.close()
                _delete(folder)
                return None
            opened.pop_all()
        with contextlib.suppress(OSError):  # a folder that is read-only
            os.utime(folder / MANIFEST_NAME)
        return DenseCopy(folder, fd, kept)

    def keep(self, source: CheckpointSource) -> DenseKeeper | None:
        """Prepares to keep what is being converted; None: it is not worth it, not allowed, or there is no room.

        Says why in the log, where that is not what the user asked for.
        """
        if not self._most_bytes:
            return None
        plan = make_plan(source.plan.checkpoint, replace(source.plan.options, keep_experts=True))
        if not self._least_bytes <= plan.file_size <= self._most_bytes:
            return None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for folder in self.folder.iterdir():
                if _is_partial(folder):  # a crash left it
                    _delete(folder)
            surplus = self._surplus(plan.file_size)
            free = shutil.disk_usage(self.folder).free + sum(size for folder, size in surplus if not _is_used(folder))
            if free < plan.file_size + _SPARE_BYTES:  # old copies stay then
                size, left = format_size(plan.file_size), format_size(free)
                log.info("%s: no room to keep the converted dense matrices: %s, %s are free", self.folder, size, left)
                return None
            for folder, _ in surplus:
                _delete(folder)
            return DenseKeeper(self.folder / _key(source), plan)
        except (LocalrunError, OSError) as error:
            log.info("the converted dense matrices are not kept: %s", error)
            return None

    def copies(self) -> list[tuple[Path, int]]:
        """Complete copies and their sizes in bytes, the last used first."""
        found = []
        with contextlib.suppress(OSError):
            for folder in self.folder.iterdir():
                with contextlib.suppress(OSError):
                    used = (folder / MANIFEST_NAME).stat().st_mtime_ns
                    found.append((used, folder, (folder / DENSE_NAME).stat().st_size))
        return [(folder, size) for used, folder, size in sorted(found, reverse=True) if not _is_partial(folder)]

    def _surplus(self, n_bytes: int) -> list[tuple[Path, int]]:
        """Copies that go for one more of `n_bytes`, and their sizes."""
        surplus, total = [], n_bytes
        for number, (folder, size) in enumerate(self.copies(), 2):
            if number > MOST_COPIES or total + size > self._most_bytes:
                surplus.append((folder, size))
            else:
                total += size
        return surplus


class DenseKeeper:
    """Writes a copy while its tensors are converted (`localrun.offload.dense_reads.Keeper`). Then `close`, in any case: the copy
    appears if all of it was written, and otherwise nothing is left.

    Args:
        folder: where the copy appears.
        plan: of the file.

    Raises:
        LocalrunError, OSError: the drive.
    """

    def __init__(self, folder: Path, plan: ConversionPlan) -> None:
        self._folder, self._plan = folder, plan
        self._numbers = {name: number for number, name in enumerate(plan.tensors)}
        self._lock = threading.Lock()
        self._results: dict[int, PartResult] = {}
        self._failed = False
        self._partial = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.partial")
        self._partial.mkdir()
        self._writer: DirectWriter | None = None
        self._fd = -1
        try:
            self._writer = DirectWriter(self._partial / DENSE_NAME, plan.file_size)
            self._fd = os.open(self._partial / DENSE_NAME, os.O_RDONLY | os.O_CLOEXEC)
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._writer.write(0, np.frombuffer(plan.header, np.uint8))
        except BaseException:
            self.close()
            raise

    @property
    def text(self) -> str:
        """What is being done, for the user."""
        size, folder = format_size(self._plan.file_size), self._folder.parent
        return f"keeping the converted dense matrices: {size} in {folder}; the next start is faster"

    def write(self, name: str, begin: int, rows: Bytes, room: Callable[[int], Bytes], *, is_last: bool) -> None:
        """See `Keeper`."""
        if self._failed or self._writer is None:
            return
        offset, n_bytes = self._plan.tensors[name].offset + begin, rows.size
        if is_last:  # the tensor's padding belongs to it: whole pages can go around the page cache
            n_bytes = align_up(offset + rows.size, ALIGNMENT) - offset
            padded = room(n_bytes)[:n_bytes]
            if padded.ctypes.data != rows.ctypes.data:
                padded[: rows.size] = rows
            padded[rows.size :] = 0
            rows = padded
        try:
            self._writer.write(offset, rows)
        except LocalrunError as error:
            self._fail(error)

    def finished(self, name: str, digest: str, sources: Sequence[str]) -> None:
        """See `Keeper`."""
        part = self._plan.tensors[name].parts[0]
        scale = sources[1] if part.source.scale is not None else ""
        with self._lock:
            self._results[self._numbers[name]] = PartResult(digest, sources[0], scale, None)

    def close(self) -> None:
        """Publishes the copy if it is complete; else removes it. Again does nothing."""
        writer, self._writer = self._writer, None
        try:
            if writer is not None and not self._failed and len(self._results) == len(self._numbers):
                writer.sync()
                options = described_options(self._plan)
                write_manifest(build_manifest(self._plan, DENSE_NAME, self._results, options, {}), self._partial)
                self._partial.rename(self._folder)  # fails if another process was faster
        except (LocalrunError, OSError) as error:
            self._fail(error)
        finally:
            if writer is not None:
                writer.close()
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1
            shutil.rmtree(self._partial, ignore_errors=True)

    def _fail(self, error: Exception) -> None:
        with self._lock:
            is_first, self._failed = not self._failed, True
        if is_first:
            log.info("the converted dense matrices are not kept: %s", error)


def _key(source: CheckpointSource) -> str:
    return xxhash.xxh3_128_hexdigest(f"{source.identity} {localrun.__version__} {FORMAT}".encode())


def _is_partial(folder: Path) -> bool:
    return folder.name.endswith(".partial")


def _lock(path: Path, how: int) -> int:
    """Opens a copy's file and locks it (`flock`'s LOCK_SH or LOCK_EX) without waiting; returns the descriptor.

    Raises:
        BlockingIOError: another process is using it, or has put another one into its place.
        OSError: it can't be opened.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(fd), path.stat()):
            raise BlockingIOError(errno.EWOULDBLOCK, "another process has replaced it", str(path))
    except BaseException:
        os.close(fd)
        raise
    return fd


def _is_used(folder: Path) -> bool:
    """Another process is reading or writing it."""
    try:
        os.close(_lock(folder / DENSE_NAME, fcntl.LOCK_EX))
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _delete(folder: Path) -> None:
    """Removes a copy, or what a crash left of one, unless somebody is using it."""
    fd = -1
    try:
        with contextlib.suppress(FileNotFoundError):
            fd = _lock(folder / DENSE_NAME, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            (folder / MANIFEST_NAME).unlink()  # first: what has none is not found
        shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        log.info("%s is not deleted: %s", folder, error)
    finally:
        if fd >= 0:
            os.close(fd)
