"""Guarantees that the program ends: on a lost terminal, on a signal, and after a deadline for the shutdown.

The event loop can't be trusted with that. It may be busy, or block forever writing to a terminal that is gone: Textual's output
is a bounded queue whose reader ends at the first error. So a thread watches and enforces the deadline.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import termios
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from localrun.commands import typeahead

GRACE_S = 3.0
"""After the terminal is gone or a signal came: time to save and to end in order."""

QUIT_S = 30.0
"""After the user has quit: the engine may have a gigabyte of learned things to write."""

_POLL_S = 0.5

# What Textual's driver switches on: kitty keys, alternate screen, hidden cursor, focus events, paste marks, mouse, no line wrap.
_RESTORE = b"\x1b[<u\x1b[?1049l\x1b[?25h\x1b[?1004l\x1b[?2004l\x1b[?1000l\x1b[?1003l\x1b[?1015l\x1b[?1006l\x1b[?7h"


class Lifeline:
    """Watches over one run of the program. Create it in the main thread before the interface starts.

    Args:
        leave: asks the interface to exit with a code; called from any thread, returns immediately.
        last: called before the process is killed; must not block.
    """

    def __init__(self, leave: Callable[[int], Any], last: Callable[[], None] = lambda: None) -> None:
        self._leave, self._last = leave, last
        self._ended = threading.Event()
        self._code = 0
        self._deadline_s: float | None = None
        self._wake_reader, self._wake_writer = os.pipe()
        self._before: dict[int, Any] = {}
        self._attributes: Any = None

    def __enter__(self) -> Lifeline:
        with contextlib.suppress(termios.error, OSError, ValueError):
            self._attributes = typeahead.attributes_before() or termios.tcgetattr(sys.__stdin__)  # type: ignore[arg-type]
        for number in (signal.SIGTERM, signal.SIGHUP):
            self._before[number] = signal.signal(number, self._signalled)
        threading.Thread(target=self._watch, name="tui-lifeline", daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._deadline_s != GRACE_S:  # else what comes after the interface has no more time either
            self._ended.set()
            os.write(self._wake_writer, b"x")
        for number, before in self._before.items():
            signal.signal(number, before)

    def leaving(self, deadline_s: float = QUIT_S) -> None:
        """The user leaves: from now on there is a deadline."""
        if self._deadline_s is None:
            self._deadline_s = deadline_s
            os.write(self._wake_writer, b"x")

    # --- inside

    def _signalled(self, number: int, frame: FrameType | None) -> None:
        """In the main thread, between two of its steps, also while it waits for a lock."""
        self._code = 128 + number
        os.write(self._wake_writer, b"s")

    def _watch(self) -> None:
        poll = select.poll()
        poll.register(self._wake_reader, select.POLLIN)
        terminals = [stream.fileno() for stream in (sys.__stdin__, sys.__stderr__) if stream is not None]
        for terminal in terminals:
            poll.register(terminal, 0)  # hang-ups are reported without being requested
        while self._deadline_s is None and not self._ended.is_set():
            for descriptor, happened in poll.poll(1000 * _POLL_S):
                if descriptor == self._wake_reader:
                    if os.read(self._wake_reader, 1) == b"s":
                        self._must_end()
                elif happened & (select.POLLHUP | select.POLLERR | select.POLLNVAL):
                    self._code = self._code or 128 + signal.SIGHUP
                    self._must_end()
                    break
        if not self._ended.wait(self._deadline_s):
            self._end_by_force()

    def _must_end(self) -> None:
        if self._deadline_s is None:
            self._deadline_s = GRACE_S
            self._leave(self._code)

    def _end_by_force(self) -> None:
        """The engine ends by itself when its pipes close; the conversations are whole after any transaction."""
        with contextlib.suppress(Exception):
            self._last()
        with contextlib.suppress(OSError, ValueError, termios.error):
            os.set_blocking(2, False)
            os.write(2, _RESTORE)
            if self._attributes is not None:
                termios.tcsetattr(sys.__stdin__, termios.TCSANOW, self._attributes)  # type: ignore[arg-type]
        os._exit(self._code or 1)
