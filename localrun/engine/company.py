"""Chooses the number of threads for llama.cpp's own operations on one token.

They synchronize after every node of the graph and sleep while our device computes, so each token also wakes them whenever the
graph comes back from it. When our kernels handle the large matrices, little is left: a single thread is faster, on few cores
with llama.cpp's own attention, too.

If another program occupies a core, the thread there is late by a scheduler time slice each time and all others wait for it: a
token takes seconds instead of a tenth of a second. So no more threads are used than other programs leave cores free. (Our
kernels don't wait for idle threads, see `offload/kernels/threads`.) Programs of lower priority (`nice`) yield to us and are not
counted; neither is kernel time, most of which is spent on our reads.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Final

_STAT = Path("/proc/stat")

INTERVAL_S: Final = 0.25
"""Between two samples: /proc/stat has a resolution of 10 ms."""

TOLERANCE: Final = 0.35
"""Share of a core that others may use before it counts as occupied, for a desktop's idle programs."""

FEW_CORES: Final = 4
"""Up to this many threads, waking and synchronizing costs more than parallelism gains for small operations. Measured with 2
(three layers of DeepSeek-V4-Flash, outside of experts: 1 thread 23 ms per token, 2 threads 30), assumed up to 4."""

ROWS_PER_THREAD: Final = 8192
"""Tokens of context per thread on few cores where attention is llama.cpp's: with 1 and 2 threads equally fast at 12,000 tokens."""


def threads_at(position: int, n_threads: int, *, attention_is_ours: bool) -> int:
    """How many of `n_threads` compute llama.cpp's operations on one token at `position` when our kernels handle the large
    matrices. Depends on nothing else, so answers are reproducible.

    Where attention is ours, so is nearly everything between matrices (`offload/device/between.py`). What is left is about three
    operations a layer, sorting and small rotations, of which most have a single row: more threads would only wait for one another.
    """
    if attention_is_ours:
        return 1
    return n_threads if n_threads > FEW_CORES else min(n_threads, 1 + position // ROWS_PER_THREAD)


def cores() -> frozenset[int]:
    """The CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def busy_seconds(cpus: Collection[int], stat: Path = _STAT, *, low_priority: bool = False) -> float | None:
    """Seconds that these CPUs have spent since boot on programs of normal or higher priority, in user mode, and on other
    virtual machines (steal); None if the system does not report it.

    Args:
        low_priority: count programs of lower priority, too.

    `cpuN user nice system idle iowait irq softirq steal ...`, in units of 1 / SC_CLK_TCK (proc(5)).
    """
    try:
        lines = stat.read_text().splitlines()
    except OSError:
        return None
    wanted = {f"cpu{number}" for number in cpus}
    ticks = 0
    for line in lines:
        name, *values = line.split()
        if name in wanted:
            ticks += int(values[0]) + int(values[7]) + low_priority * int(values[1])
    return ticks / os.sysconf("SC_CLK_TCK")


def seconds_of_others(*, low_priority: bool = True) -> float:
    """Seconds of this process's CPUs that other programs have used since boot; 0.0 if nobody says."""
    busy = busy_seconds(cores(), low_priority=low_priority)
    return 0.0 if busy is None else busy - _own_seconds()


def _own_seconds() -> float:
    """Seconds that this process has spent outside the kernel."""
    return os.times().user


class Company:
    """Watches what other programs use. Not thread-safe: one owner asks, between two decodes."""

    def __init__(
        self,
        *,
        busy: Callable[[], float | None] | None = None,
        own: Callable[[], float] = _own_seconds,
        clock: Callable[[], float] = time.monotonic,
        n_cores: int | None = None,
    ) -> None:
        cpus = cores()
        self._busy = busy or (lambda: busy_seconds(cpus))
        self._own, self._clock = own, clock
        self._n_cores = len(cpus) if n_cores is None else n_cores
        self._last = (clock(), self._busy(), own())
        self._others = 0.0

    def others(self) -> float:
        """Cores that others used between the last two looks; a new look is taken if the last one is `INTERVAL_S` old."""
        now = self._clock()
        then, busy_then, own_then = self._last
        if now - then < INTERVAL_S:
            return self._others
        busy, own = self._busy(), self._own()
        self._last = (now, busy, own)
        if busy is not None and busy_then is not None:
            self._others = max(0.0, ((busy - busy_then) - (own - own_then)) / (now - then))
        return self._others

    def threads(self, n_threads: int) -> int:
        """How many of `n_threads` find a free core; at least one."""
        free = self._n_cores - self.others() + TOLERANCE
        return max(1, min(n_threads, int(free)))
