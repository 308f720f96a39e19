"""A control group with a memory limit for a child process: what a model does on a smaller machine, page cache included.

Works with control groups version 1 (`/sys/fs/cgroup/memory`) and 2, as root or in a group that was delegated to the user.
The group is removed at the end.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from pathlib import Path
from types import TracebackType

from localrun.errors import LocalrunError
from localrun.units import format_size

ROOT = Path("/sys/fs/cgroup")

_HINT = "run it as root, or inside `systemd-run --user --scope -p MemoryMax=BYTES -p MemorySwapMax=0 ...` without this option"


class MemoryLimit:
    """The group, from `with` to its end. Give `folder` to the child, which calls `join` as its first act.

    Raises:
        LocalrunError: this machine or this user can't make such a group.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        parent, self._version = _parent()
        self.folder = parent / f"localrun-{uuid.uuid4().hex[:12]}"

    def __enter__(self) -> MemoryLimit:
        try:
            self.folder.mkdir()
        except OSError as error:
            raise self._error(error) from error
        try:
            if self._version == 1:
                (self.folder / "memory.limit_in_bytes").write_text(str(self._limit_bytes))
            else:
                (self.folder / "memory.max").write_text(str(self._limit_bytes))
                with contextlib.suppress(OSError):  # a kernel without swap accounting has no such file
                    (self.folder / "memory.swap.max").write_text("0")
        except OSError as error:
            self._remove()
            raise self._error(error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def change(self, limit_bytes: int) -> bool:
        """Sets another limit; False: the kernel refuses, because what is in use can't be given back (version 1)."""
        name = "memory.limit_in_bytes" if self._version == 1 else "memory.max"
        try:
            (self.folder / name).write_text(str(limit_bytes))
        except OSError:
            return False
        return True

    def add(self, pid: int) -> None:
        """Moves a process in; what it has used before stays where it was counted."""
        (self.folder / "cgroup.procs").write_text(str(pid))

    def anonymous_bytes(self) -> int:
        """Memory in use that the kernel can't take back without a swap file: all but the page cache."""
        counters = dict(line.split() for line in (self.folder / "memory.stat").read_text().splitlines())
        return int(counters["total_rss" if self._version == 1 else "anon"])

    def peak_bytes(self) -> int | None:
        """Most memory that the group had, page cache included; None if the kernel does not say."""
        for name in ("memory.max_usage_in_bytes", "memory.peak"):
            with contextlib.suppress(OSError, ValueError):
                return int((self.folder / name).read_text())
        return None

    def out_of_memory_kills(self) -> int:
        """Processes of the group that the kernel killed."""
        for name in ("memory.oom_control", "memory.events"):
            with contextlib.suppress(OSError, ValueError):
                fields = dict(line.split() for line in (self.folder / name).read_text().splitlines())
                return int(fields.get("oom_kill", 0))
        return 0

    def _remove(self) -> None:
        for _ in range(50):
            try:
                self.folder.rmdir()
                return
            except FileNotFoundError:
                return
            except OSError:  # EBUSY until the last process is reaped
                time.sleep(0.1)

    def _error(self, error: OSError) -> LocalrunError:
        return LocalrunError(
            f"{self.folder}: can't make a control group limited to {format_size(self._limit_bytes)}: {error.strerror}",
            hint=_HINT,
        )


def join(folder: Path) -> None:
    """Puts the calling process into the group."""
    (folder / "cgroup.procs").write_text(str(os.getpid()))


def leave(folder: Path) -> None:
    """Takes the calling process out of the group, into the one above."""
    join(folder.parent)


def _parent() -> tuple[Path, int]:
    """Where groups with a memory limit can be made, and the version of control groups there."""
    own = _own_groups()
    if "memory" in own and (ROOT / "memory" / "memory.limit_in_bytes").exists():
        folder = ROOT / "memory" / own["memory"].lstrip("/")
        return (folder if folder.is_dir() else ROOT / "memory"), 1
    root = ROOT / "unified" if (ROOT / "unified").is_dir() else ROOT
    folder = root / own.get("", "/").lstrip("/")
    # Version 2: a group may limit its children, or hold processes, not both; so the way leads upwards from our own.
    while folder.is_relative_to(root):
        with contextlib.suppress(OSError):
            if "memory" in (folder / "cgroup.subtree_control").read_text().split():
                return folder, 2
        folder = folder.parent
    raise LocalrunError("this machine has no control groups that limit memory", hint=_HINT)


def _own_groups() -> dict[str, str]:
    """Controller -> path of this process's group; the unified hierarchy under an empty name (cgroups(7))."""
    groups = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            for controller in controllers.split(","):
                groups[controller] = path
    return groups
