"""No command opens a network socket: each runs under a guard that kills whatever process tries."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from localrun.demo import checkpoint_dir
from tests.engine.models import write_chat_model
from tests.network_guard import KILLED, available, guarded

pytestmark = pytest.mark.skipif(not available(), reason="the guard needs Linux on x86-64 or ARM64")

PATIENCE_S = 300.0
"""Far more than anything here takes; only a hang reaches it."""

LOAD = ["--threads", "1", "--context", "256", "--ram", "64MiB"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_chat_model(tmp_path_factory.mktemp("model") / "chat.gguf"))


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        guarded([sys.executable, *command]),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )


@pytest.mark.parametrize(
    "code",
    [
        "import socket; socket.socket(socket.AF_INET)",
        "import socket; socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)",
        "import ctypes; ctypes.CDLL(None).socket(2, 1, 0)",
        "import subprocess, sys; r = subprocess.run([sys.executable, '-c', 'import socket; socket.socket()']);"
        "import os, signal; signal.signal(signal.SIGSYS, signal.SIG_DFL); os.kill(os.getpid(), -r.returncode)",
    ],
)
def test_the_guard_kills_whoever_opens_a_network_socket(code: str) -> None:
    assert run("-c", code).returncode == KILLED


def test_the_guard_allows_what_stays_on_this_machine() -> None:
    assert (
        run("-c", "import asyncio, socket; socket.socket(socket.AF_UNIX); asyncio.run(asyncio.sleep(0))").returncode
        == 0
    )


@pytest.mark.parametrize("command", ["run", "chat", "bench", "eval", "verify", "doctor", "convert"])
@pytest.mark.engine_process
def test_no_command_opens_a_network_socket(command: str, model: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("he he he " * 8)
    arguments = {
        "run": [model, "-p", "hello", "--max-tokens", "2", *LOAD],
        "chat": [model, "--max-tokens", "2", *LOAD],
        "bench": [model, "--prompt-tokens", "8", "--new-tokens", "2", "--warm-up", "0", *LOAD],
        "eval": [model, "--text", str(tmp_path / "text.txt"), *LOAD],
        "verify": [model],
        "doctor": [],
        "convert": [str(checkpoint_dir()), str(tmp_path / "out"), "--dry-run"],
    }[command]
    done = run("-m", "localrun.cli", command, *arguments)
    assert done.returncode == 0, done.stderr
    # A child that was killed would be named like this, by doctor as a warning only.
    assert f"exit code {KILLED}" not in done.stdout + done.stderr
    assert "SIGSYS" not in done.stdout + done.stderr


@pytest.mark.engine_process
def test_the_terminal_ui_opens_no_network_socket(model: str) -> None:
    """Opened in a terminal of 80x24; Ctrl-Q when the model is loaded."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(TERM="xterm-256color", COLUMNS="80", LINES="24")
        os.execv(sys.executable, guarded([sys.executable, "-m", "localrun.cli", "chat", model, *LOAD]))
    output, has_quit, deadline = b"", False, time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.1)[0]:
            try:
                output += os.read(terminal, 65536)
            except OSError:  # the other side has gone
                break
        if not has_quit and b"/256" in re.sub(
            rb"\x1b\[[0-9;]*m", b"", output
        ):  # the context, known once the model is loaded
            os.write(terminal, b"\x11")
            has_quit = True
    else:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, json.dumps(output[-2000:].decode(errors="replace"))
    assert b"SIGSYS" not in output
