"""Pipes and shared values: nobody waits for a slow reader, and nothing is freed while it is looked at."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from localrun.engine.process.outbox import Outbox
from localrun.engine.process.shared import Shared

PATIENCE_S = 300.0
BIG = 1 << 20
"""More than any pipe holds."""


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """Reading and writing end; the outbox closes the second one."""
    reading, writing = os.pipe()
    yield reading, writing
    os.close(reading)


def read_all(fd: int) -> bytes:
    pieces = []
    while piece := os.read(fd, 1 << 16):
        pieces.append(piece)
    return b"".join(pieces)


def test_lines_arrive_whole_and_in_order(pipe: tuple[int, int]) -> None:
    outbox = Outbox(pipe[1], name="test")
    lines = [bytes([65 + i]) * (i * 40_000) for i in range(20)]
    for line in lines:
        outbox.put(line)
    outbox.close()
    assert read_all(pipe[0]) == b"".join(lines)


def test_putting_does_not_wait_for_a_reader_and_room_comes_back(pipe: tuple[int, int]) -> None:
    outbox = Outbox(pipe[1], name="test", room_bytes=2 * BIG)
    for _ in range(3):
        outbox.put(bytes(BIG))
    assert not outbox.has_room()
    waited = threading.Event()
    waiter = threading.Thread(target=lambda: (outbox.wait_for_room(), waited.set()))
    waiter.start()
    assert not waited.wait(0.05)
    n_read = 0
    while n_read <= 2 * BIG:  # two lines have gone
        n_read += len(os.read(pipe[0], 1 << 16))
    assert waited.wait(PATIENCE_S)
    assert outbox.has_room()
    outbox.close()
    assert n_read + len(read_all(pipe[0])) == 3 * BIG


def test_lines_that_nobody_wants_any_more_are_left_out(pipe: tuple[int, int]) -> None:
    outbox = Outbox(pipe[1], name="test")
    wanted = True
    outbox.put(bytes(BIG))  # the thread waits in it
    outbox.put(b"one", lambda: wanted)
    outbox.put(b"two")
    wanted = False
    outbox.close()
    assert read_all(pipe[0]) == bytes(BIG) + b"two"


def test_broken_pipe_is_told_once_and_makes_everybody_go_on() -> None:
    reading, writing = os.pipe()
    broken: list[int] = []
    told = threading.Event()
    outbox = Outbox(writing, name="test", room_bytes=BIG, on_broken=lambda: (broken.append(1), told.set()))
    outbox.put(bytes(2 * BIG))
    waiter = threading.Thread(target=outbox.wait_for_room)
    waiter.start()
    os.close(reading)
    waiter.join(PATIENCE_S)
    assert not waiter.is_alive()
    assert told.wait(PATIENCE_S)
    outbox.put(b"more")
    assert outbox.close(timeout_s=PATIENCE_S)
    assert outbox.has_room()
    assert broken == [1]


def test_closing_does_not_wait_for_a_reader_either(pipe: tuple[int, int]) -> None:
    outbox = Outbox(pipe[1], name="test", room_bytes=BIG)
    outbox.put(bytes(2 * BIG))
    assert not outbox.close(timeout_s=0.01)
    outbox.wait_for_room()
    outbox.put(b"too late")
    assert read_all(pipe[0]) == bytes(2 * BIG)
    assert outbox.close(timeout_s=PATIENCE_S)


def test_value_is_taken_after_its_users_have_left_it() -> None:
    shared: Shared[str] = Shared()
    with shared.use() as nothing:
        assert nothing is None
    shared.put("model")
    events: list[str] = []
    inside, leave = threading.Event(), threading.Event()

    def look() -> None:
        with shared.use() as value:
            inside.set()
            leave.wait(PATIENCE_S)
            events.append(f"used {value}")

    def free() -> None:
        events.append(f"freed {shared.take()}")

    user, owner = threading.Thread(target=look), threading.Thread(target=free)
    user.start()
    assert inside.wait(PATIENCE_S)
    owner.start()
    while shared.value is not None:
        pass
    with shared.use() as value:  # who comes now finds nothing, and does not wait
        assert value is None
    leave.set()
    user.join(PATIENCE_S)
    owner.join(PATIENCE_S)
    assert events == ["used model", "freed model"]
    assert shared.take() is None


def test_user_that_fails_leaves_too() -> None:
    shared: Shared[int] = Shared()
    shared.put(1)
    with pytest.raises(ZeroDivisionError), shared.use():
        raise ZeroDivisionError
    assert shared.take() == 1
