"""Tells the user when kernels are being compiled: on the first start on a processor, or after an update.

Setup compiles all of them (`warm.py`); this covers starts without it.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable

from localrun.commands.output import Output
from localrun.engine.process.process import EngineProcess
from localrun.units import format_duration

USUAL_FUNCTIONS = 14
"""Functions that the demo model's conversion needs, and about as many that a first answer needs; other formats need more."""

_PATIENCE_S = 2.0
_POLL_S = 0.5


def compiled_here() -> int:
    """Functions that this process has begun to compile."""
    # Slow to import, and whatever compiles imports it anyway; another thread may be in the middle of that.
    module = sys.modules.get("localrun.kernel_cache")
    return getattr(module, "n_compiled", 0)


def compiled_by(engine: EngineProcess) -> Callable[[], int]:
    """Number of functions that an engine process has started to compile, from its log."""
    return lambda: sum(line.startswith("compiling ") for line in engine.log_tail())


class Notice:
    """Shows the compiler's progress while nothing else is shown, on its own thread, which `close` ends."""

    def __init__(self, out: Output, count: Callable[[], int] = compiled_here) -> None:
        self._out, self._count = out, count
        self._before, self._started = count(), time.monotonic()
        self._over = threading.Event()
        self._shown_at = time.monotonic()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def something_else(self) -> None:
        """Something else was shown: be silent for a while."""
        self._shown_at = time.monotonic()

    def _run(self) -> None:
        while not self._over.wait(_POLL_S):
            if time.monotonic() - self._shown_at < _PATIENCE_S or (text := self._text()) is None:
                continue
            if self._out.err_is_terminal:
                self._out.status(text)
            else:
                self._out.note_once("compiling for this processor, first run only: takes a minute or two")

    def _text(self) -> str | None:
        """How far the compiler is; None while it does nothing."""
        done = self._count() - self._before
        if not done:
            return None
        total = f" of about {USUAL_FUNCTIONS}" if done < USUAL_FUNCTIONS else ""
        elapsed = format_duration(time.monotonic() - self._started)
        return f"compiling for this processor, first run only: function {done}{total}, {elapsed}"

    def __enter__(self) -> Notice:
        with contextlib.suppress(RuntimeError):  # out of threads: code that really needs one will report it
            self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join()
