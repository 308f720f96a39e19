"""The engine process: reads commands from its standard input, sends events to its standard output (`protocol.py`).

The main thread loads models and computes; a control thread reads commands and serves the short ones at once. Whatever C code
prints goes to standard error, which the parent keeps as a log. When the command pipe ends, so does the process.

Started by `process.EngineProcess` as `python -m localrun.engine.process.worker`.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import IO, Any

from localrun.engine.process.protocol import (
    Close,
    Closed,
    Command,
    CountTokens,
    EvalLogits,
    EvalText,
    Event,
    Failed,
    Generate,
    GetStats,
    Load,
    Restore,
    Snapshot,
    Stats,
    Stop,
    TokenCount,
)
from localrun.engine.process.wire import decode_command, encode
from localrun.errors import LocalrunError, StoppedError

log = logging.getLogger(__name__)

LAST_WORDS_S = 20.0
"""What closing may take before the process ends without it."""


class Worker:
    """The engine and its session behind the two pipes.

    Threads: `run` on the main thread owns `_host`; `read_commands` on the control thread only stops it and reads its counters.
    """

    def __init__(self, commands: IO[bytes], events: IO[bytes]) -> None:
        self._commands, self._events = commands, events
        self._send_lock = threading.Lock()
        self._queue: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._lock = threading.Lock()  # guards the next three
        self._running = 0  # request of the command that runs, 0: none
        self._waiting: set[int] = set()
        self._stopped: set[int] = set()
        self._host: Any = None  # localrun.engine.process.host.Host, once its imports are done

    def send(self, event: Event) -> None:
        """Any thread."""
        line = encode(event)
        with self._send_lock:
            self._events.write(line)
            self._events.flush()

    # --- control thread

    def read_commands(self) -> None:
        """Serves commands until the pipe ends; then the main thread closes the model and ends the process."""
        try:
            self._read_commands()
        except Exception:
            log.exception("the command pipe can't be read")
        # Whoever asked may be gone. What is worth saving (the routing profile, a conversation's state) is saved all the same.
        self._queue.put(Close())
        self._stop_all()
        time.sleep(LAST_WORDS_S)
        os._exit(0)

    def _read_commands(self) -> None:
        for line in self._commands:
            command = decode_command(line)
            if isinstance(command, Stop):
                self._stop(command.target)
            elif isinstance(command, GetStats):
                self._guarded(command, self._send_stats)
            elif isinstance(command, CountTokens):
                self._guarded(command, self._count_tokens)
            else:
                with self._lock:
                    self._waiting.add(command.request)
                self._queue.put(command)
                if isinstance(command, Close):
                    self._stop_all()

    def _stop(self, target: int) -> None:
        with self._lock:
            if target in self._waiting:
                self._stopped.add(target)
            elif target == self._running and self._host is not None:
                self._host.stop()

    def _stop_all(self) -> None:
        with self._lock:
            self._stopped |= {request for request in self._waiting if request}
            if self._running and self._host is not None:
                self._host.stop()

    def _send_stats(self, command: GetStats) -> None:
        with self._lock:
            busy, host = self._running != 0, self._host
        if host is None:
            self.send(Stats(request=command.request, busy=busy, context_used=0, n_ctx=0, rss_bytes=0, telemetry={}))
        else:
            self.send(host.stats(command, busy))

    def _count_tokens(self, command: CountTokens) -> None:
        if self._host is None:
            raise LocalrunError("no model is loaded")
        self.send(TokenCount(request=command.request, n_tokens=self._host.count_tokens(command)))

    # --- main thread

    def run(self) -> None:
        """Runs long commands one after another until Close."""
        from localrun.engine.process.host import Host

        host = Host(self.send)
        with self._lock:
            self._host = host
        handlers: dict[type[Command], Callable[[Any], None]] = {
            Load: host.load,
            Generate: host.generate,
            Snapshot: host.snapshot,
            Restore: host.restore,
            EvalLogits: host.eval_logits,
            EvalText: host.eval_text,
        }
        while True:
            command = self._queue.get()
            with self._lock:
                self._waiting.discard(command.request)
                stopped = command.request in self._stopped
                self._stopped.discard(command.request)
                self._running = command.request
                host.clear_stop()
                if stopped:
                    host.stop()
            if isinstance(command, Close):
                host.close()
                self.send(Closed(request=command.request))
                return
            self._guarded(command, handlers[type(command)])
            with self._lock:
                self._running = 0

    def _guarded(self, command: Command, handler: Callable[[Any], None]) -> None:
        """Runs a handler; whatever it raises becomes a Failed event."""
        try:
            handler(command)
        except Exception as error:
            if not isinstance(error, LocalrunError):
                log.exception("%s failed", type(command).__name__)
            message = str(error) or type(error).__name__
            hint = error.hint if isinstance(error, LocalrunError) else "this is a bug in localrun; --debug shows where"
            trace = "" if isinstance(error, StoppedError) else traceback.format_exc()
            self.send(
                Failed(request=command.request, kind=type(error).__name__, message=message, hint=hint, trace=trace)
            )


def take_over_pipes() -> tuple[IO[bytes], IO[bytes]]:
    """Keeps the pipes for the protocol; standard input becomes empty, standard output joins standard error."""
    commands = os.fdopen(os.dup(0), "rb")
    events = os.fdopen(os.dup(1), "wb")
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    return commands, events


def main() -> None:
    commands, events = take_over_pipes()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the user interface decides what Ctrl-C means
    faulthandler.enable()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    worker = Worker(commands, events)
    threading.Thread(target=worker.read_commands, name="control", daemon=True).start()
    with contextlib.suppress(BrokenPipeError):  # the parent is gone
        worker.run()
    # Skips the destructors of C libraries, which run in no defined order after a model was freed.
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
