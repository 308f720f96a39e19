"""A bounded request queue that is fair between clients, and the thread that serves it.

The engine answers one request at a time. Requests of one client (a session or a connection) are served in order of arrival, and
clients take turns, so an agent with ten requests does not block the others. A cancelled request costs nothing more: a waiting
one is dropped, a running one is stopped within a token.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from localrun.engine.process.process import GenerateEvent
from localrun.engine.process.protocol import Finished, Generate
from localrun.errors import LocalrunError
from localrun.server.engine import ServerEngine
from localrun.server.faults import ApiError, from_engine

USUAL_ANSWER_S = 10.0
"""What an answer takes as long as none was given: only for `Retry-After`."""


@dataclass(frozen=True, slots=True)
class Item:
    """An item for a job's owner: an event of one choice, or the job's end.

    Attributes:
        event: None at the end.
        error: set at the end of a job that failed.
    """

    choice: int
    event: GenerateEvent | None = None
    error: ApiError | None = None

    @property
    def is_end(self) -> bool:
        return self.event is None


@dataclass(slots=True, eq=False)
class Job:
    """A request on its way through the engine; its events arrive in `items`, on the event loop that submitted it.

    Attributes:
        commands: one per choice, answered in sequence.
        client: whose turn it uses.
    """

    commands: tuple[Generate, ...]
    client: str
    loop: asyncio.AbstractEventLoop
    items: asyncio.Queue[Item] = field(default_factory=asyncio.Queue)
    cancelled: bool = False
    submitted: float = field(default_factory=time.monotonic)
    started: float | None = None

    def put(self, item: Item) -> None:
        """From the engine's thread."""
        with contextlib.suppress(RuntimeError):  # the loop was closed
            self.loop.call_soon_threadsafe(self.items.put_nowait, item)


class Dispatcher:
    """Owns the thread that talks to the engine. `submit`, `cancel` and `place` may be called from any thread.

    Args:
        most_waiting: maximum number of waiting requests; more are rejected.
        on_finished: called in the engine's thread with the last event of each answer.
    """

    def __init__(
        self, engine: ServerEngine, *, most_waiting: int, on_finished: Callable[[Finished], None] | None = None
    ) -> None:
        self._engine = engine
        self._most_waiting = most_waiting
        self._on_finished = on_finished
        self._changed = threading.Condition()  # guards everything below
        self._waiting: OrderedDict[str, deque[Job]] = OrderedDict()  # client -> its jobs; the next client comes first
        self._running: Job | None = None
        self._closing = False
        self._mean_s = USUAL_ANSWER_S
        self._thread = threading.Thread(target=self._run, name="localrun-dispatch", daemon=True)
        self._thread.start()

    # --- from any thread

    @property
    def n_waiting(self) -> int:
        with self._changed:
            return sum(len(jobs) for jobs in self._waiting.values())

    @property
    def busy(self) -> bool:
        return self._running is not None

    @property
    def closing(self) -> bool:
        return self._closing

    def submit(self, job: Job) -> None:
        """Adds a job to the queue.

        Raises:
            ApiError: the queue is full, or the server is stopping.
        """
        with self._changed:
            if self._closing:
                raise ApiError("unavailable", "the server is stopping", code="server_stopping", retry_after_s=5)
            n_waiting = sum(len(jobs) for jobs in self._waiting.values())
            if n_waiting >= self._most_waiting:
                wait_s = round(min(60.0, max(1.0, self._mean_s * n_waiting / 2)))
                raise ApiError(
                    "overloaded",
                    f"{n_waiting} requests are already waiting",
                    code="rate_limit_exceeded",
                    retry_after_s=wait_s,
                )
            self._waiting.setdefault(job.client, deque()).append(job)
            self._changed.notify()

    def n_ahead(self, job: Job) -> int:
        """How many requests are answered before `job`; 0: it is being answered, or over."""
        with self._changed:
            if job.client not in self._waiting or job not in self._waiting[job.client]:
                return 0
            clients = list(self._waiting)
            turn, mine = clients.index(job.client), self._waiting[job.client].index(job)
            ahead = sum(min(len(self._waiting[c]), mine + (i < turn)) for i, c in enumerate(clients) if i != turn)
            return ahead + mine + (1 if self._running is not None else 0)

    def cancel(self, job: Job) -> None:
        """Its client has left; nothing happens if the job is over."""
        with self._changed:
            job.cancelled = True
            if self._running is job:
                self._engine.stop()
            elif job.client in self._waiting:
                jobs = self._waiting[job.client]
                if job in jobs:
                    jobs.remove(job)
                if not jobs:
                    del self._waiting[job.client]

    def close(self, *, patience_s: float) -> None:
        """Rejects waiting jobs, gives the running answer `patience_s` to finish, then stops it. Blocks; may be called twice,
        the second time with less patience."""
        stopping = ApiError("unavailable", "the server is stopping", code="server_stopping", retry_after_s=5)
        with self._changed:
            self._closing = True
            waiting = [job for jobs in self._waiting.values() for job in jobs]
            self._waiting.clear()
            self._changed.notify()
        for job in waiting:
            job.put(Item(0, error=stopping))
        deadline = time.monotonic() + patience_s
        while self._thread.is_alive():
            self._thread.join(0.05)
            if time.monotonic() > deadline:
                with self._changed:
                    if self._running is not None:
                        self._engine.stop()
                self._thread.join(2.0)
                return

    # --- the engine's thread

    def _run(self) -> None:
        while (job := self._next()) is not None:
            start = time.monotonic()
            job.started = start
            try:
                error = self._answer(job)
            except Exception as fault:  # a bug must not take the server down
                error = from_engine(fault)
            with self._changed:
                self._running = None
            self._mean_s += 0.2 * (time.monotonic() - start - self._mean_s)
            job.put(Item(len(job.commands) - 1, error=error))

    def _next(self) -> Job | None:
        with self._changed:
            while not self._waiting:
                if self._closing:
                    return None
                self._changed.wait()
            client, jobs = next(iter(self._waiting.items()))
            job = jobs.popleft()
            if jobs:
                self._waiting.move_to_end(client)
            else:
                del self._waiting[client]
            self._running = job
            return job

    def _answer(self, job: Job) -> ApiError | None:
        """Hands out the events of all choices; how it failed, or None."""
        for choice, command in enumerate(job.commands):
            events: Iterator[GenerateEvent] = self._engine.generate(command)
            try:
                # A cancel that arrives before the engine knows the command finds nothing to stop: the check at each event
                # makes up for it, and closing the iterator stops what runs.
                for event in events:
                    if job.cancelled:
                        return None
                    job.put(Item(choice, event))
                    if isinstance(event, Finished):
                        if self._on_finished is not None:
                            self._on_finished(event)
                        if event.reason == "stopped":
                            return ApiError("unavailable", "the server is stopping", code="server_stopping")
            except LocalrunError as error:
                return from_engine(error, loading=self._engine.facts is None)
            finally:
                close = getattr(events, "close", None)
                if close is not None:
                    close()
            if job.cancelled:
                return None
        return None
