"""Rounding of sizes and addresses, at the bottom of the package: everything may use it, it uses nothing."""

from __future__ import annotations

from typing import Final

PAGE_BYTES: Final = 4096
"""What direct reads and writes, slots and staging buffers are aligned to: the page of x86-64 and a multiple of every drive's block.
A constant and not the system's page size, because converted files are laid out by it."""

LINE_BYTES: Final = 64
"""A cache line, and the widest vector register: what kernels want their memory aligned to."""


def ceil_div(n: int, divisor: int) -> int:
    """The quotient, rounded up."""
    return -(-n // divisor)


def align_up(n: int, multiple: int) -> int:
    """The smallest multiple that is not below `n`."""
    return -(-n // multiple) * multiple
