"""How many readers are woken: each that finds nothing to do takes the interpreter's lock from those that do."""

from __future__ import annotations

from typing import Any, cast

from localrun.alignment import PAGE_BYTES
from localrun.offload.cache.slots import Slot
from localrun.offload.cache.tickets import ReadMatrices, ReadPiece, ReadPieces, Ticket, most_ahead, read_buffers

MOST_AHEAD = 4


class Readers:
    """Those that compiled code asks, too: counts whom Python wakes."""

    asked = 0

    def __init__(self) -> None:
        self.woken: list[int] = []

    def ask(self, count: int) -> None:
        self.woken.append(count)

    def next(self, _asked: int, *, sleeps: bool = True) -> None:
        assert not sleeps, "nothing was left to do"


def pieces(ticket: Ticket, count: int) -> list[ReadPiece]:
    return [ReadPiece(ticket, 0, i, memoryview(b""), 0) for i in range(count)]


def test_as_many_readers_are_woken_as_there_are_pieces_to_read() -> None:
    readers = Readers()
    queue = ReadPieces(MOST_AHEAD, cast(Any, readers))
    queue.put(pieces(Ticket(Slot(0, 0, 0, 0), ()), 3))
    queue.put_matrices(Ticket(Slot(0, 1, 0, 0), ()), 0b101)
    assert readers.woken == [3, 2]
    found = [queue.get() for _ in range(2)]
    assert [matrices.matrices for matrices in found if isinstance(matrices, ReadMatrices)] == [0b001, 0b100]


def test_readers_sleep_while_enough_is_read_ahead() -> None:
    readers = Readers()
    queue = ReadPieces(MOST_AHEAD, cast(Any, readers))
    ahead = Ticket(Slot(0, 0, 0, 0), (), ahead=True)
    queue.put(pieces(ahead, MOST_AHEAD + 2))
    for _ in range(MOST_AHEAD):
        assert queue.get() is not None
    queue.put(pieces(Ticket(Slot(0, 1, 0, 0), (), ahead=True), 2))
    assert readers.woken == [MOST_AHEAD, 0]
    queue.end_ahead(last=True)  # its reader packs now, another one goes on
    queue.hurry(ahead.slot)  # two pieces are left of it
    assert readers.woken == [MOST_AHEAD, 0, 1, 2]


def test_what_is_read_ahead_is_bounded_in_bytes_but_keeps_two_reads_in_flight() -> None:
    mib = 1 << 20
    assert [most_ahead(size) for size in (mib // 2, mib, 2 * mib, 4 * mib, 64 * mib)] == [8, 4, 2, 2, 2]


def test_buffers_are_whole_pages_in_one_mapping_each_its_own() -> None:
    buffers = read_buffers(3, PAGE_BYTES + 1)
    addresses = [int(buffer.array.ctypes.data) for buffer in buffers]
    assert [buffer.number for buffer in buffers] == [0, 1, 2]
    assert [address - addresses[0] for address in addresses] == [0, 2 * PAGE_BYTES, 4 * PAGE_BYTES]
    assert addresses[0] % PAGE_BYTES == 0
    for buffer in buffers:
        buffer.view[:] = bytes([buffer.number]) * len(buffer.view)
    assert [set(buffer.array.tolist()) for buffer in buffers] == [{0}, {1}, {2}]
