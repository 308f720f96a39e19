"""Connects the interface to the engine process: blocking calls run in threads, which only post messages.

Knows nothing about widgets. The threads are our own daemons rather than Textual's thread workers, which are joined at exit, so
that one waiting for a hanging engine would block the terminal.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from textual.message import Message

from localrun.engine.facts import ModelFacts
from localrun.engine.options import EngineOptions
from localrun.engine.process.process import EngineProcess, GenerateEvent, LoadEvent
from localrun.engine.process.protocol import Generate, Loading, Ready, Stats
from localrun.errors import EngineDiedError, LocalrunError
from localrun.tui.faults import as_ours
from localrun.tui.files import estimate_tokens
from localrun.tui.messages import AnswerEvents, EngineDied, EngineFailed, EngineLoading, EngineReady, StatsArrived

OnDeath = Callable[[EngineDiedError], None]


class ScreenEngine(Protocol):
    """What the interface uses of `EngineProcess`; tests give a scripted one."""

    @property
    def facts(self) -> ModelFacts | None: ...
    @property
    def alive(self) -> bool: ...
    @property
    def pid(self) -> int | None: ...
    def load(self, path: Path | str, options: EngineOptions | None = None) -> Iterator[LoadEvent]: ...
    def reload(self) -> Iterator[LoadEvent]: ...
    def generate(self, command: Generate) -> Iterator[GenerateEvent]: ...
    def stop(self) -> None: ...
    def stats(self, *, expert_map: bool = False, timeout_s: float = 5.0) -> Stats: ...
    def count_tokens(self, text: str, *, timeout_s: float = 30.0) -> int: ...
    def log_tail(self) -> list[str]: ...
    def close(self) -> None: ...


EngineFactory = Callable[[OnDeath], ScreenEngine]


def start_engine(on_death: OnDeath) -> ScreenEngine:
    """The real one."""
    return EngineProcess(on_death=on_death)


class AnswerFeed:
    """Events of one answer on their way from the engine's thread to the screen.

    The thread adds events, the screen takes all available ones: a fast model costs one message per frame, not one per token.
    `ended` is set after the last event, `error` says why if it failed.
    """

    def __init__(self) -> None:
        self._events: deque[GenerateEvent] = deque()
        self._lock = threading.Lock()
        self._announced = False
        self.ended = False
        self.error: LocalrunError | None = None

    def add(self, event: GenerateEvent | None) -> bool:
        """Returns whether the screen must be told."""
        with self._lock:
            if event is not None:
                self._events.append(event)
            tell, self._announced = not self._announced, True
            return tell

    def end(self, error: LocalrunError | None = None) -> bool:
        """As `add`."""
        self.error, self.ended = error, True
        return self.add(None)

    def take(self) -> list[GenerateEvent]:
        with self._lock:
            events = list(self._events)
            self._events.clear()
            self._announced = False
            return events


class EngineLink:
    """The engine for the screen: calls return immediately, results arrive as messages.

    Owns the engine. Methods are for the screen's thread.

    Args:
        factory: makes the engine.
        post: delivers a message to the screen; called from any thread.
    """

    def __init__(self, factory: EngineFactory, post: Callable[[Message], Any]) -> None:
        self._post_message = post
        self._closed = False
        self._asking_stats = threading.Lock()
        self.engine = factory(lambda error: self._post(EngineDied(error)))

    # --- commands

    def load(self, path: Path, options: EngineOptions, *, restart: bool = False) -> None:
        """Ends in EngineReady or EngineFailed. `restart` first ends the current process, whatever it is doing."""

        def run() -> None:
            if restart:
                self.engine.close()
            self._run_load(self.engine.load(path, options))

        self._start("load", run)

    def reload(self) -> None:
        """Starts a dead engine again. Ends as `load`."""
        self._start("reload", lambda: self._run_load(self.engine.reload()))

    def generate(self, command: Generate) -> AnswerFeed:
        """Starts an answer; its events arrive in the feed."""
        feed = AnswerFeed()
        self._start("generate", lambda: self._run_answer(command, feed))
        return feed

    def stop(self) -> None:
        self.engine.stop()

    def ask_stats(self, *, expert_map: bool) -> None:
        """Ends in StatsArrived, or nothing. Skipped while a request is pending."""
        if self.engine.alive and self._asking_stats.acquire(blocking=False):
            self._start("stats", lambda: self._run_stats(expert_map))

    def count_tokens(self, text: str, done: Callable[[int, bool], None]) -> None:
        """Calls `done(n_tokens, is_exact)` from a thread; an estimate if the engine can't be asked."""
        self._start("tokens", lambda: done(*self._count(text)))

    def count_now(self, text: str) -> int:
        """As `count_tokens`, but blocks."""
        return self._count(text)[0]

    def close(self) -> None:
        """Ends the engine; blocks for as long as that takes."""
        self._closed = True
        self.engine.close()

    # --- in threads

    def _run_load(self, events: Iterator[LoadEvent]) -> None:
        try:
            for event in events:
                self._post_load_event(event)
        except Exception as error:  # a bug must not leave the screen waiting
            self._post(EngineFailed(as_ours(error)))

    def _run_answer(self, command: Generate, feed: AnswerFeed) -> None:
        error: LocalrunError | None = None
        try:
            for event in self.engine.generate(command):
                if isinstance(event, Loading | Ready):
                    self._post_load_event(event)
                elif feed.add(event):
                    self._post(AnswerEvents(feed))
        except Exception as failure:
            error = as_ours(failure)
        if feed.end(error):
            self._post(AnswerEvents(feed))

    def _run_stats(self, expert_map: bool) -> None:
        try:
            started = time.perf_counter()
            stats = self.engine.stats(expert_map=expert_map)
            self._post(StatsArrived(stats, time.perf_counter() - started))
        except (LocalrunError, TimeoutError):
            pass  # loading, busy or dead: each is shown by other means
        finally:
            self._asking_stats.release()

    def _count(self, text: str) -> tuple[int, bool]:
        try:
            if self.engine.facts is not None:
                return self.engine.count_tokens(text), True
        except (LocalrunError, TimeoutError):
            pass
        return estimate_tokens(text), False

    def _post_load_event(self, event: LoadEvent) -> None:
        if isinstance(event, Ready):
            self._post(EngineReady(event.facts, event.load_s, event.plan))
        else:
            self._post(EngineLoading(event.progress, event.text, event.plan))

    def _start(self, name: str, target: Callable[[], None]) -> None:
        threading.Thread(target=target, name=f"tui-{name}", daemon=True).start()

    def _post(self, message: Message) -> None:
        if not self._closed:
            self._post_message(message)
