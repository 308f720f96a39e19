"""Textual's driver for a real terminal, with pastes extracted from the input before its parser sees them (`pasted`)."""

from __future__ import annotations

import os
import selectors
from codecs import getincrementaldecoder
from collections.abc import Iterable

from textual import events
from textual._parser import ParseError
from textual._xterm_parser import XTermParser
from textual.drivers.linux_driver import LinuxDriver

from localrun.commands import typeahead
from localrun.tui.pasted import Pasted, PasteSplitter

_POLL_S = 0.1
_QUIET_S = 0.03
"""Between the pieces of one paste a terminal pauses for less."""
_READ_BYTES = 1 << 16


class TerminalDriver(LinuxDriver):
    """As its parent; reading differs. A terminal that is gone ends the reading: `lifeline` sees to the rest."""

    def start_application_mode(self) -> None:
        """Editors that get the terminal for a while find it as it was before the program."""
        super().start_application_mode()  # type: ignore[no-untyped-call]
        self.attrs_before = typeahead.attributes_before() or self.attrs_before

    def run_input_thread(self) -> None:
        """Reads until the driver is stopped."""
        decode = getincrementaldecoder("utf-8")("replace").decode
        parser = XTermParser(self._debug)
        splitter = PasteSplitter()
        with selectors.SelectSelector() as selector:
            selector.register(self.fileno, selectors.EVENT_READ)
            while not self.exit_event.is_set():
                if selector.select(_QUIET_S if splitter.waiting else _POLL_S):
                    try:
                        data = os.read(self.fileno, _READ_BYTES)
                    except OSError:
                        data = b""
                    if not data:
                        self.exit_event.wait()  # the terminal is gone
                        break
                    self._dispatch(parser, splitter.feed(decode(data)))
                else:
                    self._dispatch(parser, splitter.quiet())
                for message in parser.tick():
                    self.process_message(message)
        try:
            for _ in parser.feed(""):
                pass
        except (EOFError, ParseError):
            pass

    def _dispatch(self, parser: XTermParser, pieces: Iterable[str | Pasted]) -> None:
        for piece in pieces:
            if isinstance(piece, Pasted):
                self.process_message(events.Paste(piece.text))
            else:
                for message in parser.feed(piece):
                    self.process_message(message)
