"""Anonymous memory for data that kernels stream through, and how much the C library keeps of what was freed."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from typing import Final

HUGE_PAGE_BYTES: Final = 2 << 20
"""Size of a huge page on x86-64, and on ARM64 with 4 KiB pages."""


def anonymous(n_bytes: int, *, forked: bool = True) -> mmap.mmap:
    """Zeroed private memory, in huge pages where the kernel supports them; freed with the last array that uses it.

    Args:
        forked: child processes get it, too. Reads past the page cache into memory that a fork shares may end up in the child's
            (open(2), "O_DIRECT").

    Private, because Python's default is a shared mapping: that is tmpfs, whose huge pages are off on most systems
    (/sys/kernel/mm/transparent_hugepage/shmem_enabled), regardless of `madvise`.

    Raises:
        OSError: out of memory.
    """
    if not hasattr(mmap, "MAP_PRIVATE"):  # Windows
        return mmap.mmap(-1, n_bytes)
    memory = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if n_bytes >= HUGE_PAGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    if not forked and hasattr(mmap, "MADV_DONTFORK"):
        memory.madvise(mmap.MADV_DONTFORK)
    return memory


def ask_for_huge_pages(address: int, n_bytes: int) -> None:
    """Memory that somebody else allocated and nobody has touched yet: huge pages from now on, where the kernel supports them.

    Args:
        address, n_bytes: the range; pages that it shares with others at its ends are left alone.
    """
    begin, end = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE, (address + n_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end - begin < HUGE_PAGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    with contextlib.suppress(AttributeError, OSError):
        # A kernel without huge pages answers -1, and all is as before.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_HUGEPAGE)


_M_ARENA_MAX = -8
"""`mallopt(3)`, malloc.h."""

_HEAPS: Final = 4
"""As many as experts are decoded at a time."""


def share_heaps() -> None:
    """From now on threads share a few of the C library's heaps, instead of having one each up to eight per core.

    A heap keeps what was freed, up to tens of MiB. Readers that decode an official checkpoint's experts, one after the other, would
    each keep such a share: 256 MiB more resident with 16 of them (three layers of Flash, two Zen 4 cores). Elsewhere than in glibc
    nothing happens.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, _HEAPS)
