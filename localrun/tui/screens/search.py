"""Searches all conversations, in all their branches."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from textual import events, on
from textual.app import ComposeResult
from textual.content import Content
from textual.message import Message
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option

from localrun.engine.conversations import ConversationError, SearchHit
from localrun.textsafe import visible_line
from localrun.tui.screens.dialog import Dialog

Search = Callable[[str], list[SearchHit]]

_WHO = {"user": "You", "assistant": "Model", "title": "Title"}


class SearchScreen(Dialog[SearchHit]):
    """Gives the place that was chosen. Searches in a thread; an older search's result is dropped."""

    TITLE_TEXT = "Search all conversations"

    @dataclass
    class Result(Message):
        """What a search found, or why it failed."""

        words: str
        hits: list[SearchHit]
        error: str = ""

    def __init__(self, search: Search, words: str = "") -> None:
        super().__init__()
        self._search, self._first_words = search, words
        self._hits: list[SearchHit] = []

    def compose_content(self) -> ComposeResult:
        yield Input(self._first_words, placeholder="all of these words", id="search-words")
        yield OptionList(id="search-hits")
        yield Static("", id="search-note")

    @on(Input.Changed)
    def change(self, event: Input.Changed) -> None:
        threading.Thread(target=self._run, args=(event.value,), name="tui-search", daemon=True).start()

    def _run(self, words: str) -> None:
        try:
            self.post_message(self.Result(words, self._search(words)))
        except ConversationError as error:
            self.post_message(self.Result(words, [], str(error)))

    @on(Result)
    def show(self, event: Result) -> None:
        if event.words != self.query_one(Input).value:
            return
        self._hits = event.hits
        options = self.query_one(OptionList)
        options.clear_options()
        options.add_options(Option(_line(hit)) for hit in event.hits)
        if event.hits:
            options.highlighted = 0
        count = f"{len(event.hits)} matches" if event.words.strip() else ""
        self.query_one("#search-note", Static).update(Content(event.error or count))

    def on_key(self, event: events.Key) -> None:
        """Arrows move in the list while the words have the focus."""
        if event.key in ("up", "down") and isinstance(self.focused, Input):
            options = self.query_one(OptionList)
            options.action_cursor_up() if event.key == "up" else options.action_cursor_down()
            event.stop()

    @on(Input.Submitted)
    def choose_highlighted(self) -> None:
        index = self.query_one(OptionList).highlighted
        if index is not None and index < len(self._hits):
            self.dismiss(self._hits[index])

    @on(OptionList.OptionSelected)
    def choose(self, event: OptionList.OptionSelected) -> None:
        self.dismiss(self._hits[event.option_index])


def _line(hit: SearchHit) -> Content:
    title = visible_line(hit.title, max_chars=40) or "New conversation"
    return Content.assemble(
        (f"{title} · {_WHO.get(hit.role, hit.role)}\n", "bold"), f"  {visible_line(hit.snippet, max_chars=140)}"
    )
