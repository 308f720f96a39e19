"""The user interface's side of the engine process: starts it, sends commands, hands events out, notices its death.

Why a process: llama.cpp aborts the whole process on internal errors, and every layer enters Python once per token, so
a busy interface thread would slow the engine down. A dead engine costs the running answer and a reload, nothing else.

This module knows nothing about models or numbers; it imports the standard library and the protocol only.
"""

from __future__ import annotations

import itertools
import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, TypeVar, cast

from msgspec import structs

import localrun
from localrun import errors
from localrun.engine.facts import ModelFacts
from localrun.engine.options import EngineOptions
from localrun.engine.process.protocol import (
    CLOSING_EVENTS,
    Close,
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
    Stop,
    TokenCount,
    ToolCall,
)
from localrun.engine.process.wire import ProtocolError, decode_event, encode
from localrun.errors import EngineDiedError, LocalrunError

LOG_LINES = 200
"""Lines of the C library's output that are kept to explain a crash."""

CLOSE_TIMEOUT_S = 25.0
"""More than the engine gives itself to save what it has learned (`worker.LAST_WORDS_S`)."""

# How an abort begins: ggml_abort's `file.cpp:12: GGML_ASSERT(...) failed`, or an uncaught C++ exception.
_LAST_WORDS = re.compile(r"\.(?:c|cc|cpp|cu|h|m):\d+: |^\s*what\(\): ")

LoadEvent = Loading | Ready
GenerateEvent = Loading | Ready | PromptProgress | Delta | ToolCall | Finished
_Inbox = queue.SimpleQueue[Event | LocalrunError]
_E = TypeVar("_E", bound=Event)


WORKER_ENVIRONMENT = {"GGML_NO_BACKTRACE": "1", "OMP_WAIT_POLICY": "passive"}
"""Unless the user sets them. Threads that spin between two parallel regions starve everybody else on a busy machine: four tokens of
a tiny model took 0.6 s with waiting threads and 34 s with spinning ones (two cores, load 18)."""


class EngineProcess:
    """One engine process and the model in it; a new process is started when one is needed.

    Owns the child process, its pipes and two reader threads. All methods may be called from any thread. Long commands
    (load, generate, evaluate) run one after another in the engine, in the order of their calls; `stats`,
    `count_tokens` and `stop` are served meanwhile.

    The iterators block between events; run them in a worker thread. One that is closed before its end stops its
    command.

    A dead engine: the running iterators raise EngineDiedError with the cause. The next `generate` starts a new process
    and loads the same model again first, which shows as Loading and Ready events in its stream; `reload` does that at
    once.

    The child never outlives this process: it ends when its command pipe is closed, however that happens.
    (PR_SET_PDEATHSIG would kill it as soon as the *thread* that started it ends, so it is no use here.)
    """

    def __init__(self, *, on_death: Callable[[EngineDiedError], None] | None = None) -> None:
        """
        Args:
            on_death: called once per death, from a reader thread, also when no command was running.
        """
        self.on_death = on_death
        self._requests = itertools.count(1)
        self._lock = threading.RLock()  # guards everything below
        self._process: subprocess.Popen[bytes] | None = None
        self._inboxes: dict[int, _Inbox] = {}
        self._running: list[int] = []  # long commands in the order of their calls
        self._log: deque[str] = deque(maxlen=LOG_LINES)
        self._load: Load | None = None
        self._facts: ModelFacts | None = None

    # --- state

    @property
    def facts(self) -> ModelFacts | None:
        """Facts of the loaded model; None while there is none."""
        return self._facts

    @property
    def alive(self) -> bool:
        """A process is there and has not been found dead."""
        return self._process is not None

    @property
    def pid(self) -> int | None:
        process = self._process
        return process.pid if process else None

    def log_tail(self) -> list[str]:
        """The last lines that the engine's C libraries printed, of the dead engine too until another one starts."""
        return list(self._log)

    # --- commands

    def start(self) -> None:
        """Starts the process now, so that its imports are done by the time of the first command. Not needed otherwise."""
        with self._lock:
            if self._process is None:
                self._start()

    def load(self, path: Path | str, options: EngineOptions | None = None) -> Iterator[LoadEvent]:
        """Loads a model in place of the present one; the last event is Ready.

        Raises:
            LocalrunError: the model can't be loaded; the process stays, without a model.
            EngineDiedError: the engine ended meanwhile.
        """
        command = Load(path=str(path), options=options or EngineOptions())
        with self._lock:
            self._load, self._facts = command, None
        return self._load_events(command)

    def reload(self) -> Iterator[LoadEvent]:
        """Starts a new process if the engine is dead and loads the last model again; GPUs of other machines that no longer
        answer are left out."""
        if self._load is None:
            raise LocalrunError("no model was loaded")
        return self._load_events(_without_lost_servers(self._load))

    def generate(self, command: Generate) -> Iterator[GenerateEvent]:
        """One answer; the last event is Finished. `command.request` is assigned here.

        Raises:
            LocalrunError: the answer failed; the engine lives on.
            EngineDiedError: the engine ended meanwhile.
        """
        if self._facts is None:
            yield from self.reload()
        yield from cast(Iterator[GenerateEvent], self._events(command))

    def stop(self) -> None:
        """Ends all long commands that are running or waiting, within one layer's time. Does nothing if there is
        none."""
        with self._lock:
            for target in self._running:
                self._send(Stop(target=target))

    def stats(self, *, expert_map: bool = False, timeout_s: float = 5.0) -> Stats:
        """The engine's counters, also in the middle of an answer.

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
            process, self._process = self._process, None
            self._load = self._facts = None
            inboxes, self._inboxes = self._inboxes, {}
            self._running.clear()
        for inbox in inboxes.values():
            inbox.put(EngineDiedError("the engine was closed"))
        if process is None:
            return
        assert process.stdin is not None
        try:
            process.stdin.write(encode(Close()))
            process.stdin.close()  # the end of the pipe alone also ends the engine
        except OSError:
            pass  # already dead
        try:
            process.wait(CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # --- inside

    def _load_events(self, command: Load) -> Iterator[LoadEvent]:
        for event in self._events(command):
            if isinstance(event, Ready):
                with self._lock:
                    self._facts = event.facts
            yield cast(LoadEvent, event)

    def _events(self, command: Command) -> Iterator[Event]:
        """Sends a long command and yields its events up to the closing one."""
        request, inbox = self._post(command, long=True)
        finished = False
        try:
            while not finished:
                event = inbox.get()
                finished = isinstance(event, (LocalrunError, *CLOSING_EVENTS))
                if isinstance(event, LocalrunError):
                    raise event
                if isinstance(event, Failed):
                    raise _as_error(event)
                yield event
        finally:
            with self._lock:
                self._inboxes.pop(request, None)
                if request in self._running:
                    self._running.remove(request)
                if not finished:
                    self._send(Stop(target=request))

    def _last(self, command: Command, kind: type[_E]) -> _E:
        *_, event = self._events(command)
        assert isinstance(event, kind)
        return event

    def _ask(self, command: Command, kind: type[_E], timeout_s: float) -> _E:
        """A short command of one event, served in the middle of a long one."""
        if self._process is None:
            raise EngineDiedError("the engine process is not running")
        request, inbox = self._post(command, long=False)
        try:
            event = inbox.get(timeout=timeout_s)
        except queue.Empty:
            raise TimeoutError(f"the engine did not answer {type(command).__name__} within {timeout_s:g} s") from None
        finally:
            with self._lock:
                self._inboxes.pop(request, None)
        if isinstance(event, LocalrunError):
            raise event
        if isinstance(event, Failed):
            raise _as_error(event)
        assert isinstance(event, kind)
        return event

    def _post(self, command: Command, *, long: bool) -> tuple[int, _Inbox]:
        inbox: _Inbox = queue.SimpleQueue()
        with self._lock:
            if self._process is None:
                self._start()
            request = next(self._requests)
            self._inboxes[request] = inbox
            if long:
                self._running.append(request)
            self._send(structs.replace(command, request=request))
        return request, inbox

    def _send(self, command: Command) -> None:
        """Writes under the lock. A broken pipe is left to the reader thread, which knows the cause of death."""
        if self._process is None or self._process.stdin is None:
            return
        try:
            self._process.stdin.write(encode(command))
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError):
            pass

    def _start(self) -> None:
        self._log = deque(maxlen=LOG_LINES)
        # -P and an explicit path: the worker is this package, and no file in the working directory shadows a module.
        path = [str(Path(localrun.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "localrun.engine.process.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # ggml's backtrace would start a debugger and can hang in it.
            env={**WORKER_ENVIRONMENT, **os.environ, "PYTHONPATH": os.pathsep.join(p for p in path if p)},
            start_new_session=True,  # Ctrl-C in the terminal is for the user interface, which then sends Stop
        )
        assert process.stdout is not None
        assert process.stderr is not None
        self._process = process
        log_reader = threading.Thread(
            target=self._read_log, args=(process.stderr, self._log), name="engine-log", daemon=True
        )
        log_reader.start()
        threading.Thread(
            target=self._read_events, args=(process, process.stdout, log_reader), name="engine-events", daemon=True
        ).start()

    def _read_log(self, stream: IO[bytes], log: deque[str]) -> None:
        for line in stream:
            log.append(line.decode("utf-8", "replace").rstrip())

    def _read_events(self, process: subprocess.Popen[bytes], stream: IO[bytes], log_reader: threading.Thread) -> None:
        """Hands events out until the process is dead, then tells everybody who waits."""
        garbage: ProtocolError | None = None
        for line in stream:
            try:
                event = decode_event(line)
            except ProtocolError as error:
                garbage = error
                process.kill()
                break
            with self._lock:
                inbox = self._inboxes.get(event.request)
            if inbox is not None:  # else: its caller has gone away
                inbox.put(event)
        code = process.wait()
        log_reader.join(timeout=1.0)
        death = _garbage_error(garbage) if garbage else _cause_of_death(code, self.log_tail())
        with self._lock:
            expected = self._process is not process  # `close` was called, and what is open now may be another process's
            inboxes: dict[int, _Inbox] = {}
            if not expected:
                self._process = self._facts = None
                inboxes, self._inboxes = self._inboxes, {}
                self._running.clear()
        for inbox in inboxes.values():
            inbox.put(death)
        if not expected and self.on_death is not None:
            self.on_death(death)


def _garbage_error(error: ProtocolError) -> EngineDiedError:
    message = f"the engine process sent something unreadable: {error}"
    return EngineDiedError(message, hint="reinstall localrun: make setup")


def _cause_of_death(code: int, log: list[str]) -> EngineDiedError:
    """What to tell the user about exit code `code` (negative: signal number)."""
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        how = f"was killed by {name}"
    else:
        how = f"ended with exit code {code}"
    hint = "the next question starts it again"
    if code == -signal.SIGKILL:
        hint = "probably out of memory: give a smaller --ram or --context"
    reasons = [line.strip() for line in log if _LAST_WORDS.search(line)]
    if code > 0:
        reasons = log[-1:]  # the last line of a traceback
    if any(word in reason for reason in reasons for word in ("shared object", "shared library")):
        hint = "run `localrun doctor`: it says what is missing"  # e.g. the driver that llama.cpp was compiled for
    last = f": {reasons[0]}" if reasons and code != -signal.SIGKILL else ""
    return EngineDiedError(f"the engine process {how}{last}", hint=hint)


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
        answers,  # numbers and libraries, which an interface without servers need not load
    )

    there = [endpoint for endpoint in servers if answers(endpoint)]
    if len(there) == len(servers):
        return command
    # The memory that was asked for is not there any more, nor is a device that was named.
    gpu = "auto" if command.options.gpu != "none" else "none"
    options = replace(command.options, rpc=",".join(there) or None, vram_bytes=None, gpu=gpu)
    return structs.replace(command, options=options)
