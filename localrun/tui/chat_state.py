"""What the parts of the chat screen share: the state, the widgets by name, errors, and showing a branch."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from textual.containers import VerticalScroll
from textual.screen import Screen

from localrun.engine.conversations import Conversation, ConversationStore, Message
from localrun.engine.facts import ModelFacts
from localrun.engine.process.protocol import Generate, Stats
from localrun.errors import LocalrunError, UsageError
from localrun.textsafe import visible, visible_line
from localrun.tui.answer import Answer, prompt_messages
from localrun.tui.answering import Answering
from localrun.tui.engine_link import EngineFactory, EngineLink
from localrun.tui.options import ChatOptions, from_json, to_json
from localrun.tui.widgets.chat_view import ChatView
from localrun.tui.widgets.conversation_list import ConversationList
from localrun.tui.widgets.engine_panel import EnginePanel
from localrun.tui.widgets.message_view import Entry
from localrun.tui.widgets.notices import ErrorPanel
from localrun.tui.widgets.prompt import Prompt

if TYPE_CHECKING:
    from localrun.tui.app import Launch
    from localrun.tui.conversion import Conversion

EnginePanelState = Literal["off", "side", "full"]

TITLE_CHARS = 60
WIDE_COLUMNS = 110
"""From this width on panels stand beside the chat; `localrun.tcss` knows it as `-wide`."""


class ChatState(Screen[None]):
    """State and helpers; see `ChatScreen`.

    Attributes:
        conversation: on view; None: a new one that nothing was written to yet.
        options: settings of the conversation on view.
        target_message: which message the running command means.
        editing: the message that the input's text will replace.
        pending_parent: the question that is answered as soon as a model is loaded.
        model_loading: a load is under way.
        plan_lines: of the present load; none for models too small for a plan.
        planned: tokens per second of answers that the plan expects, from and to.
    """

    def init_state(self, store: ConversationStore, engine_factory: EngineFactory, launch: Launch) -> None:
        self.store = store
        self.launch = launch
        self.link = EngineLink(engine_factory, self.post_message)
        self.engine_options = launch.options
        self.options: ChatOptions = launch.chat
        self.conversation: Conversation | None = None
        self.facts: ModelFacts | None = None
        self.model_path: Path | None = launch.model
        self.model_loading = False
        self.load_text = ""
        self.plan_lines: tuple[str, ...] = ()
        self.planned: tuple[float, float] | None = None
        self.target_message: int | None = None
        self.editing: Message | None = None
        self.pending_parent: int | None = None
        self.last_stats: Stats | None = None
        self.last_answer: Answer | None = None
        self.conversion: Conversion | None = None
        self.conversion_log: list[str] = []
        self.panel_conversations = False
        self.panel_engine: EnginePanelState = "off"
        self.answering: Answering

    def begin_answering(self) -> None:
        """Once the widgets are there."""
        self.answering = Answering(
            self,
            self.store,
            self.link,
            self.chat,
            ended=self.answer_ended,
            failed_to_save=lambda error: self.show_error("The conversation could not be saved", error),
        )

    def close_engine(self) -> None:
        """Ends the processes; blocks."""
        if self.conversion is not None and self.conversion.running:
            self.conversion.stop()
            self.conversion.wait(5.0)
        self.link.close()

    # --- what other parts do

    async def answer_ended(self, answer: Answer) -> None:
        """The last event of an answer was taken in. See `EngineEvents`."""
        raise NotImplementedError

    def no_model(self) -> None:
        """A question was asked and there is no model to answer it. See `ModelCommands`, as those below."""
        raise NotImplementedError

    def open_settings(self) -> None:
        raise NotImplementedError

    def raise_context(self, n_ctx: int) -> None:
        raise NotImplementedError

    def conversion_status(self) -> str:
        raise NotImplementedError

    def show_header(self) -> None:
        """See `ChatScreen`."""
        raise NotImplementedError

    # --- widgets

    @property
    def chat(self) -> ChatView:
        return self.query_one(ChatView)

    @property
    def prompt(self) -> Prompt:
        return self.query_one(Prompt)

    @property
    def engine_panel(self) -> EnginePanel:
        return self.query_one(EnginePanel)

    def set_panels(self, *, conversations: bool | None = None, engine: EnginePanelState | None = None) -> None:
        """Shows or hides the panels; on a narrow screen one at a time."""
        if conversations is not None:
            self.panel_conversations = conversations
        if engine is not None:
            self.panel_engine = engine
        narrow = self.app.size.width < WIDE_COLUMNS
        if narrow and conversations:
            self.panel_engine = "off"
        if narrow and engine in ("side", "full"):
            self.panel_conversations = False
        self.set_class(self.panel_conversations, "-conversations")
        self.set_class(self.panel_engine != "off", "-engine")
        self.set_class(self.panel_engine == "full", "-engine-full")
        self.query_one(ConversationList).display = self.panel_conversations
        self.engine_panel.display = self.panel_engine != "off"
        if self.panel_conversations:
            self.show_conversations()

    def show_conversations(self) -> None:
        """Fills the list if it is on view."""
        if self.panel_conversations:
            current = None if self.conversation is None else self.conversation.id
            self.query_one(ConversationList).show(self.store.conversations(), current)

    def model_label(self) -> str:
        if self.facts is not None:
            return visible_line(self.facts.name, max_chars=40)
        if self.model_loading:
            return "loading…"
        return "no model (Ctrl+L)"

    def conversation_title(self) -> str:
        if self.conversation is None:
            return "New conversation"
        return visible_line(self.conversation.title, max_chars=TITLE_CHARS) or "New conversation"

    # --- errors

    def show_error(
        self, title: str, error: LocalrunError, buttons: tuple[str, ...] = ("close",), log: list[str] | None = None
    ) -> None:
        """A panel above the input. The same error is shown once."""
        notices = self.query_one("#notices", VerticalScroll)
        for panel in notices.query(ErrorPanel):
            if str(panel.error) == str(error):
                panel.remove()
        notices.mount(ErrorPanel(title, error, buttons, log or ()))
        notices.scroll_end(animate=False)

    def clear_errors(self) -> None:
        self.query_one("#notices").remove_children(ErrorPanel)

    def complain(self, error: UsageError) -> None:
        """A wrong argument: a short-lived note is enough, and the text is still in the input's history."""
        text = visible(f"{error}" + (f"\n→ {error.hint}" if error.hint else ""))
        self.app.notify(text, severity="warning", markup=False, timeout=6)

    async def run_guarded(self, work: Awaitable[None]) -> None:
        """Awaits; an error becomes a panel."""
        try:
            await work
        except UsageError as error:
            self.complain(error)
        except LocalrunError as error:
            self.show_error("That did not work", error)

    # --- the conversation on view

    def branch(self) -> list[Message]:
        return [] if self.conversation is None else self.store.branch(self.conversation.id)

    async def show_branch(self, *, at: int | None = None) -> None:
        """Shows the conversation's present branch."""
        await self.chat.show(self.entries(), at=at)
        self.show_header()

    def entries(self) -> list[Entry]:
        """The branch on view with each message's place among its versions."""
        if self.conversation is None:
            return []
        children = self.store.children(self.conversation.id)
        live = self.answering.answer.message.id if self.answering.running and self.answering.answer else None
        result = []
        for message in self.store.branch(self.conversation.id):
            versions = children[message.parent_id]
            result.append(Entry(message, versions.index(message.id) + 1, len(versions), live=message.id == live))
        return result

    def ensure_conversation(self, first_text: str) -> Conversation:
        """The conversation on view; makes it, named after the first question."""
        if self.conversation is None:
            title = visible_line(first_text.strip().split("\n")[0], max_chars=TITLE_CHARS)
            self.conversation = self.store.create(title, to_json(self.options))
            self.store.set_state("last_conversation", self.conversation.id)
        return self.conversation

    def set_options(self, options: ChatOptions) -> None:
        """New settings for the conversation on view."""
        self.options = options
        if self.conversation is not None:
            self.store.save_settings(self.conversation.id, to_json(options))

    def reload_options(self) -> None:
        """Settings of the conversation on view, from the store."""
        saved = {} if self.conversation is None else self.conversation.settings
        self.options = from_json(saved, self.launch.chat)

    async def answer_to(self, parent_id: int) -> None:
        """Starts an answer to a question that is the end of what is on view; waits for the model if it must."""
        if self.answering.running:
            raise UsageError("an answer is being written", hint="Esc stops it")
        self.clear_errors()
        if self.facts is None:
            self.pending_parent = parent_id
            if not self.model_loading:
                self.no_model()
            return
        self.pending_parent = None
        assert self.conversation is not None
        branch = self.store.branch(self.conversation.id)
        modes = self.facts.think_modes
        command = Generate(
            messages=prompt_messages(branch, self.options.system),
            think=self.options.think if self.options.think in modes else modes[0],
            sampling=self.options.sampling,
            max_tokens=self.options.max_tokens,
        )
        message = self.store.add(
            self.conversation.id,
            parent_id,
            "assistant",
            "",
            state="writing",
            details={"model": self.facts.name, "think": command.think},
        )
        versions = self.store.children(self.conversation.id)[parent_id]
        entry = Entry(message, len(versions), len(versions), live=True)
        self.answering.start(entry, command)
        await self.chat.append(entry)
        if (view := self.chat.view(message.id)) is not None:
            await view.show_progress("waiting for the model…")
        self.show_header()
        self.show_conversations()

    def stop_answer(self) -> None:
        """Ends the answer at once, also one that waits for the model."""
        if self.pending_parent is not None:
            self.pending_parent = None
            self.app.notify("Stopped; F5 asks again", timeout=4)
        if self.answering.running:
            self.link.stop()

    def cancel_editing(self) -> None:
        if self.editing is not None:
            self.editing = None
            self.prompt.clear(remember=False)
            self.prompt.border_title = ""

    def find_message(self, accept: Callable[[Message], bool]) -> Message | None:
        """The message that the running command means: the target, the focused one, or the last that is acceptable."""
        chosen = self.target_message if self.target_message is not None else self.chat.focused_message
        if chosen is not None:
            for entry in self.chat.entries:
                if entry.message.id == chosen:
                    return entry.message
        return next((entry.message for entry in reversed(self.chat.entries) if accept(entry.message)), None)

    def set_system(self, text: str) -> None:
        self.set_options(replace(self.options, system=text))
