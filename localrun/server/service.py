"""Shared by all endpoints: the engine behind its queue, defaults, counters."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from localrun.engine.process.process import GenerateEvent
from localrun.errors import EngineDiedError
from localrun.server.asks import Ask, Defaults
from localrun.server.choices import Choice
from localrun.server.dispatch import Dispatcher, Job
from localrun.server.engine import ServerEngine
from localrun.server.faults import ApiError, from_engine, prompt_too_long
from localrun.server.metrics import Metrics
from localrun.server.reminders import Reminders
from localrun.server.signatures import Signer

log = logging.getLogger(__name__)

KEEP_ALIVE_S = 2.0
"""Between keep-alives. Clients time out after 120 s at the earliest; people want to see progress."""

MOST_CHARS_PER_TOKEN = 32
"""On average, of any text (prose has 4 to 5): what can't fit for that reason is refused without being tokenized."""

FIRST_KEEP_ALIVE_S = 0.5
"""Until the first one: an answer that comes sooner needs none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerLine:
    """Log data about a finished request, without its content."""

    api: str
    client: str
    outcome: str
    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    waited_s: float = 0.0
    total_s: float = 0.0
    decode_tokens_per_s: float | None = None


@dataclass(slots=True, kw_only=True)
class Service:
    """The server without HTTP. Used from the event loop's thread.

    Attributes:
        created: start time of the server, for `created` fields (seconds since 1970).
        prompts_log: called with each request's API and body, if enabled.
        on_answer: called when a request has finished.
        reminders: None leaves system prompts unchanged.
    """

    engine: ServerEngine
    dispatcher: Dispatcher
    defaults: Defaults
    metrics: Metrics
    signer: Signer
    keep_alive_s: float = KEEP_ALIVE_S
    first_keep_alive_s: float = FIRST_KEEP_ALIVE_S
    created: int = field(default_factory=lambda: int(time.time()))
    prompts_log: Callable[[str, object], None] | None = None
    on_answer: Callable[[AnswerLine], None] | None = None
    reminders: Reminders | None = field(default_factory=Reminders)

    def arranged(self, ask: Ask, *, learn: bool = True) -> Ask:
        """The request with volatile lines moved after the tools (`reminders.py`)."""
        if self.reminders is None or not ask.tools:
            return ask
        return replace(ask, messages=self.reminders.arranged(ask.messages, learn=learn))

    async def count(self, ask: Ask) -> int | None:
        """Number of prompt tokens; None if the engine is not running yet: the request itself starts it.

        Raises:
            ApiError: the prompt is invalid, or leaves no room for an answer.
        """
        least = ask.n_chars() // MOST_CHARS_PER_TOKEN
        if least >= self.defaults.n_ctx:
            raise prompt_too_long(least, self.defaults.n_ctx)
        if self.engine.facts is None:
            return None
        try:
            command = ask.count_command()
            n_tokens = len(ask.tokens or ()) if command is None else await asyncio.to_thread(self.engine.count, command)
        except (EngineDiedError, TimeoutError):
            return None
        except Exception as error:
            raise from_engine(error) from error
        if n_tokens >= self.defaults.n_ctx:
            raise prompt_too_long(n_tokens, self.defaults.n_ctx)
        return n_tokens

    def submit(self, ask: Ask, n_prompt: int | None, client: str) -> Job:
        """Puts a request into the queue. Raises ApiError: it is full."""
        room = None if n_prompt is None else self.defaults.n_ctx - n_prompt
        if ask.max_tokens is None:
            ask = replace(ask, max_tokens=self.defaults.max_tokens)
        job = Job(ask.commands(room), client, asyncio.get_running_loop())
        self.dispatcher.submit(job)
        return job

    def waiting(self, job: Job, event: GenerateEvent | None) -> dict[str, object]:
        """Progress information for a waiting client: the extension field `localrun`."""
        if job.started is None:
            return {"state": "queued", "requests_ahead": self.dispatcher.n_ahead(job)}
        if event is None:
            return {"state": "started"}
        done, total = getattr(event, "done", None), getattr(event, "total", None)
        if done is not None:
            reused = getattr(event, "reused", 0)
            return {"state": "prompt", "prompt_done": done, "prompt_tokens": total, "prompt_cached": reused}
        progress = getattr(event, "progress", None)
        return {"state": "loading", "progress": progress} if progress is not None else {"state": "answering"}

    def over(self, api: str, job: Job, choices: Sequence[Choice], error: ApiError | None, *, left: bool) -> None:
        """Counts and logs a request that is over. Of one that ended early it tells what is known: the prompt if it was begun."""
        outcome = "left" if left else "ok" if error is None else error.kind
        now = time.monotonic()
        first = choices[0].finished.timings if choices[0].finished else None
        begun = choices[0].prompt
        line = AnswerLine(
            api=api,
            client=job.client,
            outcome=outcome,
            prompt_tokens=first.prompt_tokens if first else begun.total if begun else 0,
            cached_tokens=first.reused_tokens if first else begun.reused if begun else 0,
            new_tokens=sum(c.finished.timings.new_tokens if c.finished else c.n_tokens for c in choices),
            waited_s=(job.started or now) - job.submitted,
            total_s=now - job.submitted,
            decode_tokens_per_s=first.decode_tokens_per_s if first else None,
        )
        self.metrics.answered(line.api, line.outcome, line.prompt_tokens, line.cached_tokens, line.new_tokens)
        self.metrics.waited(line.waited_s)
        if self.on_answer is not None:
            self.on_answer(line)
