"""What every call of our kernels by compiled code needs: the process's scratch, and its clock."""

from __future__ import annotations

import numba as nb

from localrun.offload.device.layouts import PROCESS
from localrun.offload.kernels.layouts import CALL
from localrun.offload.kernels.lowlevel import call_i32, load_i64
from localrun.offload.kernels.records import get, put


@nb.njit
def now_ns(process: int) -> int:
    """CLOCK_MONOTONIC in nanoseconds."""
    clock_monotonic = (
        1  # <time.h>, Linux; macOS has 6, where the field is only a duration of unknown origin all the same
    )
    call_i32(get(process, PROCESS.clock), clock_monotonic, get(process, PROCESS.timespec))
    timespec = get(process, PROCESS.timespec)
    return load_i64(timespec) * 1_000_000_000 + load_i64(timespec + 8)


@nb.njit
def begin_call(process: int, call: int, jobs_bytes: int, tasks_bytes: int) -> None:
    """Points a call at the process's scratch."""
    scratch = get(process, PROCESS.scratch)
    put(call, CALL.jobs, scratch)
    put(call, CALL.tasks, scratch + jobs_bytes)
    put(call, CALL.panels, scratch + jobs_bytes + tasks_bytes)
    put(call, CALL.expert, 0)
    put(call, CALL.pair, 0)
