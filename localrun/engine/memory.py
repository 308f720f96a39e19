"""How much memory and how many cores this process may use: the machine's, or its cgroup's if that is less.

Linux reads /proc and /sys; elsewhere the answers are None or what `os` knows.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from localrun.units import format_size

PROC, SYS = Path("/proc"), Path("/sys")

HEADROOM_BYTES = 2 * 2**30
"""Left to the desktop and the page cache by the automatic choice; at least a tenth of the machine."""

CONTEXT_BYTES = 2**30
"""Set aside for KV cache and compute buffers by the automatic choice."""


def total_memory() -> int | None:
    """Bytes of RAM, or the cgroup's limit if that is less; None if unknown."""
    values = [v for v in (_meminfo("MemTotal"), _cgroup("memory.max")) if v is not None]
    return min(values, default=None)


def available_memory() -> int | None:
    """Bytes that can be allocated without swapping or being killed; None if unknown."""
    values = [v for v in (_meminfo("MemAvailable"), _cgroup_available()) if v is not None]
    return min(values, default=None)


def default_ram_bytes(dense_bytes: int) -> int | None:
    """Budget for expert slots when the user gives none: what is available, less the dense model, context and headroom.

    None if the machine does not say what is available. May be less than a model needs; the loader refuses with numbers.
    """
    available, total = available_memory(), total_memory()
    if available is None or total is None:
        return None
    # On a small machine headroom is a quarter of what is free: a model of a few MB must open anywhere.
    headroom = min(
        CONTEXT_BYTES + max(HEADROOM_BYTES, total // 10), available // 4 if available < 8 * 2**30 else available
    )
    return max(0, available - dense_bytes - headroom)


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


def _cgroup_folder() -> Path | None:
    """This process's folder in the unified (v2) hierarchy."""
    try:
        lines = (PROC / "self/cgroup").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("0::"):
            return SYS / "fs/cgroup" / line[3:].lstrip("/")
    return None


def _cgroup(name: str) -> int | None:
    """The tightest value of `name` from this process's group up to the root; None if there is no limit."""
    folder, values = _cgroup_folder(), []
    while folder is not None and folder.is_relative_to(SYS / "fs/cgroup"):
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            values.append(int((folder / name).read_text()))
        folder = folder.parent
    return min(values, default=None)


def _cgroup_available() -> int | None:
    """Limit less usage, file cache not counted because the kernel gives it back."""
    limit, folder = _cgroup("memory.max"), _cgroup_folder()
    if limit is None or folder is None:
        return None
    try:
        used = int((folder / "memory.current").read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return limit
    return max(0, limit - used + int(stat.get("file", 0)))
