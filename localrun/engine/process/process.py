"""The user interface's side of the engine: sends commands, delivers events, restarts the process after a crash.

Why a process: llama.cpp aborts the whole process on internal errors, and every layer enters Python once per token, so
a busy interface thread would slow the engine down. A crash only costs the running answer and a reload.

Knows nothing about models or numbers; imports only the standard library and the protocol. `connection.py` handles the child and
its pipes.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeVar, cast

from msgspec import structs

from localrun import errors
from localrun.engine.facts import ModelFacts
from localrun.engine.options import EngineOptions
from localrun.engine.process.connection import Connection
from localrun.engine.process.protocol import (
    CLOSING_EVENTS,
    Command,
    CountTokens,
    Delta,
    EvalLogits,
    EvalResult,
    EvalText,
    EvalTextResult,
    Event,
    Failed,
    Finished,
    Generate,
    GetStats,
    Load,
    Loading,
    PromptProgress,
    Ready,
    Restore,
    Restored,
    Saved,
    Snapshot,
    Stats,
    TokenCount,
    ToolCall,
    ToolCallBegun,
)
from localrun.errors import EngineDiedError, LocalrunError

LoadEvent = Loading | Ready
GenerateEvent = Loading | Ready | PromptProgress | Delta | ToolCallBegun | ToolCall | Finished
_E = TypeVar("_E", bound=Event)


class EngineProcess:
    """One engine process and its model; starts a new process when needed.

    All methods may be called from any thread. Long commands (load, generate, evaluate) run one after another in call order;
    `stats`, `count_tokens` and `stop` are served meanwhile. `stop` never blocks; `close` returns within `CLOSE_TIMEOUT_S` plus
    `KILL_TIMEOUT_S` of `connection.py`; short queries have timeouts.

    The iterators block between events; run them in a worker thread. Closing one early stops its command.

    If the engine dies, running iterators raise EngineDiedError with the cause. The next `generate` first starts a new process
    and reloads the model, with Loading and Ready events in its stream; `reload` does that immediately.

    The child never outlives this process: it exits when its command pipe closes for any reason, and also polls for its parent.
    (PR_SET_PDEATHSIG is useless here, because it fires when the *thread* that started the child ends.)

    Lock: `_lock` guards the current connection and its intended model; held while a process is started.
    """

    def __init__(self, *, on_death: Callable[[EngineDiedError], None] | None = None) -> None:
        """
        Args:
            on_death: called once per death, from a reader thread, also when no command was running.
        """
        self.on_death = on_death
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._log: Connection | None = None  # the last one, for its log
        self._load: Load | None = None

    # --- state

    @property
    def facts(self) -> ModelFacts | None:
        """Facts of the loaded model; None while there is none."""
        connection = self._connection
        return connection.facts if connection is not None else None

    @property
    def alive(self) -> bool:
        """A process is there and has not been found dead."""
        connection = self._connection
        return connection is not None and connection.alive

    @property
    def pid(self) -> int | None:
        connection = self._connection
        return connection.pid if connection is not None and connection.alive else None

    def log_tail(self) -> list[str]:
        """The last lines that the engine's C libraries printed, of the dead engine too until another one starts."""
        last = self._log
        return list(last.log) if last is not None else []

    # --- commands

    def start(self) -> None:
        """Starts the process early, so its imports are done before the first command. Optional."""
        self._connected()

    def load(self, path: Path | str, options: EngineOptions | None = None) -> Iterator[LoadEvent]:
        """Replaces the current model; the last event is Ready.

        Raises:
            LocalrunError: the model can't be loaded; the process continues without a model.
            EngineDiedError: the engine ended meanwhile.
        """
        command = Load(path=str(path), options=options or EngineOptions())
        with self._lock:
            self._load = command
            if self._connection is not None:
                self._connection.facts = None
        return cast(Iterator[LoadEvent], self._events(command))

    def reload(self) -> Iterator[LoadEvent]:
        """Starts a new process if the engine is dead and reloads the last model, without unreachable remote GPUs."""
        load = self._load
        if load is None:
            raise LocalrunError("no model was loaded")
        return cast(Iterator[LoadEvent], self._events(_without_lost_servers(load)))

    def generate(self, command: Generate) -> Iterator[GenerateEvent]:
        """One answer; the last event is Finished. `command.request` is assigned here. Waits for a running load; if no model is
        loaded, the last one is reloaded first.

        Raises:
            LocalrunError: the answer failed; the engine is still usable.
            EngineDiedError: the engine ended meanwhile.
        """
        connection = self._connection
        if self.facts is None and not (connection is not None and connection.loading):
            yield from self.reload()
        yield from cast(Iterator[GenerateEvent], self._events(command))

    def stop(self) -> None:
        """Stops all running and queued long commands, within one layer's time. No effect if there are none; returns
        immediately."""
        connection = self._connection
        if connection is not None:
            connection.stop()

    def stats(self, *, expert_map: bool = False, timeout_s: float = 5.0) -> Stats:
        """The engine's counters; works during an answer, too.

        Raises:
            EngineDiedError: there is no engine process.
            TimeoutError: it did not answer in time.
        """
        return self._ask(GetStats(expert_map=expert_map), Stats, timeout_s)

    def count_tokens(self, text: str, *, timeout_s: float = 30.0) -> int:
        """Length of `text` in tokens. Raises as `stats`."""
        return self.count(CountTokens(text=text), timeout_s=timeout_s)

    def count(self, command: CountTokens, *, timeout_s: float = 30.0) -> int:
        """Length in tokens of a text or a whole conversation. Raises as `stats`, and LocalrunError if it can't be a prompt."""
        return self._ask(command, TokenCount, timeout_s).n_tokens

    def tokenize(self, text: str, *, timeout_s: float = 30.0) -> tuple[int, ...]:
        """Token ids of a text. Raises as `stats`."""
        return self._ask(CountTokens(text=text, ids=True), TokenCount, timeout_s).ids

    def snapshot(self, path: Path | str) -> Saved:
        """Writes the session's state to a file. Raises as `generate`."""
        return self._last(Snapshot(path=str(path)), Saved)

    def restore(self, path: Path | str) -> Restored:
        """Reads a state that `snapshot` wrote for the same model. Raises as `generate`."""
        return self._last(Restore(path=str(path)), Restored)

    def evaluate(self, tokens: tuple[int, ...], logits_path: Path | str) -> Iterator[PromptProgress | EvalResult]:
        """Writes the logits of all positions, float32 (T, n_vocab), as .npy; the last event is EvalResult. Raises as
        `generate`."""
        command = EvalLogits(tokens=tokens, logits_path=str(logits_path))
        return cast(Iterator[PromptProgress | EvalResult], self._events(command))

    def evaluate_text(self, command: EvalText) -> Iterator[PromptProgress | EvalTextResult]:
        """Perplexity and comparison with a reference; the last event is EvalTextResult. Raises as `generate`."""
        return cast(Iterator[PromptProgress | EvalTextResult], self._events(command))

    def close(self) -> None:
        """Ends the process, politely at first. May be called at any time, also twice."""
        with self._lock:
            connection, self._connection, self._load = self._connection, None, None
        if connection is not None:
            connection.close()

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # --- inside

    def _connected(self) -> Connection:
        """The current process, or a new one if there is none or it has died."""
        with self._lock:
            if self._connection is None or not self._connection.alive:
                self._connection = self._log = Connection(self._died)
            return self._connection

    def _died(self, connection: Connection, death: EngineDiedError) -> None:
        with self._lock:
            if self._connection is connection:
                self._connection = None
        if self.on_death is not None:
            self.on_death(death)

    def _events(self, command: Command) -> Iterator[Event]:
        """Sends a long command and yields its events up to the closing one."""
        connection = self._connected()
        request, inbox = connection.post(command, long=True)
        finished = False
        try:
            while not finished:
                event = inbox.get()
                finished = isinstance(event, (LocalrunError, *CLOSING_EVENTS))
                yield _checked(event)
        finally:
            connection.forget(request, stop=not finished)

    def _last(self, command: Command, kind: type[_E]) -> _E:
        *_, event = self._events(command)
        assert isinstance(event, kind)
        return event

    def _ask(self, command: Command, kind: type[_E], timeout_s: float) -> _E:
        """A short command of one event, served in the middle of a long one."""
        connection = self._connection
        if connection is None:
            raise EngineDiedError("the engine process is not running")
        request, inbox = connection.post(command, long=False)
        try:
            event = _checked(inbox.get(timeout=timeout_s))
        except queue.Empty:
            raise TimeoutError(f"the engine did not answer {type(command).__name__} within {timeout_s:g} s") from None
        finally:
            connection.forget(request, stop=False)
        assert isinstance(event, kind)
        return event


def _checked(event: Event | LocalrunError) -> Event:
    """The event, unless it tells of a failure. Raises LocalrunError."""
    if isinstance(event, LocalrunError):
        raise event
    if isinstance(event, Failed):
        raise _as_error(event)
    return event


def _as_error(event: Failed) -> LocalrunError:
    """The exception that `event` tells of, with the engine's traceback as a note."""
    kind = getattr(errors, event.kind, LocalrunError)
    error: LocalrunError = kind(event.message, hint=event.hint)
    if event.trace:
        error.add_note(event.trace)
    return error


def _without_lost_servers(command: Load) -> Load:
    """The same command with those RPC servers only that answer: llama.cpp ends the process when it loses one."""
    servers = [endpoint.strip() for endpoint in (command.options.rpc or "").split(",") if endpoint.strip()]
    if not servers:
        return command
    from localrun.ggml.devices import (
        is_reachable,  # numbers and libraries, which an interface without servers need not load
    )

    there = [endpoint for endpoint in servers if is_reachable(endpoint)]
    if len(there) == len(servers):
        return command
    # The requested memory, or a named device, is gone.
    gpu = "auto" if command.options.gpu != "none" else "none"
    options = replace(command.options, rpc=",".join(there) or None, vram_bytes=None, gpu=gpu)
    return structs.replace(command, options=options)
