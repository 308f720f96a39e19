"""The chat screen: puts the widgets together, owns engine, conversation and settings on view, and carries out commands.

Every command of `commands.COMMANDS` is a method `do_<name>` in one of the parts that this class is made of
(`message_commands`, `conversation_commands`, `model_commands`); keys, slash commands, palette and buttons all come through
`run_command`, where errors become panels. What the engine sends arrives as messages (`engine_events`).
"""

from __future__ import annotations

import contextlib
import inspect
from typing import TYPE_CHECKING, ClassVar

from textual import events, on
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.widgets import Footer, OptionList, Static

from localrun.errors import LocalrunError, UsageError
from localrun.tui.chat_state import WIDE_COLUMNS, ChatState
from localrun.tui.commands import BY_SLASH, screen_bindings
from localrun.tui.conversation_commands import ConversationCommands
from localrun.tui.engine_events import EngineEvents
from localrun.tui.message_commands import MessageCommands
from localrun.tui.messages import ConversationAction, ConversationChosen, ErrorAction, MessageAction, PromptSubmitted
from localrun.tui.model_commands import ModelCommands
from localrun.tui.widgets.chat_view import ChatView
from localrun.tui.widgets.conversation_list import ConversationList
from localrun.tui.widgets.engine_panel import EnginePanel
from localrun.tui.widgets.expert_map import ExpertMap
from localrun.tui.widgets.find_bar import FindBar
from localrun.tui.widgets.notices import LoadingPanel
from localrun.tui.widgets.prompt import Prompt
from localrun.tui.widgets.status_bar import StatusBar

if TYPE_CHECKING:
    from localrun.engine.conversations import ConversationStore
    from localrun.tui.app import Launch
    from localrun.tui.engine_link import EngineFactory

_LIVE_TICK_S = 0.25
_STATS_TICK_S = 1.0


class ChatScreen(MessageCommands, ConversationCommands, ModelCommands, EngineEvents, ChatState):
    """One conversation and everything around it."""

    BINDINGS: ClassVar[list[BindingType]] = list(screen_bindings())
    AUTO_FOCUS = "#input"

    def __init__(self, store: ConversationStore, engine_factory: EngineFactory, launch: Launch) -> None:
        super().__init__()
        self._was_narrow = True
        self.init_state(store, engine_factory, launch)

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
                yield Prompt()
            yield EnginePanel()
        yield StatusBar()
        yield Footer(compact=True, show_command_palette=False)

    async def on_mount(self) -> None:
        self.query_one("#notices").can_focus = False
        self.query_one(LoadingPanel).display = False
        self.query_one(FindBar).display = False
        self.set_panels(conversations=False, engine="side" if self.app.size.width >= 140 else "off")
        self.begin_answering()
        self.prompt.set_history(self.store.recent_user_texts())
        self.prompt.set_text(str(self.store.get_state("draft", "")))
        await self.reopen_last()
        self.set_interval(_LIVE_TICK_S, self.tick_live)
        self.set_interval(_STATS_TICK_S, self.tick_stats)
        self.start_first_model()
        self.prompt.area.focus()

    def on_resize(self, event: events.Resize) -> None:
        """Panels that have no place beside the chat any more are closed: they would cover it."""
        narrow = event.size.width < WIDE_COLUMNS
        if narrow and not self._was_narrow:
            self.set_panels(conversations=False, engine="off")
            self.prompt.area.focus()
        self._was_narrow = narrow

    # --- commands

    async def run_command(self, name: str, argument: str = "", message_id: int | None = None) -> None:
        """Carries out a command; an error becomes a panel.

        Args:
            message_id: which message a command of scope `message` means; None: the focused or the last one.
        """
        self.target_message = message_id
        try:
            result = getattr(self, f"do_{name}")(argument)
            if inspect.isawaitable(result):
                await result
        except UsageError as error:
            self.complain(error)
        except LocalrunError as error:
            self.show_error("That did not work", error)
        finally:
            self.target_message = None

    async def action_do(self, name: str) -> None:
        await self.run_command(name)

    @on(MessageAction)
    async def do_message_action(self, event: MessageAction) -> None:
        await self.run_command(event.command, message_id=event.message_id)

    @on(ErrorAction)
    async def do_error_action(self, event: ErrorAction) -> None:
        await self.run_command(event.command)

    @on(ConversationChosen)
    async def do_chosen(self, event: ConversationChosen) -> None:
        await self.run_guarded(self.open_conversation(event.conversation_id, event.message_id))
        if self.has_class("-narrow"):
            self.set_panels(conversations=False)
        self.prompt.area.focus()

    @on(ConversationAction)
    async def do_conversation_action(self, event: ConversationAction) -> None:
        await self.run_guarded(self.act_on_conversation(event.conversation_id, event.command))

    @on(PromptSubmitted)
    async def submit(self, event: PromptSubmitted) -> None:
        text = event.text
        if text.startswith("/") and not text.startswith("//"):
            await self._run_slash(text)
            return
        if not text.strip() and not self.prompt.attachments:
            return
        await self.run_guarded(self.ask(text.removeprefix("/") if text.startswith("//") else text))

    async def _run_slash(self, text: str) -> None:
        """The text stays in the input if there is no such command."""
        name, _, argument = text[1:].partition(" ")
        command = BY_SLASH.get(name.strip().lower())
        if command is None:
            self.complain(
                UsageError(
                    f"there is no command /{name.strip()}", hint="/help lists them; // sends a text with a slash"
                )
            )
            return
        attachments = self.prompt.attachments
        self.prompt.clear()
        self.prompt.set_attachments(attachments)
        await self.run_command(command.name, argument.strip())

    # --- the program

    def do_stop(self, argument: str) -> None:
        prompt = self.prompt
        if prompt.close_suggestions():
            return
        if self.answering.running or self.pending_parent is not None:
            self.stop_answer()
        elif self.query_one(FindBar).display:
            self.query_one(FindBar).display = False
        elif self.editing is not None:
            self.cancel_editing()
        elif self.has_class("-narrow") and (self.panel_conversations or self.panel_engine != "off"):
            self.set_panels(conversations=False, engine="off")
        elif self.panel_engine == "full":
            self.set_panels(engine="side")
        prompt.area.focus()

    def do_interrupt(self, argument: str) -> None:
        selected = self.prompt.area.selected_text or self.get_selected_text()
        if selected:
            self.app.copy_to_clipboard(selected)
            self.app.notify("Copied", timeout=2)
        elif self.answering.running or self.pending_parent is not None:
            self.stop_answer()
        elif self.prompt.text:
            self.prompt.clear()
        else:
            self.app.notify("Ctrl+Q quits", timeout=3)

    def do_help(self, argument: str) -> None:
        from localrun.tui.screens.help import HelpScreen

        self.app.push_screen(HelpScreen())

    def do_palette(self, argument: str) -> None:
        self.app.action_command_palette()

    def do_theme(self, argument: str) -> None:
        if not argument:
            self.app.search_themes()
        elif argument in self.app.available_themes:
            self.app.theme = argument
        else:
            raise UsageError(f"there is no theme '{argument}'", hint=", ".join(sorted(self.app.available_themes)))

    async def do_quit(self, argument: str) -> None:
        await self.app.action_quit()

    def save_draft(self) -> None:
        """What stands in the input is there again at the next start."""
        with contextlib.suppress(LocalrunError):  # nothing may keep the user from leaving
            self.store.set_state("draft", self.prompt.text)

    def do_scroll_up(self, argument: str) -> None:
        self._scroll_page("up")

    def do_scroll_down(self, argument: str) -> None:
        self._scroll_page("down")

    def _scroll_page(self, direction: str) -> None:
        focused = self.focused
        if isinstance(focused, OptionList | ExpertMap):
            focused.scroll_page_up(animate=False) if direction == "up" else focused.scroll_page_down(animate=False)
        elif direction == "up":
            self.chat.scroll_page_up(animate=False)
        else:
            self.chat.scroll_page_down(animate=False)

    async def do_scroll_top(self, argument: str) -> None:
        if self.chat.entries:
            await self.chat.scroll_to_message(self.chat.entries[0].message.id)

    async def do_scroll_end(self, argument: str) -> None:
        await self.chat.scroll_to_end()

    def show_header(self) -> None:
        """Program, model and conversation in one line; what to do next in an empty conversation."""
        model, title = self.model_label(), self.conversation_title()
        self.query_one("#header", Static).update(
            Content.assemble((" localrun ", "bold reverse"), f" {model}", (" │ ", "dim"), (title, "bold"))
        )
        welcome = self.query_one("#welcome", Static)
        welcome.display = not self.chat.entries
        self.chat.display = bool(self.chat.entries)
        welcome.update(
            Content.assemble(
                ("localrun\n\n", "bold"),
                f"{model}\n\n",
                ("Enter sends · Ctrl+J new line · / commands · F1 help\n", "dim"),
                ("Ctrl+L models · F2 conversations · F3 engine", "dim"),
            )
        )
