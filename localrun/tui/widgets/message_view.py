"""One message of the conversation on the screen."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.message import Message as TextualMessage
from textual.widget import Widget
from textual.widgets import Markdown, Static
from textual.widgets.markdown import MarkdownStream

from localrun.engine.conversations import Message
from localrun.textsafe import visible, visible_line
from localrun.tui.commands import message_bindings
from localrun.tui.messages import MessageAction
from localrun.tui.widgets.lean_markdown import LeanMarkdown, parse_markdown
from localrun.tui.widgets.marks import Marks
from localrun.tui.widgets.thinking import ThinkingBlock
from localrun.units import format_duration

_ENDINGS = {
    "stopped": "stopped",
    "length": "cut off: token limit",
    "context": "cut off: context full",
    "failed": "cut off: the engine failed",
    "writing": "not finished",
}


def code_blocks(markdown: str) -> list[str]:
    """Contents of the fenced and indented code blocks."""
    tokens = parse_markdown(markdown)
    return [token.content.rstrip("\n") for token in tokens if token.type in ("fence", "code_block")]


@dataclass(frozen=True, slots=True)
class Entry:
    """A message and its place among the versions of itself, counted from 1."""

    message: Message
    version: int = 1
    n_versions: int = 1
    live: bool = False


class MessageView(Vertical, can_focus=True):
    """Shows an entry; grows with it while `live`.

    No threads. `sync` may be called at any rate; it only writes what is new.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        *message_bindings(),
        Binding("up", "neighbour(-1)", "Message before", show=False),
        Binding("down", "neighbour(1)", "Message after", show=False),
        Binding("home", "neighbour(-1000000)", "First message", show=False),
        Binding("end", "neighbour(1000000)", "Last message", show=False),
    ]

    @dataclass
    class Neighbour(TextualMessage):
        """The user wants to go `step` messages on."""

        view: MessageView
        step: int

    def __init__(self, entry: Entry) -> None:
        super().__init__(classes=f"message -{entry.message.role}")
        self.entry = entry
        self._written = visible(entry.message.content)
        self._stream: MarkdownStream | None = None
        self._marks, self._words = Marks(), tuple[str, ...]()

    @property
    def message_id(self) -> int:
        return self.entry.message.id

    def compose(self) -> ComposeResult:
        message = self.entry.message
        yield Static(self._header(), classes="message-header")
        for attachment in message.attachments:
            size = f" · {attachment.n_tokens:,} tokens" if attachment.n_tokens else ""
            yield Static(Content(f"▤ {visible_line(attachment.name, max_chars=60)}{size}"), classes="attachment")
        if message.role != "assistant":
            yield Static(Content(self._written), classes="message-text")
            return
        if message.reasoning:
            yield ThinkingBlock(message.reasoning, message.details.get("thinking_s"))
        yield LeanMarkdown(self._written)
        if ending := self._ending():
            yield Static(ending, classes="message-ending")

    async def sync(self, entry: Entry, thinking_live: bool = False) -> None:
        """Shows the entry's current state. Its text may only have grown."""
        self.entry = entry
        if not self.is_mounted or not self.children:
            return
        message = entry.message
        self.query_one(".message-header", Static).update(self._header())
        if message.role != "assistant":
            return
        if message.reasoning:
            await self._show_thinking(thinking_live)
        await self._write(visible(message.content))
        await self._show_line("message-ending", self._ending())
        if not entry.live and self._stream is not None:
            stream, self._stream = self._stream, None
            await stream.stop()

    async def show_progress(self, text: str) -> None:
        """A line in place of an answer that has not begun; empty: none."""
        if self.is_mounted and self.children:
            await self._show_line("message-progress", Content(text))

    def toggle_thinking(self) -> None:
        for block in self.query(ThinkingBlock):
            block.toggle()

    def mark(self, words: Sequence[str]) -> None:
        """Highlights search words, also in text drawn later; empty: no highlights."""
        self._words = tuple(words)
        self._marks.show(self, self._words)

    @property
    def first_mark(self) -> Widget | None:
        """Where the topmost of them is."""
        return self._marks.first

    def on_markdown_table_of_contents_updated(self, event: Markdown.TableOfContentsUpdated) -> None:
        """The text was redrawn."""
        if self._words:
            self._marks.show(self, self._words)

    async def _show_thinking(self, live: bool) -> None:
        message = self.entry.message
        seconds = message.details.get("thinking_s")
        blocks = self.query(ThinkingBlock)
        if blocks:
            blocks.first().show(message.reasoning, seconds, live=live)
        else:
            block = ThinkingBlock(message.reasoning, seconds, live=live)
            await self.mount(block, before=self.query_one(LeanMarkdown))

    async def _show_line(self, name: str, text: Content) -> None:
        """A line below the text, mounted only while it is not empty, because unmounted widgets cost nothing."""
        lines = self.query_children(f".{name}").results(Static)
        line = next(iter(lines), None)
        if line is None:
            if text:
                await self.mount(Static(text, classes=name))
        elif text:
            line.update(text)
        else:
            await line.remove()

    async def _write(self, text: str) -> None:
        if text == self._written:
            return
        markdown = self.query_one(LeanMarkdown)
        if not text.startswith(self._written):
            self._written = text
            await markdown.update(text)
            return
        new, self._written = text[len(self._written) :], text
        if self._stream is None:
            self._stream = Markdown.get_stream(markdown)
        await self._stream.write(new)

    # --- header and last line

    def _header(self) -> Content:
        message, entry = self.entry.message, self.entry
        name = {"user": "You", "assistant": str(message.details.get("model") or "Model")}.get(
            message.role, message.role.capitalize()
        )
        parts = [Content.styled(visible_line(name, max_chars=40), "bold")]
        if entry.n_versions > 1:
            parts.append(Content.styled(f"  ◂ {entry.version}/{entry.n_versions} ▸", "$text-accent"))
        parts.append(Content.styled(f"  {_clock(message.created_at)}", "$text-muted"))
        return Content.assemble(*parts)

    def _ending(self) -> Content:
        message = self.entry.message
        if self.entry.live:
            return Content("")
        return Content(" · ".join(_ending_parts(message)))

    # --- keys and mouse

    def action_ask(self, command: str) -> None:
        self.post_message(MessageAction(self.message_id, command))

    def action_neighbour(self, step: int) -> None:
        self.post_message(self.Neighbour(self, step))

    def on_markdown_link_clicked(self, event: Markdown.LinkClicked) -> None:
        """A model's link is copied, never followed."""
        event.stop()
        self.app.copy_to_clipboard(event.href)
        self.app.notify(visible_line(event.href, max_chars=200), title="Link copied", markup=False)


def _ending_parts(message: Message) -> Iterator[str]:
    if message.state in _ENDINGS:
        yield f"■ {_ENDINGS[message.state]}"
    timings = message.details.get("timings") or {}
    n_new, seconds = timings.get("new_tokens", 0), timings.get("decode_s", 0.0)
    if n_new and seconds:
        yield f"{n_new:,} {'token' if n_new == 1 else 'tokens'}, {n_new / seconds:.1f}/s"
    n_prompt = timings.get("prompt_tokens", 0) - timings.get("reused_tokens", 0)
    if n_prompt > 0 and timings.get("prompt_s"):
        yield f"read {n_prompt:,} in {format_duration(timings['prompt_s'])}"
    if warning := message.details.get("warning"):
        yield f"⚠ {visible_line(str(warning), max_chars=200)}"
    if note := message.details.get("note"):
        yield visible_line(str(note), max_chars=300)


def _clock(moment: float) -> str:
    then, now = time.localtime(moment), time.localtime()
    same_day = (then.tm_year, then.tm_yday) == (now.tm_year, now.tm_yday)
    return time.strftime("%H:%M" if same_day else "%Y-%m-%d %H:%M", then)
