"""One call's work as tasks for several threads: quantize activations, gate and up with SwiGLU, down.

All tasks of a window of experts stand in one list, in an order in which each task's inputs come from tasks before it; threads
take them one after another and wait (rarely) until the inputs are complete. So a call is a single parallel region, and threads
that come late or not at all cost time, never correctness.

The region runs on OpenMP's pool (`GOMP_parallel` of the libgomp that ggml uses too), not on numba's: a second pool would compete
with ggml's spinning threads. [m] Starting two threads takes 2-4 us, numba's `prange` milliseconds while other processes compute.

Structures are int64 arrays, the same for Python and compiled callers; `C_...` are a call's fields, `M_...` a matrix's, `J_...`
a job's. A job is up to `JOB_PAIRS` (token, expert) pairs of one expert, cut into tiles of at most 16 tokens.
"""

from __future__ import annotations

import ctypes
import functools
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numba as nb
import numpy as np
import numpy.typing as npt

from localrun.alignment import ceil_div
from localrun.kernel_cache import cached_cfunc
from localrun.offload.kernels.activations import swiglu16
from localrun.offload.kernels.lowlevel import (
    atomic_add,
    atomic_load,
    call_0,
    call_1,
    call_4,
    call_9,
    copy,
    float_of_bits,
    load_i32,
    load_i64,
    stack,
    store_i32,
    store_i64,
)
from localrun.offload.kernels.panels import SUPER256, Panel, clear_token, fill_panel
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

# A call: threads, 1 if only `down` is applied to x, clamp; batch as in FfnKernel.run; scratch; work in progress; function addresses
C_THREADS, C_MATRIX_ONLY, C_LIMIT_BITS, C_N_EXPERTS, C_SLOTS, C_STARTS, C_X_ROWS, C_OUT_ROWS = range(8)
C_X, C_X_STRIDE, C_OUT, C_OUT_STRIDE, C_JOBS, C_TASKS, C_PANELS, C_TICKET, C_N_TASKS = range(8, 17)
C_EXPERT, C_PAIR, C_UP_ROWS, C_DOWN_ROWS, C_YIELD, C_GOMP_PARALLEL, C_WORKER, C_MATRICES = range(17, 25)
# A matrix: row kernel and its extra argument, offset in the slot, shape, activation panel
M_ROWS, M_EXTRA, M_OFFSET, M_N_IN, M_N_OUT, M_KIND, M_AUX, M_UNIT, M_UNIT_BYTES, M_FIELDS = range(10)
CALL_FIELDS: Final = C_MATRICES + 3 * M_FIELDS
# A job: expert's slot, pairs, panels of gate, up and down inputs, counters of finished tasks
J_SLOT, J_PAIR, J_N_PAIRS, J_N_TILES, J_PANEL, J_QUANTIZED, J_ACTIVATED, J_FIELDS = 0, 1, 2, 3, 4, 7, 8, 9

_QUANTIZE, _ACTIVATE, _PROJECT = range(3)


@nb.njit(inline="always")
def _matrix(call: int, which: int) -> int:
    return call + (C_MATRICES + which * M_FIELDS) * 8


@nb.njit(inline="always")
def _get(structure: int, field: int) -> int:
    return load_i64(structure + field * 8)


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
    units = (_get(matrix, M_N_IN) + _get(matrix, M_UNIT) - 1) // _get(matrix, M_UNIT)
    padded = n_tokens // 16 * 16 + _tile_size(n_tokens % 16)
    return int((units * _get(matrix, M_UNIT_BYTES) * padded + 63) // 64 * 64)


@nb.njit
def _same_panel(a: int, b: int) -> bool:
    return bool(_get(a, M_KIND) == _get(b, M_KIND) and _get(a, M_AUX) == _get(b, M_AUX))


@nb.njit
def _rows_per_task(call: int, rows: int, least: int) -> int:
    """Largest block with which a stage of `rows` rows in all still gives every thread eight tasks."""
    block = MOST_ROWS
    while block > least and rows < block * 8 * _get(call, C_THREADS):
        block //= 2
    return block


# -- the task list ----------------------------------------------------------------------------------------------------


@nb.njit
def _add_job(call: int, n_jobs: int, slot: int, pair: int, n_pairs: int, panels: int) -> int:
    """Fills in a job; returns the end of its panels."""
    job = _get(call, C_JOBS) + n_jobs * J_FIELDS * 8
    store_i64(job + J_SLOT * 8, slot)
    store_i64(job + J_PAIR * 8, pair)
    store_i64(job + J_N_PAIRS * 8, n_pairs)
    store_i64(job + J_N_TILES * 8, (n_pairs + 15) // 16)
    store_i64(job + J_QUANTIZED * 8, 0)
    store_i64(job + J_ACTIVATED * 8, 0)
    for which in range(3):
        store_i64(job + (J_PANEL + which) * 8, panels)
        if which == 0 and _get(call, C_MATRIX_ONLY) == 0 and _same_panel(_matrix(call, 0), _matrix(call, 1)):
            continue  # up reads gate's panel
        if which == 2 or _get(call, C_MATRIX_ONLY) == 0:
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
    expert, pair, n_experts = _get(call, C_EXPERT), _get(call, C_PAIR), _get(call, C_N_EXPERTS)
    starts, slots, tasks = _get(call, C_STARTS), _get(call, C_SLOTS), _get(call, C_TASKS)
    n_jobs, n_pairs, panels = 0, 0, _get(call, C_PANELS)
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
    store_i64(call + C_EXPERT * 8, expert)
    store_i64(call + C_PAIR * 8, pair)
    # Stages of neighbouring jobs alternate, so that a stage's inputs were begun a whole stage earlier.
    n_up, n_down = _get(_matrix(call, 0), M_N_OUT), _get(_matrix(call, 2), M_N_OUT)
    least = MOST_ROWS if _get(_matrix(call, 2), M_KIND) == SUPER256 else ROW_BLOCK
    up_rows, down_rows = _rows_per_task(call, n_up * n_jobs, least), _rows_per_task(call, n_down * n_jobs, ROW_BLOCK)
    store_i64(call + C_UP_ROWS * 8, up_rows)
    store_i64(call + C_DOWN_ROWS * 8, down_rows)
    down_blocks = (n_down + down_rows - 1) // down_rows
    activate_blocks, delay = 0, 1
    if _get(call, C_MATRIX_ONLY) == 0:
        activate_blocks, delay = (n_up + up_rows - 1) // up_rows, 2
    n_tasks = 0
    for step in range(n_jobs + delay):
        if step < n_jobs:
            n_tasks = _add_tasks(
                tasks, n_tasks, step, _QUANTIZE, _get(_get(call, C_JOBS) + step * J_FIELDS * 8, J_N_TILES)
            )
        if 1 <= step <= n_jobs:
            n_tasks = _add_tasks(tasks, n_tasks, step - 1, _ACTIVATE, activate_blocks)
        if step >= delay:
            n_tasks = _add_tasks(tasks, n_tasks, step - delay, _PROJECT, down_blocks)
    store_i64(call + C_TICKET * 8, 0)
    store_i64(call + C_N_TASKS * 8, n_tasks)
    return n_jobs > 0


# -- the stages -------------------------------------------------------------------------------------------------------


@nb.njit
def _tile_panel(job: int, matrix: int, which: int, tile: int) -> int:
    units = (_get(matrix, M_N_IN) + _get(matrix, M_UNIT) - 1) // _get(matrix, M_UNIT)
    return int(_get(job, J_PANEL + which) + tile * 16 * units * _get(matrix, M_UNIT_BYTES))


@nb.njit
def _quantize_tile(call: int, job: int, which: int, tile: int) -> None:
    matrix = _matrix(call, which)
    n_in, kind = _get(matrix, M_N_IN), _get(matrix, M_KIND)
    used = min(16, _get(job, J_N_PAIRS) - tile * 16)
    nt, panel = _tile_size(used), _tile_panel(job, matrix, which, tile)
    x_rows = _get(call, C_X_ROWS) + (_get(job, J_PAIR) + tile * 16) * 4
    for t in range(used):
        source = _get(call, C_X) + load_i32(x_rows + t * 4) * _get(call, C_X_STRIDE)
        fill_panel(kind, _get(matrix, M_AUX), source, n_in, panel, 0, t, nt)
    for t in range(used, nt):
        clear_token(kind, panel, (n_in + _get(matrix, M_UNIT) - 1) // _get(matrix, M_UNIT), t, nt)


@nb.njit
def _rows(matrix: int, slot: int, row: int, n_rows: int, panel: int, nt: int, out: int, out_stride: int) -> None:
    call_9(_get(matrix, M_ROWS), slot + _get(matrix, M_OFFSET), _get(matrix, M_EXTRA), row, n_rows, _get(matrix, M_N_IN), panel, nt,
           out, out_stride)  # fmt: skip


@nb.njit
def _activate_rows(call: int, job: int, row: int, n_rows: int, gates: int, ups: int) -> None:
    """Rows of gate and up for all tiles, SwiGLU, and the result into the down projection's panel."""
    gate, up, down = _matrix(call, 0), _matrix(call, 1), _matrix(call, 2)
    slot, limit, stride = _get(job, J_SLOT), float_of_bits(np.int32(_get(call, C_LIMIT_BITS))), (n_rows + 15) // 16 * 64
    for tile in range(_get(job, J_N_TILES)):
        nt = _tile_size(min(16, _get(job, J_N_PAIRS) - tile * 16))
        _rows(gate, slot, row, n_rows, _tile_panel(job, gate, 0, tile), nt, gates, stride)
        _rows(up, slot, row, n_rows, _tile_panel(job, up, 1, tile), nt, ups, stride)
        target = _tile_panel(job, down, 2, tile)
        for t in range(nt):
            for offset in range(t * stride, (t + 1) * stride, 64):  # rows are filled up to a multiple of 16
                swiglu16(gates + offset, ups + offset, limit)
            fill_panel(_get(down, M_KIND), _get(down, M_AUX), gates + t * stride, n_rows, target, row, t, nt)


@nb.njit
def _project_rows(call: int, job: int, row: int, n_rows: int, buffer: int) -> None:
    """Rows of the down projection for all tiles, into the output rows."""
    down, stride = _matrix(call, 2), (n_rows + 15) // 16 * 64
    for tile in range(_get(job, J_N_TILES)):
        used = min(16, _get(job, J_N_PAIRS) - tile * 16)
        _rows(down, _get(job, J_SLOT), row, n_rows, _tile_panel(job, down, 2, tile), _tile_size(used), buffer, stride)
        out_rows = _get(call, C_OUT_ROWS) + (_get(job, J_PAIR) + tile * 16) * 4
        for t in range(used):
            target = _get(call, C_OUT) + load_i32(out_rows + t * 4) * _get(call, C_OUT_STRIDE) + row * 4
            copy(target, buffer + t * stride, n_rows * 4)


@nb.njit
def _wait(call: int, counter: int, target: int) -> None:
    spins = 0
    while atomic_load(counter) < target:
        spins += 1
        if spins % 1024 == 0 and _get(call, C_YIELD):
            call_0(_get(call, C_YIELD))


@nb.njit
def _run_task(call: int, job: int, stage: int, index: int, gates: int, ups: int) -> None:
    if stage == _QUANTIZE:
        if _get(call, C_MATRIX_ONLY):
            _quantize_tile(call, job, 2, index)
        else:
            _quantize_tile(call, job, 0, index)
            if _get(job, J_PANEL) != _get(job, J_PANEL + 1):
                _quantize_tile(call, job, 1, index)
        atomic_add(job + J_QUANTIZED * 8, 1)
    elif stage == _ACTIVATE:
        _wait(call, job + J_QUANTIZED * 8, _get(job, J_N_TILES))
        row, up_rows = index * _get(call, C_UP_ROWS), _get(call, C_UP_ROWS)
        _activate_rows(call, job, row, min(up_rows, _get(_matrix(call, 0), M_N_OUT) - row), gates, ups)
        atomic_add(job + J_ACTIVATED * 8, 1)
    else:
        if _get(call, C_MATRIX_ONLY):
            _wait(call, job + J_QUANTIZED * 8, _get(job, J_N_TILES))
        else:
            blocks = (_get(_matrix(call, 0), M_N_OUT) + _get(call, C_UP_ROWS) - 1) // _get(call, C_UP_ROWS)
            _wait(call, job + J_ACTIVATED * 8, blocks)
        row, down_rows = index * _get(call, C_DOWN_ROWS), _get(call, C_DOWN_ROWS)
        _project_rows(call, job, row, min(down_rows, _get(_matrix(call, 2), M_N_OUT) - row), gates)


@cached_cfunc("void(intp)")
def _worker(call: int) -> None:
    """Takes tasks until none is left; every thread of a region runs this."""
    gates, ups = stack(16384), stack(16384)  # 256 rows x 16 tokens of f32
    n_tasks = _get(call, C_N_TASKS)
    while True:
        ticket = atomic_add(call + C_TICKET * 8, 1)
        if ticket >= n_tasks:
            return
        task = _get(call, C_TASKS) + ticket * 8
        code = load_i32(task)
        _run_task(call, _get(call, C_JOBS) + code // 4 * J_FIELDS * 8, code % 4, load_i32(task + 4), gates, ups)


@cached_cfunc("intp(intp)")
def _next_window(call: int) -> int:
    return 1 if next_window(call) else 0


@cached_cfunc("void(intp)")
def _run(call: int) -> None:
    """A whole call; `C_EXPERT` must be 0 and `C_PAIR` `starts[0]`."""
    while next_window(call):
        if _get(call, C_THREADS) == 1:
            call_1(_get(call, C_WORKER), call)
        else:
            call_4(_get(call, C_GOMP_PARALLEL), _get(call, C_WORKER), call, _get(call, C_THREADS), 0)


class Runner:
    """Runs calls: on OpenMP's pool where libgomp is loaded, else on Python threads."""

    def __init__(self) -> None:
        self.run_address = int(_run.address)
        self.worker_address = int(_worker.address)
        self.gomp_parallel = self._symbol("libgomp.so.1", "GOMP_parallel")
        self.sched_yield = self._symbol(None, "sched_yield")
        prototype = ctypes.CFUNCTYPE(None, ctypes.c_int64)
        self._run, self._worker = prototype(self.run_address), prototype(self.worker_address)
        self._next_window = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(_next_window.address)

    @staticmethod
    def _symbol(library: str | None, name: str) -> int:
        try:
            return ctypes.cast(getattr(ctypes.CDLL(library), name), ctypes.c_void_p).value or 0
        except (OSError, AttributeError, TypeError):
            return 0

    def __call__(self, call: Call) -> None:
        """Computes a filled-in call; the interpreter lock is free meanwhile."""
        if self.gomp_parallel or call.n_threads == 1:
            self._run(call.address)
            return
        while self._next_window(call.address):
            threads = [threading.Thread(target=self._worker, args=(call.address,)) for _ in range(call.n_threads - 1)]
            for thread in threads:
                thread.start()
            self._worker(call.address)
            for thread in threads:
                thread.join()


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

    def fields(self) -> list[int]:
        panel = self.panel
        return [
            self.rows_address,
            self.extra,
            self.offset,
            self.n_in,
            self.n_out,
            panel.kind,
            panel.offset,
            panel.unit,
            panel.unit_bytes,
        ]

    def panel_bytes(self) -> int:
        """Scratch that a window's activations of this matrix need at most."""
        return ceil_div(self.n_in, self.panel.unit) * self.panel.unit_bytes * WINDOW_PAIRS + 64 * MAX_JOBS


class Call:
    """Arguments of one kind of call: three projections of a spec, or one matrix alone. Reused from call to call, by one thread."""

    def __init__(self, matrices: Sequence[Matrix], *, limit: float = math.inf, n_threads: int) -> None:
        run = runner()
        self.n_threads = n_threads
        self._fields = np.zeros(CALL_FIELDS, np.int64)
        self.address = int(self._fields.ctypes.data)
        fields, alone = self._fields, len(matrices) == 1
        fields[C_THREADS], fields[C_MATRIX_ONLY] = n_threads, alone
        fields[C_LIMIT_BITS] = np.float32(limit).view(np.int32)
        fields[C_YIELD], fields[C_GOMP_PARALLEL], fields[C_WORKER] = (
            run.sched_yield,
            run.gomp_parallel,
            run.worker_address,
        )
        for which, matrix in enumerate(matrices):
            at = C_MATRICES + (2 if alone else which) * M_FIELDS
            fields[at : at + M_FIELDS] = matrix.fields()
        blocks = 16 + sum(ceil_div(m.n_out, ROW_BLOCK) for m in (matrices if alone else (matrices[0], matrices[2])))
        self.jobs_bytes = MAX_JOBS * J_FIELDS * 8
        self.tasks_bytes = -(-MAX_JOBS * blocks * 8 // 64) * 64
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
        self._fields[C_N_EXPERTS : C_PANELS + 1] = (
            slots.size, address_of(slots), address_of(starts), address_of(x_rows), address_of(out_rows),
            address_of(x), x.strides[0], address_of(out), out.strides[0],
            scratch, scratch + self.jobs_bytes, scratch + self.jobs_bytes + self.tasks_bytes,
        )  # fmt: skip
        self._fields[C_EXPERT], self._fields[C_PAIR] = 0, starts[0]
        runner()(self)


def address_of(array: npt.NDArray[Any]) -> int:
    """As `array.ctypes.data`, without building a ctypes object."""
    return int(array.__array_interface__["data"][0])
