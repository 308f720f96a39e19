"""Helpers of the UI tests: an app with a scripted engine, and waiting for a condition instead of for a time."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from textual.errors import NoWidget
from textual.message_pump import MessagePump
from textual.pilot import Pilot
from textual.widget import Widget

from localrun.engine.conversations import Conversation, ConversationStore
from localrun.errors import EngineDiedError
from localrun.tui.app import Launch, LocalrunApp
from localrun.tui.chat_screen import ChatScreen
from localrun.tui.widgets.notices import ErrorPanel
from tests.tui.fake_engine import FakeEngine

PATIENCE_S = 300.0
"""Only a failing test waits so long."""


@dataclass
class Talk:
    """A running app under test."""

    app: LocalrunApp
    pilot: Pilot[None]
    engine: FakeEngine
    notes: list[str] = field(default_factory=list)
    """All short notes since the start, whether or not they have gone from the screen."""

    @property
    def screen(self) -> ChatScreen:
        assert self.app.chat is not None
        return self.app.chat

    @property
    def shown(self) -> list[tuple[str, str]]:
        """Role and text of the messages on view."""
        return [(entry.message.role, entry.message.content) for entry in self.screen.chat.entries]

    @property
    def errors(self) -> list[str]:
        return [str(panel.error) for panel in self.screen.query(ErrorPanel)]

    async def stored(self) -> list[Conversation]:
        """All conversations, as they are in the file after everything that was asked for."""
        await self.settled()
        return await self.screen.records(ConversationStore.conversations)

    @property
    def clipboard(self) -> str:
        return self.app.clipboard

    async def until(self, condition: Callable[[], Any], what: str = "") -> None:
        """Lets the app work until the condition holds."""
        end = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < end, f"never happened: {what or condition}"
            await self.pilot.pause(0.005)
        await self.pilot.pause()

    async def idle(self) -> None:
        """Until no answer is being written and none is waiting."""
        await self.until(lambda: self.screen.queue.idle and not self.screen.asking.busy, "idle")

    async def focus(self, widget: Widget) -> None:
        """Keys go there from now on: a screen that is still being built may take the focus once more."""
        widget.focus()
        await self.until(lambda: widget.has_focus, "the widget has the focus")

    async def click(self, target: str | Widget) -> None:
        """Once the widget is there, laid out, and nothing covers its middle."""

        def found() -> Widget | None:
            widgets = [target] if isinstance(target, Widget) else self.app.screen.query(target)
            return next(iter(widgets), None)

        def is_in_reach() -> bool:
            if (widget := found()) is None or not widget.region.area:
                return False
            region = widget.region
            try:
                hit, _ = self.app.screen.get_widget_at(region.x + region.width // 2, region.y + region.height // 2)
            except NoWidget:
                return False
            return widget in hit.ancestors_with_self

        await self.until(is_in_reach, f"{target} can be clicked")
        widget = found()
        assert widget is not None
        await self.pilot.click(widget)  # type: ignore[arg-type]

    async def type(self, text: str, *, send: bool = True) -> None:
        """Puts a text into the input, as a paste does, and sends it."""
        await self.until(lambda: self.app.screen is self.screen, "the chat screen is in front")
        await self.focus(self.screen.prompt.area)
        self.screen.prompt.set_text(text)
        await self.settled()
        if send:
            await self.press("enter")

    async def ask(self, text: str) -> None:
        """Sends a question and waits for its answer."""
        await self.type(text)
        await self.idle()

    async def press(self, *keys: str) -> None:
        for key in keys:
            await self.pilot.press(key)
            await self.settled()

    async def settled(self) -> None:
        """Until the key's messages have gone their way, from the app to the focused widget, up to the screen and back, and what
        they ask for is done. The pilot alone waits for that only for a while, which is too short on a busy machine."""
        focused = self.app.focused
        way: list[MessagePump] = [
            self.app,
            *(focused.ancestors_with_self if focused is not None else [self.app.screen]),
        ]
        for pump in [*way, self.app]:
            if pump.is_running:
                passed = asyncio.Event()
                pump.call_later(passed.set)
                await asyncio.wait_for(passed.wait(), PATIENCE_S)
        await self.until(lambda: self.app.chat is None or self.screen.queue.idle, "commands are carried out")


@dataclass
class Setup:
    """What an app starts with."""

    folder: Path
    size: tuple[int, int] = (80, 24)
    launch: Launch = field(default_factory=lambda: Launch(model=Path("/models/fake")))
    prepare: Callable[[FakeEngine], None] = lambda engine: None
    ready: bool = True
    toasts: bool = False

    @contextlib.asynccontextmanager
    async def start(self) -> AsyncIterator[Talk]:
        engines: list[FakeEngine] = []

        def factory(on_death: Callable[[EngineDiedError], None]) -> FakeEngine:
            engines.append(FakeEngine(on_death))
            self.prepare(engines[-1])
            return engines[-1]

        app = LocalrunApp(self.launch, engine_factory=factory, store_path=self.folder / "c.sqlite3")
        notes: list[str] = []
        notify = app.notify

        def keep(message: str, **how: Any) -> None:
            notes.append(message)
            notify(message, **how)

        app.notify = keep  # type: ignore[method-assign]
        async with app.run_test(size=self.size, notifications=self.toasts) as pilot:
            end = time.monotonic() + PATIENCE_S
            while app.chat is None and len(app.screen_stack) == 1:
                assert time.monotonic() < end, "neither the chat nor a question came"
                await asyncio.sleep(0.01)
            while self.ready and (
                app.chat is None or not app.chat.is_mounted or not app.chat.queue.idle or app.chat.model.facts is None
            ):
                assert time.monotonic() < end, "the model was never ready"
                await asyncio.sleep(0.01)
            await pilot.pause()
            yield Talk(app, pilot, engines[0] if engines else FakeEngine(lambda error: None), notes)
