"""Notifications: panels for errors, short notes for everything else."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from typing import Any, Literal

from textual.containers import VerticalScroll
from textual.css.query import NoMatches
from textual.screen import Screen

from localrun.errors import LocalrunError, UsageError
from localrun.textsafe import visible
from localrun.tui.widgets.notices import ErrorPanel


class Notices:
    """Fills the area above the input (`#notices`) and the corner of short notes."""

    def __init__(self, screen: Screen[Any]) -> None:
        self._screen = screen

    def note(
        self,
        text: str,
        *,
        title: str = "",
        severity: Literal["information", "warning", "error"] = "information",
        timeout_s: float = 4.0,
    ) -> None:
        """Some words that go away by themselves. Foreign text in them is harmless."""
        self._screen.app.notify(visible(text), title=title, severity=severity, markup=False, timeout=timeout_s)

    def complain(self, error: UsageError) -> None:
        """A wrong argument: a note is enough, and the text is still in the input's history."""
        self.note(f"{error}" + (f"\n→ {error.hint}" if error.hint else ""), severity="warning", timeout_s=6)

    def error(
        self, title: str, error: LocalrunError, buttons: Sequence[str] = ("close",), log: Sequence[str] = ()
    ) -> None:
        """A panel above the input. The same error is shown once."""
        area = self._screen.query_one("#notices", VerticalScroll)
        for panel in area.query(ErrorPanel):
            if str(panel.error) == str(error):
                panel.remove()
        area.mount(ErrorPanel(title, error, buttons, log))
        area.scroll_end(animate=False)

    def clear(self) -> None:
        """Takes all panels away."""
        self._screen.query_one("#notices").remove_children(ErrorPanel)

    def tell(self, error: LocalrunError) -> None:
        """Whatever kind of error it is."""
        if isinstance(error, UsageError):
            self.complain(error)
        else:
            self.error("That didn't work", error)

    async def guard(self, work: Awaitable[None]) -> None:
        """Awaits; errors are shown. When the program ends, widgets go before the work that looks for them: that is no error."""
        try:
            try:
                await work
            except LocalrunError as error:
                self.tell(error)
        except NoMatches:
            if self._screen.app.is_running:
                raise
