"""The kernels' threads: they take tasks of the published call, and no one waits for a thread without a task.

A fork-join region ends when its last thread arrives. If another program occupies a core, that thread may be late by a scheduler
time slice in each of a token's hundreds of regions, although the others could long have done its share. So the calling thread
publishes a call, takes tasks like the others, and continues as soon as all tasks are done: a thread that wakes late finds the
next call's tasks, or none.

This is sound because a claim identifies its call. One 64-bit word holds the published call's number of tasks and the next
ticket; adding 1 claims a ticket and atomically returns the number of tasks. A ticket below that number pins the call: its
fields change only after its last task is done. A ticket at or above it means there is nothing to do.

Linux only (futex); elsewhere, and with one thread, `tasks` does without.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from typing import ClassVar, Final

import numba as nb
import numpy as np
import numpy.typing as npt

from localrun.alignment import LINE_BYTES, align_up
from localrun.kernel_cache import cached_cfunc
from localrun.offload.kernels import futex
from localrun.offload.kernels.lowlevel import (
    atomic_add,
    atomic_exchange,
    atomic_load,
    call_0,
    call_i64,
    load_i64,
    pause,
    store_i64,
)
from localrun.offload.kernels.records import Layout

MAX_THREADS: Final = 255
_TICKET_BITS: Final = 24
_TICKETS: Final = (1 << _TICKET_BITS) - 1
_THREADS_SHIFT: Final = 2 * _TICKET_BITS

_STRIDE: Final = 64
"""Bytes from field to field: each has a cache line of its own."""


class _Pool(Layout):
    """A pool's fields, `_STRIDE` bytes apart."""

    word: int
    """threads << 48 | tasks << 24 | next ticket; the caller publishes, all claim by adding 1."""
    call: int
    """First argument of `task`; the caller writes before it publishes."""
    task: int
    """Address of `int64 f(call, ticket)`; likewise."""
    done: int
    """Tasks of the published call that are done; all add."""
    futex: int
    """Number of publications, whose low 32 bits helpers sleep on."""
    asleep: int
    """Helpers that sleep or are about to."""
    helpers: int
    """Helpers that were started; Python writes."""
    taken: int
    """1 while somebody's call is published."""
    syscall: int
    """Address of libc's function; Python writes once, as the next."""
    sched_yield: int
    """Address of libc's function."""


POOL = _Pool()


@nb.njit(inline="always")
def _at(pool: int, field: int) -> int:
    return pool + field * _STRIDE


@nb.njit
def _take_tasks(pool: int) -> None:
    """Claims and runs tasks until none is left."""
    while True:
        word = atomic_load(_at(pool, POOL.word))
        if word & _TICKETS >= (word >> _TICKET_BITS) & _TICKETS:
            return
        word = atomic_add(_at(pool, POOL.word), 1)
        ticket = word & _TICKETS
        if ticket >= (word >> _TICKET_BITS) & _TICKETS:
            return
        call_i64(load_i64(_at(pool, POOL.task)), load_i64(_at(pool, POOL.call)), ticket)
        atomic_add(_at(pool, POOL.done), 1)


@cached_cfunc("void(intp, intp)")
def _work(pool: int, index: int) -> None:
    """A helping thread, for the rest of the process; the calling thread counts as number 0.

    It sleeps whenever there is nothing to do: llama.cpp computes between our calls, on the same cores.
    """
    while True:
        published = atomic_load(_at(pool, POOL.futex))
        word = atomic_load(_at(pool, POOL.word))
        if word & _TICKETS < (word >> _TICKET_BITS) & _TICKETS and index < word >> _THREADS_SHIFT:
            _take_tasks(pool)
        else:
            atomic_add(_at(pool, POOL.asleep), 1)
            futex.wait(load_i64(_at(pool, POOL.syscall)), _at(pool, POOL.futex), published)
            atomic_add(_at(pool, POOL.asleep), -1)


@nb.njit
def run_tasks(pool: int, task: int, call: int, n_tasks: int, n_threads: int) -> None:
    """Runs `int64 task(call, ticket)` for every ticket below `n_tasks` and returns when all are done.

    Any thread may call; while another one's call is published, it works alone.

    Args:
        pool: `Pool.address`.
        n_threads: most threads that take part, the caller among them.
    """
    if atomic_exchange(_at(pool, POOL.taken), 1) != 0:
        for ticket in range(n_tasks):
            call_i64(task, call, ticket)
        return
    store_i64(_at(pool, POOL.call), call)
    store_i64(_at(pool, POOL.task), task)
    store_i64(_at(pool, POOL.done), 0)
    atomic_exchange(_at(pool, POOL.word), n_threads << _THREADS_SHIFT | n_tasks << _TICKET_BITS)
    atomic_add(_at(pool, POOL.futex), 1)
    wanted = min(n_threads, n_tasks) - 1
    if load_i64(_at(pool, POOL.helpers)) >= n_threads:
        wanted = load_i64(_at(pool, POOL.helpers))  # the kernel picks whom to wake, and some of them have to stay out
    if wanted > 0 and atomic_load(_at(pool, POOL.asleep)) > 0:
        futex.wake(load_i64(_at(pool, POOL.syscall)), _at(pool, POOL.futex), wanted)
    _take_tasks(pool)
    spins = 0
    while atomic_load(_at(pool, POOL.done)) < n_tasks:
        spins += 1
        pause()
        if spins % 256 == 0:
            call_0(load_i64(_at(pool, POOL.sched_yield)))
    atomic_exchange(_at(pool, POOL.taken), 0)


class Pool:
    """Threads that live as long as the process; more are added when a call needs more.

    Threads: any may call `run_tasks`; `reserve` is guarded by a lock.
    """

    _alive: ClassVar[list[npt.NDArray[np.uint8]]] = []
    """Memory of all pools: their threads use it until the process ends."""

    def __init__(self) -> None:
        self._memory = np.zeros(POOL.size * _STRIDE + LINE_BYTES, np.uint8)
        self.address = int(align_up(self._memory.ctypes.data, LINE_BYTES))
        at = self.address - self._memory.ctypes.data
        self._fields: npt.NDArray[np.int64] = self._memory[at : at + POOL.size * _STRIDE].view(np.int64)
        sched_yield = ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p).value or 0
        self._fields[POOL.syscall * _STRIDE // 8] = futex.syscall_address()
        self._fields[POOL.sched_yield * _STRIDE // 8] = sched_yield
        self._alive.append(self._memory)
        self._n_helpers = 0
        self._lock = threading.Lock()

    def reserve(self, n_threads: int) -> None:
        """Makes sure that calls of so many threads find them."""
        work = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64)(_work.address)
        with self._lock:
            while self._n_helpers < min(n_threads, MAX_THREADS) - 1:
                self._n_helpers += 1
                threading.Thread(
                    target=work, args=(self.address, self._n_helpers), name=f"kernels-{self._n_helpers}", daemon=True
                ).start()
            self._fields[POOL.helpers * _STRIDE // 8] = self._n_helpers


def is_supported() -> bool:
    """This system has what the pool needs."""
    return futex.is_supported()


@functools.cache
def _pool_of(_pid: int) -> Pool:
    return Pool()


def pool_for(n_threads: int) -> int:
    """Address of the process's pool with room for so many threads; 0: the caller works alone (one thread, or no pool here).

    A forked child gets its own pool, because threads don't survive a fork.
    """
    if n_threads <= 1 or not is_supported():
        return 0
    pool = _pool_of(os.getpid())
    pool.reserve(n_threads)
    return pool.address
