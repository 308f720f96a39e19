"""The parent's connection to one engine process: the child, its pipes, pending requests, and the cause of death.

Knows requests and events, but not their meaning. The connection of a dead process is not reused; `process.EngineProcess` makes
a new one.
"""

from __future__ import annotations

import io
import itertools
import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import IO

from msgspec import structs

import localrun
from localrun.engine.facts import ModelFacts
from localrun.engine.process.outbox import Outbox
from localrun.engine.process.protocol import Close, Command, Event, Load, Ready, Stop
from localrun.engine.process.wire import ProtocolError, decode_event, encode
from localrun.errors import EngineDiedError, LocalrunError

LOG_LINES = 200
"""Lines of the C library's output that are kept to explain a crash."""

_LOG_LINE_BYTES = 4096  # per line; longer ones are split

CLOSE_TIMEOUT_S = 25.0
"""Longer than the engine allows itself for saving state (`worker.LAST_WORDS_S`)."""

KILL_TIMEOUT_S = 5.0
"""What a killed process may take to disappear; one that a dead drive or driver keeps is left behind."""

WORKER_ENVIRONMENT = {"GGML_NO_BACKTRACE": "1", "OMP_WAIT_POLICY": "passive", "LOCALRUN_TELL_COMPILED": "1"}
"""Defaults, unless the user sets them. Threads that spin between parallel regions starve all others on a busy machine: four
tokens of a tiny model took 0.6 s with waiting threads and 34 s with spinning ones (two cores, load 18)."""

# How an abort begins: ggml_abort's `file.cpp:12: GGML_ASSERT(...) failed`, or an uncaught C++ exception.
_LAST_WORDS = re.compile(r"\.(?:c|cc|cpp|cu|h|m):\d+: |^\s*what\(\): ")

Inbox = queue.SimpleQueue[Event | LocalrunError]
"""Events of one request, or the reason why there are no more. Holds at most one answer, however slowly it is read, so others
don't wait."""

_requests = itertools.count(1)  # unique across connections


class Connection:
    """A running engine process. Methods may be called from any thread; only `close` blocks.

    Owns the child, its pipes, and three threads: one writes commands (`Outbox`), one dispatches events, one keeps the log.

    Lock: `_lock` guards the attributes below it. Held briefly, never during pipe I/O or callbacks; only the outbox's lock is
    taken inside it.

    Attributes:
        facts: of the loaded model; None if there is none.
        log: the last lines that the engine's C libraries printed.

    Args:
        on_death: called once, from the event thread, when the process ends without `close`.
    """

    def __init__(self, on_death: Callable[[Connection, EngineDiedError], None]) -> None:
        self._on_death = on_death
        self.log: deque[str] = deque(maxlen=LOG_LINES)
        self.facts: ModelFacts | None = None
        self._lock = threading.Lock()
        self._inboxes: dict[int, Inbox] = {}
        self._running: set[int] = set()  # long commands
        self._stopped: set[int] = set()  # those of them that a Stop was sent for
        self._loads: set[int] = set()  # those of them that are loads
        self._ended: EngineDiedError | None = None
        self._n_kills = out_of_memory_kills()
        try:
            self._process = _start()
        except OSError as error:
            hint = "too little memory, or `ulimit -u` allows no more processes"
            raise EngineDiedError(f"the engine process can't be started: {error.strerror}", hint=hint) from error
        try:
            self._start_threads(self._process)
        except RuntimeError as error:
            hint = "too little memory, or `ulimit -u` allows no more threads"
            raise EngineDiedError(f"the engine process can't be started: {error}", hint=hint) from error

    def _start_threads(self, process: subprocess.Popen[bytes]) -> None:
        """Leaves no process behind, and no pipe open, where the system has no thread to give."""
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        self._log_reader = threading.Thread(
            target=self._read_log, args=(process.stderr,), name="engine-log", daemon=True
        )
        events = threading.Thread(target=self._read_events, args=(process.stdout,), name="engine-events", daemon=True)
        try:
            self._outbox = Outbox(os.dup(process.stdin.fileno()), name="engine-commands")
            try:
                self._log_reader.start()
                events.start()
            except BaseException:
                self._outbox.close()
                raise
        except BaseException:
            self._kill()
            if self._log_reader.is_alive():
                self._log_reader.join(KILL_TIMEOUT_S)
            for pipe in (process.stdin, process.stdout, process.stderr):
                pipe.close()
            raise
        process.stdin.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        """The process has not been found dead, nor closed."""
        return self._ended is None

    @property
    def loading(self) -> bool:
        """A model is being loaded, or will be."""
        return bool(self._loads)

    # --- commands

    def post(self, command: Command, *, long: bool) -> tuple[int, Inbox]:
        """Sends a command with a unique number; its events go to the inbox until `forget`.

        Raises:
            EngineDiedError: the process has ended.
            TypeError: the command holds something that can't be sent.
        """
        request, inbox = next(_requests), Inbox()
        line = encode(structs.replace(command, request=request))
        if self._process.poll() is None:
            self._n_kills = out_of_memory_kills()  # earlier ones were other programs'
        with self._lock:
            if self._ended is not None:
                raise _again(self._ended)
            if isinstance(command, Load):
                self.facts = None
                self._loads.add(request)
            self._inboxes[request] = inbox
            if long:
                self._running.add(request)
            # A command whose caller has gone before its turn came need not be sent.
            self._outbox.put(line, lambda: request in self._inboxes)
        return request, inbox

    def forget(self, request: int, *, stop: bool) -> None:
        """Drops this request; `stop`: also stop it if it is still running."""
        with self._lock:
            if stop and request in self._running:
                self._stop(request)
            self._inboxes.pop(request, None)
            self._running.discard(request)
            self._stopped.discard(request)
            self._loads.discard(request)

    def stop(self) -> None:
        """Ends all long commands that are running or waiting."""
        with self._lock:
            for request in self._running:
                self._stop(request)

    def _stop(self, request: int) -> None:
        if request not in self._stopped:
            self._stopped.add(request)
            self._outbox.put(encode(Stop(target=request)))

    # --- ending

    def close(self) -> None:
        """Ends the process, gracefully at first; returns within `CLOSE_TIMEOUT_S` plus `KILL_TIMEOUT_S`. Waiters are notified
        immediately."""
        self._end(EngineDiedError("the engine was closed"))
        self._outbox.put(encode(Close()))
        self._outbox.close()  # the end of the pipe alone also ends the engine
        try:
            self._process.wait(CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._kill()

    def _kill(self) -> int | None:
        self._process.kill()
        try:
            return self._process.wait(KILL_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return None

    def _end(self, cause: EngineDiedError) -> bool:
        """Notifies all waiters; False if that had already happened."""
        with self._lock:
            if self._ended is not None:
                return False
            self._ended, self.facts = cause, None
            inboxes, self._inboxes = self._inboxes, {}
            self._running.clear()
            self._loads.clear()
        for inbox in inboxes.values():
            inbox.put(_again(cause))
        return True

    # --- threads

    def _read_log(self, stream: IO[bytes]) -> None:
        with io.BufferedReader(stream) as lines:  # type: ignore[type-var]
            while line := lines.readline(_LOG_LINE_BYTES):
                self.log.append(line.decode("utf-8", "replace").rstrip())

    def _read_events(self, stream: IO[bytes]) -> None:
        """Dispatches events until the process is dead, then notifies all waiters."""
        death: EngineDiedError | None = None
        try:
            with io.BufferedReader(stream, 1 << 16) as lines:  # type: ignore[type-var]
                for line in lines:
                    self._hand_out(decode_event(line))
        except ProtocolError as error:
            death = _garbage_error(error)
        except Exception as error:  # on any error: waiters must not wait forever
            death = EngineDiedError(f"can't read the engine's events: {error!r}")
        try:
            # A process that has closed its pipe is ending.
            code = self._process.wait(KILL_TIMEOUT_S) if death is None else self._kill()
        except subprocess.TimeoutExpired:
            code = self._kill()
        self._log_reader.join(timeout=1.0)
        self._outbox.close()
        if death is None:
            short = out_of_memory_kills() > self._n_kills
            death = _cause_of_death(
                code if code is not None else -signal.SIGKILL, list(self.log), short_of_memory=short
            )
        if self._end(death):
            self._on_death(self, death)

    def _hand_out(self, event: Event) -> None:
        with self._lock:
            inbox = self._inboxes.get(event.request)
            if isinstance(event, Ready) and self._ended is None:
                self.facts = event.facts
        if inbox is not None:  # else: its caller has gone away
            inbox.put(event)


def _again(error: EngineDiedError) -> EngineDiedError:
    """The same for another thread: one exception raised in two would collect both threads' tracebacks."""
    return EngineDiedError(str(error), hint=error.hint)


def _start() -> subprocess.Popen[bytes]:
    # -P and an explicit path: the worker is this package, and no file in the working directory shadows a module.
    path = [str(Path(localrun.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "localrun.engine.process.worker", str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
        # ggml's backtrace would start a debugger and can hang in it.
        env={**WORKER_ENVIRONMENT, **os.environ, "PYTHONPATH": os.pathsep.join(p for p in path if p)},
        start_new_session=True,  # Ctrl-C in the terminal is for the user interface, which then sends Stop
    )


def _garbage_error(error: ProtocolError) -> EngineDiedError:
    message = f"the engine process sent something unreadable: {error}"
    return EngineDiedError(message, hint="reinstall localrun: make setup")


def out_of_memory_kills(vmstat: Path = Path("/proc/vmstat")) -> int:
    """Processes that the kernel has ended for want of memory since it was started; 0 where it does not say."""
    try:
        return int(dict(line.split() for line in vmstat.read_text().splitlines()).get("oom_kill", 0))
    except (OSError, ValueError):
        return 0


def _cause_of_death(code: int, log: list[str], *, short_of_memory: bool = False) -> EngineDiedError:
    """What to tell the user about exit code `code` (negative: signal number).

    Args:
        short_of_memory: the kernel has ended processes for want of memory since the last command.
    """
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        how = f"was killed by {name}"
    else:
        how = f"ended with exit code {code}"
    hint = "the next question restarts it"
    if code == -signal.SIGKILL:
        hint = "probably out of memory: lower --ram or --context"
        if short_of_memory:
            how = "was ended by the system, which had run out of memory (SIGKILL)"
            hint = "close other programs, or lower --ram or --context; the next question restarts it"
    reasons = [line.strip() for line in log if _LAST_WORDS.search(line)]
    if code > 0:
        reasons = log[-1:]  # the last line of a traceback
    if any(word in reason for reason in reasons for word in ("shared object", "shared library")):
        hint = "run `localrun doctor` to see what is missing"  # e.g. the driver that llama.cpp was compiled for
    if any("can't start new thread" in reason for reason in reasons):
        hint = "too little memory, or `ulimit -u` allows no more threads"
    last = f": {reasons[0]}" if reasons and code != -signal.SIGKILL else ""
    return EngineDiedError(f"the engine process {how}{last}", hint=hint)
