"""Rounds sizes and addresses. Imports nothing from the package, so every module may use it."""

from __future__ import annotations

from typing import Final

PAGE_BYTES: Final = 4096
"""Alignment of direct I/O, slots and staging buffers: x86-64's page size, a multiple of every drive's block size. A constant
rather than the system's page size, because converted files are laid out with it."""

LINE_BYTES: Final = 64
"""Alignment for kernels: a cache line, which is also the widest vector register."""


def ceil_div(n: int, divisor: int) -> int:
    """The quotient, rounded up."""
    return -(-n // divisor)


def align_up(n: int, multiple: int) -> int:
    """The smallest multiple that is not below `n`."""
    return -(-n // multiple) * multiple
