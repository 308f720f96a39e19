"""What people see of long work: one form of progress, and the compiler's."""

from __future__ import annotations

import errno
import io
import os
import sys
import threading
from types import ModuleType
from typing import Any

import pytest

from localrun.commands import compiling
from localrun.commands.compiling import USUAL_FUNCTIONS, Notice, compiled_here
from localrun.commands.output import Output, ProgressLine
from localrun.errors import host_error


class Terminal(io.StringIO):
    """Says that it is one; `written` is set at every write."""

    def __init__(self) -> None:
        super().__init__()
        self.written = threading.Event()

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.written.set()
        return super().write(text)


def test_progress_has_share_amount_rate_and_time_left() -> None:
    progress = ProgressLine(Output(io.StringIO(), io.StringIO()), "splitting")
    assert progress.text(2**30, 2**32, 1e9, 3.2) == "splitting  25%  1.00 GiB of 4.00 GiB  1.00 GB/s, 3.2s left"
    progress = ProgressLine(Output(io.StringIO(), io.StringIO()), in_bytes=False, unit="tokens")
    assert progress.text(5, 10, 1.0, None) == " 50%  5 of 10 tokens"
    progress = ProgressLine(Output(io.StringIO(), Terminal()), bar=True)
    assert progress.text(1, 2, 1e9, None).startswith(f"[{'#' * 15}{'.' * 15}]  50%")


def test_progress_is_a_line_now_and_then_off_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("localrun.commands.output.time.monotonic", lambda: now[0])
    err = io.StringIO()
    progress = ProgressLine(Output(io.StringIO(), err))
    for second in range(1, 32):
        now[0] = second
        progress(second << 20, 100 << 20)
    assert err.getvalue().splitlines() == [
        " 10%  10.00 MiB of 100.00 MiB  1.05 MB/s, 1m30s left",
        " 20%  20.00 MiB of 100.00 MiB  1.05 MB/s, 1m20s left",
        " 30%  30.00 MiB of 100.00 MiB  1.05 MB/s, 1m10s left",
    ]


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_compiling_is_shown_while_nothing_else_is(stream: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "_PATIENCE_S", -1.0)
    monkeypatch.setattr(compiling, "_POLL_S", 0.001)
    err, begun, polled = stream(), [5], threading.Semaphore(0)

    def count() -> int:
        polled.release()
        return begun[0]

    out = Output(io.StringIO(), err)
    with Notice(out, count):
        for _ in range(5):
            polled.acquire()
        assert err.getvalue() == "", "what was compiled before is not news"
        begun[0] = 7
        for _ in range(5):
            polled.acquire()
    with Notice(out, count):  # the next thing that compiles, of the same command
        begun[0] = 9
        for _ in range(5):
            polled.acquire()
    text = err.getvalue()
    if stream is Terminal:
        assert f"compiling for this processor, first run only: function 2 of about {USUAL_FUNCTIONS}, " in text
    else:
        assert text == "compiling for this processor, first run only: takes a minute or two\n"


def test_functions_are_counted_while_another_thread_imports_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "localrun.kernel_cache", ModuleType("localrun.kernel_cache"))
    assert compiled_here() == 0
    monkeypatch.delitem(sys.modules, "localrun.kernel_cache")
    assert compiled_here() == 0


class FullDrive(io.StringIO):
    def flush(self) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("write", [Output.json, Output.json_line, Output.line, Output.answer])
def test_an_output_that_cannot_be_written_is_named(write: Any) -> None:
    with pytest.raises(OSError, match="No space left on device: 'standard output'") as caught:
        write(Output(FullDrive(), io.StringIO()), "x")
    assert str(host_error(caught.value)) == "standard output: No space left on device"
