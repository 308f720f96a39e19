"""Asking: pending questions, the answer in progress, and what happens when it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from textual.screen import Screen

from localrun.engine.conversations import Attachment, Message
from localrun.engine.facts import ModelFacts
from localrun.engine.process.protocol import Generate
from localrun.errors import ContextFullError, EngineDiedError, StoppedError, UsageError
from localrun.tui.controllers.answering import Answering
from localrun.tui.controllers.conversation import OpenConversation
from localrun.tui.controllers.model import ModelSwitch
from localrun.tui.controllers.notices import Notices
from localrun.tui.controllers.records import Records
from localrun.tui.controllers.work import WorkQueue
from localrun.tui.demo_words import DEMO_NOTE, DEMO_NOTE_AGAIN, DEMO_QUESTIONS
from localrun.tui.live_answer import LiveAnswer, last_turns, prompt_messages
from localrun.tui.screens.dialog import ChoiceDialog
from localrun.tui.widgets.chat_view import ChatView
from localrun.tui.widgets.status_bar import short_count

TURN_OVERHEAD_TOKENS = 8
"""Role markers around a message; at most."""

BUSY = UsageError("an answer is still being written", hint="Esc stops it")


@dataclass(frozen=True, slots=True)
class Question:
    """What the user sent: its text, files, and the message that it is a new version of."""

    text: str
    attachments: tuple[Attachment, ...] = ()
    instead_of: Message | None = None


class Asking:
    """Owns the answer in progress and the question waiting for a model.

    Args:
        refused: gets a question that could not be saved.
        answered: called for every answer that has ended.

    Attributes:
        answering: the current or last answer.
        pending: id of the question to answer as soon as a model is loaded.
    """

    def __init__(
        self,
        screen: Screen[Any],
        records: Records,
        queue: WorkQueue,
        notices: Notices,
        model: ModelSwitch,
        *,
        refused: Callable[[Question], None],
        answered: Callable[[LiveAnswer], None],
        changed: Callable[[], None],
    ) -> None:
        self._screen, self._queue, self._notices, self._model = screen, queue, notices, model
        self._refused, self._answered, self._changed = refused, answered, changed
        self.pending: int | None = None
        self.current: OpenConversation  # set by whoever puts the controllers together: it shows which message is live
        self.answering = Answering(
            screen,
            records,
            model.link,
            lambda: screen.query_one(ChatView),
            ended=self._ended,
            failed_to_save=lambda error: notices.error("Could not save the conversation", error),
        )

    @property
    def busy(self) -> bool:
        """An answer is written or waits for a model."""
        return self.answering.running or self.pending is not None

    def check_free(self) -> None:
        """Raises UsageError while an answer is written."""
        if self.answering.running:
            raise BUSY

    # --- asking

    async def ask(self, question: Question) -> None:
        """Writes a question down and has it answered."""
        try:
            self.check_free()
            message = await self.current.add_question(
                question.text, question.attachments, instead_of=question.instead_of
            )
        except BaseException:
            self._refused(question)
            raise
        await self.answer_to(message.id)

    async def answer_to(self, question_id: int) -> None:
        """Starts an answer to the question at the end of the visible branch; without a model the question waits for one."""
        self.check_free()
        self._notices.clear()
        facts = self._model.facts
        if facts is None:
            self.pending = question_id
            if not self._model.loading:
                self._model.choose_for_a_question()
            self._changed()
            return
        self.pending = None
        options = self.current.options
        modes = facts.think_modes
        branch = await self.current.branch()
        command = Generate(
            messages=prompt_messages(branch, options.system),
            think=options.think if options.think in modes else modes[0],
            sampling=options.sampling,
            max_tokens=options.max_tokens,
        )
        details = {"model": facts.name, "think": command.think}
        if self._model.is_demo and branch and branch[-1].content not in DEMO_QUESTIONS:
            details["note"] = DEMO_NOTE if len(branch) == 1 else DEMO_NOTE_AGAIN
        entry = await self.current.add_answer(question_id, details)
        chat = self._screen.query_one(ChatView)
        await chat.append(entry)
        self.answering.start(entry, command)  # not before: what comes is drawn into what the chat shows
        if (view := chat.view(entry.message.id)) is not None:
            await view.show_progress("waiting for the model…")
        self._changed()

    def model_ready(self) -> None:
        """There is a model: what waited for one is answered."""
        if self.pending is not None and not self.answering.running:
            self._queue.add(self._answer_pending())

    async def _answer_pending(self) -> None:
        if self.pending is not None and not self.answering.running:
            await self.answer_to(self.pending)

    def stop(self) -> bool:
        """Stops the answer immediately, even one waiting for a model; returns whether there was one."""
        was_busy = self.busy
        if self.pending is not None:
            self.pending = None
            self._notices.note("Stopped; F5 retries")
        if self.answering.running:
            self._model.link.stop()
        return was_busy

    def forget_pending(self) -> None:
        """Another conversation comes on view: the question stays in its own, and is asked again from there."""
        self.pending = None

    # --- the end of an answer

    def _ended(self, answer: LiveAnswer) -> None:
        self._queue.add(self._after(answer))

    async def _after(self, answer: LiveAnswer) -> None:
        error = answer.error
        self._answered(answer)
        if error is not None and not answer.text and not answer.thinking:
            await self.current.discard_empty(answer.message)
        self._changed()
        facts = self._model.facts
        if isinstance(error, ContextFullError) or (answer.finished is not None and answer.finished.reason == "context"):
            if facts is not None:  # else another model is being loaded already
                self._screen.run_worker(self._context_full(facts, str(error) if error is not None else ""))
        elif error is not None and not isinstance(error, EngineDiedError | StoppedError):
            self._notices.error("The answer failed", error, ("regenerate", "close"))

    # --- context full

    async def _context_full(self, facts: ModelFacts, message: str) -> None:
        """Asks what to do; nothing is truncated silently."""
        branch = await self.current.branch()
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
            choices["raise"] = f"Raise the context to {short_count(larger)} tokens (reloads the model)"
        choices["cancel"] = "Leave it as is"
        text = (message or f"The context of {facts.n_ctx:,} tokens is full; the answer ends here.") + (
            "\n\nNothing is lost either way: a new branch leaves this one unchanged."
        )
        choice = await self._screen.app.push_screen_wait(ChoiceDialog("The context is full", text, choices))
        if choice == "branch":
            self._queue.add(self._branch_with(last_turns(branch, n_turns)))
        elif choice == "raise":
            self._queue.add(self._ask_again_with(larger, branch[-1].id))

    def _turns_that_fit(self, branch: Sequence[Message], budget: int) -> int:
        """How many questions from the end, with what follows them, fit into `budget` tokens. Blocks."""
        n_turns = 0
        used = self._count(self.current.options.system)
        for message in reversed(branch):
            (body,) = prompt_messages([message]) or ({"content": ""},)
            used += self._count(str(body["content"])) + TURN_OVERHEAD_TOKENS
            if used > budget:
                break
            n_turns += message.role == "user"
        return n_turns

    def _count(self, text: str) -> int:
        return self._model.link.count_now(text) if text else 0

    async def _branch_with(self, messages: Sequence[Message]) -> None:
        """Copies the last turns to a new root."""
        last = await self.current.begin_again_with(messages)
        if last is not None:
            await self.answer_to(last)

    async def _ask_again_with(self, n_ctx: int, question_id: int) -> None:
        await self.current.rewind(question_id)
        self.pending = question_id
        self._model.raise_context(n_ctx)
