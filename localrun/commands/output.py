"""Where commands print: data on standard output, everything for people on standard error.

A transient status line and colour appear on a terminal only; `NO_COLOR` and `TERM=dumb` are obeyed. What a model wrote is made
harmless for a terminal and left as it is for a pipe.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any, TextIO

from localrun.textsafe import visible, visible_line

_CLEAR_LINE = "\r\x1b[K"
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


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

    def answer(self, text: str) -> None:
        """A piece of a model's answer, without a line end, shown at once."""
        if not text:
            return
        self.clear_status()
        self._at_line_start = False  # before: an interrupt may come as soon as a reader has seen the text
        self._out.write(visible(text) if self.out_is_terminal else text)
        self._out.flush()
        self._at_line_start = text.endswith("\n")

    def end_line(self) -> None:
        """Ends the answer's last line, if it is not ended."""
        self.clear_status()
        if not self._at_line_start:
            self._out.write("\n")
            self._out.flush()
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
        self.line(json.dumps(value, ensure_ascii=False, indent=2))

    def json_line(self, value: Any) -> None:
        """One of several data objects, in one line and in one piece."""
        self.line(json.dumps(value, ensure_ascii=False))

    def line(self, text: str) -> None:
        """A line of data; harmless on a terminal."""
        self.clear_status()
        self._out.write((visible(text) if self.out_is_terminal else text) + "\n")
        self._out.flush()
