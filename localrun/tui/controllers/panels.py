"""The panels open next to the chat, or, on a narrow screen, instead of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from textual.screen import Screen

from localrun.tui.controllers.work import Handler, Invocation
from localrun.tui.widgets.conversation_list import ConversationList, ConversationOptions
from localrun.tui.widgets.engine_panel import EnginePanel

EnginePanelState = Literal["off", "side", "full"]

WIDE_COLUMNS = 110
"""From this width on, panels are shown next to the chat; `-wide` in `localrun.tcss`."""

ENGINE_COLUMNS = 140
"""From this width on the engine panel is open at the start."""

_NEXT: dict[EnginePanelState, EnginePanelState] = {"off": "side", "side": "full", "full": "off"}


class Panels:
    """Owns the open panels.

    Args:
        to_input: gives the focus to the input.
        opened: called when a panel that must be filled comes into view.
    """

    def __init__(
        self, screen: Screen[Any], *, to_input: Callable[[], Any], opened: Callable[[], None] = lambda: None
    ) -> None:
        self._screen, self._to_input, self.opened = screen, to_input, opened
        self.conversations = False
        self.engine: EnginePanelState = "off"
        self._was_narrow = True

    def commands(self) -> dict[str, Handler]:
        return {
            "conversations": self._toggle_conversations,
            "engine_panel": self._next_engine,
            "map_view": self._next_map_view,
        }

    @property
    def narrow(self) -> bool:
        """Whether there is no room for a panel next to the chat."""
        return self._screen.app.size.width < WIDE_COLUMNS

    def begin(self) -> None:
        """The panels of a fresh screen."""
        self.set(conversations=False, engine="side" if self._screen.app.size.width >= ENGINE_COLUMNS else "off")

    def set(self, *, conversations: bool | None = None, engine: EnginePanelState | None = None) -> None:
        """Shows or hides; on a narrow screen one at a time."""
        if conversations is not None:
            self.conversations = conversations
        if engine is not None:
            self.engine = engine
        if self.narrow and conversations:
            self.engine = "off"
        if self.narrow and engine in ("side", "full"):
            self.conversations = False
        screen = self._screen
        screen.set_class(self.conversations, "-conversations")
        screen.set_class(self.engine != "off", "-engine")
        screen.set_class(self.engine == "full", "-engine-full")
        screen.query_one(ConversationList).display = self.conversations
        screen.query_one(EnginePanel).display = self.engine != "off"
        self.opened()

    def resized(self, width: int) -> None:
        """Closes panels that no longer fit next to the chat, which they would cover."""
        narrow = width < WIDE_COLUMNS
        if narrow and not self._was_narrow:
            self.set(conversations=False, engine="off")
            self._to_input()
        self._was_narrow = narrow

    def close_one(self) -> bool:
        """Closes what covers the chat; returns whether something did."""
        if self.narrow and (self.conversations or self.engine != "off"):
            self.set(conversations=False, engine="off")
        elif self.engine == "full":
            self.set(engine="side")
        else:
            return False
        return True

    def uncover_input(self) -> None:
        """The user writes: what covers the input goes."""
        if self.engine == "full":
            self.close_one()
        self._to_input()

    def _toggle_conversations(self, call: Invocation) -> None:
        self.set(conversations=not self.conversations)
        if self.conversations:
            self._screen.query_one(ConversationOptions).focus()
        else:
            self._to_input()

    def _next_engine(self, call: Invocation) -> None:
        if self.narrow:
            self.set(engine="full" if self.engine == "off" else "off")
        else:
            self.set(engine=_NEXT[self.engine])
        if self.engine == "full":  # the input is hidden, so keys must not go there
            self._screen.query_one(EnginePanel).map.focus()
        else:
            self._to_input()

    def _next_map_view(self, call: Invocation) -> None:
        if self.engine == "off":
            self._next_engine(call)
        panel = self._screen.query_one(EnginePanel)
        panel.map.next_view()
        panel.show_legend()
