"""Highlights search words wherever a message shows them: text, lists, tables, code and reasoning."""

from __future__ import annotations

import re
from collections.abc import Sequence

from textual.content import Content
from textual.visual import Visual
from textual.widget import Widget
from textual.widgets import Static

from localrun.tui.widgets.lean_markdown import RowsVisual, TableVisual

STYLE = "reverse bold"
"""Seen in every theme, and without colours."""


class Marks:
    """The marks of one message. Owns what stood in the marked widgets before."""

    def __init__(self) -> None:
        self._before: list[tuple[Static, Visual, Visual]] = []

    def show(self, message: Widget, words: Sequence[str]) -> None:
        """Marks these words in place of others; without words nothing is marked."""
        self.clear()
        wanted = [re.escape(word) for word in words if word]
        if not wanted:
            return
        pattern = re.compile("|".join(sorted(wanted, key=len, reverse=True)), re.IGNORECASE)
        for widget in message.query(Static):
            if not widget.has_class("message-header") and (found := _marked(widget.visual, pattern)) is not None:
                self._before.append((widget, widget.visual, found))
                widget.update(found, layout=False)

    def clear(self) -> None:
        """Everything is as before; what has changed meanwhile stays."""
        for widget, before, marked in self._before:
            if widget.is_attached and widget.visual is marked:
                widget.update(before, layout=False)
        self._before.clear()

    @property
    def first(self) -> Static | None:
        """The topmost widget that has a mark and is on view."""
        return next((w for w, _, _ in self._before if w.is_attached and w.region.height), None)


def _marked(visual: Visual, pattern: re.Pattern[str]) -> Visual | None:
    """The same with its words marked; None: it has none of them."""
    if isinstance(visual, Content):
        return _content(visual, pattern)
    if isinstance(visual, RowsVisual | TableVisual):
        n_marked = 0

        def each(content: Content) -> Content:
            nonlocal n_marked
            found = _content(content, pattern)
            n_marked += found is not None
            return found or content

        changed = visual.changed(each)
        return changed if n_marked else None
    return None


def _content(content: Content, pattern: re.Pattern[str]) -> Content | None:
    places = [match.span() for match in pattern.finditer(content.plain)]
    for start, end in places:
        content = content.stylize(STYLE, start, end)
    return content if places else None
