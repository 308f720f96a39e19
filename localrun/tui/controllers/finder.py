"""Finds words in the open conversation and highlights them."""

from __future__ import annotations

from typing import Any

from textual.screen import Screen

from localrun.tui.controllers.work import Handler, Invocation
from localrun.tui.widgets.chat_view import ChatView
from localrun.tui.widgets.find_bar import FindBar
from localrun.tui.widgets.message_view import MessageView


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
        self._unmark()
        return was_open

    def _find(self, call: Invocation) -> None:
        if self._bar.display and not call.argument:
            self._bar.action_step(-1)
        else:
            self._bar.open(call.argument)

    def look(self) -> None:
        """Other words."""
        chat = self._screen.query_one(ChatView)
        self._unmark()
        self._bar.search([entry.message for entry in chat.entries])

    async def go_to(self, message_id: int) -> None:
        """Shows a place: the message with all its words marked, the first of them in view."""
        self._unmark()
        chat = self._screen.query_one(ChatView)
        await chat.scroll_to_message(message_id)
        if (found := chat.view(message_id)) is not None:
            found.add_class("found")
            found.mark(self._bar.words.split())
            chat.call_after_refresh(self._show_mark, found)

    def _show_mark(self, found: MessageView) -> None:
        """In a message that is longer than the view."""
        chat, mark = self._screen.query_one(ChatView), found.first_mark
        if mark is not None and mark.region.y >= chat.region.bottom:
            chat.scroll_to_widget(mark, animate=False, top=True)

    def _unmark(self) -> None:
        for view in self._screen.query_one(ChatView).query(".found").results(MessageView):
            view.remove_class("found")
            view.mark(())
