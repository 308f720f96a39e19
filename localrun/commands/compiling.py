"""Says so while kernels are being compiled: the first start on a processor, or after an update, waits for the compiler.

Set-up compiles all of them (`warm.py`); this is for whoever starts without. What the compiler has finished is seen in the kernel
folder, so it does not matter which process compiles.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from localrun import paths
from localrun.commands.output import Output
from localrun.units import format_duration

USUAL_PIECES = 13
"""Pieces of code that a first answer needs, with weights in two formats; other formats need a few more."""

_PATIENCE_S = 2.0
_POLL_S = 0.5


class Watch:
    """What has been compiled since its making. One thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known = set(self._pieces())
        self._started = time.monotonic()

    def _pieces(self) -> Iterator[Path]:
        with contextlib.suppress(OSError):
            yield from self._folder.glob("*/*/*.nbc")

    def text(self) -> str | None:
        """How far the compiler is; None while it has finished nothing."""
        done = sum(piece not in self._known for piece in self._pieces())
        if not done:
            return None
        total = f" of about {USUAL_PIECES}" if done < USUAL_PIECES else ""
        elapsed = format_duration(time.monotonic() - self._started)
        return f"compiling for this processor, only this once: {done}{total} pieces, {elapsed}"


class Notice:
    """Shows the compiler's progress while nothing else is shown. A thread of its own, ended by `close`."""

    def __init__(self, out: Output) -> None:
        self._out, self._watch = out, Watch(paths.kernel_dir())
        self._over = threading.Event()
        self._shown_at = time.monotonic()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def something_else(self) -> None:
        """Something else was shown: be silent for a while."""
        self._shown_at = time.monotonic()

    def _run(self) -> None:
        noted = False
        while not self._over.wait(_POLL_S):
            if time.monotonic() - self._shown_at < _PATIENCE_S or (text := self._watch.text()) is None:
                continue
            if self._out.err_is_terminal:
                self._out.status(text)
            elif not noted:
                noted = True
                self._out.note("compiling for this processor, only this once: a minute or two")

    def __enter__(self) -> Notice:
        with contextlib.suppress(RuntimeError):  # no more threads: whoever needs them says so
            self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join()
