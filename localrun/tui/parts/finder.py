"""Finding words in the conversation on view."""

from __future__ import annotations

from typing import Any

from textual.screen import Screen

from localrun.tui.parts.work import Call, Handler
from localrun.tui.widgets.chat_view import ChatView
from localrun.tui.widgets.find_bar import FindBar


class Finder:
    """Between the find bar, which owns words and place, and the chat, which shows the place."""

    def __init__(self, screen: Screen[Any]) -> None:
        self._screen = screen

    def commands(self) -> dict[str, Handler]:
        return {"find": self._find}

    @property
    def _bar(self) -> FindBar:
        return self._screen.query_one(FindBar)

    def close(self) -> bool:
        """Returns whether it was open."""
        was_open = bool(self._bar.display)
        self._bar.display = False
        return was_open

    def _find(self, call: Call) -> None:
        if self._bar.display and not call.argument:
            self._bar.action_step(-1)
        else:
            self._bar.open(call.argument)

    def look(self) -> None:
        """Other words."""
        chat = self._screen.query_one(ChatView)
        self._bar.search([entry.message for entry in chat.entries])

    async def go_to(self, message_id: int) -> None:
        """Shows a place."""
        chat = self._screen.query_one(ChatView)
        for view in chat.query(".found"):
            view.remove_class("found")
        await chat.scroll_to_message(message_id)
        if (found := chat.view(message_id)) is not None:
            found.add_class("found")
