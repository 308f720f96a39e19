"""How a call is cut into jobs and tasks: every pair once, inputs before what needs them, within the scratch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGMLQuantizationType as T

from localrun.offload.kernels import FfnSpec, make_kernel
from localrun.offload.kernels.layouts import CALL, JOB
from localrun.offload.kernels.tasks import (
    JOB_PAIRS,
    MAX_JOBS,
    MOST_ROWS,
    ROW_BLOCK,
    WINDOW_PAIRS,
    KernelCall,
    _tile_size,
    address_of,
    next_window,
)

QUANTIZE, ACTIVATE, PROJECT = range(3)


@pytest.fixture(scope="module")
def kernel() -> Any:
    return make_kernel(FfnSpec((T.Q8_0,) * 3, 256, 512, math.inf), n_threads=2)


class Windows:
    """A call of experts with so many pairs, listed window by window and not computed."""

    def __init__(self, call: KernelCall, counts: list[int]) -> None:
        self.starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        self.slots = np.arange(len(counts), dtype=np.uint64) * 1000 + 5
        self.scratch = np.zeros(call.scratch_bytes + 64, np.uint8)
        base = -(-self.scratch.ctypes.data // 64) * 64
        self.call, fields = call, call._fields
        fields[CALL.n_experts], fields[CALL.slots], fields[CALL.starts] = (
            len(counts),
            address_of(self.slots),
            address_of(self.starts),
        )
        fields[CALL.jobs], fields[CALL.tasks] = base, base + call.jobs_bytes
        fields[CALL.panels] = self.panels = base + call.jobs_bytes + call.tasks_bytes
        fields[CALL.expert], fields[CALL.pair] = 0, 0
        self.end = base + call.scratch_bytes

    def __iter__(self) -> Any:
        while next_window(self.call.address):
            tasks = self.view(self.call._fields[CALL.tasks], 8 * int(self.call._fields[CALL.n_tasks])).view(np.int32)
            codes = tasks.reshape(-1, 2)
            n_jobs = int(codes[:, 0].max()) // 4 + 1
            jobs = (
                self.view(self.call._fields[CALL.jobs], JOB.size * 8 * n_jobs).view(np.int64).reshape(n_jobs, JOB.size)
            )
            yield jobs.copy(), [(int(code) // 4, int(code) % 4, int(index)) for code, index in codes]

    def view(self, address: int, n_bytes: int) -> npt.NDArray[np.uint8]:
        at = int(address) - self.scratch.ctypes.data
        return self.scratch[at : at + n_bytes]


COUNTS = [[1], [0, 3, 0, 16, 17, 0], [700, 1], [0, 0], [5] * 300, [2000, 0, 40]]


@pytest.mark.parametrize("counts", COUNTS, ids=lambda counts: f"{len(counts)} experts, {sum(counts)} pairs")
def test_every_pair_is_in_one_job_and_every_job_has_all_its_tasks(kernel: Any, counts: list[int]) -> None:
    windows = Windows(kernel.call, counts)
    seen: list[tuple[int, int]] = []
    for jobs, tasks in windows:
        assert len(jobs) <= MAX_JOBS
        padded = 0
        for number, job in enumerate(jobs):
            n_pairs = int(job[JOB.n_pairs])
            expert = (int(job[JOB.slot]) - 5) // 1000
            assert windows.starts[expert] <= job[JOB.pair] < windows.starts[expert + 1]
            assert 1 <= n_pairs <= JOB_PAIRS
            seen += [(expert, int(job[JOB.pair]) + i) for i in range(n_pairs)]
            padded += n_pairs // 16 * 16 + _tile_size(n_pairs % 16)
            mine = [(stage, index) for job_, stage, index in tasks if job_ == number]
            assert job[JOB.n_tiles] == -(-n_pairs // 16)
            up_rows, down_rows = (int(kernel.call._fields[at]) for at in (CALL.up_rows, CALL.down_rows))
            assert ROW_BLOCK <= down_rows <= MOST_ROWS
            n_of = {QUANTIZE: int(job[JOB.n_tiles]), ACTIVATE: -(-512 // up_rows), PROJECT: -(-256 // down_rows)}
            # Whoever takes tasks in this order never waits for one that nobody has begun.
            assert mine == [(stage, index) for stage in (QUANTIZE, ACTIVATE, PROJECT) for index in range(n_of[stage])]
            assert windows.panels <= job[JOB.panel] == job[JOB.panel + 1] < job[JOB.panel + 2] < windows.end
        assert padded <= WINDOW_PAIRS
    assert seen == [(e, int(windows.starts[e]) + i) for e, n in enumerate(counts) for i in range(n)]


def test_neighbouring_jobs_alternate(kernel: Any) -> None:
    """A stage's inputs were begun a whole stage earlier, by other threads perhaps."""
    ((_, tasks),) = Windows(kernel.call, [1, 1, 1])
    stages = [(job, stage) for job, stage, _ in tasks]
    assert list(dict.fromkeys(stages)) == [
        (0, QUANTIZE), (1, QUANTIZE), (0, ACTIVATE), (2, QUANTIZE), (1, ACTIVATE), (0, PROJECT), (2, ACTIVATE), (1, PROJECT),
        (2, PROJECT),
    ]  # fmt: skip


def test_tiles_are_those_that_are_compiled() -> None:
    assert [_tile_size(n) for n in (0, 1, 2, 3, 4, 5, 8, 9, 12, 13, 16)] == [0, 1, 2, 4, 4, 8, 8, 12, 12, 16, 16]
