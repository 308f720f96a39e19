"""The files that experts are read from, and how one expert is read: which aligned ranges, and where its matrices are then."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from localrun.alignment import PAGE_BYTES, align_up
from localrun.errors import StoreError
from localrun.quant.model.source import Projection
from localrun.reading import read_fully


@dataclass(frozen=True, slots=True)
class ExpertFile:
    """An open file. `direct`: it is read past the page cache."""

    fd: int
    direct: bool
    path: Path

    @classmethod
    def open(cls, path: Path) -> ExpertFile:
        """Opens for reading with O_DIRECT if a real read through it works (tmpfs and some network file systems refuse).

        Raises:
            StoreError: can't be opened.
        """
        direct_flag = getattr(os, "O_DIRECT", 0)
        if direct_flag:
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | direct_flag)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP):
                    raise _open_error(path, error) from error
            else:
                try:
                    os.preadv(fd, [memoryview(mmap.mmap(-1, PAGE_BYTES))], 0)
                    return cls(fd, True, path)
                except OSError:
                    os.close(fd)
        try:
            return cls(os.open(path, os.O_RDONLY | os.O_CLOEXEC), False, path)
        except OSError as error:
            raise _open_error(path, error) from error

    def read(self, offset: int, target: memoryview, need: int) -> None:
        """Fills `target`; `need`: bytes that must be there, see `read_fully`."""
        hint = "check the drive (dmesg) and run `localrun verify` on the model"
        read_fully(self.fd, self.path, offset, target, need=need, hint=hint)


def _open_error(path: Path, error: OSError) -> StoreError:
    return StoreError(f"{path}: {error.strerror}", hint="check the path and its permissions")


@dataclass(slots=True)
class ReadPlan:
    """How an expert is read into a buffer.

    Attributes:
        spans: (file, begin and end of the aligned read, end of what must be there, position in the buffer) of each run of
            extents that follow each other in a file, as a converted expert's do.
        payloads: of each matrix (position in the buffer, bytes) of its extents.
    """

    spans: list[tuple[int, int, int, int, int]] = field(default_factory=list)
    payloads: list[list[tuple[int, int]]] = field(default_factory=list)

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """Where each begins and ends in the buffer; no two of them overlap."""
        return [(of[0][0], of[-1][0] + of[-1][1]) for of in self.payloads]

    def matrices_in(self, begin: int, end: int) -> int:
        """Those that have bytes in this part of the buffer, a bit each."""
        return sum(1 << which for which, (first, last) in enumerate(self.matrices) if first < end and begin < last)


def plan_read(projections: Sequence[Projection], is_direct: Sequence[bool]) -> ReadPlan:
    """An expert's.

    Args:
        is_direct: by file, whether reads must begin and end at pages.
    """
    plan, position = ReadPlan(), 0
    for projection in projections:
        plan.payloads.append([])
        for extent in projection.extents:
            grain = PAGE_BYTES if is_direct[extent.file] else 1
            start, last = extent.offset // grain * grain, extent.offset + extent.n_bytes
            end = align_up(last, grain)
            file, begin, until, _, at = plan.spans[-1] if plan.spans else (-1, 0, 0, 0, 0)
            if file == extent.file and until == start == begin + position - at:
                plan.spans[-1] = file, begin, end, last, at
            else:
                plan.spans.append((extent.file, start, end, last, position))
            plan.payloads[-1].append((position + extent.offset - start, extent.n_bytes))
            position += align_up(end - start, PAGE_BYTES)
    return plan
