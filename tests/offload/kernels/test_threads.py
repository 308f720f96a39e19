"""The kernels' threads: every task runs once, whoever runs it, and nobody is waited for who has none."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading

import numba as nb
import numpy as np
import pytest

from localrun.offload.kernels import threads
from localrun.offload.kernels.lowlevel import atomic_add, call_0, load_i64, store_i64
from localrun.offload.kernels.threads import Pool, run_tasks

pytestmark = pytest.mark.skipif(not threads.is_supported(), reason="the pool needs Linux's futex")

# A call: address of its counters, a function to call in each task (0: none)
COUNTERS, FUNCTION = 0, 8


@nb.cfunc("int64(intp, intp)")
def count(call: int, ticket: int) -> int:
    if load_i64(call + FUNCTION) != 0:
        call_0(load_i64(call + FUNCTION))
    atomic_add(load_i64(call + COUNTERS) + ticket * 8, 1)
    return 0


@nb.njit(nogil=True)
def many_calls(pool: int, task: int, call: int, counters: int, n_calls: int, most_tasks: int, n_threads: int) -> int:
    """Publishes calls of 1 to `most_tasks` tasks one after another; the number of tasks that did not run exactly once."""
    wrong = 0
    for i in range(n_calls):
        n_tasks = 1 + i * 7 % most_tasks
        for ticket in range(most_tasks):
            store_i64(counters + ticket * 8, 0)
        run_tasks(pool, task, call, n_tasks, n_threads)
        for ticket in range(most_tasks):
            if load_i64(counters + ticket * 8) != (1 if ticket < n_tasks else 0):
                wrong += 1
    return wrong


@nb.njit(nogil=True)
def one_call(pool: int, task: int, call: int, n_tasks: int, n_threads: int) -> None:
    run_tasks(pool, task, call, n_tasks, n_threads)


def a_call(n_counters: int, function: int = 0) -> tuple[np.ndarray, np.ndarray]:
    counters = np.zeros(n_counters, np.int64)
    return np.array([counters.ctypes.data, function], np.int64), counters


@pytest.mark.parametrize("n_threads", [1, 2, 5])
def test_every_task_runs_once_call_after_call(n_threads: int) -> None:
    pool = Pool()
    pool.reserve(n_threads)
    call, counters = a_call(40)
    assert many_calls(pool.address, count.address, call.ctypes.data, counters.ctypes.data, 3000, 40, n_threads) == 0


def test_a_thread_that_never_comes_is_not_waited_for() -> None:
    call, counters = a_call(100)
    run_tasks_alone = Pool()  # nobody was reserved: the caller does all
    one_call(run_tasks_alone.address, count.address, call.ctypes.data, 100, 8)
    assert counters.tolist() == [1] * 100


def test_a_call_returns_only_when_the_last_task_of_others_is_done() -> None:
    n_at_once, both_in, went_on = threading.Barrier(2), threading.Event(), []

    @ctypes.CFUNCTYPE(None)
    def meet() -> None:
        n_at_once.wait(300)  # needs two threads inside tasks at the same time
        both_in.set()
        went_on.append(threading.get_ident())

    pool = Pool()
    pool.reserve(2)
    call, counters = a_call(2, ctypes.cast(meet, ctypes.c_void_p).value or 0)
    one_call(pool.address, count.address, call.ctypes.data, 2, 2)
    assert both_in.is_set()
    assert len(set(went_on)) == 2
    assert counters.tolist() == [1, 1]


def test_two_callers_at_once_get_their_own_tasks_done() -> None:
    pool, wrong = Pool(), []
    pool.reserve(3)

    def caller() -> None:
        call, counters = a_call(30)
        many = many_calls(pool.address, count.address, call.ctypes.data, counters.ctypes.data, 2000, 30, 3)
        wrong.append(many)

    callers = [threading.Thread(target=caller) for _ in range(3)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join()
    assert wrong == [0, 0, 0]


def test_threads_that_are_not_wanted_stay_out() -> None:
    seen: set[int] = set()

    @ctypes.CFUNCTYPE(None)
    def note() -> None:
        seen.add(threading.get_ident())

    pool = Pool()
    pool.reserve(6)
    call, counters = a_call(400, ctypes.cast(note, ctypes.c_void_p).value or 0)
    for _ in range(20):
        one_call(pool.address, count.address, call.ctypes.data, 400, 2)
    assert counters.tolist() == [20] * 400
    assert len(seen) <= 2


def test_a_process_ends_while_its_threads_sleep() -> None:
    code = "from localrun.offload.kernels import threads; threads.pool_for(8); print('done')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
