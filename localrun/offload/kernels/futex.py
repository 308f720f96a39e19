"""Sleeping until another thread changes a word of memory, from compiled code: Linux's futex.

A word is an int64 of which the lower 32 bits count: little-endian machines have them first.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from typing import Final

import numba as nb

from localrun.offload.kernels.lowlevel import call_6

_WAIT, _WAKE = 128, 129  # FUTEX_WAIT and FUTEX_WAKE with FUTEX_PRIVATE_FLAG, linux/futex.h
_NUMBERS = {"x86_64": 202, "aarch64": 98}
"""System call `futex` by machine: asm/unistd_64.h, asm-generic/unistd.h."""
_SYS_FUTEX: Final = _NUMBERS.get(platform.machine(), 0)


@nb.njit
def wait(syscall: int, word: int, seen: int) -> None:
    """Sleeps until somebody wakes those who wait for `word`, or returns because its lower 32 bits are not `seen`'s; also for no
    reason.

    Args:
        syscall: `syscall_address()`.
    """
    call_6(syscall, _SYS_FUTEX, word, _WAIT, seen & 0xFFFFFFFF, 0, 0)


@nb.njit
def wake(syscall: int, word: int, count: int) -> None:
    """Wakes so many of those who wait for `word`."""
    call_6(syscall, _SYS_FUTEX, word, _WAKE, count, 0, 0)


def syscall_address() -> int:
    """Of libc's `syscall`."""
    return ctypes.cast(ctypes.CDLL(None).syscall, ctypes.c_void_p).value or 0


def is_supported() -> bool:
    """This system has them."""
    return bool(_SYS_FUTEX) and platform.system() == "Linux" and sys.byteorder == "little"
