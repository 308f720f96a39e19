"""Keeps eviction and compiled layer calls apart: compiled code looks experts up, and computes with their slots, without a lock.

Compiled code says which layer's experts it is using, from before it looks them up until it is done with their bytes. Whoever
evicts meanwhile closes the gate, so that no other call begins, leaves that layer alone, and opens the gate again: the call that
is running goes on, and a gate is closed for as long as it takes to strike slots off, some microseconds each.

Both sides write their own word and then read the other's, with operations that are ordered against each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numba as nb

from localrun.kernel_cache import cached_jit
from localrun.offload.kernels import futex
from localrun.offload.kernels.lowlevel import atomic_add, atomic_exchange, pause
from localrun.offload.kernels.records import Layout, get


class _Gate(Layout):
    """One model's gate."""

    using: int
    """Block number + 1 of the layer whose slots compiled code is using, 0: none; atomic, compiled code writes."""
    closed: int
    """1: no layer call may begin; atomic, Python writes. Compiled code sleeps on its low 32 bits (futex)."""
    syscall: int
    """Address of libc's `syscall`, 0: there is no futex."""


GATE = _Gate()


@nb.njit
def enter(gate: int, layer: int) -> None:
    """From now on slots of block `layer` stay. Waits while the gate is closed.

    Args:
        gate: address of the GATE record, 0: nobody evicts meanwhile.
    """
    if gate == 0:
        return
    while True:
        atomic_exchange(gate + GATE.using * 8, layer + 1)
        if atomic_add(gate + GATE.closed * 8, 0) == 0:
            return
        atomic_exchange(gate + GATE.using * 8, 0)
        if get(gate, GATE.syscall) != 0:
            futex.wait(get(gate, GATE.syscall), gate + GATE.closed * 8, 1)
        else:
            pause()


@nb.njit
def leave(gate: int) -> None:
    """Slots are free to go."""
    if gate != 0:
        atomic_exchange(gate + GATE.using * 8, 0)


@cached_jit(nogil=True)
def _close(gate: int) -> int:
    atomic_exchange(gate + GATE.closed * 8, 1)
    return int(atomic_add(gate + GATE.using * 8, 0))


@cached_jit(nogil=True)
def _open(gate: int) -> None:
    atomic_exchange(gate + GATE.closed * 8, 0)
    if get(gate, GATE.syscall) != 0:
        futex.wake(get(gate, GATE.syscall), gate + GATE.closed * 8, 1)


class Gate:
    """The record, kept alive as long as compiled code may use it.

    Attributes:
        address: of the GATE record.
    """

    def __init__(self) -> None:
        self._fields = GATE.make(using=0, closed=0, syscall=futex.syscall_address() if futex.is_supported() else 0)
        self.address = int(self._fields.ctypes.data)
        with self.closed():
            pass  # compiled now: it would take time and memory when both are short

    @contextmanager
    def closed(self) -> Iterator[int | None]:
        """Meanwhile no compiled call begins. Yields the layer that one is using, None if there is none. One thread at a time: the
        caller holds residency's lock."""
        using = _close(self.address)
        try:
            yield using - 1 if using else None
        finally:
            _open(self.address)
