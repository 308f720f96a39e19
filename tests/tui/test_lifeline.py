"""A terminal that goes away, a signal, and a locked file: the program ends within seconds, whatever it is doing."""

from __future__ import annotations

import os
import pty
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

PATIENCE_S = 300.0
"""Only a failing test waits so long."""

STUCK = """
import sys, threading, time
from localrun.tui import lifeline

lifeline.GRACE_S = 0.3
ended = threading.Event()
with lifeline.Lifeline(lambda code: print("asked to end", code, flush=True), lambda: print("by force", flush=True)):
    print("ready", flush=True)
    {work}
"""


@contextmanager
def in_a_terminal(code: str, **environment: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A Python program whose input and errors are a terminal of its own, and the other end of that terminal."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=theirs,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **environment},
        start_new_session=True,
    )
    os.close(theirs)
    try:
        yield process, ours
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("work", ["threading.Event().wait()", "while True: pass"], ids=["waits", "computes"])
def test_a_program_that_is_stuck_ends_when_its_terminal_is_gone(work: str) -> None:
    """Waiting as for a queue that nobody empties any more."""
    with in_a_terminal(STUCK.format(work=work)) as (process, terminal):
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        os.close(terminal)
        assert process.stdout.read().split(b"\n")[:2] == [b"asked to end 129", b"by force"]
        assert process.wait(PATIENCE_S) == 129


def test_a_signal_ends_a_program_that_waits_for_a_lock() -> None:
    with in_a_terminal(STUCK.format(work="threading.Event().wait()")) as (process, terminal):
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read().split(b"\n")[:2] == [b"asked to end 143", b"by force"]
        assert process.wait(PATIENCE_S) == 143
        os.close(terminal)


INTERFACE = """
import sys, threading, time
from pathlib import Path
from types import SimpleNamespace
from localrun.engine.conversations import ConversationStore
from localrun.tui.app import LocalrunApp, Launch
import localrun.tui.app as app
import localrun.tui.lifeline as lifeline
from tests.tui.fake_engine import FakeEngine

closing, kept = threading.Event(), threading.Event()

class Deaf(FakeEngine):
    def close(self):
        closing.set()
        {close}

class Event(threading.Event):
    def wait(self, timeout=None):
        if timeout == lifeline.GRACE_S:  # it is enough for what has to be done, however slow this machine is
            closing.wait()
            kept.wait()
        return super().wait(timeout)

set_state = ConversationStore.set_state
def keep(store, name, value):
    set_state(store, name, value)
    if (name, value) == ("draft", "half a thought"):
        kept.set()

ConversationStore.set_state = keep
if {is_kept}:
    kept.set()
lifeline.threading = SimpleNamespace(Event=Event, Thread=threading.Thread)
lifeline.GRACE_S = {grace}
app.start_engine = Deaf
sys.exit(app.run_app(Path("/models/fake"), model_folders=[]))
"""


class Screen:
    """Reads what a terminal gets, so that the program can go on writing."""

    def __init__(self, terminal: int) -> None:
        self._terminal = terminal
        self.text = b""
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        try:
            while data := os.read(self._terminal, 1 << 16):
                self.text += data
        except OSError:
            pass

    def wait_for(self, words: bytes) -> None:
        end = time.monotonic() + PATIENCE_S
        while words not in self.text:
            assert time.monotonic() < end, self.text[-2000:]
            time.sleep(0.02)


@pytest.mark.parametrize(
    ("close", "grace"),
    [("pass", 60.0), ("time.sleep(600)", 0.3)],
    ids=["in order", "an engine that won't end"],
)
def test_the_interface_ends_with_its_terminal_and_keeps_what_stood_in_the_input(
    tmp_path: Path, close: str, grace: float
) -> None:
    folders = {f"LOCALRUN_{name}_DIR": str(tmp_path / name) for name in ("DATA", "CACHE", "CONFIG")}
    code = INTERFACE.format(close=close, grace=grace, is_kept=False)
    with in_a_terminal(code, TERM="xterm-256color", **folders) as (process, terminal):
        screen = Screen(terminal)
        screen.wait_for(b"Fake V4")
        os.write(terminal, b"half a thought")
        screen.wait_for(b"thought")
        process.send_signal(signal.SIGHUP)
        assert process.wait(PATIENCE_S) == 129
    code = INTERFACE.format(close=close, grace=grace, is_kept=True)
    with in_a_terminal(code, TERM="xterm-256color", **folders) as (process, terminal):
        Screen(terminal).wait_for(b"half a thought")
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 143


def test_a_locked_file_of_conversations_is_said_at_once_and_can_be_left(tmp_path: Path) -> None:
    (tmp_path / "DATA").mkdir()
    folders = {f"LOCALRUN_{name}_DIR": str(tmp_path / name) for name in ("DATA", "CACHE", "CONFIG")}
    other = sqlite3.connect(tmp_path / "DATA" / "conversations.sqlite3", isolation_level=None)
    other.execute("PRAGMA locking_mode = EXCLUSIVE")
    other.execute("BEGIN EXCLUSIVE")
    code = INTERFACE.format(close="pass", grace=60.0, is_kept=True)
    with in_a_terminal(code, TERM="xterm-256color", **folders) as (process, terminal):
        screen = Screen(terminal)
        screen.wait_for(b"in use by another program")
        os.write(terminal, b"\x11")
        assert process.wait(PATIENCE_S) == 0
        os.close(terminal)
    other.close()
