"""Keeps what is typed while the terminal UI is still being imported: about a second in which the terminal would change it.

A terminal that waits for lines turns Enter into a line feed, echoes keys over what the UI draws, and hands out nothing before
Enter. Without that, keys wait in its buffer, as they were pressed, until the UI reads them. Ctrl+C still works.
"""

from __future__ import annotations

import contextlib
import sys
import termios
from collections.abc import Iterator
from typing import Any

_before: list[Any] | None = None


def attributes_before() -> list[Any] | None:
    """The terminal's attributes outside of `kept`: what programs that the UI starts need. None: outside."""
    return None if _before is None else list(_before)


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """For the UI's time, from before its import; afterwards the terminal is as it was. Standard input is a terminal."""
    global _before
    try:
        terminal = sys.stdin.fileno()
        before = termios.tcgetattr(terminal)
        quiet = termios.tcgetattr(terminal)
        quiet[0] &= ~(termios.ICRNL | termios.INLCR | termios.IGNCR | termios.IXON)
        quiet[3] &= ~(termios.ICANON | termios.ECHO)
        quiet[6][termios.VMIN], quiet[6][termios.VTIME] = 1, 0
        termios.tcsetattr(terminal, termios.TCSANOW, quiet)
    except (termios.error, OSError, ValueError):  # whatever it is, the UI has its own ways
        yield
        return
    _before = before
    try:
        yield
    finally:
        _before = None
        with contextlib.suppress(termios.error):
            termios.tcsetattr(terminal, termios.TCSANOW, before)
