"""What is typed before the terminal UI reads."""

from __future__ import annotations

import os
import pty
import select
import termios
from collections.abc import Iterator

import pytest

from localrun.commands import typeahead


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, int]]:
    """The user's end of a terminal, and the program's, which is its standard input."""
    users, ours = pty.openpty()
    with open(ours, "rb", buffering=0, closefd=False) as stream:
        monkeypatch.setattr("sys.stdin", stream)
        yield users, ours
    os.close(users)
    os.close(ours)


def test_keys_wait_as_they_were_pressed_and_are_not_echoed(terminal: tuple[int, int]) -> None:
    users, ours = terminal
    before = termios.tcgetattr(ours)
    with typeahead.kept():
        assert typeahead.attributes_before() == before  # for editors, which the UI starts
        os.write(users, b"hello\r")
        assert select.select([ours], [], [], 30)[0]
        assert os.read(ours, 100) == b"hello\r"  # not a line feed, which would be Ctrl+J
        assert not select.select([users], [], [], 0)[0]
        assert termios.tcgetattr(ours)[3] & termios.ISIG  # Ctrl+C ends a start that takes too long
    assert termios.tcgetattr(ours) == before
    assert typeahead.attributes_before() is None


def test_what_was_typed_before_that_is_kept_too(terminal: tuple[int, int]) -> None:
    users, ours = terminal
    os.write(users, b"Hi")
    assert select.select([users], [], [], 30)[0]  # echoed: the terminal has it
    with typeahead.kept():
        assert select.select([ours], [], [], 30)[0]
        assert os.read(ours, 100) == b"Hi"


def test_a_failing_interface_leaves_the_terminal_as_it_was(terminal: tuple[int, int]) -> None:
    before = termios.tcgetattr(terminal[1])
    with pytest.raises(ZeroDivisionError), typeahead.kept():
        raise ZeroDivisionError
    assert termios.tcgetattr(terminal[1]) == before


def test_without_a_terminal_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    with open(os.devnull, "rb") as stream:
        monkeypatch.setattr("sys.stdin", stream)
        with typeahead.kept():
            assert typeahead.attributes_before() is None
