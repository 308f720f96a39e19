"""The program behind `localrun chat`: opens the conversations, starts the engine, shows the chat screen, cleans up.

Whatever happens, the terminal is given back in order: signals end the program the normal way, and the engine is a process
of its own whose death is an event like others.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from textual import work
from textual.app import App
from textual.command import DiscoveryHit, Hit, Hits, Provider

from localrun.engine.conversations import (
    ConversationError,
    ConversationStore,
    DamagedConversationsError,
    salvage,
)
from localrun.engine.model_finder import default_folders
from localrun.engine.options import EngineOptions, SamplingOptions
from localrun.engine.process.process import EngineProcess
from localrun.errors import UsageError
from localrun.textsafe import visible
from localrun.tui.chat_screen import ChatScreen
from localrun.tui.chat_state import WIDE_COLUMNS
from localrun.tui.commands import COMMANDS
from localrun.tui.engine_link import EngineFactory, EngineLike, OnDeath, start_engine
from localrun.tui.options import ChatOptions
from localrun.tui.screens.dialog import ChoiceDialog

DEFAULT_THEME = "textual-dark"


@dataclass(frozen=True, slots=True)
class Launch:
    """What the program starts with.

    Attributes:
        model: model to load; None: `prepare` gives it, in a thread (the demo model may have to be converted first).
        chat: settings of new conversations.
        model_folders: where the chooser looks.
        fresh: begin a new conversation instead of the last one.
    """

    model: Path | None = None
    prepare: Callable[[], Path] | None = None
    options: EngineOptions = field(default_factory=EngineOptions)
    chat: ChatOptions = field(default_factory=ChatOptions)
    model_folders: Sequence[Path] = ()
    fresh: bool = False


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
    """Owns the store; the chat screen owns the engine."""

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
        super().__init__()
        self.launch = launch
        self.chat: ChatScreen | None = None
        self.store: ConversationStore | None = None
        self._engine_factory = engine_factory
        self._store_path = store_path
        # Over SSH every frame of an animation is traffic, and here it would take time from the model.
        self.animation_level = "none"

    def on_mount(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGHUP):
            try:
                loop.add_signal_handler(number, self._leave, 128 + number)
            except (NotImplementedError, RuntimeError, ValueError):  # not the main thread, or no such thing here
                break
        self._begin()

    @work
    async def _begin(self) -> None:
        store = await self._open_store()
        if store is None:
            self.exit(return_code=1)
            return
        self.store = store
        theme = store.get_state("theme", DEFAULT_THEME)
        self.theme = theme if theme in self.available_themes else DEFAULT_THEME
        self.theme_changed_signal.subscribe(self, lambda theme: store.set_state("theme", theme.name))
        self.chat = ChatScreen(store, self._engine_factory, self.launch)
        await self.push_screen(self.chat)

    async def _open_store(self) -> ConversationStore | None:
        """The user's conversations; asks what to do if they can't be opened. None: leave."""
        while True:
            try:
                return ConversationStore.open(self._store_path)
            except DamagedConversationsError as error:
                choices = {
                    "salvage": "Rescue what can be read",
                    "memory": "Go on without saving",
                    "quit": "Quit",
                }
                choice = await self._ask("The conversations are damaged", error, choices)
                if choice == "salvage":
                    await self._salvage(error.path)
                    continue
            except ConversationError as error:
                choices = {"retry": "Try again", "memory": "Go on without saving", "quit": "Quit"}
                choice = await self._ask("The conversations can't be opened", error, choices)
            if choice == "memory":
                self.notify("Nothing of this session will be saved.", severity="warning", timeout=20)
                return ConversationStore.in_memory()
            if choice != "retry":
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
            f"{result.n_conversations} conversations with {result.n_messages} messages were read. "
            f"The damaged file is kept: {visible(str(result.damaged))}",
            markup=False,
            timeout=30,
        )

    async def action_quit(self) -> None:
        self._leave(0)

    def _leave(self, return_code: int) -> None:
        if self.chat is not None and self.chat.is_mounted:
            self.chat.save_draft()
        self.exit(return_code=return_code)

    async def on_unmount(self) -> None:
        if self.chat is not None:
            await asyncio.to_thread(self.chat.close_engine)
        if self.store is not None:
            self.store.close()


def run_app(
    model: Path | None,
    options: EngineOptions | None = None,
    *,
    engine: EngineProcess | None = None,
    prepare: Callable[[], Path] | None = None,
    sampling: SamplingOptions | None = None,
    think: str = "off",
    system: str = "",
    max_tokens: int | None = None,
    model_folders: Sequence[Path] | None = None,
    fresh: bool = False,
) -> int:
    """Runs the terminal UI until the user leaves; standard input and output must be a terminal.

    Args:
        model: what to load; None: what `prepare` gives (called in a thread while the interface is up already), or, without
            one, the chooser opens.
        options: how to load it.
        engine: an engine process that was started already; None: one is started when it is needed.
        sampling, think, system, max_tokens: settings of new conversations.
        model_folders: where the chooser looks for models; None: `default_folders()`.
        fresh: begin a new conversation instead of the last one.

    Returns:
        The exit code.

    Raises:
        UsageError: standard error, where Textual draws, is no terminal.
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
    )

    def adopt(on_death: OnDeath) -> EngineLike:
        if engine is None:
            return start_engine(on_death)
        engine.on_death = on_death
        return engine

    app = LocalrunApp(launch, engine_factory=adopt)
    app.run()
    return app.return_code or 0
