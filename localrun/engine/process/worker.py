"""The engine process: reads commands from its standard input, sends events to its standard output (`protocol.py`).

Output of C code goes to standard error, which the parent keeps as a log. When the parent is gone, this process exits within
`ORPHAN_S`, whatever it is doing.

Started by `connection.Connection` as `python -m localrun.engine.process.worker PARENT_PID`.
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
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from localrun.engine.process.outbox import Outbox
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
from localrun.engine.process.wire import ProtocolError, decode_command, encode
from localrun.errors import LocalrunError, StoppedError, host_error

if TYPE_CHECKING:
    from localrun.engine.process.host import Host

log = logging.getLogger(__name__)

LAST_WORDS_S = 20.0
"""What closing may take before the process ends without it, when the parent asked for it and waits."""

ORPHAN_S = 8.0
"""The same when the parent is gone, to release a whole model's memory."""

ORPHAN_EMPTY_S = 2.0
"""The same without a loaded model, when there is nothing to save."""

PARENT_POLL_S = 0.5
"""Polling interval for the parent. The end of the command pipe usually comes sooner, but a process forked by the parent may
keep it open."""

TRACE_CHARACTERS = 20_000
"""Maximum length kept of a traceback's end: messages may quote their input, and each cause repeats it."""

FIRST_TO_GO = 1000
"""`oom_score_adj` (proc(5)) at which the kernel ends this process before all others when memory runs out: it holds nothing that
would be lost, while the interface and other programs do."""

_Send = Callable[[Event], None]


class Worker:
    """The engine and its session, behind two pipes.

    Threads:
        main (`run`) owns the host: loads models, computes, frees them.
        control (`read_commands`) reads every command immediately: it never waits for a computation or another pipe. counting
        (`count_all`) tokenizes, which may take seconds for a large text. parent (`watch_parent`) notices that the parent has
        gone. events (in `Outbox`) writes.

    Lock: `_lock` guards the attributes below it. Held briefly; only the locks of `Host.stop` are taken inside it.

    Args:
        commands: read by the control thread only.
        events: file descriptor of the event pipe, owned from now on.
        parent: process id of the parent.
    """

    def __init__(self, commands: IO[bytes], events: int, parent: int) -> None:
        self._commands, self._parent = commands, parent
        self._outbox = Outbox(events, name="events", on_broken=self._orphaned)
        self._queue: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._counts: queue.SimpleQueue[CountTokens] = queue.SimpleQueue()
        self._exit_code = 0
        self._lock = threading.Lock()
        self._running = 0  # request of the command that runs, 0: none
        self._waiting: set[int] = set()
        self._stopped: set[int] = set()
        self._host: Host | None = None  # once its imports are done
        self._deadline: float | None = None  # time.monotonic() at which the process ends in any case

    def send(self, event: Event) -> None:
        """On the main thread; waits while the parent does not read earlier events."""
        line = encode(event)
        self._outbox.wait_for_room()
        self._outbox.put(line)

    def _reply(self, event: Event) -> None:
        """On the other threads; never waits. Who asks and asks and never reads gets no answers."""
        line = encode(event)
        if self._outbox.has_room():
            self._outbox.put(line)
        else:
            log.warning("%s not sent: the parent is not reading", type(event).__name__)

    # --- control thread

    def read_commands(self) -> None:
        """Serves commands until the pipe ends; then the main thread closes the model and ends the process."""
        try:
            for line in self._commands:
                self._take(decode_command(line))
        except ProtocolError:
            log.exception("the command pipe can't be read")
            self._exit_code = 1
        with self._lock:
            asked = self._deadline is not None
        if not asked:
            self._orphaned()

    def _take(self, command: Command) -> None:
        if isinstance(command, Stop):
            self._stop(command.target)
        elif isinstance(command, GetStats):
            self._guarded(command, self._send_stats, self._reply)
        elif isinstance(command, CountTokens):
            self._counts.put(command)
        else:
            with self._lock:
                self._waiting.add(command.request)
            self._queue.put(command)
            if isinstance(command, Close):
                self._end_within(LAST_WORDS_S)
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
            self._reply(Stats(request=command.request, busy=busy, context_used=0, n_ctx=0, rss_bytes=0, telemetry={}))
        else:
            self._reply(host.stats(command, busy))

    # --- counting thread

    def count_all(self) -> None:
        """Answers CountTokens, one after another."""
        while True:
            self._guarded(command := self._counts.get(), self._count, self._reply)
            del command  # may be large

    def _count(self, command: CountTokens) -> None:
        host = self._host
        if host is None:
            raise LocalrunError("no model is loaded")
        ids = host.count_tokens(command)
        self._reply(TokenCount(request=command.request, n_tokens=len(ids), ids=tuple(ids) if command.ids else ()))

    # --- ending

    def watch_parent(self) -> None:
        """Waits until the parent is gone; runs on its own thread."""
        while os.getppid() == self._parent:
            time.sleep(PARENT_POLL_S)
        self._orphaned()

    def _orphaned(self) -> None:
        """The parent is gone. Saves the routing profile and the conversation's state in a short time. Any thread; may be called
        repeatedly."""
        host = self._host
        self._end_within(ORPHAN_S if host is not None and host.has_model else ORPHAN_EMPTY_S)
        self._queue.put(Close())
        self._stop_all()
        self._outbox.close()  # the main thread must not wait for room

    def _end_within(self, seconds: float) -> None:
        """Sets a deadline for exiting in any case; an earlier one stays."""
        with self._lock:
            now = time.monotonic()
            self._deadline = min(self._deadline or now + seconds, now + seconds)
            # Needs neither this thread nor the interpreter lock, and logs all stacks.
            faulthandler.dump_traceback_later(max(0.01, self._deadline - now), exit=True)

    # --- main thread

    def run(self) -> int:
        """Runs long commands one after another until Close; returns the exit code."""
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
                break
            self._guarded(command, handlers[type(command)], self.send)
            with self._lock:
                self._running = 0
            del command  # a long conversation need not stay until the next one comes
        try:
            host.close()
        except Exception:
            log.exception("closing failed")
        self._outbox.put(encode(Closed(request=command.request)))
        self._outbox.close(timeout_s=1.0)
        return self._exit_code

    def _guarded(self, command: Command, handler: Callable[[Any], None], send: _Send) -> None:
        """Runs a handler; whatever it raises becomes a Failed event."""
        try:
            handler(command)
        except Exception as caught:
            error = host_error(caught) or caught
            if not isinstance(error, LocalrunError):
                log.exception("%s failed", type(command).__name__)
            message = str(error) or type(error).__name__
            hint = error.hint if isinstance(error, LocalrunError) else "this is a bug in localrun; --debug shows where"
            trace = "" if isinstance(error, StoppedError) else traceback.format_exc()[-TRACE_CHARACTERS:]
            send(Failed(request=command.request, kind=type(error).__name__, message=message, hint=hint, trace=trace))


def take_over_pipes() -> tuple[IO[bytes], int]:
    """Keeps the pipes for the protocol; standard input becomes empty, standard output joins standard error."""
    commands = os.fdopen(os.dup(0), "rb")
    events = os.dup(1)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    return commands, events


def offer_memory() -> None:
    """Lets the kernel end this process first; where it does not know that, nothing happens."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(FIRST_TO_GO))


def main() -> None:
    commands, events = take_over_pipes()
    offer_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the user interface decides what Ctrl-C means
    faulthandler.enable()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    code = 1
    try:
        worker = Worker(commands, events, int(sys.argv[1]))
        for name, target in (
            ("control", worker.read_commands),
            ("counting", worker.count_all),
            ("parent", worker.watch_parent),
        ):
            threading.Thread(target=target, name=name, daemon=True).start()
        code = worker.run()
    except BaseException:
        traceback.print_exc()
    finally:
        # Skips the destructors of C libraries, which run in no defined order after a model was freed.
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
