"""The list of conversations at the side."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.widgets import OptionList, Static
from textual.widgets.option_list import Option

from localrun.engine.conversations import Conversation
from localrun.textsafe import visible_line
from localrun.tui.messages import ConversationAction, ConversationChosen


class ConversationOptions(OptionList):
    """The list with its own keys."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("r", "ask('rename')", "Rename"),
        Binding("delete,d", "ask('delete')", "Delete"),
    ]

    def action_ask(self, command: str) -> None:
        option = self.highlighted_option
        if option is not None and option.id is not None:
            self.post_message(ConversationAction(int(option.id), command))


class ConversationList(Vertical):
    """All conversations, the newest first; posts ConversationChosen and ConversationAction."""

    def __init__(self) -> None:
        super().__init__(id="conversations")

    def compose(self) -> ComposeResult:
        yield Static("Conversations", classes="panel-title")
        yield ConversationOptions(id="conversation-options", compact=True)
        yield Static("Enter open · r rename · d delete", classes="panel-foot")

    def show(self, conversations: Sequence[Conversation], current: int | None) -> None:
        """Fills the list; the current one is marked."""
        options = self.query_one(ConversationOptions)
        highlighted = options.highlighted_option
        keep = highlighted.id if highlighted is not None else str(current)
        options.clear_options()
        options.add_options(_option(conversation, current) for conversation in conversations)
        ids = [str(conversation.id) for conversation in conversations]
        if keep in ids or str(current) in ids:
            options.highlighted = ids.index(keep if keep in ids else str(current))

    @on(OptionList.OptionSelected)
    def choose(self, event: OptionList.OptionSelected) -> None:
        event.stop()
        self.post_message(ConversationChosen(int(str(event.option.id))))


def _option(conversation: Conversation, current: int | None) -> Option:
    mark = "● " if conversation.id == current else "  "
    title = visible_line(conversation.title) or "New conversation"
    then, now = time.localtime(conversation.updated_at), time.localtime()
    same_day = (then.tm_year, then.tm_yday) == (now.tm_year, now.tm_yday)
    date = time.strftime("%H:%M" if same_day else "%d %b", then)
    return Option(Content.assemble(f"{mark}{date} ", (title, "bold" if mark.strip() else "")), id=str(conversation.id))
