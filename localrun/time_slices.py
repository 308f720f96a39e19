"""Short time slices for this process's threads, so that a thread that is woken runs soon, even beside other programs.

Since Linux 6.12 a thread may ask for the length of its time slices (sched(7): `sched_runtime` of SCHED_OTHER and SCHED_BATCH, 0.1
to 100 ms). A waking thread whose slice is shorter than the running one's need not wait until that one's ends, about 3 ms by
default. Shares of the processor stay what they are. A token wakes helper threads some hundred times, each for less than a
millisecond of work; without this, they are of no use as soon as other programs occupy the cores.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
from typing import Final

SLICE_NS: Final = 100_000
"""The shortest slice that Linux grants (kernel/sched/syscalls.c: 0.1 ms)."""

_SCHED_SETATTR: Final = {"x86_64": 314, "aarch64": 274}
"""System call by machine: asm/unistd_64.h, asm-generic/unistd.h."""

_SCHED_GETATTR: Final = {"x86_64": 315, "aarch64": 275}

_ATTR: Final = struct.Struct("=IIQiIQQQ")
"""struct sched_attr, first version, linux/sched/types.h: size, policy, flags, nice, priority, runtime, deadline, period."""

_THREADS: Final = "/proc/self/task"

_FAIR: Final = (0, 3)
"""SCHED_OTHER and SCHED_BATCH, linux/sched.h."""


def shorten() -> bool:
    """Asks for slices of `SLICE_NS` for all threads of this process; threads started later inherit them.

    Returns:
        Whether the system grants them. If not, nothing has changed.
    """
    number = _SCHED_SETATTR.get(platform.machine())
    if not sys.platform.startswith("linux") or number is None:
        return False
    try:
        threads = os.listdir(_THREADS)
    except OSError:  # /proc isn't mounted
        return False
    for name in threads:
        attr = _attributes(int(name))
        if attr is None or attr[1] not in _FAIR:
            continue  # it has ended, or is scheduled by other rules
        wanted = _ATTR.pack(_ATTR.size, attr[1], 0, attr[3], 0, SLICE_NS, 0, 0)
        _libc().syscall(number, int(name), ctypes.c_char_p(wanted), 0)
    return slice_ns() == SLICE_NS


def slice_ns(thread: int = 0) -> int:
    """A thread's time slice in nanoseconds, this thread's by default; 0 if the system doesn't say.

    Args:
        thread: its number in /proc/self/task.
    """
    attr = _attributes(thread)
    return 0 if attr is None else attr[5]


def _attributes(thread: int) -> tuple[int, ...] | None:
    number = _SCHED_GETATTR.get(platform.machine())
    if not sys.platform.startswith("linux") or number is None:
        return None
    buffer = ctypes.create_string_buffer(_ATTR.size)
    if _libc().syscall(number, thread, buffer, _ATTR.size, 0) != 0:
        return None
    return _ATTR.unpack(buffer.raw)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)
