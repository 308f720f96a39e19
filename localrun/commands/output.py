"""Where commands print: data on standard output, everything for people on standard error.

The transient status line and colour appear only on a terminal, and `NO_COLOR` and `TERM=dumb` are respected. Model output is
neutralized on a terminal and unchanged in a pipe.
"""

from __future__ import annotations

import json
import os
import sys
import textwrap
import time
from collections.abc import Callable
from typing import Any, TextIO

from localrun.errors import LocalrunError
from localrun.textsafe import visible, visible_line
from localrun.units import format_bytes_rate, format_duration, format_size

_CLEAR_LINE = "\r\x1b[K"
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


PLAN_INDENT = 9
"""Where a plan's lines begin, after their names."""


def folded(text: str, width: int, indent: int = PLAN_INDENT) -> list[str]:
    """Lines of at most `width` columns, broken between words; from the second on they are indented."""
    return textwrap.wrap(
        text, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    ) or [""]


class Output:
    """The two streams of a command."""

    def __init__(self, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self._out = out or sys.stdout
        self._err = err or sys.stderr
        self.out_is_terminal = self._out.isatty()
        self.err_is_terminal = self._err.isatty()
        self._colour = self.err_is_terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        self._status_shown = False
        self._at_line_start = True
        self._noted: set[str] = set()

    def check_open(self) -> None:
        """Call before long work: raises LocalrunError if standard output is closed."""
        self._put("")
        if self._out.closed or getattr(self._out, "refuses", False):
            raise LocalrunError("standard output is closed", hint="redirect it to a file, or to /dev/null")

    def status(self, text: str) -> None:
        """Replaces the transient line; nothing off a terminal."""
        if self.err_is_terminal:
            self._err.write(_CLEAR_LINE + visible_line(text))
            self._err.flush()
            self._status_shown = True

    def clear_status(self) -> None:
        """Removes the transient line."""
        if self._status_shown:
            self._err.write(_CLEAR_LINE)
            self._err.flush()
            self._status_shown = False

    def note(self, text: str) -> None:
        """A line for people, also off a terminal."""
        self.clear_status()
        print(visible_line(text), file=self._err, flush=True)

    def note_once(self, text: str) -> None:
        """As `note`, the first time."""
        if text not in self._noted:
            self._noted.add(text)
            self.note(text)

    def answer(self, text: str) -> None:
        """Prints a piece of an answer immediately, without a newline."""
        if not text:
            return
        self.clear_status()
        self._at_line_start = False  # before: an interrupt may come as soon as a reader has seen the text
        self._put(visible(text) if self.out_is_terminal else text)
        self._at_line_start = text.endswith("\n")

    def end_line(self) -> None:
        """Ends the answer's last line, if it is not ended."""
        self.clear_status()
        if not self._at_line_start:
            self._put("\n")
            self._at_line_start = True

    def thinking(self, text: str) -> None:
        """A piece of a model's reasoning: on the terminal only, dimmed."""
        if self.err_is_terminal:
            self.clear_status()
            safe = visible(text)
            self._err.write(f"{_DIM}{safe}{_PLAIN}" if self._colour else safe)
            self._err.flush()

    def json(self, value: Any) -> None:
        """Data for a program."""
        self.line(self._json(value, indent=2))

    def json_line(self, value: Any) -> None:
        """One of several data objects, in one line and in one piece."""
        self.line(self._json(value))

    def _json(self, value: Any, indent: int | None = None) -> str:
        """Lossless JSON: characters that this output can't represent are JSON-escaped."""
        text = json.dumps(value, ensure_ascii=False, indent=indent)
        try:
            text.encode(getattr(self._out, "encoding", None) or "utf-8")
        except UnicodeEncodeError:
            return json.dumps(value, indent=indent)
        harmless = not self.out_is_terminal or visible(text) == text
        return text if harmless else json.dumps(value, indent=indent)

    def line(self, text: str) -> None:
        """A line of data; harmless on a terminal."""
        self.clear_status()
        self._put((visible(text) if self.out_is_terminal else text) + "\n")

    def _put(self, text: str) -> None:
        """Raises OSError, which names standard output: a full drive, a closed pipe."""
        try:
            self._out.write(text)
            self._out.flush()
        except OSError as error:
            error.filename = error.filename or "standard output"
            raise


class ProgressLine:
    """Progress of a long task: share, amount, rate and time left, the same for every command.

    On a terminal one line that redraws itself, elsewhere a line every ten seconds. Use from one thread.

    Args:
        what: label before the figures, such as `splitting`.
        skipped: the part of the amount that an earlier run did.
        in_bytes: amounts are bytes; otherwise counts of `unit`.
        bar: draw a bar, on a terminal.
        note: prints the lines when not on a terminal; None: the output's own.
    """

    EVERY_S = 10.0
    BAR_WIDTH = 30

    def __init__(
        self,
        out: Output,
        what: str = "",
        *,
        skipped: int = 0,
        in_bytes: bool = True,
        unit: str = "",
        bar: bool = False,
        note: Callable[[str], None] | None = None,
    ) -> None:
        self._out, self._what, self._skipped = out, what, skipped
        self._note = note or out.note
        self._in_bytes, self._unit, self._bar = in_bytes, unit, bar
        self._started = self._shown = time.monotonic()

    def __call__(self, done: int, total: int, *, per_s: float | None = None, left_s: float | None = None) -> None:
        """Shows progress if it is time to.

        Args:
            per_s: bytes or units per second, if the caller knows better than the mean so far.
            left_s: likewise.
        """
        now = time.monotonic()
        if now - self._shown < (0.1 if self._out.err_is_terminal else self.EVERY_S):
            return
        self._shown = now
        if per_s is None:
            per_s = (done - self._skipped) / max(now - self._started, 1e-9)
        if left_s is None and per_s > 0:
            left_s = (total - done) / per_s
        text = self.text(done, total, per_s, left_s)
        if self._out.err_is_terminal:
            self._out.status(text)
        else:
            self._note(text)

    def text(self, done: int, total: int, per_s: float, left_s: float | None) -> str:
        """The line: `splitting  12%  1.20 GiB of 10.00 GiB  1.10 GB/s, 9.1s left`."""
        share = min(1.0, done / max(1, total))
        filled = int(share * self.BAR_WIDTH)
        bar = f"[{'#' * filled}{'.' * (self.BAR_WIDTH - filled)}] " if self._bar and self._out.err_is_terminal else ""
        amount = f"{format_size(done)} of {format_size(total)}" if self._in_bytes else f"{done} of {total} {self._unit}"
        speed = f"  {format_bytes_rate(per_s)}" if self._in_bytes else ""
        left = f", {format_duration(left_s)} left" if left_s is not None else ""
        what = f"{self._what} " if self._what else ""
        return f"{bar}{what}{share:4.0%}  {amount.rstrip()}{speed}{left}"
