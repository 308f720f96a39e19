"""Words that are looked for are marked in what a message shows, and only there."""

from __future__ import annotations

from textual.app import App, ComposeResult
from textual.containers import Vertical
from textual.content import Content
from textual.widgets import Static

from localrun.tui.widgets.marks import STYLE, Marks


class Message(App[None]):
    def compose(self) -> ComposeResult:
        with Vertical(id="message"):
            yield Static("an apple", classes="message-header")
            yield Static("Apple pie, an apple-tree, a.b")
            yield Static("nothing")


def marked(app: Message) -> list[str]:
    found = []
    for widget in app.query(Static):
        content = widget.visual
        assert isinstance(content, Content)
        found += [content.plain[span.start : span.end] for span in content.spans if str(span.style) == STYLE]
    return found


async def test_words_are_marked_in_any_case_and_the_marks_go_again() -> None:
    async with Message().run_test() as pilot:
        app, marks = pilot.app, Marks()
        assert isinstance(app, Message)
        message = app.query_one("#message")
        marks.show(message, ["apple", ""])
        assert marked(app) == ["Apple", "apple"], "not in the header"
        assert marks.first is app.query(Static)[1]
        marks.show(message, ["apple-tree", "apple", "a.b"])
        assert marked(app) == ["Apple", "apple-tree", "a.b"], "the longest, and no patterns"
        marks.clear()
        assert marked(app) == []
        assert marks.first is None
        assert str(app.query(Static)[1].visual) == "Apple pie, an apple-tree, a.b"


async def test_what_has_changed_meanwhile_stays() -> None:
    async with Message().run_test() as pilot:
        app, marks = pilot.app, Marks()
        marks.show(app.query_one("#message"), ["apple"])
        app.query(Static)[1].update("new")
        marks.clear()
        assert str(app.query(Static)[1].visual) == "new"
