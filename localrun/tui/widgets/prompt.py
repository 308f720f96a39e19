"""The input: several lines, history, slash commands with a list to choose from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rich.text import Text
from textual import events
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.content import Content
from textual.message import Message
from textual.widgets import OptionList, Static, TextArea
from textual.widgets.option_list import Option

from localrun.engine.conversations import Attachment
from localrun.textsafe import visible_line
from localrun.tui.commands import BY_SLASH, matching_slashes
from localrun.tui.files import completions, estimate_tokens, is_long_paste
from localrun.tui.messages import PromptSubmitted
from localrun.tui.sealed import pictures, sealed, unsealed

MAX_SUGGESTIONS = 8
PASTED = "pasted text"

NEW_LINE_KEYS = ("ctrl+j", "shift+enter", "alt+enter")


class PromptArea(TextArea):
    """The text field itself; what a key means here is decided in `on_key` before `TextArea` sees it."""

    def get_line(self, line_index: int) -> Text:
        """A line as drawn: control characters are replaced by symbols."""
        return Text(pictures(self.document.get_line(line_index)), end="", no_wrap=True)

    async def _on_paste(self, event: events.Paste) -> None:
        event.stop()
        event.prevent_default()
        prompt = self.parent
        assert isinstance(prompt, PromptInput)
        if is_long_paste(event.text):
            prompt.fold(event.text)
        else:
            self.insert_text(event.text)

    def action_paste(self) -> None:
        self.insert_text(self.app.clipboard)

    def insert_text(self, text: str) -> None:
        """In place of the selection, whatever is in it."""
        result = self._replace_via_keyboard(sealed(text), *self.selection)
        if result is not None:
            self.move_cursor(result.end_location)
        self.focus()

    async def _on_key(self, event: events.Key) -> None:
        prompt = self.parent
        assert isinstance(prompt, PromptInput)
        if event.key in NEW_LINE_KEYS:
            event.stop()
            event.prevent_default()
            self.insert("\n")
        elif prompt.take_key(event.key):
            event.stop()
            event.prevent_default()
        else:
            await super()._on_key(event)


class PromptInput(Vertical):
    """Input, suggestions above it, chips of attached files.

    Owns the history and the files attached to the next message.

    Attributes:
        offers: questions that Tab cycles through in an empty input.
        arguments: completions for slash commands, by command name.
    """

    @dataclass
    class Changed(Message):
        """Its text has changed."""

    def __init__(self) -> None:
        super().__init__(id="prompt")
        self.attachments: list[Attachment] = []
        self._history: list[str] = []
        self._at = 0  # position in the history; len: the draft
        self._draft = ""
        self._dismissed = ""  # text whose suggestions were closed with Esc
        self._kind = "/"  # of the suggestions on view: slash commands and their arguments, or files after an @
        self._suggested = ""  # text that they were made for
        self.offers: tuple[str, ...] = ()
        self.arguments: Mapping[str, Callable[[], Sequence[str]]] = {}

    def compose(self) -> ComposeResult:
        suggestions = OptionList(id="suggestions", compact=True)
        suggestions.display = suggestions.can_focus = False
        yield suggestions
        chips = Static("", id="chips")
        chips.display = False
        yield chips
        yield PromptArea(id="input", placeholder="Ask something, or / for commands", compact=True, soft_wrap=True)

    # --- for the screen

    @property
    def area(self) -> PromptArea:
        return self.query_one(PromptArea)

    @property
    def text(self) -> str:
        return unsealed(self.area.text)

    @property
    def selected_text(self) -> str:
        return unsealed(self.area.selected_text)

    def set_text(self, text: str) -> None:
        """Replaces the draft, cursor at its end."""
        self.area.text = sealed(text)
        self.area.move_cursor(self.area.document.end)

    def set_history(self, texts: list[str]) -> None:
        """Earlier inputs, oldest first."""
        self._history, self._at = list(texts), len(texts)

    def clear(self, *, remember: bool = True) -> None:
        """Empties input and attachments; the text goes to the history."""
        text = self.text
        if remember and text.strip() and text not in self._history[-1:]:
            self._history.append(text)
        self._at, self._draft = len(self._history), ""
        self.set_text("")
        self.set_attachments([])

    def set_attachments(self, attachments: list[Attachment]) -> None:
        self.attachments = attachments
        chips = self.query_one("#chips", Static)
        chips.display = bool(attachments)
        names = (f"▤ {visible_line(a.name, max_chars=30)} · {a.n_tokens:,} tokens" for a in attachments)
        chips.update(Content("   ".join(names)))

    def fold(self, text: str) -> None:
        """A long paste goes with the message as a file does."""
        number = sum(a.name.startswith(PASTED) for a in self.attachments) + 1
        # Not worth waiting for the engine's count.
        self.set_attachments([*self.attachments, Attachment(f"{PASTED} {number}", text, estimate_tokens(text))])
        self.area.focus()

    def close_suggestions(self) -> bool:
        """Returns whether there were any."""
        options = self.query_one("#suggestions", OptionList)
        was_open = bool(options.display)
        self._dismissed = self.text
        options.display = False
        return was_open

    # --- keys

    def take_key(self, key: str) -> bool:
        """Returns whether the key is used up."""
        options = self.query_one("#suggestions", OptionList)
        if key in ("up", "down", "tab", "enter") and self.text != self._suggested:
            self._suggest()  # somebody types faster than the news of a change arrives
        if options.display and key in ("up", "down"):
            options.action_cursor_up() if key == "up" else options.action_cursor_down()
            return True
        if options.display and key in ("tab", "enter") and self._complete(options, run=key == "enter"):
            return True
        if key == "enter":
            self._enter()
            return True
        if key == "tab" and self.offers and self.text in ("", *self.offers):
            at = self.offers.index(self.text) + 1 if self.text else 0
            self.set_text(self.offers[at % len(self.offers)])
            return True
        if key in ("up", "down"):
            return self._go_in_history(key)
        if key == "backspace" and not self.text and self.attachments:
            self.set_attachments(self.attachments[:-1])
            return True
        return False

    def _enter(self) -> None:
        area, text = self.area, self.text
        row, column = area.cursor_location
        if column and area.document.get_line(row)[column - 1] == "\\" and text.strip() != "\\":
            area.replace("\n", (row, column - 1), (row, column))
        else:
            self.post_message(PromptSubmitted(text))

    def _go_in_history(self, key: str) -> bool:
        area = self.area
        if not (area.cursor_at_first_line if key == "up" else area.cursor_at_last_line):
            return False
        step = -1 if key == "up" else 1
        if not 0 <= self._at + step <= len(self._history):
            return False
        if self._at == len(self._history):
            self._draft = self.text
        self._at += step
        self._dismissed = self._draft if self._at == len(self._history) else self._history[self._at]
        self.set_text(self._dismissed)
        return True

    # --- suggestions

    def on_text_area_changed(self, event: TextArea.Changed) -> None:
        event.stop()
        self._suggest()
        self.post_message(self.Changed())

    def _suggest(self) -> None:
        options = self.query_one("#suggestions", OptionList)
        text = self._suggested = self.text
        if text != self._dismissed:
            self._dismissed = ""
        found = (
            []
            if text == self._dismissed
            else self._slash_options(text) or self._arguments(text) or self._file_options()
        )
        options.clear_options()
        options.add_options(found)
        options.display = bool(found)
        if found:
            options.highlighted = 0

    def _slash_options(self, text: str) -> list[Option]:
        self._kind = "/"
        is_name = text.startswith("/") and not text.startswith("//") and not any(c.isspace() for c in text)
        found = matching_slashes(text[1:])[:MAX_SUGGESTIONS] if is_name else []
        return [
            Option(Content.assemble((f"/{slash} {c.argument}".ljust(24), "bold"), f" {c.title}"), id=slash)
            for slash, c in found
        ]

    def _arguments(self, text: str) -> list[Option]:
        """Completions of a slash command's argument; empty once it is complete."""
        self._kind = "/"
        name, blank, typed = text.removeprefix("/").partition(" ")
        command = BY_SLASH.get(name) if text.startswith("/") and blank else None
        if command is None or command.name not in self.arguments:
            return []
        known = self.arguments[command.name]()
        found = [] if typed in known else [word for word in known if word.startswith(typed)]
        return [
            Option(Content.assemble((visible_line(f"/{name} {word}"), "bold")), id=f"{name} {word}")
            for word in found[:MAX_SUGGESTIONS]
        ]

    def _file_options(self) -> list[Option]:
        self._kind = "@"
        row, column = self.area.cursor_location
        before = self.area.document.get_line(row)[:column]
        return [Option(Content(f"▤ {visible_line(path)}"), id=path) for path in completions(unsealed(before))]

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """A click."""
        event.stop()
        self._take(str(event.option.id))
        self.area.focus()

    def _complete(self, options: OptionList, *, run: bool) -> bool:
        highlighted = options.highlighted_option
        if highlighted is None:
            return False
        name = str(highlighted.id)
        if run and (self.text == f"/{name}" or (self._kind == "@" and self._word().endswith("@" + name))):
            return False
        self._take(name)
        return True

    def _word(self) -> str:
        """The word before the cursor."""
        row, column = self.area.cursor_location
        return self.area.document.get_line(row)[:column].rpartition(" ")[2]

    def _take(self, name: str) -> None:
        self.query_one("#suggestions", OptionList).display = False
        if self._kind == "/":
            self.set_text(f"/{name}" if " " in name else f"/{name} ")
            return
        row, column = self.area.cursor_location
        start = column - len(self._word().rpartition("@")[2])
        self.area.replace(sealed(name if name.endswith("/") else f"{name} "), (row, start), (row, column))
