"""Layer calls that lack experts, or look ahead, without Python on the decoding thread.

Compiled code has the readers begin (`cache/early.py`), posts what is missing and goes on: it starts GPUs, computes what is in RAM,
and then each missing expert as soon as it is there. A thread of Python's (`misses.Misses`) does the bookkeeping meanwhile: it
makes room, reads what readers have not begun with, guesses ahead. Nothing but the MISSES record passes between the two, with atomic
counters and a futex in each direction, so the decoding thread never waits for the interpreter lock.
"""

from __future__ import annotations

from typing import Final

import numba as nb
import numpy as np

from localrun.kernel_cache import cached_jit
from localrun.offload.cache.early import announce, begin
from localrun.offload.device.layouts import MISSES, MOST_PAIRS
from localrun.offload.device.view import F32, I32
from localrun.offload.kernels import futex
from localrun.offload.kernels.lowlevel import (
    atomic_add,
    atomic_exchange,
    atomic_load,
    copy,
    load_i32,
    store_i32,
    store_i64,
)
from localrun.offload.kernels.records import get, put

_GIVEN_UP: Final = 1 << 40
"""More experts than a call computes."""


@nb.njit
def list_missing(misses: int, counts: int, n_experts: int) -> int:
    """Lists the experts whose count is negative; how many there are."""
    n_missing = 0
    for e in range(n_experts):
        if load_i32(counts + e * 4) < 0:
            store_i32(get(misses, MISSES.experts) + n_missing * 4, e)
            store_i64(get(misses, MISSES.words) + n_missing * 8, 0)
            n_missing += 1
    put(misses, MISSES.n_experts, n_missing)
    return n_missing


@nb.njit
def post(misses: int, layer: int, ids: int, ids_stride: int, n_tokens: int, n_used: int, x: int, width: int) -> None:
    """Asks for the listed experts of a call; reads that can begin do so first.

    Args:
        layer: block number.
        x: the first token's input, `width` F32.
    """
    if get(misses, MISSES.early) != 0:
        n_begun = 0
        for i in range(get(misses, MISSES.n_experts)):
            if begin(get(misses, MISSES.early), layer, load_i32(get(misses, MISSES.experts) + i * 4)):
                n_begun += 1
        if n_begun > 0:
            announce(get(misses, MISSES.early))
    for t in range(n_tokens):
        copy(get(misses, MISSES.ids) + t * n_used * 4, ids + t * ids_stride, n_used * 4)
    copy(get(misses, MISSES.x), x, width * 4)
    put(misses, MISSES.layer, layer)
    put(misses, MISSES.n_tokens, n_tokens)
    put(misses, MISSES.n_used, n_used)
    put(misses, MISSES.status, 0)
    put(misses, MISSES.computed, 0)
    atomic_add(misses + MISSES.posted * 8, 1)
    _ring(misses)


@nb.njit
def _ring(misses: int) -> None:
    atomic_add(misses + MISSES.bell * 8, 1)
    futex.wake(get(misses, MISSES.syscall), misses + MISSES.bell * 8, 1)


@nb.njit(inline="always")
def is_settled(misses: int) -> bool:
    """The fetching thread is done with the running call."""
    return bool(atomic_load(misses + MISSES.settled * 8) == get(misses, MISSES.posted))


@nb.njit
def note_computed(misses: int) -> None:
    """The experts in RAM, or a missing one, are computed."""
    atomic_add(misses + MISSES.computed * 8, 1)


@nb.njit
def settle(misses: int) -> int:
    """Waits until the fetching thread is done with the running call, all of whose answers were taken; the call's status."""
    while not is_settled(misses):
        seen = atomic_load(misses + MISSES.answered * 8)
        if not is_settled(misses):
            futex.wait(get(misses, MISSES.syscall), misses + MISSES.answered * 8, seen)
    return int(get(misses, MISSES.status))


@nb.njit
def give_up(misses: int) -> None:
    """Nothing of the running call will be computed: the fetching thread need not wait for that. `settle` must follow."""
    put(misses, MISSES.computed, _GIVEN_UP)


@cached_jit(nogil=True)
def await_bell(misses: int, heard: int) -> int:
    """For the fetching thread: waits until the bell has rung more than `heard` times; how often it has."""
    while atomic_load(misses + MISSES.bell * 8) == heard:
        futex.wait(get(misses, MISSES.syscall), misses + MISSES.bell * 8, heard)
    return int(atomic_load(misses + MISSES.bell * 8))


@cached_jit(nogil=True)
def _ring_once(misses: int) -> None:
    _ring(misses)


@cached_jit(nogil=True)
def _answer(misses: int, index: int, word: int) -> None:
    atomic_exchange(get(misses, MISSES.words) + index * 8, word)
    atomic_add(misses + MISSES.answered * 8, 1)
    futex.wake(get(misses, MISSES.syscall), misses + MISSES.answered * 8, 1)


@cached_jit(nogil=True)
def _end(misses: int, status: int) -> None:
    put(misses, MISSES.status, status)
    atomic_add(misses + MISSES.settled * 8, 1)
    atomic_add(misses + MISSES.answered * 8, 1)
    futex.wake(get(misses, MISSES.syscall), misses + MISSES.answered * 8, 1)


@cached_jit(nogil=True)
def _close(misses: int) -> None:
    atomic_exchange(misses + MISSES.closing * 8, 1)
    _ring(misses)


class MissRecord:
    """The fields and their targets. Methods are for the fetching thread, except `ring` and `close`.

    Args:
        n_embd: most values of a row.
        gate: address of the layers' GATE record (`cache/gate.py`), 0: they have none.
    """

    def __init__(self, n_embd: int, gate: int = 0) -> None:
        self._ids, self._experts = np.zeros(MOST_PAIRS, np.int32), np.zeros(MOST_PAIRS, np.int32)
        self._words, self._x = np.zeros(MOST_PAIRS, np.int64), np.zeros(n_embd, np.float32)
        self._heard = self._seen = 0
        self.fields = MISSES.empty()
        MISSES.fill(
            self.fields,
            syscall=futex.syscall_address(),
            early=0,
            gate=gate,
            looks=0,
            ids=self._ids.ctypes.data,
            experts=self._experts.ctypes.data,
            words=self._words.ctypes.data,
            x=self._x.ctypes.data,
        )
        self.address = int(self.fields.ctypes.data)

    def use_early(self, address: int) -> None:
        """From now on reads begin there (`cache.early.EARLY`)."""
        self.fields[MISSES.early] = address

    def post_all(self, looks: bool) -> None:
        """Whether a token's calls that lack no expert are posted from now on."""
        self.fields[MISSES.looks] = int(looks)

    @property
    def layer(self) -> int:
        """Block number of the posted call."""
        return int(self.fields[MISSES.layer])

    @property
    def n_tokens(self) -> int:
        """Tokens of the posted call."""
        return int(self.fields[MISSES.n_tokens])

    @property
    def n_missing(self) -> int:
        """How many of its experts were nowhere."""
        return int(self.fields[MISSES.n_experts])

    @property
    def ids(self) -> I32:
        """(T, K) its choices, a copy."""
        n_tokens, n_used = int(self.fields[MISSES.n_tokens]), int(self.fields[MISSES.n_used])
        return self._ids[: n_tokens * n_used].reshape(n_tokens, n_used).copy()

    @property
    def missing(self) -> list[int]:
        """Its experts that were nowhere, ascending."""
        experts: list[int] = self._experts[: self.fields[MISSES.n_experts]].tolist()
        return experts

    def x(self, width: int) -> F32:
        """(D,) the first token's input, valid until the call ends."""
        return self._x[:width]

    @property
    def n_computed(self) -> int:
        """What the decoding thread has computed of it: 1 for the experts that were in RAM, and 1 for each answer; more if it has
        given up."""
        return int(self.fields[MISSES.computed])

    @property
    def is_posted(self) -> bool:
        """There is a call that was not taken, or there will be none."""
        return bool(self.fields[MISSES.posted] != self._seen or self.fields[MISSES.closing])

    def next(self) -> bool:
        """Waits for the next call, or until somebody rings; False: there will be none."""
        self._heard = await_bell(self.address, self._heard)
        return not self.fields[MISSES.closing]

    def take(self) -> bool:
        """There is a call that was not taken before."""
        seen, self._seen = self._seen, int(self.fields[MISSES.posted])
        return self._seen != seen

    def ring(self) -> None:
        """Wakes the fetching thread. Any thread."""
        _ring_once(self.address)

    def answer(self, index: int, word: int) -> None:
        """Expert `index` of `missing` is in RAM, see `LAYER.resident`."""
        _answer(self.address, index, word)

    def end(self, status: int = 0) -> None:
        """The call is over. `status`: what it fails with, as Python's answer to compiled code."""
        _end(self.address, status)

    def close(self) -> None:
        """Ends `next`. Any thread."""
        _close(self.address)
