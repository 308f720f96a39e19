"""Reads that begin before Python knows of them: compiled code asks the readers for an expert's bytes, and Python takes over later.

A layer call that lacks an expert needs its bytes as soon as possible, but not yet a slot: they go into a staging buffer. So
compiled code claims a free buffer, writes down the pieces of the read, and wakes the readers, which fetch them with libc's `pread`
without the interpreter lock. `ExpertStore.submit` for the same expert adopts the buffer meanwhile; everything from the last byte
of a matrix on (checks, packing, errors) is the store's. A piece that can't be read is not reported here: the store reads all of
the expert again.

Where experts' bytes are is told by `ExpertStore.know`; the read of one that is not known begins in Python.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Annotated, Final, NamedTuple

import numba as nb
import numpy as np
import numpy.typing as npt
from numba.extending import register_jitable

from localrun.alignment import PAGE_BYTES
from localrun.kernel_cache import cached_jit
from localrun.offload.kernels import futex
from localrun.offload.kernels.lowlevel import (
    atomic_add,
    atomic_exchange,
    atomic_load,
    atomic_take,
    call_i32,
    call_pread,
    load_i64,
    load_u8,
    rounded_up,
)
from localrun.offload.kernels.records import Layout, Words, get, put

MOST_PIECES: Final = 64
MOST_EXTENTS: Final = 6
N_MATRICES: Final = 3
"""Of an expert: gate, up, down. Sets of them are bits, 1 << number."""
ALL_MATRICES: Final = (1 << N_MATRICES) - 1
_TICKET_BITS: Final = 24
_TICKETS: Final = (1 << _TICKET_BITS) - 1
_PIECE_WORDS: Final = 6
_CLOCK_MONOTONIC: Final = 1  # <time.h>, Linux; where there are no futexes, nothing begins here
_FREE, _ORDINARY, _EARLY = 0, 1, 2
"""What a buffer is used for: nothing, a read that Python began, one that compiled code began."""


class _EarlyReads(Layout):
    """A store's readers and buffers, as compiled code sees them. Python writes unless a field says otherwise."""

    work: int
    """Requests so far, of either kind; atomic, whoever asks adds. Readers sleep on its low 32 bits."""
    asked: int
    """Those of Python; atomic."""
    syscall: int
    """Address of libc's `syscall`."""
    pread: int
    """Address of `int64 pread(fd, address, size, offset)`."""
    clock: int
    """Address of libc's `clock_gettime`."""
    timespec: int
    """Address of two int64 that the clock writes: s, ns."""
    n_readers: int
    """Threads that read."""
    piece_bytes: int
    """Most bytes of one read."""
    n_experts: int
    """Experts of a layer in `recipes` and `loading`."""
    recipes: int
    """Address of RECIPE records by layer and expert."""
    loading: int
    """Address of uint8 by layer and expert: 1 for what is being read (`SlotTable.loading`)."""
    n_buffers: int
    """Buffers."""
    buffers: int
    """Address of BUFFER records."""


EARLY = _EarlyReads()


class _Recipe(Layout):
    """Where the bytes are that a call waits for. Python writes, compiled code reads."""

    n_extents: int
    """0: not known yet; atomic, written last."""
    extents: Annotated[int, Words(MOST_EXTENTS * 4)]
    """Of each: file descriptor, first byte and end of the aligned read, end of what must be there."""
    matrices: Annotated[int, Words(N_MATRICES * 2)]
    """Of each: where it begins and ends in the buffer."""


RECIPE = _Recipe()


class _Buffer(Layout):
    """One staging buffer; compiled code writes and reads."""

    taken: int
    """`_FREE`, `_ORDINARY` or `_EARLY`; atomic."""
    address: int
    """First byte; Python writes once."""
    layer: int
    """Whose bytes, of an early read."""
    expert: int
    """Likewise."""
    began_ns: int
    """When it was asked for, on the clock of `time.perf_counter`."""
    tickets: int
    """Pieces << 24 | the next one that a reader takes; atomic."""
    left: Annotated[int, Words(N_MATRICES)]
    """Of each matrix, pieces that are not there yet; atomic."""
    failed: int
    """1: one could not be read."""
    pieces: Annotated[int, Words(MOST_PIECES * _PIECE_WORDS)]
    """Of each: file descriptor, offset, address, size, bytes that must be there, matrices that have bytes in it."""


BUFFER = _Buffer()


@register_jitable
def even_pieces(n_bytes: int, most: int) -> int:
    """Size of one read, whole pages, if so many bytes are read in as few as may be: the last is hardly smaller than the others."""
    count = (n_bytes + most - 1) // most
    return ((n_bytes + count - 1) // count + PAGE_BYTES - 1) // PAGE_BYTES * PAGE_BYTES


@nb.njit(inline="always")
def _buffer(early: int, index: int) -> int:
    return int(get(early, EARLY.buffers) + index * BUFFER.size * 8)


@nb.njit
def _take(early: int, kind: int) -> int:
    """Claims a free buffer; -1: there is none."""
    for i in range(get(early, EARLY.n_buffers)):
        if atomic_take(_buffer(early, i) + BUFFER.taken * 8, kind):
            return i
    return -1


@nb.njit
def _matrices(recipe: int, begin_at: int, end_at: int) -> int:
    """Those that have bytes in this part of the buffer."""
    found = 0
    for which in range(N_MATRICES):
        first, end = get(recipe, RECIPE.matrices + which * 2), get(recipe, RECIPE.matrices + which * 2 + 1)
        if first < end_at and begin_at < end:
            found |= 1 << which
    return found


@nb.njit
def begin(early: int, layer: int, expert: int) -> bool:
    """Asks for an expert that is nowhere; False: it is being read, or Python has to. `announce` must follow."""
    at = layer * get(early, EARLY.n_experts) + expert
    recipe = get(early, EARLY.recipes) + at * RECIPE.size * 8
    if atomic_load(recipe + RECIPE.n_extents * 8) == 0 or load_u8(get(early, EARLY.loading) + at) != 0:
        return False
    index = _take(early, _EARLY)
    if index < 0:
        return False
    buffer, n, position = _buffer(early, index), 0, 0
    for which in range(N_MATRICES):
        put(buffer, BUFFER.left + which, 0)
    for i in range(get(recipe, RECIPE.n_extents)):
        extent = RECIPE.extents + i * 4
        fd, start, end, last = (
            get(recipe, extent),
            get(recipe, extent + 1),
            get(recipe, extent + 2),
            get(recipe, extent + 3),
        )
        most = even_pieces(end - start, get(early, EARLY.piece_bytes))
        for offset in range(start, end, most):
            size, piece, at = min(most, end - offset), BUFFER.pieces + n * _PIECE_WORDS, position + offset - start
            matrices = _matrices(recipe, at, at + size)
            put(buffer, piece, fd)
            put(buffer, piece + 1, offset)
            put(buffer, piece + 2, get(buffer, BUFFER.address) + at)
            put(buffer, piece + 3, size)
            put(buffer, piece + 4, min(size, last - offset))
            put(buffer, piece + 5, matrices)
            for which in range(N_MATRICES):
                put(buffer, BUFFER.left + which, get(buffer, BUFFER.left + which) + (matrices >> which & 1))
            n += 1
        position += rounded_up(end - start, PAGE_BYTES)
    call_i32(get(early, EARLY.clock), _CLOCK_MONOTONIC, get(early, EARLY.timespec))
    put(
        buffer,
        BUFFER.began_ns,
        load_i64(get(early, EARLY.timespec)) * 1_000_000_000 + load_i64(get(early, EARLY.timespec) + 8),
    )
    put(buffer, BUFFER.layer, layer)
    put(buffer, BUFFER.expert, expert)
    put(buffer, BUFFER.failed, 0)
    atomic_exchange(buffer + BUFFER.tickets * 8, n << _TICKET_BITS)
    return True


@nb.njit
def announce(early: int) -> None:
    """Wakes a reader for what `begin` has asked, which wakes the others: waking eight takes 15 us."""
    atomic_add(early + EARLY.work * 8, 1)
    futex.wake(get(early, EARLY.syscall), early + EARLY.work * 8, 1)


@nb.njit
def _wake(early: int, count: int) -> None:
    """Wakes so many readers, or all that sleep. One that is woken for nothing costs 10 us, and the interpreter's lock."""
    if count > 0:
        futex.wake(get(early, EARLY.syscall), early + EARLY.work * 8, min(count, get(early, EARLY.n_readers)))


@nb.njit
def _read(early: int, buffer: int, piece: int) -> bool:
    fd, offset, address = get(buffer, piece), get(buffer, piece + 1), get(buffer, piece + 2)
    size, need, done = get(buffer, piece + 3), get(buffer, piece + 4), 0
    while done < need:
        n = call_pread(get(early, EARLY.pread), fd, address + done, size - done, offset + done)
        if n <= 0:
            return False
        done += n
    return True


@nb.njit
def _note_read(buffer: int, piece: int) -> int:
    """A piece is there; the matrices that are complete thereby."""
    complete = 0
    matrices = get(buffer, piece + 5)
    for which in range(N_MATRICES):
        if matrices >> which & 1 and atomic_add(buffer + (BUFFER.left + which) * 8, -1) == 1:
            complete |= 1 << which
    return complete


@nb.njit
def _serve(early: int) -> int:
    """Reads pieces that compiled code has asked for.

    Returns:
        Buffer << N_MATRICES | the matrices of it that are complete thereby; -1: nothing is left to read.
    """
    for i in range(get(early, EARLY.n_buffers)):
        buffer = _buffer(early, i)
        tickets = buffer + BUFFER.tickets * 8
        word = atomic_load(tickets)
        while word & _TICKETS < word >> _TICKET_BITS:
            word = atomic_add(tickets, 1)
            ticket = word & _TICKETS
            if ticket >= word >> _TICKET_BITS:
                break
            if ticket == 0:
                _wake(early, (word >> _TICKET_BITS) - 1)
            piece = BUFFER.pieces + ticket * _PIECE_WORDS
            if get(buffer, BUFFER.failed) == 0 and not _read(early, buffer, piece):
                put(buffer, BUFFER.failed, 1)
            complete = _note_read(buffer, piece)
            if complete != 0:
                return int(i << N_MATRICES | complete)
            word = atomic_load(tickets)
    return -1


@cached_jit(nogil=True)
def _next(early: int, asked: int, sleeps: bool) -> int:
    """What this reader has completed, see `_serve`; -1: Python has asked for more than `asked`, or nothing is to be done now."""
    while True:
        seen = atomic_load(early + EARLY.work * 8)
        done = _serve(early)
        if done >= 0 or not sleeps or atomic_load(early + EARLY.asked * 8) != asked:
            return int(done)
        futex.wait(get(early, EARLY.syscall), early + EARLY.work * 8, seen)


@cached_jit(nogil=True)
def _ask(early: int, count: int) -> None:
    atomic_add(early + EARLY.asked * 8, 1)
    atomic_add(early + EARLY.work * 8, 1)
    _wake(early, count)


@cached_jit(nogil=True)
def _take_ordinary(early: int) -> int:
    return int(_take(early, _ORDINARY))


@cached_jit(nogil=True)
def _give_up(early: int, index: int) -> None:
    atomic_exchange(_buffer(early, index) + BUFFER.taken * 8, _ORDINARY)


@cached_jit(nogil=True)
def _free(early: int, index: int) -> None:
    put(_buffer(early, index), BUFFER.layer, -1)  # of whoever takes it, until it says whose bytes it reads
    atomic_exchange(_buffer(early, index) + BUFFER.taken * 8, _FREE)


@cached_jit(nogil=True)
def _publish(recipe: int, n_extents: int) -> None:
    """A recipe is complete: compiled code may use it from now on."""
    atomic_exchange(recipe + RECIPE.n_extents * 8, n_extents)


class Arrival(NamedTuple):
    """Matrices of an early read that are complete: the buffer's number, and which of them (bits)."""

    buffer: int
    matrices: int


class EarlyReads:
    """The records of one store's readers and buffers. Any thread.

    Args:
        addresses: of the staging buffers.
        shape: (layers, experts of a layer) that recipes are kept for.
        n_readers, piece_bytes: as the store has them.
    """

    def __init__(self, addresses: Sequence[int], shape: tuple[int, int], n_readers: int, piece_bytes: int) -> None:
        self._recipes = np.zeros((*shape, RECIPE.size), np.int64)
        self._buffers = np.zeros((len(addresses), BUFFER.size), np.int64)
        self._buffers[:, BUFFER.address] = addresses
        self._buffers[:, BUFFER.layer] = -1
        self._timespec = np.zeros(2, np.int64)
        self._loading: npt.NDArray[np.uint8] = np.ones(shape, np.uint8)  # nothing is asked for before `watch`
        self.fields = EARLY.make(
            work=0,
            asked=0,
            syscall=futex.syscall_address(),
            pread=pread_address(),
            clock=ctypes.cast(ctypes.CDLL(None).clock_gettime, ctypes.c_void_p).value or 0,
            timespec=self._timespec.ctypes.data,
            n_readers=n_readers,
            piece_bytes=piece_bytes,
            n_experts=shape[1],
            recipes=self._recipes.ctypes.data,
            loading=self._loading.ctypes.data,
            n_buffers=len(addresses),
            buffers=self._buffers.ctypes.data,
        )
        self.address = int(self.fields.ctypes.data)

    def watch(self, loading: npt.NDArray[np.uint8]) -> None:
        """From now on compiled code may ask; `loading`, (layers, experts): what is being read."""
        assert loading.shape == self._loading.shape
        assert loading.flags.c_contiguous
        self._loading = loading
        self.fields[EARLY.loading] = loading.ctypes.data

    def know(
        self,
        layer: int,
        expert: int,
        extents: Sequence[tuple[int, int, int, int]],
        matrices: Sequence[tuple[int, int]],
    ) -> None:
        """Where an expert's bytes are.

        Args:
            extents: descriptor, begin and end of the aligned read, end of what must be there.
            matrices: begin and end of each in the buffer, where the reads lie one after the other, each in whole pages.
        """
        recipe = self._recipes[layer, expert]
        n_pieces = sum(-(-(end - start) // int(self.fields[EARLY.piece_bytes])) for _, start, end, _ in extents)
        if recipe[RECIPE.n_extents] or len(extents) > MOST_EXTENTS or n_pieces > MOST_PIECES:
            return
        recipe[RECIPE.extents : RECIPE.extents + 4 * len(extents)] = np.ravel(extents)
        recipe[RECIPE.matrices : RECIPE.matrices + 2 * N_MATRICES] = np.ravel(matrices)
        _publish(int(recipe.ctypes.data), len(extents))

    @property
    def n_known(self) -> int:
        """Experts whose place is known."""
        return int(np.count_nonzero(self._recipes[..., RECIPE.n_extents]))

    @property
    def asked(self) -> int:
        """How often Python has asked."""
        return int(self.fields[EARLY.asked])

    def ask(self, count: int) -> None:
        """Wakes so many readers for a request of Python's; those that are awake notice it before they sleep."""
        _ask(self.address, count)

    def next(self, asked: int, *, sleeps: bool = True) -> Arrival | None:
        """Reads what compiled code asks for.

        Returns:
            Matrices that are complete now, and this thread's to pass on; None: Python has asked since it was `asked`.
        """
        word = int(_next(self.address, asked, sleeps))
        return Arrival(word >> N_MATRICES, word & ALL_MATRICES) if word >= 0 else None

    def take(self) -> int | None:
        """A free buffer's number, for a read that Python begins; None: there is none."""
        index = int(_take_ordinary(self.address))
        return index if index >= 0 else None

    def free(self, index: int) -> None:
        """Gives a buffer back."""
        _free(self.address, index)

    def give_up(self, index: int) -> None:
        """Takes the buffer of a complete early read, whose bytes are lost, for a read that Python begins."""
        _give_up(self.address, index)

    def holding(self) -> list[tuple[int, int, int]]:
        """(buffer, layer, expert) of early reads, under way or complete."""
        return [
            (i, int(buffer[BUFFER.layer]), int(buffer[BUFFER.expert]))
            for i, buffer in enumerate(self._buffers)
            if buffer[BUFFER.taken] == _EARLY
        ]

    def began_s(self, index: int) -> float:
        """When an early read was asked for, on the clock of `time.perf_counter`."""
        return float(self._buffers[index, BUFFER.began_ns]) / 1e9

    def has_failed(self, index: int) -> bool:
        """A piece of a complete early read could not be read."""
        return bool(self._buffers[index, BUFFER.failed])


def pread_address() -> int:
    """Of what reads: libc's `pread`."""
    return ctypes.cast(ctypes.CDLL(None).pread, ctypes.c_void_p).value or 0
