"""Runs `localrun convert --json` as a subprocess: started and stopped by the interface, followed line by line.

A stopped conversion resumes when it is started again, which the converter guarantees. It ends with the interface, which reads
its pipe.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import localrun

GO_ON = "start it again to resume"


@dataclass(frozen=True, slots=True)
class ConversionNews:
    """The state of a conversion.

    Attributes:
        note: text for the log; empty: none.
        step: what is being done.
        done, total: bytes or another unit; total 0: not known yet.
        is_bytes: whether they are bytes.
        ended: it is over; `error` and `hint` say why if it failed.
    """

    note: str = ""
    step: str = ""
    done: int = 0
    total: int = 0
    is_bytes: bool = True
    bytes_per_s: float = 0.0
    remaining_s: float | None = None
    ended: bool = False
    error: str = ""
    hint: str | None = None


@contextlib.contextmanager
def _children_can_be_interrupted() -> Iterator[None]:
    """Processes started meanwhile notice SIGINT even if this one ignores it, as a shell's background jobs do.

    What is ignored stays so in children, what is handled does not (execve(2)). Only on the
    main thread: others may not set handlers.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        yield
        return
    signal.signal(signal.SIGINT, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


class ConverterProcess:
    """A running conversion. `on_news` is called from a reader thread, last with `ended`.

    Args:
        options: of `localrun convert`, without source and target.
    """

    def __init__(self, source: Path, target: Path, options: Sequence[str], on_news: Callable[[ConversionNews], Any]):
        self.source, self.target = source, target
        self.last = ConversionNews()
        self._on_news = on_news
        self._stopped = False
        self._complaints: deque[str] = deque(maxlen=20)
        path = [str(Path(localrun.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
        command = [sys.executable, "-P", "-m", "localrun", "convert", "--json", *options]
        with _children_can_be_interrupted():
            self._process = subprocess.Popen(
                [*command, "--", str(source), str(target)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in path if p), "PYTHONIOENCODING": "utf-8"},
                start_new_session=True,  # Ctrl-C in the terminal is the interface's
            )
        assert self._process.stderr is not None
        self._log_reader = threading.Thread(
            target=self._read_complaints, args=(self._process.stderr,), name="tui-conversion-log", daemon=True
        )
        self._log_reader.start()
        threading.Thread(target=self._read, name="tui-conversion", daemon=True).start()

    @property
    def running(self) -> bool:
        return not self.last.ended

    @property
    def pid(self) -> int:
        return self._process.pid

    def stop(self) -> None:
        """Interrupts it like Ctrl-C, once, so that it can finish its output."""
        if self._stopped:
            return
        self._stopped = True
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGINT)

    def wait(self, timeout_s: float) -> None:
        """Waits for the end; kills it after `timeout_s`. It can be gone on with either way."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def _read_complaints(self, stream: IO[bytes]) -> None:
        for line in stream:
            self._complaints.append(line.decode("utf-8", "replace").strip())

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with contextlib.suppress(ValueError, KeyError, TypeError):  # something else printed
                self._tell(news_of(json.loads(line), self.last))
        code = self._process.wait()
        self._log_reader.join(1.0)
        if not self.last.ended and self._stopped:  # before it could say so itself
            self._tell(ConversionNews(ended=True, error="stopped", hint=GO_ON))
        elif not self.last.ended:
            reason = next((line for line in reversed(self._complaints) if line), f"exit code {code}")
            self._tell(ConversionNews(ended=True, error=f"the conversion ended: {reason}", hint=GO_ON))

    def _tell(self, news: ConversionNews) -> None:
        self.last = news
        self._on_news(news)


def news_of(event: Mapping[str, Any], last: ConversionNews) -> ConversionNews:
    """Updates the state with an event of `localrun convert --json`.

    Raises:
        KeyError, TypeError, ValueError: not such an event.
    """
    kind = event["event"]
    last = replace(last, note="")
    if kind == "note":
        return replace(last, note=str(event["text"]))
    if kind == "step":
        done, total = int(event["done"]), int(event["total"])
        return replace(
            last, step=str(event["step"]), done=done, total=total, is_bytes=False, bytes_per_s=0.0, remaining_s=None
        )
    if kind == "progress":
        return replace(
            last,
            step=str(event["step"]),
            done=int(event["done_bytes"]),
            total=int(event["total_bytes"]),
            is_bytes=True,
            bytes_per_s=float(event["bytes_per_s"]),
            remaining_s=event["remaining_s"],
        )
    if kind == "finished":
        return replace(last, ended=True)
    if kind == "failed":
        return replace(last, ended=True, error=str(event["message"]), hint=event["hint"])
    if kind == "interrupted":
        return replace(last, ended=True, error="stopped", hint=GO_ON)
    return last
