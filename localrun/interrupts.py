"""Ctrl-C handling: the first one stops the running command, later ones must not interrupt its cleanup.

And that no signal is lost: see `raised_again`. Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

PATIENCE_S = 3.0
"""Another interrupt means that cleanup takes too long: exit immediately; the engine exits when its pipe closes."""

EXIT_INTERRUPTED = 130


class Once:
    """A handler of SIGINT that raises KeyboardInterrupt once, until `again`."""

    def __init__(self) -> None:
        self._raised_at: float | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self._raised_at is None:
            self._raised_at = time.monotonic()
            raise KeyboardInterrupt
        if time.monotonic() - self._raised_at > PATIENCE_S:
            os._exit(EXIT_INTERRUPTED)

    def again(self) -> None:
        self._raised_at = None


def again() -> None:
    """The interrupt was handled and the command continues: the next one counts as the first."""
    handler = signal.getsignal(signal.SIGINT)
    if isinstance(handler, Once):
        handler.again()


SWALLOWED_S = 0.02
"""After an exception was swallowed: the C code that called us has most likely returned by then. If not, it is tried again."""


@contextlib.contextmanager
def raised_again() -> Iterator[None]:
    """Exceptions that a signal raises are lost inside a finalizer or a function that C code calls: raises them again after it.

    LLVM calls such a function for each kernel that it has compiled, so a start that compiles would survive SIGTERM. Python hands
    what it has to drop to `sys.unraisablehook`; a timer brings it back. Outside of the main thread, where no signal is
    handled, nothing is done.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    usual = sys.unraisablehook
    lost: list[BaseException] = []

    def keep(dropped: Any) -> None:
        error = dropped.exc_value
        if isinstance(error, KeyboardInterrupt | SystemExit) and threading.current_thread() is threading.main_thread():
            lost[:] = [type(error)(*error.args)]
            signal.setitimer(signal.ITIMER_REAL, SWALLOWED_S)
        else:
            usual(dropped)

    def bring_back(number: int, frame: FrameType | None) -> None:
        if lost:
            raise lost.pop()

    before = signal.signal(signal.SIGALRM, bring_back)
    sys.unraisablehook = keep
    try:
        yield
    finally:
        lost.clear()
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = usual
        signal.signal(signal.SIGALRM, before)
