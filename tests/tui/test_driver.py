"""Reading a terminal: pastes are one event, keys are keys, and the end of the terminal is waited out."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from textual import events
from textual.message import Message

from localrun.tui.driver import TerminalDriver
from localrun.tui.pasted import END, START

PATIENCE_S = 300.0


class Reader:
    """A driver that reads a pipe, and what it makes of it."""

    def __init__(self) -> None:
        self.driver = TerminalDriver.__new__(TerminalDriver)
        self.got: list[Message] = []
        self.arrived = threading.Condition()
        self.driver.fileno, self.write_end = os.pipe()
        self.driver.exit_event = threading.Event()
        self.driver._debug = False
        self.driver.process_message = self.take  # type: ignore[method-assign]
        self.thread = threading.Thread(target=self.driver.run_input_thread, daemon=True)
        self.thread.start()

    def take(self, message: Message) -> None:
        with self.arrived:
            self.got.append(message)
            self.arrived.notify_all()

    def until(self, n: int) -> list[Any]:
        with self.arrived:
            assert self.arrived.wait_for(lambda: len(self.got) >= n, PATIENCE_S), self.got
        return list(self.got)

    def close(self) -> None:
        self.driver.exit_event.set()
        self.thread.join(PATIENCE_S)
        assert not self.thread.is_alive()
        os.close(self.driver.fileno)


@pytest.fixture
def reader() -> Iterator[Reader]:
    reader = Reader()
    yield reader
    reader.close()
    os.close(reader.write_end)


def test_a_paste_is_one_event_with_all_its_bytes(reader: Reader) -> None:
    os.write(reader.write_end, b"a" + START.encode() + b"line one\rq\x1b[A\x11")
    (first,) = reader.until(1)
    assert (type(first), first.key) == (events.Key, "a")
    os.write(reader.write_end, b" end" + END.encode() + b"b")
    _, paste, last = reader.until(3)
    assert (type(paste), paste.text) == (events.Paste, "line one\nq\x1b[A\x11 end")
    assert last.key == "b"


def test_a_character_in_two_pieces_and_a_lone_escape(reader: Reader) -> None:
    euro = "€".encode()
    os.write(reader.write_end, euro[:1])
    os.write(reader.write_end, euro[1:])
    assert reader.until(1)[0].character == "€"
    os.write(reader.write_end, b"\x1b")
    assert reader.until(2)[1].key == "escape"


def test_a_terminal_that_is_gone_is_waited_out() -> None:
    reader = Reader()
    os.close(reader.write_end)
    assert reader.thread.is_alive(), "it waits for the program to end, and reads no more"
    reader.close()
    assert [message for message in reader.got if isinstance(message, events.Key)] == []
