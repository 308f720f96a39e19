"""The chat screen: assembles widgets and controllers, and routes keys, slash commands and messages to them.

Every command of `commands.COMMANDS` is a method of one of the controllers (`localrun.tui.controllers`); keys, slash commands,
the palette and buttons all come through `run_command`, where errors become notes or panels.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from textual import events, on
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.screen import Screen
from textual.widgets import OptionList, Static

from localrun.errors import LocalrunError, UsageError
from localrun.options import THINK_MODES
from localrun.tui.commands import BY_NAME, screen_bindings
from localrun.tui.controllers.asking import Asking
from localrun.tui.controllers.composer import Composer
from localrun.tui.controllers.conversation import OpenConversation
from localrun.tui.controllers.conversions import Conversions
from localrun.tui.controllers.finder import Finder
from localrun.tui.controllers.library import ConversationActions
from localrun.tui.controllers.model import ModelSwitch
from localrun.tui.controllers.monitor import Monitor
from localrun.tui.controllers.notices import Notices
from localrun.tui.controllers.panels import Panels
from localrun.tui.controllers.presets import Presets, preset_arguments
from localrun.tui.controllers.versions import Versions
from localrun.tui.controllers.work import Handler, Invocation, WorkQueue
from localrun.tui.demo_words import DEMO_QUESTIONS, DEMO_WORDS
from localrun.tui.engine_link import EngineLink
from localrun.tui.live_answer import LiveAnswer
from localrun.tui.messages import (
    AnswerEvents,
    ConversationAction,
    ConversationChosen,
    ConversionTold,
    EngineDied,
    EngineFailed,
    EngineLoading,
    EngineReady,
    ErrorAction,
    LongAnswerEnded,
    MessageAction,
    ModelChecked,
    PromptSubmitted,
    StatsArrived,
)
from localrun.tui.screens.help import HelpScreen
from localrun.tui.screens.settings import SettingsResult, SettingsScreen
from localrun.tui.widgets.chat_view import ChatView
from localrun.tui.widgets.conversation_list import ConversationList
from localrun.tui.widgets.engine_panel import EnginePanel
from localrun.tui.widgets.expert_map import ExpertMap
from localrun.tui.widgets.find_bar import FindBar
from localrun.tui.widgets.key_footer import KeyFooter
from localrun.tui.widgets.notices import LoadingPanel
from localrun.tui.widgets.prompt import PromptInput
from localrun.tui.widgets.status_bar import StatusBar

if TYPE_CHECKING:
    from localrun.tui.app import Launch
    from localrun.tui.controllers.records import Records
    from localrun.tui.engine_link import EngineFactory

LONG_ANSWER_S = 20.0
"""Answers that take at least this long are announced."""

_LIVE_TICK_S = 0.25
_STATS_TICK_S = 1.0
_CONVERSION_STOP_S = 5.0


class ChatScreen(Screen[None]):
    """One conversation and everything around it. Owns the controllers; each of those owns its state.

    Args:
        typed_early: types into the input what was typed before the screen was there.
    """

    BINDINGS: ClassVar[list[BindingType]] = list(screen_bindings())
    AUTO_FOCUS = "#input"

    def __init__(
        self,
        records: Records,
        engine_factory: EngineFactory,
        launch: Launch,
        typed_early: Callable[[], Awaitable[None]],
    ) -> None:
        super().__init__()
        self._launch, self._typed_early = launch, typed_early
        self.records = records
        self.notices = Notices(self)
        self.queue = WorkQueue(self.notices.guard)
        self.panels = Panels(self, to_input=self._to_input)
        self.model = ModelSwitch(
            self,
            EngineLink(engine_factory, self.post_message),
            self.notices,
            launch.model_folders,
            launch.options,
            begun=lambda: self.monitor.forget(),
            ready=self._model_ready,
            changed=self.show_header,
            to_input=self._to_input,
        )
        self.asking = Asking(
            self,
            records,
            self.queue,
            self.notices,
            self.model,
            refused=lambda question: self.composer.put_back(question),
            answered=self._answered,
            changed=self._conversation_changed,
        )
        self.current = OpenConversation(
            records,
            lambda: self.chat,
            launch.chat,
            live=lambda: self.asking.answering.live,
            changed=self.show_header,
            failed=self.notices.tell,
        )
        self.asking.current = self.current
        self.composer = Composer(
            self,
            records,
            self.queue,
            self.notices,
            self.model,
            self.asking,
            self.current,
            run=self.run_command,
            room=lambda: self.monitor.room,
            open_settings=self.open_settings,
        )
        self.presets = Presets(self.notices, self.current)
        self.versions = Versions(self, self.notices, self.current, self.asking, self.composer)
        self.library = ConversationActions(
            self,
            records,
            self.queue,
            self.notices,
            self.panels,
            self.current,
            check_free=self.asking.check_free,
            leaving=self._leave_conversation,
            to_input=self._to_input,
        )
        self.finder = Finder(self)
        self.conversions = Conversions(self, self.notices, load=self.model.switch)
        self.monitor = Monitor(
            self, self.model, self.asking, self.current, self.panels, extra=lambda: self.conversions.status
        )
        self.panels.opened = self._panels_changed
        self.handlers = self._all_handlers()

    def _all_handlers(self) -> dict[str, Handler]:
        handlers: dict[str, Handler] = {
            "stop": self._stop,
            "interrupt": self._interrupt,
            "settings": lambda call: self.open_settings(),
            "help": lambda call: self._push(HelpScreen()),
            "palette": lambda call: self.app.action_command_palette(),
            "theme": self._theme,
            "quit": lambda call: self._quit(),
            "scroll_up": lambda call: self._scroll_page("up"),
            "scroll_down": lambda call: self._scroll_page("down"),
            "scroll_top": self._scroll_top,
            "scroll_end": self._scroll_end,
        }
        controllers = (
            *(self.panels, self.model, self.composer, self.versions, self.library),
            *(self.finder, self.conversions, self.monitor, self.presets),
        )
        for controller in controllers:
            handlers |= controller.commands()
        return handlers

    # --- widgets

    def compose(self) -> ComposeResult:
        yield Static("", id="header")
        with Horizontal(id="body"):
            yield ConversationList()
            with Vertical(id="main"):
                yield Static("", id="welcome")
                yield ChatView()
                yield LoadingPanel()
                yield VerticalScroll(id="notices")
                yield FindBar()
                yield PromptInput()
            yield EnginePanel()
        yield StatusBar()
        yield KeyFooter()

    @property
    def chat(self) -> ChatView:
        return self.query_one(ChatView)

    @property
    def prompt(self) -> PromptInput:
        return self.query_one(PromptInput)

    def on_mount(self) -> None:
        self.query_one("#notices").can_focus = False
        self.query_one(LoadingPanel).display = False
        self.query_one(FindBar).display = False
        self.records.slow = self._store_is_slow
        self.prompt.arguments = {"think": self._think_modes, "preset": preset_arguments}
        self.panels.begin()
        self.queue.add(self.composer.begin(self._typed_early))
        self.queue.add(self.current.show() if self._launch.fresh else self.current.open_last())
        self.set_interval(_LIVE_TICK_S, self.monitor.tick_live)
        self.set_interval(_STATS_TICK_S, self.monitor.tick_stats)
        self.set_interval(_STATS_TICK_S, self.model.tick_loading)
        self.model.begin(self._launch.model, self._launch.prepare)
        self._to_input()

    def begin(self) -> None:
        """Begins with what is in the queue. To be called when the screen and all of its widgets are mounted."""
        self.run_worker(self.queue.run(), name="commands")

    def on_key(self, event: events.Key) -> None:
        """What is typed while the engine panel covers the input goes there all the same."""
        if self.panels.engine == "full" and event.is_printable and event.character:
            event.stop()
            self.panels.uncover_input()
            self.set_focus(self.prompt.area)  # now: the next key may be there already
            self.prompt.area.insert(event.character)

    def on_resize(self, event: events.Resize) -> None:
        self.panels.resized(event.size.width)

    def close_engine(self) -> None:
        """Ends the processes; blocks."""
        self.conversions.close(_CONVERSION_STOP_S)
        self.model.link.close()

    def save(self) -> None:
        """Saves what is not in the file yet: the input's text and the answer in progress."""
        self.composer.save_draft()
        self.asking.answering.save()

    # --- commands

    def run_command(self, name: str, argument: str = "", message_id: int | None = None) -> None:
        """Runs a command, immediately or after pending ones.

        Args:
            message_id: which message a command of scope `message` means; None: the focused or the last one.
        """
        if message_id is None and BY_NAME[name].scope == "message":
            message_id = self.chat.focused_message
        try:
            work = self.handlers[name](Invocation(argument, message_id))
        except LocalrunError as error:
            self.notices.tell(error)
        else:
            if work is not None:
                self.queue.add(work)

    def action_do(self, name: str) -> None:
        self.run_command(name)

    @on(MessageAction)
    def do_message_action(self, event: MessageAction) -> None:
        self.run_command(event.command, message_id=event.message_id)

    @on(ErrorAction)
    def do_error_action(self, event: ErrorAction) -> None:
        self.run_command(event.command)

    @on(ConversationChosen)
    def do_chosen(self, event: ConversationChosen) -> None:
        self.queue.add(self.library.open(event.conversation_id, event.message_id))

    @on(ConversationAction)
    def do_conversation_action(self, event: ConversationAction) -> None:
        self.library.act(event.conversation_id, event.command)

    @on(PromptSubmitted)
    def submit(self, event: PromptSubmitted) -> None:
        try:
            self.composer.submit(event.text)
        except LocalrunError as error:
            self.notices.tell(error)

    @on(PromptInput.Changed)
    def prompt_changed(self) -> None:
        self.composer.changed()

    @on(FindBar.Changed)
    def find_words(self) -> None:
        self.finder.look()

    @on(FindBar.Goto)
    async def go_to_found(self, event: FindBar.Goto) -> None:
        await self.finder.go_to(event.message_id)

    # --- what threads tell

    @on(EngineLoading)
    def engine_loading(self, event: EngineLoading) -> None:
        self.model.show_loading(event)

    @on(EngineReady)
    def engine_ready(self, event: EngineReady) -> None:
        self.model.loaded(event)

    @on(EngineFailed)
    def engine_failed(self, event: EngineFailed) -> None:
        self.model.failed(event)

    @on(EngineDied)
    def engine_died(self, event: EngineDied) -> None:
        self.model.died(event)

    @on(ModelChecked)
    def model_checked(self, event: ModelChecked) -> None:
        self.model.checked(event)

    @on(ConversionTold)
    def conversion_told(self, event: ConversionTold) -> None:
        self.conversions.told(event.news)

    @on(AnswerEvents)
    async def answer_events(self, event: AnswerEvents) -> None:
        await self.asking.answering.news(event.feed)

    @on(StatsArrived)
    def stats_arrived(self, event: StatsArrived) -> None:
        self.monitor.show(event)

    def _store_is_slow(self) -> None:
        self.notices.note(
            "waiting for the conversation database: another program has it locked", severity="warning", timeout_s=6
        )

    # --- from controller to controller

    def _think_modes(self) -> Sequence[str]:
        return THINK_MODES if self.model.facts is None else self.model.facts.think_modes

    def _to_input(self) -> None:
        self.prompt.area.focus()

    def _model_ready(self) -> None:
        self.monitor.look()
        self.asking.model_ready()

    def _answered(self, answer: LiveAnswer) -> None:
        self.monitor.look()
        timings = answer.finished.timings if answer.finished is not None else None
        if timings is not None and timings.prompt_s + timings.decode_s >= LONG_ANSWER_S:
            self.post_message(LongAnswerEnded())  # after such a wait the user is probably looking elsewhere

    def _conversation_changed(self) -> None:
        self.show_header()
        self.library.refresh()

    def _leave_conversation(self) -> None:
        self.composer.cancel_editing()
        self.asking.forget_pending()
        self.notices.clear()

    def _panels_changed(self) -> None:
        self.library.refresh()
        if self.panels.engine != "off":
            self.monitor.look()

    # --- the program

    def _push(self, screen: Screen[Any]) -> None:
        self.app.push_screen(screen)

    def _stop(self, call: Invocation) -> None:
        """Esc: the first of what can be ended or closed."""
        if self.prompt.close_suggestions():
            return
        _ = self.asking.stop() or self.finder.close() or self.composer.cancel_editing() or self.panels.close_one()
        self._to_input()

    def _interrupt(self, call: Invocation) -> None:
        selected = self.prompt.selected_text or self.get_selected_text()
        if selected:
            self.app.copy_to_clipboard(selected)
            self.notices.note("Copied", timeout_s=2)
        elif not self.asking.stop():
            if self.prompt.text:
                self.prompt.clear()
            else:
                self.notices.note("Ctrl+Q quits", timeout_s=3)

    def open_settings(self) -> None:
        screen = SettingsScreen(
            self.current.options,
            self.model.options,
            self.model.facts,
            self.app.theme,
            list(self.app.available_themes),
        )
        self.app.push_screen(screen, self._apply_settings)

    def _apply_settings(self, result: SettingsResult | None) -> None:
        if result is not None:
            self.current.set_options(result.chat)
            self.app.theme = result.theme
            self.model.change_options(result.engine)

    def _theme(self, call: Invocation) -> None:
        if not call.argument:
            self.app.search_themes()
        elif call.argument in self.app.available_themes:
            self.app.theme = call.argument
        else:
            raise UsageError(f"there is no theme '{call.argument}'", hint=", ".join(sorted(self.app.available_themes)))

    def _quit(self) -> None:
        self.app.call_later(self.app.action_quit)

    def _scroll_page(self, direction: str) -> None:
        focused = self.focused
        target = focused if isinstance(focused, OptionList | ExpertMap) else self.chat
        target.scroll_page_up(animate=False) if direction == "up" else target.scroll_page_down(animate=False)

    async def _scroll_top(self, call: Invocation) -> None:
        if self.chat.entries:
            await self.chat.scroll_to_message(self.chat.entries[0].message.id)

    async def _scroll_end(self, call: Invocation) -> None:
        await self.chat.scroll_to_end()

    def show_header(self) -> None:
        """Program, model and conversation in one line; what to do next in an empty conversation."""
        label = self.model.label
        self.query_one("#header", Static).update(
            Content.assemble((" localrun ", "bold reverse"), f" {label}", (" │ ", "dim"), (self.current.title, "bold"))
        )
        welcome = self.query_one("#welcome", Static)
        welcome.display = not self.chat.entries
        self.chat.display = bool(self.chat.entries)
        demo = self.model.is_demo
        self.prompt.offers = DEMO_QUESTIONS if demo and not self.chat.entries else ()
        welcome.update(
            Content.assemble(
                ("localrun\n\n", "bold"),
                f"{label}\n\n",
                *([DEMO_WORDS, *(f"  {question}\n" for question in DEMO_QUESTIONS), "\n"] if demo else []),
                ("Enter sends · Ctrl+J new line · / commands · F1 help\n", "dim"),
                ("Ctrl+L models · F2 conversations · F3 engine", "dim"),
            )
        )
