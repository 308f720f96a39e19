"""The line of keys at the bottom of the screen."""

from __future__ import annotations

from textual.app import ComposeResult
from textual.binding import Binding
from textual.screen import Screen
from textual.widgets import Footer


class KeyFooter(Footer):
    """Composed again only when it would show something else: Textual's own builds all its labels anew whenever the focus moves."""

    def __init__(self) -> None:
        super().__init__(compact=True, show_command_palette=False)
        self._composed_of: list[tuple[Binding, bool, str]] | None = None

    def compose(self) -> ComposeResult:
        if self._bindings_ready:
            self._composed_of = self._on_view()
        yield from super().compose()

    def bindings_changed(self, screen: Screen[object]) -> None:
        if screen is not self.screen or self._composed_of != self._on_view():
            super().bindings_changed(screen)

    def _on_view(self) -> list[tuple[Binding, bool, str]]:
        """The keys that are shown, whether they can be used, and what is said about them."""
        return [
            (each.binding, each.enabled, each.tooltip)
            for each in self.screen.active_bindings.values()
            if each.binding.show
        ]
