"""Memory and cores available to this process: the machine's, or its cgroup's if lower.

On Linux from /proc and /sys; elsewhere None or whatever `os` provides.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from localrun.errors import BudgetError, UsageError
from localrun.units import format_size

PROC, SYS = Path("/proc"), Path("/sys")

HEADROOM_BYTES = 2 * 2**30
"""Left to the desktop and the page cache by the automatic choice; at least a tenth of the machine."""

_ALWAYS_THREADS = 16
"""Allowed on the smallest machine, too: a script may be written for a larger one."""

CONTEXT_BYTES = 2**30
"""Set aside for KV cache and compute buffers where a model's own are not known: in the chooser's look at what would fit."""


def total_memory() -> int | None:
    """Bytes of RAM, or the cgroup's limit if that is less; None if unknown."""
    values = [v for v in (_meminfo("MemTotal"), _cgroup_limit()) if v is not None]
    return min(values, default=None)


def available_memory() -> int | None:
    """Bytes that can be allocated without swapping or being killed; None if unknown."""
    machine = _meminfo("MemAvailable")
    values = [v for v in (machine, _cgroup_available(machine)) if v is not None]
    return min(values, default=None)


def resident_bytes() -> int:
    """Resident size of this process; 0 if unknown."""
    try:
        pages = int((PROC / "self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGESIZE")


def physical_cores() -> int:
    """Cores, hyper-threads counted once, that this process may run on."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cores = set()
    for cpu in os.sched_getaffinity(0):
        siblings = SYS / f"devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        try:
            cores.add(siblings.read_text().strip())
        except OSError:
            cores.add(str(cpu))
    return len(cores)


def logical_cores() -> int:
    """CPUs that this process may run on, hyper-threads counted."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_threads(n_threads: int) -> None:
    """Raises UsageError for more threads than do any good here, or than the system lets this user start."""
    most = max(_ALWAYS_THREADS, 4 * logical_cores())
    if n_threads > most:
        raise UsageError(
            f"{n_threads} threads on {logical_cores()} CPUs: the maximum is {most}",
            hint=f"leave out --threads: one per physical core ({physical_cores()}) is usually fastest",
        )


def check_ram(ram_bytes: int | None) -> None:
    """Raises BudgetError for a promise larger than the machine, however small the model."""
    total = total_memory()
    if ram_bytes is not None and total is not None and ram_bytes > total:
        raise BudgetError(
            f"--ram {format_size(ram_bytes)}: this machine has {format_size(total)}, of which "
            f"{format_size(available_memory() or 0)} are free",
            hint="lower --ram, or leave it out to use the free RAM",
        )


def describe() -> str:
    """`17.20 GiB of 23.42 GiB available`, for messages."""
    available, total = available_memory(), total_memory()
    if available is None or total is None:
        return "unknown"
    return f"{format_size(available)} of {format_size(total)} available"


def _meminfo(key: str) -> int | None:
    try:
        lines = (PROC / "meminfo").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    return None


@dataclass(frozen=True, slots=True)
class _CgroupFiles:
    """Names of the memory controller's files in one version of cgroups, and of the counters in its `memory.stat`."""

    limits: tuple[str, ...]  # the second one slows a process down until it stands still
    used: str
    cache: str
    shared: str  # tmpfs and the like: counted as cache, but nothing gives it back


_V1 = _CgroupFiles(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_cache", "total_shmem")
_V2 = _CgroupFiles(("memory.max", "memory.high"), "memory.current", "file", "shmem")


def _cgroups() -> Iterator[tuple[Path, _CgroupFiles]]:
    """This process's groups that may limit its memory, from its own up to the root, in both versions' hierarchies."""
    try:
        lines = (PROC / "self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, files = SYS / "fs/cgroup", _V2
        elif "memory" in controllers.split(","):
            root, files = SYS / "fs/cgroup/memory", _V1
        else:
            continue
        # In a container the path may be the host's: what does not exist below the mount is passed over.
        folder = root / path.lstrip("/")
        while folder.is_relative_to(root):
            yield folder, files
            folder = folder.parent


def _cgroup_limit() -> int | None:
    """The tightest limit of all levels; None if there is none. Version 1 reports "none" as a number near 2**63."""
    limits = (_limit(folder, files) for folder, files in _cgroups())
    return min((limit for limit in limits if limit is not None), default=None)


def _limit(folder: Path, files: _CgroupFiles) -> int | None:
    values = (_number(folder / name) for name in files.limits)
    return min((value for value in values if value is not None), default=None)


def _cgroup_available(enough: int | None) -> int | None:
    """The least that a level has left: limit less usage, file cache not counted because the kernel gives it back.

    Args:
        enough: how much more than this is left is of no interest; saves a look at counters of 0.1 ms a level.
    """
    left, used = [], 0
    for folder, files in _cgroups():
        limit, current = _limit(folder, files), _number(folder / files.used)
        if current is not None:
            used = current
            if limit is None or enough is None or limit - current < enough:
                stat = _counters(folder / "memory.stat")
                used -= max(0, stat.get(files.cache, 0) - stat.get(files.shared, 0))
        if limit is not None:
            left.append(max(0, limit - used))
    return min(left, default=None)


def _number(path: Path) -> int | None:
    """None: no such file, or no number in it (`max`)."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _counters(path: Path) -> dict[str, int]:
    try:
        return {name: int(value) for name, value in (line.split() for line in path.read_text().splitlines())}
    except (OSError, ValueError):
        return {}
