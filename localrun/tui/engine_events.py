"""What the engine sends to the chat screen, and what is shown of it: loads, answers, deaths, counters, a full context."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from textual import on, work

from localrun.engine.conversations import Message
from localrun.engine.facts import ModelFacts
from localrun.errors import ContextFullError, EngineDiedError, StoppedError
from localrun.tui.answer import Answer, last_turns, prompt_messages, prompt_time_left
from localrun.tui.chat_state import ChatState
from localrun.tui.messages import (
    AnswerEvents,
    EngineDied,
    EngineFailed,
    EngineLoading,
    EngineReady,
    StatsArrived,
)
from localrun.tui.screens.dialog import ChoiceDialog
from localrun.tui.screens.plan import PlanScreen, planned
from localrun.tui.widgets.engine_panel import ram_bytes
from localrun.tui.widgets.notices import LoadingPanel
from localrun.tui.widgets.status_bar import Status, StatusBar, short_count, time_left

IDLE_STATS_EVERY = 3
"""While nothing is computed the counters hardly change."""

MAP_EVERY = 3
"""Looks at the counters per look at the map. A look at the 11,008 experts of Flash takes the engine 26 ms at most (measured on
a busy machine), most of it JSON: once in 3 s that is less than 1 % of its time."""

TURN_OVERHEAD_TOKENS = 8
"""Role markers around a message; at most."""


class EngineEvents(ChatState):
    """Part of `ChatScreen`."""

    _stats_tick = 0

    # --- loading

    @on(EngineLoading)
    def show_loading(self, event: EngineLoading) -> None:
        if not self.model_loading:
            self.model_loading = True
            self.facts = None
            self.plan_lines = ()
            self.show_header()
        self.load_text = event.text
        self.plan_lines = event.plan or self.plan_lines
        self.query_one(LoadingPanel).show(event.text, event.progress, self.plan_lines)

    @on(EngineReady)
    async def model_ready(self, event: EngineReady) -> None:
        self.model_loading, self.facts = False, event.facts
        self.planned = planned(event.plan)
        self.query_one(LoadingPanel).display = False
        self.show_header()
        self.link.ask_stats(expert_map=self.panel_engine != "off")
        if self.pending_parent is not None and not self.answering.running:
            await self.run_guarded(self.answer_to(self.pending_parent))

    @on(EngineFailed)
    def load_failed(self, event: EngineFailed) -> None:
        self.model_loading, self.facts = False, None
        self.query_one(LoadingPanel).display = False
        self.show_header()
        if not isinstance(event.error, StoppedError):
            self.show_error(
                "The model could not be loaded",
                event.error,
                ("models", "settings", "reload", "close"),
                self.link.engine.log_tail() if isinstance(event.error, EngineDiedError) else None,
            )

    @on(EngineDied)
    def engine_died(self, event: EngineDied) -> None:
        """Says so and starts it again; a death while loading is told by the load itself."""
        if self.model_loading:
            return
        self.facts = None
        self.show_error("The engine has died; it is started again", event.error, log=self.link.engine.log_tail())
        self.model_loading = True
        self.engine_panel.forget()
        self.show_header()
        self.link.reload()

    # --- answers

    @on(AnswerEvents)
    async def take_answer(self, event: AnswerEvents) -> None:
        await self.answering.news(event.feed)

    async def answer_ended(self, answer: Answer) -> None:
        self.last_answer = answer
        self.link.ask_stats(expert_map=self.panel_engine != "off")
        error = answer.error
        if error is not None and not answer.text and not answer.thinking:
            self.store.discard_empty(answer.message)
            await self.show_branch()
        self.show_conversations()
        if isinstance(error, ContextFullError) or (answer.finished is not None and answer.finished.reason == "context"):
            if self.facts is not None:  # else another model is being loaded already
                self.context_full(self.facts, str(error) if error is not None else "")
        elif error is not None and not isinstance(error, EngineDiedError | StoppedError):
            self.show_error("The answer failed", error, ("regenerate", "close"))

    # --- context full

    @work
    async def context_full(self, facts: ModelFacts, message: str) -> None:
        """Asks what to do; nothing is ever cut silently."""
        branch = self.branch()
        if branch and branch[-1].role == "assistant":
            branch = branch[:-1]
        if not branch:
            return
        n_turns = await asyncio.to_thread(self._turns_that_fit, branch, facts.n_ctx // 2)
        n_all = sum(m.role == "user" for m in branch)
        larger = min(2 * facts.n_ctx, facts.n_ctx_train)
        choices = {}
        if 0 < n_turns < n_all:
            choices["branch"] = f"New branch with the last {n_turns} of {n_all} questions"
        if larger > facts.n_ctx:
            choices["raise"] = f"Raise the context to {short_count(larger)} tokens (loads the model again)"
        choices["cancel"] = "Leave it as it is"
        text = (message or f"The context of {facts.n_ctx:,} tokens is full; the answer ends here.") + (
            "\n\nNothing is lost, whatever you choose: a new branch leaves this one as it is."
        )
        choice = await self.app.push_screen_wait(ChoiceDialog("The context is full", text, choices))
        if choice == "branch":
            await self.run_guarded(self._branch_with(last_turns(branch, n_turns)))
        elif choice == "raise":
            self.store.rewind(branch[-1].conversation_id, branch[-1].id)
            await self.show_branch()
            self.pending_parent = branch[-1].id
            self.raise_context(larger)

    def _turns_that_fit(self, branch: Sequence[Message], budget: int) -> int:
        """How many questions from the end, with what follows them, fit into `budget` tokens. Blocks."""
        n_turns = used = 0
        used += self._count(self.options.system)
        for message in reversed(branch):
            (body,) = prompt_messages([message]) or ({"content": ""},)
            used += self._count(str(body["content"])) + TURN_OVERHEAD_TOKENS
            if used > budget:
                break
            n_turns += message.role == "user"
        return n_turns

    def _count(self, text: str) -> int:
        return self.link.count_now(text) if text else 0

    async def _branch_with(self, messages: Sequence[Message]) -> None:
        """A copy of the last turns as a beginning of its own."""
        assert self.conversation is not None
        parent_id: int | None = None
        for message in messages:
            parent_id = self.store.add(
                self.conversation.id,
                parent_id,
                message.role,
                message.content,
                reasoning=message.reasoning,
                state=message.state,
                attachments=message.attachments,
                details=message.details,
            ).id
        await self.show_branch()
        if parent_id is not None:
            await self.answer_to(parent_id)

    # --- counters

    def tick_live(self) -> None:
        """A few times a second: what changes while an answer is written."""
        self.query_one(StatusBar).show(self.status())

    def tick_stats(self) -> None:
        self._stats_tick += 1
        busy = self.answering.running
        if not busy and (self.panel_engine == "off" or self._stats_tick % IDLE_STATS_EVERY):
            return
        if self.facts is not None:
            self.link.ask_stats(expert_map=self.panel_engine != "off" and self._stats_tick % MAP_EVERY == 0)

    @on(StatsArrived)
    def show_stats(self, event: StatsArrived) -> None:
        self.last_stats = event.stats
        self.engine_panel.show(event.stats, self.facts, event.seconds)

    def status(self) -> Status:
        """What the status line shows now."""
        facts, stats = self.facts, self.last_stats
        answer = self.answering.answer
        used = stats.context_used if stats is not None else 0
        if self.answering.running and answer is not None:
            used = answer.context_used or used
        return Status(
            activity=self._activity(),
            decode_tokens_per_s=None if answer is None else answer.decode_tokens_per_s,
            prompt_tokens_per_s=None if answer is None else answer.prompt_tokens_per_s,
            context_used=used,
            n_ctx=facts.n_ctx if facts is not None else 0,
            planned=self.planned if facts is not None else None,
            hit_rate=self.engine_panel.rates.hit_rate,
            ram_bytes=None if facts is None else ram_bytes(facts, self.engine_panel.grid, stats),
            ram_budget=None if facts is None else facts.ram_bytes,
            think=self.options.think,
            extra=self.conversion_status(),
        )

    def do_plan(self, argument: str) -> None:
        """The plan of the load, and what was measured since."""
        answer = self.answering.answer
        measured = None if answer is None or answer.finished is None else answer.finished.timings
        self.app.push_screen(PlanScreen(self.plan_lines, measured, loaded=self.facts is not None))

    def _activity(self) -> str:
        if self.model_loading:
            return "loading"
        if self.facts is None:
            return "no model"
        answer = self.answering.answer
        if not self.answering.running or answer is None:
            return ""
        progress = answer.progress
        if progress is not None and progress.done < progress.total:
            percent = 100 * progress.done / max(1, progress.total)
            return f"reading {percent:.0f}% {time_left(prompt_time_left(progress))}".strip()
        return "thinking" if answer.is_thinking else "writing" if answer.n_tokens else "reading"
