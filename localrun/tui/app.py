"""The program behind `localrun chat`: opens the conversations, starts the engine, shows the chat screen, cleans up.

The terminal is always restored: signals end the program normally, if that takes no longer than `lifeline` allows, and the
engine is a separate process whose death is just an event.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from textual import events, on, work
from textual.app import App
from textual.command import DiscoveryHit, Hit, Hits, Provider
from textual.message_pump import MessagePump
from textual.theme import Theme
from textual.widgets import Input, TextArea

from localrun.engine.conversations import (
    ConversationError,
    ConversationStore,
    DamagedConversationsError,
    StoreThread,
    salvage,
)
from localrun.engine.model_finder import default_folders
from localrun.engine.options import EngineOptions, SamplingOptions
from localrun.engine.process.process import EngineProcess
from localrun.errors import UsageError
from localrun.server.remote import RemoteEngine
from localrun.textsafe import visible
from localrun.tui import attention
from localrun.tui.chat_screen import ChatScreen
from localrun.tui.commands import COMMANDS
from localrun.tui.controllers.panels import WIDE_COLUMNS
from localrun.tui.controllers.records import Records
from localrun.tui.driver import TerminalDriver
from localrun.tui.engine_link import EngineFactory, OnDeath, ScreenEngine, start_engine
from localrun.tui.lifeline import Lifeline
from localrun.tui.messages import LongAnswerEnded
from localrun.tui.options import ChatOptions
from localrun.tui.screens.dialog import ChoiceDialog
from localrun.tui.widgets.prompt import NEW_LINE_KEYS, PromptArea

DEFAULT_THEME = "textual-dark"

TYPING_KEYS = ("enter", "backspace", *NEW_LINE_KEYS)
"""Besides those that print something."""

STORE_CLOSE_S = 10.0
"""More than a change of another program's may take."""


@dataclass(frozen=True, slots=True)
class Launch:
    """Start-up parameters.

    Attributes:
        model: model to load; None: from `prepare`, in a thread (the demo model may have to be converted first).
        chat: settings of new conversations.
        model_folders: folders that the chooser searches.
        fresh: start a new conversation instead of reopening the last one.
        notify: how the end of a long answer is told.
    """

    model: Path | None = None
    prepare: Callable[[], Path] | None = None
    options: EngineOptions = field(default_factory=EngineOptions)
    chat: ChatOptions = field(default_factory=ChatOptions)
    model_folders: Sequence[Path] = ()
    fresh: bool = False
    notify: str = "bell"


def _is_typed(event: events.Event) -> bool:
    """Whether it is meant to change or send the text in the input."""
    return isinstance(event, events.Paste) or (
        isinstance(event, events.Key) and (event.is_printable or event.key in TYPING_KEYS)
    )


async def _caught_up(pump: MessagePump) -> None:
    """Until it has handled all messages that it has got."""
    done = asyncio.Event()
    if pump.is_running and pump.call_later(done.set):
        await done.wait()


class LocalrunCommands(Provider):
    """The command palette's content: the list of commands."""

    async def discover(self) -> Hits:
        for command in COMMANDS:
            if (run := self._runner(command.name)) is not None:
                yield DiscoveryHit(f"{command.title}", run, help=f"{command.key_labels}  {command.help}".strip())

    async def search(self, query: str) -> Hits:
        matcher = self.matcher(query)
        for command in COMMANDS:
            text = f"{command.title} {' '.join('/' + slash for slash in command.slash)}"
            run = self._runner(command.name)
            if run is not None and (score := matcher.match(text)) > 0:
                yield Hit(score, matcher.highlight(text), run, help=f"{command.key_labels}  {command.help}".strip())

    def _runner(self, name: str) -> Callable[[], object] | None:
        screen = self.screen
        return partial(screen.run_command, name) if isinstance(screen, ChatScreen) else None


class LocalrunApp(App[None]):
    """Owns the store's thread; the chat screen owns the engine.

    Attributes:
        on_leaving: called when the user leaves, before anything is closed.
    """

    CSS_PATH = "localrun.tcss"
    TITLE = "localrun"
    COMMANDS = {LocalrunCommands}  # noqa: RUF012
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (WIDE_COLUMNS, "-wide")]  # noqa: RUF012

    def __init__(
        self,
        launch: Launch,
        *,
        engine_factory: EngineFactory = start_engine,
        store_path: Path | None = None,
    ) -> None:
        super().__init__(driver_class=None if "TEXTUAL_DRIVER" in os.environ else TerminalDriver)
        self.launch = launch
        self.chat: ChatScreen | None = None
        self.records: Records | None = None
        self.on_leaving: Callable[[], None] = lambda: None
        self._engine_factory = engine_factory
        self._store_path = store_path
        self._early: deque[events.Event] | None = deque()
        """What was typed and pasted before the input could take it; None: it can."""
        self._retyped: events.Event | None = None
        """The one of them that is on its way to the input."""
        # Over SSH every frame of an animation is traffic, and here it would take time from the model.
        self.animation_level = "none"

    def on_mount(self) -> None:
        self._begin()

    @work
    async def _begin(self) -> None:
        records = await self._open_records()
        if records is None:
            self.exit(return_code=1)
            return
        self.records = records
        theme = await records(lambda store: store.get_state("theme", DEFAULT_THEME))
        self.theme = theme if theme in self.available_themes else DEFAULT_THEME
        self.theme_changed_signal.subscribe(self, self._keep_theme)
        self.chat = ChatScreen(records, self._engine_factory, self.launch, self._type_early)
        await self.push_screen(self.chat)
        self.chat.begin()

    async def _type_early(self) -> None:
        """What was typed before goes to the input, in order, each key when the one before has done its work."""
        while self._early:
            self._retyped = self._early.popleft()
            self.post_message(self._retyped)
            await self._passed()
        self._early = None

    async def _passed(self) -> None:
        """Until a key has gone its way: from the app to the focused widget, up to the screen, and from there to the input."""
        await _caught_up(self)
        way = (self.focused or self.screen).ancestors_with_self
        for pump in (*way, *way):
            await _caught_up(pump)

    def _keep_theme(self, theme: Theme) -> None:
        if self.records is not None:
            self.records.post(lambda store: store.set_state("theme", theme.name), lambda error: None)

    async def _open_records(self) -> Records | None:
        """The user's conversations; asks what to do if they can't be opened. None: leave."""
        records = Records(StoreThread(partial(ConversationStore.open, self._store_path)))
        while True:
            try:
                await records.open()
                return records
            except DamagedConversationsError as error:
                choices = {
                    "salvage": "Recover what is readable",
                    "memory": "Continue without saving",
                    "quit": "Quit",
                }
                choice = await self._ask("The conversation database is damaged", error, choices)
                if choice == "salvage":
                    await self._salvage(error.path)
                    continue
            except ConversationError as error:
                choices = {"retry": "Try again", "memory": "Continue without saving", "quit": "Quit"}
                choice = await self._ask("Can't open the conversations", error, choices)
            if choice == "memory":
                self.notify("Nothing in this session will be saved.", severity="warning", timeout=20)
                records = Records(StoreThread(ConversationStore.in_memory))
            elif choice != "retry":
                return None

    async def _ask(self, title: str, error: ConversationError, choices: dict[str, str]) -> str | None:
        text = f"{error}" + (f"\n\n→ {error.hint}" if error.hint else "")
        return await self.push_screen_wait(ChoiceDialog(title, text, choices))

    async def _salvage(self, path: Path) -> None:
        try:
            result = await asyncio.to_thread(salvage, path)
        except ConversationError as error:
            self.notify(visible(str(error)), severity="error", markup=False, timeout=20)
            return
        self.notify(
            f"{result.n_conversations} conversations with {result.n_messages} messages were recovered. "
            f"The damaged file is kept as {visible(str(result.damaged))}",
            markup=False,
            timeout=30,
        )

    async def on_event(self, event: events.Event) -> None:
        """A paste goes to the focused text field; in the chat always to the input. What is typed waits for the input; keys that
        leave the program or scroll don't."""
        if self._early is not None and event is not self._retyped and _is_typed(event):
            stack = self.screen_stack
            if len(stack) == 1 or stack[-1:] == [self.chat]:
                self._early.append(event)
                return
        if isinstance(event, events.Paste) and not event.is_forwarded:
            if not isinstance(self.focused, Input | TextArea) and self.chat is not None and self.screen is self.chat:
                self.chat.panels.uncover_input()
                self.chat.prompt.area.post_message(events.Paste(event.text))
                return
            if not isinstance(self.focused, PromptArea):
                event = events.Paste(visible(event.text))
        await super().on_event(event)

    async def action_quit(self) -> None:
        self.on_leaving()
        self.leave(0)

    def call_from_outside(self, return_code: int) -> None:
        """As `leave`, from any thread."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self.leave, return_code)

    def leave(self, return_code: int) -> None:
        """Quits; the input's text and the answer so far are saved."""
        if self.chat is not None and self.chat.is_mounted:
            self.chat.save()
        self.exit(return_code=return_code)

    @on(LongAnswerEnded)
    def call_attention(self) -> None:
        """Notifies the user in the chosen way."""
        self.tell_terminal(attention.sequence(self.launch.notify, "the answer is ready"))

    def tell_terminal(self, sequence: str) -> None:
        """Writes a control sequence to the terminal, if there is one."""
        if self._driver is not None and not self.is_headless:
            self._driver.write(sequence)

    async def on_unmount(self) -> None:
        if self.chat is not None:
            await asyncio.to_thread(self.chat.close_engine)
        if self.records is not None:
            await asyncio.to_thread(self.records.close, STORE_CLOSE_S)


def run_app(
    model: Path | None,
    options: EngineOptions | None = None,
    *,
    engine: EngineProcess | RemoteEngine | None = None,
    prepare: Callable[[], Path] | None = None,
    sampling: SamplingOptions | None = None,
    think: str = "off",
    system: str = "",
    max_tokens: int | None = None,
    model_folders: Sequence[Path] | None = None,
    fresh: bool = False,
    notify: str = "bell",
) -> int:
    """Runs the terminal UI until the user leaves; standard input and output must be a terminal.

    Args:
        model: what to load; None: the result of `prepare` (called in a thread while the interface is already up), or, without
            that, the chooser opens.
        options: how to load it.
        engine: a running engine process, or a server; None: start a process when needed.
        sampling, think, system, max_tokens: settings of new conversations.
        model_folders: where the chooser looks for models; None: `default_folders()`.
        fresh: start a new conversation instead of reopening the last one.
        notify: how the end of a long answer is told.

    Returns:
        The exit code.

    Raises:
        UsageError: standard error, where Textual draws, is not a terminal.
    """
    if sys.__stderr__ is None or not sys.__stderr__.isatty():
        raise UsageError("standard error is not a terminal", hint="don't redirect it, or use localrun chat --plain")
    launch = Launch(
        model=model,
        prepare=prepare,
        options=options or EngineOptions(),
        chat=ChatOptions(sampling or SamplingOptions(), think, system, max_tokens),
        model_folders=default_folders() if model_folders is None else model_folders,
        fresh=fresh,
        notify=notify,
    )

    def adopt(on_death: OnDeath) -> ScreenEngine:
        if engine is None:
            return start_engine(on_death)
        engine.on_death = on_death
        return engine

    app = LocalrunApp(launch, engine_factory=adopt)

    def leave(return_code: int) -> None:
        with contextlib.suppress(RuntimeError, AttributeError):  # the loop has not begun, or has ended
            app.call_from_outside(return_code)

    with Lifeline(leave) as lifeline:
        app.on_leaving = lifeline.leaving
        app.run()
    return app.return_code or 0
