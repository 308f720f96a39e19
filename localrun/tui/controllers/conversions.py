"""The conversion that is running, if any: started in a dialog, watched there or in the status line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from textual.screen import Screen

from localrun.errors import LocalrunError
from localrun.tui.controllers.notices import Notices
from localrun.tui.controllers.work import Handler, Invocation
from localrun.tui.converter_process import ConversionNews, ConverterProcess
from localrun.tui.messages import ConversionTold
from localrun.tui.screens.convert import ConvertScreen

MAX_LOG_LINES = 500


class Conversions:
    """Owns the conversion and its log. One at a time; it continues when the dialog is closed.

    Args:
        load: loads the finished model.
    """

    def __init__(self, screen: Screen[Any], notices: Notices, *, load: Callable[[Path], None]) -> None:
        self._screen, self._notices, self._load = screen, notices, load
        self.running: ConverterProcess | None = None
        self._log: list[str] = []

    def commands(self) -> dict[str, Handler]:
        return {"convert": self._convert}

    def _convert(self, call: Invocation) -> None:
        source, _, target = call.argument.partition(" ")

        def done(path: Path | None) -> None:
            if path is not None:
                self._load(path)

        dialog = ConvertScreen(self._start, self.running, self._log, source.strip(), target.strip())
        self._screen.app.push_screen(dialog, done)

    def _start(self, source: Path, target: Path, options: list[str]) -> ConverterProcess:
        self._log.clear()
        self.running = ConverterProcess(
            source, target, options, lambda news: self._screen.post_message(ConversionTold(news))
        )
        return self.running

    def told(self, news: ConversionNews) -> None:
        """News from the converter, shown in the dialog if it is open; else its end is a note."""
        lines = [news.note, f"error: {news.error}" if news.error else ""]
        self._log.extend(line for line in lines if line)
        del self._log[:-MAX_LOG_LINES]
        front = self._screen.app.screen
        if isinstance(front, ConvertScreen):
            front.show(news)
        elif news.ended and self.running is not None:
            if news.error:
                self._notices.error("The conversion ended", LocalrunError(news.error, hint=news.hint))
            else:
                self._notices.note(str(self.running.target), title="The conversion is finished", timeout_s=20)

    @property
    def status(self) -> str:
        """For the status line."""
        if self.running is None or not self.running.running:
            return ""
        last = self.running.last
        return f"converting {100 * last.done / last.total:.0f}%" if last.total else "converting"

    def close(self, timeout_s: float) -> None:
        """Stops it; it can be gone on with. Blocks."""
        if self.running is not None and self.running.running:
            self.running.stop()
            self.running.wait(timeout_s)
