"""How many cores other programs leave us: llama.cpp's own operations are computed by no more threads than that.

llama.cpp's threads meet after every node of the graph, some thousand times a token. Where another program computes on a core, the
thread there comes a scheduler's time slice late each time, and all wait for it: a token takes seconds instead of a tenth of one.
With a thread less there is nobody to wait for. (Our kernels don't wait for idle threads, see `offload/kernels/threads`.)

Programs of lower priority (`nice`) give way to us and are not counted.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection
from pathlib import Path

_STAT = Path("/proc/stat")

INTERVAL_S = 0.25
"""Between two looks: /proc/stat counts in hundredths of a second."""

TOLERANCE = 0.35
"""Share of a core that others may use before it counts as taken: a desktop's idle programs, the kernel's own threads."""


def cores() -> frozenset[int]:
    """The CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def busy_seconds(cpus: Collection[int], stat: Path = _STAT) -> float | None:
    """Seconds that these CPUs have spent since boot on programs of ordinary or higher priority, on the kernel's work and on other
    machines (steal); None where the system does not tell.

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
            user, _, system, _, _, irq, softirq, steal = map(int, values[:8])
            ticks += user + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK")


class Company:
    """Watches what other programs use. Not thread-safe: one owner asks, between two decodes."""

    def __init__(
        self,
        *,
        busy: Callable[[], float | None] | None = None,
        own: Callable[[], float] = time.process_time,
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
        """Of `n_threads`, as many as find a core of their own; at least one."""
        free = self._n_cores - self.others() + TOLERANCE
        return max(1, min(n_threads, int(free)))
