"""What Ctrl-C does: the first one ends what runs, those that follow must not break off its cleaning up.

Standard library only.
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

PATIENCE_S = 3.0
"""A later interrupt means that cleaning up takes too long: the process ends at once, and the engine when its pipe closes."""

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
    """The interrupt was dealt with and the command goes on: the next one counts."""
    handler = signal.getsignal(signal.SIGINT)
    if isinstance(handler, Once):
        handler.again()
