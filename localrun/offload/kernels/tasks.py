"""Splits a call into tasks for several threads: quantize activations, gate and up with SwiGLU, down.

All tasks of a window of experts are in one list, ordered so that each task's inputs come from earlier tasks; threads take them
in order and wait (rarely) until the inputs are complete. So a window is published once, and threads that arrive late or not at
all cost time, never correctness (`threads`).

Records are those of `layouts`, the same for Python and compiled callers. A job is up to `JOB_PAIRS` (token,
expert) pairs of one expert, cut into tiles of at most 16 tokens.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numba as nb
import numpy as np
import numpy.typing as npt

from localrun.alignment import LINE_BYTES, align_up, ceil_div
from localrun.kernel_cache import cached_cfunc
from localrun.offload.kernels import threads
from localrun.offload.kernels.activations import swiglu16
from localrun.offload.kernels.layouts import CALL, JOB, MATRIX
from localrun.offload.kernels.lowlevel import (
    atomic_add,
    atomic_load,
    blocks_of,
    call_0,
    call_9,
    call_i64,
    copy,
    float_of_bits,
    load_i32,
    load_i64,
    rounded_up,
    stack,
    store_i32,
)
from localrun.offload.kernels.panels import SUPER256, Panel, clear_token, fill_panel
from localrun.offload.kernels.records import Record, get, put
from localrun.offload.kernels.threads import run_tasks
from localrun.offload.kernels.workspace import workspace

JOB_PAIRS: Final = 256
"""Pairs of one expert computed together: their activations stay in a core's L2."""
WINDOW_PAIRS: Final = 1024
"""Padded pairs of a window, which bounds the scratch: 8 MiB at D = 4096 and F = 2048."""
MAX_JOBS: Final = 256
ROW_BLOCK: Final = 64
"""Least rows per task."""
MOST_ROWS: Final = 256
"""Most rows per task: every task begins with reads that nothing has prefetched, so large ones are better while all threads have
enough of them. Also the unit of gate and up tasks where the down projection takes activations in groups of 256."""

_QUANTIZE, _ACTIVATE, _PROJECT = range(3)


@nb.njit(inline="always")
def _matrix(call: int, which: int) -> int:
    return call + (CALL.matrices + which * MATRIX.size) * 8


@nb.njit
def _tile_size(n: int) -> int:
    """The smallest compiled tile that holds n tokens."""
    if n > 12:
        return 16
    if n > 8:
        return 12
    if n > 4:
        return 8
    if n > 2:
        return 4
    return n


@nb.njit
def _panel_bytes(matrix: int, n_tokens: int) -> int:
    """Bytes of a panel of n tokens, the last tile filled up."""
    units = blocks_of(get(matrix, MATRIX.n_in), get(matrix, MATRIX.unit))
    padded = n_tokens // 16 * 16 + _tile_size(n_tokens % 16)
    return int(rounded_up(units * get(matrix, MATRIX.unit_bytes) * padded, 64))


@nb.njit
def _same_panel(a: int, b: int) -> bool:
    return bool(get(a, MATRIX.kind) == get(b, MATRIX.kind) and get(a, MATRIX.aux) == get(b, MATRIX.aux))


@nb.njit
def _rows_per_task(call: int, rows: int, least: int) -> int:
    """Largest block with which a stage of `rows` rows in all still gives every thread eight tasks."""
    block = MOST_ROWS
    while block > least and rows < block * 8 * get(call, CALL.threads):
        block //= 2
    return block


# -- the task list ----------------------------------------------------------------------------------------------------


@nb.njit
def _add_job(call: int, n_jobs: int, slot: int, pair: int, n_pairs: int, panels: int) -> int:
    """Fills in a job; returns the end of its panels."""
    job = get(call, CALL.jobs) + n_jobs * JOB.size * 8
    put(job, JOB.slot, slot)
    put(job, JOB.pair, pair)
    put(job, JOB.n_pairs, n_pairs)
    put(job, JOB.n_tiles, blocks_of(n_pairs, 16))
    put(job, JOB.quantized, 0)
    put(job, JOB.activated, 0)
    for which in range(3):
        put(job, JOB.panel + which, panels)
        if which == 0 and get(call, CALL.matrix_only) == 0 and _same_panel(_matrix(call, 0), _matrix(call, 1)):
            continue  # up reads gate's panel
        if which == 2 or get(call, CALL.matrix_only) == 0:
            panels += _panel_bytes(_matrix(call, which), n_pairs)
    return panels


@nb.njit
def _add_tasks(tasks: int, n_tasks: int, job: int, stage: int, count: int) -> int:
    for i in range(count):
        store_i32(tasks + (n_tasks + i) * 8, job * 4 + stage)
        store_i32(tasks + (n_tasks + i) * 8 + 4, i)
    return n_tasks + count


@nb.njit
def next_window(call: int) -> bool:
    """Lists the jobs and tasks of the next experts; False when all pairs are done."""
    expert, pair, n_experts = get(call, CALL.expert), get(call, CALL.pair), get(call, CALL.n_experts)
    starts, slots, tasks = get(call, CALL.starts), get(call, CALL.slots), get(call, CALL.tasks)
    n_jobs, n_pairs, panels = 0, 0, get(call, CALL.panels)
    while expert < n_experts and n_jobs < MAX_JOBS:
        left = load_i32(starts + expert * 4 + 4) - pair
        if left <= 0:
            expert += 1
            continue
        take = min(left, JOB_PAIRS)
        padded = take // 16 * 16 + _tile_size(take % 16)
        if n_pairs + padded > WINDOW_PAIRS:
            break
        panels = _add_job(call, n_jobs, load_i64(slots + expert * 8), pair, take, panels)
        n_jobs, n_pairs, pair = n_jobs + 1, n_pairs + padded, pair + take
    put(call, CALL.expert, expert)
    put(call, CALL.pair, pair)
    # Stages of neighbouring jobs alternate, so that a stage's inputs were begun a whole stage earlier.
    n_up, n_down = get(_matrix(call, 0), MATRIX.n_out), get(_matrix(call, 2), MATRIX.n_out)
    least = MOST_ROWS if get(_matrix(call, 2), MATRIX.kind) == SUPER256 else ROW_BLOCK
    up_rows, down_rows = _rows_per_task(call, n_up * n_jobs, least), _rows_per_task(call, n_down * n_jobs, ROW_BLOCK)
    put(call, CALL.up_rows, up_rows)
    put(call, CALL.down_rows, down_rows)
    down_blocks = blocks_of(n_down, down_rows)
    activate_blocks, delay = 0, 1
    if get(call, CALL.matrix_only) == 0:
        activate_blocks, delay = blocks_of(n_up, up_rows), 2
    n_tasks = 0
    for step in range(n_jobs + delay):
        if step < n_jobs:
            n_tasks = _add_tasks(
                tasks, n_tasks, step, _QUANTIZE, get(get(call, CALL.jobs) + step * JOB.size * 8, JOB.n_tiles)
            )
        if 1 <= step <= n_jobs:
            n_tasks = _add_tasks(tasks, n_tasks, step - 1, _ACTIVATE, activate_blocks)
        if step >= delay:
            n_tasks = _add_tasks(tasks, n_tasks, step - delay, _PROJECT, down_blocks)
    put(call, CALL.n_tasks, n_tasks)
    return n_jobs > 0


# -- the stages -------------------------------------------------------------------------------------------------------


@nb.njit
def _tile_panel(job: int, matrix: int, which: int, tile: int) -> int:
    units = blocks_of(get(matrix, MATRIX.n_in), get(matrix, MATRIX.unit))
    return int(get(job, JOB.panel + which) + tile * 16 * units * get(matrix, MATRIX.unit_bytes))


@nb.njit
def _quantize_tile(call: int, job: int, which: int, tile: int) -> None:
    matrix = _matrix(call, which)
    n_in, kind = get(matrix, MATRIX.n_in), get(matrix, MATRIX.kind)
    used = min(16, get(job, JOB.n_pairs) - tile * 16)
    nt, panel = _tile_size(used), _tile_panel(job, matrix, which, tile)
    x_rows = get(call, CALL.x_rows) + (get(job, JOB.pair) + tile * 16) * 4
    for t in range(used):
        source = get(call, CALL.x) + load_i32(x_rows + t * 4) * get(call, CALL.x_stride)
        fill_panel(kind, get(matrix, MATRIX.aux), source, n_in, panel, 0, t, nt)
    for t in range(used, nt):
        clear_token(kind, panel, blocks_of(n_in, get(matrix, MATRIX.unit)), t, nt)


@nb.njit
def _rows(matrix: int, slot: int, row: int, n_rows: int, panel: int, nt: int, out: int, out_stride: int) -> None:
    address, extra, n_in = slot + get(matrix, MATRIX.offset), get(matrix, MATRIX.extra), get(matrix, MATRIX.n_in)
    call_9(get(matrix, MATRIX.rows), address, extra, row, n_rows, n_in, panel, nt, out, out_stride)


@nb.njit
def _activate_rows(call: int, job: int, row: int, n_rows: int, gates: int, ups: int) -> None:
    """Rows of gate and up for all tiles, SwiGLU, and the result into the down projection's panel."""
    gate, up, down = _matrix(call, 0), _matrix(call, 1), _matrix(call, 2)
    slot, limit, stride = (
        get(job, JOB.slot),
        float_of_bits(np.int32(get(call, CALL.limit_bits))),
        blocks_of(n_rows, 16) * 64,
    )
    for tile in range(get(job, JOB.n_tiles)):
        nt = _tile_size(min(16, get(job, JOB.n_pairs) - tile * 16))
        _rows(gate, slot, row, n_rows, _tile_panel(job, gate, 0, tile), nt, gates, stride)
        _rows(up, slot, row, n_rows, _tile_panel(job, up, 1, tile), nt, ups, stride)
        target = _tile_panel(job, down, 2, tile)
        for t in range(nt):
            for offset in range(t * stride, (t + 1) * stride, 64):  # rows are filled up to a multiple of 16
                swiglu16(gates + offset, ups + offset, limit)
            fill_panel(get(down, MATRIX.kind), get(down, MATRIX.aux), gates + t * stride, n_rows, target, row, t, nt)


@nb.njit
def _project_rows(call: int, job: int, row: int, n_rows: int, buffer: int) -> None:
    """Rows of the down projection for all tiles, into the output rows."""
    down, stride = _matrix(call, 2), blocks_of(n_rows, 16) * 64
    for tile in range(get(job, JOB.n_tiles)):
        used = min(16, get(job, JOB.n_pairs) - tile * 16)
        _rows(down, get(job, JOB.slot), row, n_rows, _tile_panel(job, down, 2, tile), _tile_size(used), buffer, stride)
        out_rows = get(call, CALL.out_rows) + (get(job, JOB.pair) + tile * 16) * 4
        for t in range(used):
            target = get(call, CALL.out) + load_i32(out_rows + t * 4) * get(call, CALL.out_stride) + row * 4
            copy(target, buffer + t * stride, n_rows * 4)


@nb.njit
def _wait(call: int, counter: int, target: int) -> None:
    spins = 0
    while atomic_load(counter) < target:
        spins += 1
        if spins % 1024 == 0 and get(call, CALL.sched_yield):
            call_0(get(call, CALL.sched_yield))


@nb.njit
def _run_task(call: int, job: int, stage: int, index: int, gates: int, ups: int) -> None:
    if stage == _QUANTIZE:
        if get(call, CALL.matrix_only):
            _quantize_tile(call, job, 2, index)
        else:
            _quantize_tile(call, job, 0, index)
            if get(job, JOB.panel) != get(job, JOB.panel + 1):
                _quantize_tile(call, job, 1, index)
        atomic_add(job + JOB.quantized * 8, 1)
    elif stage == _ACTIVATE:
        _wait(call, job + JOB.quantized * 8, get(job, JOB.n_tiles))
        row, up_rows = index * get(call, CALL.up_rows), get(call, CALL.up_rows)
        _activate_rows(call, job, row, min(up_rows, get(_matrix(call, 0), MATRIX.n_out) - row), gates, ups)
        atomic_add(job + JOB.activated * 8, 1)
    else:
        if get(call, CALL.matrix_only):
            _wait(call, job + JOB.quantized * 8, get(job, JOB.n_tiles))
        else:
            blocks = blocks_of(get(_matrix(call, 0), MATRIX.n_out), get(call, CALL.up_rows))
            _wait(call, job + JOB.activated * 8, blocks)
        row, down_rows = index * get(call, CALL.down_rows), get(call, CALL.down_rows)
        _project_rows(call, job, row, min(down_rows, get(_matrix(call, 2), MATRIX.n_out) - row), gates)


@cached_cfunc("int64(intp, intp)")
def _task(call: int, ticket: int) -> int:
    """One task by its number in the list."""
    gates, ups = stack(16384), stack(16384)  # 256 rows x 16 tokens of f32
    task = get(call, CALL.tasks) + ticket * 8
    code = load_i32(task)
    _run_task(call, get(call, CALL.jobs) + code // 4 * JOB.size * 8, code % 4, load_i32(task + 4), gates, ups)
    return 0


@cached_cfunc("void(intp)")
def _run(call: int) -> None:
    """A whole call; `CALL.expert` must be 0 and `CALL.pair` `starts[0]`."""
    while next_window(call):
        task, n_tasks = get(call, CALL.task), get(call, CALL.n_tasks)
        if get(call, CALL.pool) != 0:
            run_tasks(get(call, CALL.pool), task, call, n_tasks, get(call, CALL.threads))
        else:
            for ticket in range(n_tasks):
                call_i64(task, call, ticket)


class Runner:
    """Runs calls."""

    def __init__(self) -> None:
        self.run_address, self.task_address = int(_run.address), int(_task.address)
        self.sched_yield = ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p).value or 0
        self._run = ctypes.CFUNCTYPE(None, ctypes.c_int64)(self.run_address)

    def __call__(self, call: KernelCall) -> None:
        """Computes a filled-in call; the interpreter lock is free meanwhile."""
        self._run(call.address)


@functools.cache
def runner() -> Runner:
    """The process's runner; compiles or loads the driver on first use."""
    return Runner()


@dataclass(frozen=True, slots=True)
class Matrix:
    """One projection as the driver sees it: who multiplies its rows, where it lies in the slot, what activations it takes."""

    rows_address: int
    extra: int
    offset: int
    n_in: int
    n_out: int
    panel: Panel

    def record(self) -> Record:
        """Its MATRIX fields."""
        panel = self.panel
        return MATRIX.make(
            rows=self.rows_address,
            extra=self.extra,
            offset=self.offset,
            n_in=self.n_in,
            n_out=self.n_out,
            kind=panel.kind,
            aux=panel.offset,
            unit=panel.unit,
            unit_bytes=panel.unit_bytes,
        )

    def panel_bytes(self) -> int:
        """Scratch that a window's activations of this matrix need at most."""
        return ceil_div(self.n_in, self.panel.unit) * self.panel.unit_bytes * WINDOW_PAIRS + 64 * MAX_JOBS


_BATCH: Final = CALL.span(
    *(
        "n_experts",
        "slots",
        "starts",
        "x_rows",
        "out_rows",
        "x",
        "x_stride",
        "out",
        "out_stride",
        "jobs",
        "tasks",
        "panels",
    )
)


class KernelCall:
    """Arguments of one kind of call: three projections of a spec, or one matrix alone. Reused from call to call, by one thread."""

    def __init__(self, matrices: Sequence[Matrix], *, limit: float = math.inf, n_threads: int) -> None:
        run = runner()
        self.n_threads = n_threads
        self._fields = CALL.empty()
        self.address = int(self._fields.ctypes.data)
        alone = len(matrices) == 1
        CALL.fill(
            self._fields,
            threads=n_threads,
            matrix_only=alone,
            limit_bits=int(np.float32(limit).view(np.int32)),
            sched_yield=run.sched_yield,
            pool=threads.pool_for(n_threads),
            task=run.task_address,
        )
        for which, matrix in enumerate(matrices):
            at = CALL.matrices + (2 if alone else which) * MATRIX.size
            self._fields[at : at + MATRIX.size] = matrix.record()
        blocks = 16 + sum(ceil_div(m.n_out, ROW_BLOCK) for m in (matrices if alone else (matrices[0], matrices[2])))
        self.jobs_bytes = MAX_JOBS * JOB.size * 8
        self.tasks_bytes = align_up(MAX_JOBS * blocks * 8, LINE_BYTES)
        self.scratch_bytes = self.jobs_bytes + self.tasks_bytes + sum(m.panel_bytes() for m in matrices)

    def __call__(
        self,
        slots: npt.NDArray[np.uint64],
        starts: npt.NDArray[np.int32],
        x_rows: npt.NDArray[np.int32],
        out_rows: npt.NDArray[np.int32],
        x: npt.NDArray[np.float32],
        out: npt.NDArray[np.float32],
    ) -> None:
        """See `FfnKernel.run`."""
        assert x.dtype == out.dtype == np.float32
        assert starts.dtype == x_rows.dtype == out_rows.dtype == np.int32
        assert slots.dtype.itemsize == 8
        assert starts.size == slots.size + 1
        scratch = workspace(self.scratch_bytes)
        self._fields[_BATCH] = (
            slots.size, address_of(slots), address_of(starts), address_of(x_rows), address_of(out_rows),
            address_of(x), x.strides[0], address_of(out), out.strides[0],
            scratch, scratch + self.jobs_bytes, scratch + self.jobs_bytes + self.tasks_bytes,
        )  # fmt: skip
        self._fields[CALL.expert], self._fields[CALL.pair] = 0, starts[0]
        runner()(self)


def address_of(array: npt.NDArray[Any]) -> int:
    """As `array.ctypes.data`, without building a ctypes object."""
    return int(array.__array_interface__["data"][0])
