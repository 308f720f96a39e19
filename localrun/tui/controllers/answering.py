"""Runs one answer at a time: engine events become text on the screen and in the store.

Text is drawn and saved at limited rates, because drawing uses the same processor that computes the answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from textual.timer import Timer
from textual.widget import Widget

from localrun.engine.conversations import Message
from localrun.engine.process.protocol import Generate, PromptProgress
from localrun.errors import LocalrunError
from localrun.tui.controllers.records import Records
from localrun.tui.engine_link import AnswerFeed, EngineLink
from localrun.tui.live_answer import LiveAnswer, prompt_time_left, prompt_tokens_per_s
from localrun.tui.widgets.chat_view import ChatView
from localrun.tui.widgets.message_view import Entry
from localrun.tui.widgets.status_bar import time_left

MIN_DRAW_INTERVAL_S, MAX_DRAW_INTERVAL_S = 0.1, 0.5
DRAW_SHARE = 0.1
"""Of one processor that may go into showing an answer; where drawing is slow, text comes in larger pieces."""
SAVE_INTERVAL_S = 1.0

_BAR_CELLS = 10


class Answering:
    """The answer that is being written, if any.

    Args:
        host: provides the event loop and timers.
        ended: called with an answer after its last event, when all of it has been submitted to the store.
        failed_to_save: called with the store's first error; the answer continues.
    """

    def __init__(
        self,
        host: Widget,
        records: Records,
        link: EngineLink,
        chat: Callable[[], ChatView],
        *,
        ended: Callable[[LiveAnswer], None],
        failed_to_save: Callable[[LocalrunError], None],
    ) -> None:
        self._host, self._records, self._link, self._chat = host, records, link, chat
        self._ended, self._failed_to_save = ended, failed_to_save
        self.answer: LiveAnswer | None = None
        self._entry: Entry | None = None
        self._feed: AnswerFeed | None = None
        self._timer: Timer | None = None
        self._saved_at = 0.0
        self._save_failed = False
        self._cpu_at = time.process_time()

    @property
    def running(self) -> bool:
        return self._feed is not None

    @property
    def live(self) -> int | None:
        """Id of the message that is being written."""
        return self.answer.message.id if self.running and self.answer is not None else None

    def start(self, entry: Entry, command: Generate) -> None:
        """`entry` is the empty message that the answer goes into; the chat shows it already."""
        assert self._feed is None
        self.answer = LiveAnswer(entry.message)
        self._entry = entry
        self._saved_at, self._save_failed = time.monotonic(), False
        self._cpu_at = time.process_time()
        self._feed = self._link.generate(command)

    async def news(self, feed: AnswerFeed) -> None:
        """The feed has something; it is drawn now or, if it was drawn just before, a little later."""
        if feed is self._feed and self._timer is None:
            await self._draw()
            if self._feed is not None:
                self._draw_later()

    async def _draw_again(self) -> None:
        self._timer = None
        if self._feed is not None and await self._draw():
            self._draw_later()

    def _draw_later(self) -> None:
        """Layout and painting happen between draws, so the processor time since the last draw is its cost."""
        now = time.process_time()
        interval = (now - self._cpu_at) / DRAW_SHARE
        self._cpu_at = now
        interval = min(max(interval, MIN_DRAW_INTERVAL_S), MAX_DRAW_INTERVAL_S)
        self._timer = self._host.set_timer(interval, self._draw_again)

    async def _draw(self) -> bool:
        """Takes in what has come; returns whether there was anything."""
        feed, answer, entry = self._feed, self.answer, self._entry
        assert feed is not None
        assert answer is not None
        assert entry is not None
        ended = feed.ended  # before taking, so everything added before the end is included
        events = feed.take()
        answer.apply(events)
        if ended and answer.finished is None:
            answer.fail(feed.error or LocalrunError("the answer ended without a final message from the engine"))
        now = time.monotonic()
        if ended or now - self._saved_at >= SAVE_INTERVAL_S:
            self._saved_at = now
            self._save(answer)
        answer.message = _as_message(answer)
        self._entry = replace(entry, message=answer.message, live=not ended)
        try:
            await self._chat().sync(self._entry, thinking_live=answer.is_thinking)
            view = self._chat().view(answer.message.id)
            if view is not None:
                await view.show_progress("" if ended or answer.n_tokens else _progress_line(answer.progress))
        finally:
            if (
                ended
            ):  # not earlier: who waits for the end looks at what is shown, and the next answer is shown behind it
                self._feed = None
                self._ended(answer)
        return bool(events)

    def save(self) -> None:
        """Saves the answer in progress."""
        if self.running and self.answer is not None:
            self._save(self.answer)

    def _save(self, answer: LiveAnswer) -> None:
        """Hands what there is to the store's thread."""
        message, details = answer.message, answer.details
        text, thinking, state = answer.text, answer.thinking, answer.state
        self._records.post(
            lambda store: store.write(message, content=text, reasoning=thinking, state=state, details=details),
            self._not_saved,
        )

    def _not_saved(self, error: LocalrunError) -> None:
        if not self._save_failed:
            self._save_failed = True
            self._failed_to_save(error)


def _as_message(answer: LiveAnswer) -> Message:
    """The answer's message with all that has come."""
    return replace(
        answer.message,
        content=answer.text,
        reasoning=answer.thinking,
        state=answer.state,
        details={**answer.message.details, **answer.details},
    )


def _progress_line(progress: PromptProgress | None) -> str:
    if progress is None:
        return "waiting for the first token…"
    if progress.done >= progress.total:
        return "prompt read, waiting for the first token…"
    filled = round(_BAR_CELLS * progress.done / max(1, progress.total))
    rate = prompt_tokens_per_s(progress)
    parts = [f"prompt {progress.done:,} of {progress.total:,} tokens"]
    if rate is not None:
        parts += [f"{rate:.0f}/s", time_left(prompt_time_left(progress))]
    return f"{'█' * filled}{'░' * (_BAR_CELLS - filled)} {', '.join(parts)}"
