"""A conversion in a process of its own: started and stopped by the interface, described by lines of JSON.

As a program (`python -m localrun.tui.conversion SRC DST ...`) it converts and prints; as a module it starts that program. A
conversion that is stopped goes on from there when it is started again: that is the converter's own promise.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import localrun
from localrun.errors import LocalrunError


@dataclass(frozen=True, slots=True)
class ConversionNews:
    """One line of a conversion.

    Attributes:
        note: text for the log; empty: none.
        done, total: bytes; total 0: not known yet.
        ended: it is over; `error` and `hint` say why if it failed.
    """

    note: str = ""
    done: int = 0
    total: int = 0
    bytes_per_s: float = 0.0
    remaining_s: float | None = None
    ended: bool = False
    error: str = ""
    hint: str | None = None


class Conversion:
    """A running conversion. `on_news` is called from a reader thread, last with `ended`."""

    def __init__(self, source: Path, target: Path, options: Sequence[str], on_news: Callable[[ConversionNews], Any]):
        self.source, self.target = source, target
        self.last = ConversionNews()
        self._on_news = on_news
        path = [str(Path(localrun.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "localrun.tui.conversion", *options, "--", str(source), str(target)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in path if p)},
            start_new_session=True,
        )
        threading.Thread(target=self._read, name="tui-conversion", daemon=True).start()

    @property
    def running(self) -> bool:
        return not self.last.ended

    def stop(self) -> None:
        """Interrupts it, as Ctrl-C would."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGINT)

    def wait(self, timeout_s: float) -> None:
        """Waits for the end; kills it after `timeout_s`. It can be gone on with either way."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def _read(self) -> None:
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        for line in self._process.stdout:
            with contextlib.suppress(ValueError, TypeError):  # something else printed
                self._tell(ConversionNews(**json.loads(line)))
        complaints = self._process.stderr.read().decode("utf-8", "replace").strip()
        code = self._process.wait()
        if not self.last.ended:
            reason = complaints.splitlines()[-1] if complaints else f"exit code {code}"
            self._tell(
                ConversionNews(ended=True, error=f"the conversion ended: {reason}", hint="start it again: it goes on")
            )

    def _tell(self, news: ConversionNews) -> None:
        self.last = news
        self._on_news(news)


# --- the program ----------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(prog="localrun.tui.conversion")
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--base")
    parser.add_argument("--dense")
    args = parser.parse_args()
    try:
        _convert(args)
    except KeyboardInterrupt:
        _say(ended=True, error="stopped", hint="start it again: it goes on from here")
        return 130
    except LocalrunError as error:
        _say(ended=True, error=str(error), hint=error.hint)
        return 1
    return 0


def _convert(args: argparse.Namespace) -> None:
    from localrun.commands.convert import describe
    from localrun.quant.checkpoint.mapping import BASE_TYPES, DENSE_TYPES, PlanOptions, make_plan
    from localrun.quant.convert.converter import Progress, check_space, check_target, open_checkpoint, write_plan

    check_target(args.source, args.target)
    _say(note=f"checking {args.source}")
    options = PlanOptions(DENSE_TYPES[args.dense or "q8_0"], BASE_TYPES[args.base] if args.base else None)
    plan = make_plan(open_checkpoint(args.source), options)
    for line in (*(f"warning: {warning}" for warning in plan.warnings), *describe(plan)):
        _say(note=line)
    check_space(plan, args.target)

    def progress(now: Progress) -> None:
        _say(done=now.done_bytes, total=now.total_bytes, bytes_per_s=now.bytes_per_s, remaining_s=now.remaining_s)

    result = write_plan(plan, args.target, progress=progress)
    _say(note=f"wrote {result.path}", done=result.file_bytes, total=result.file_bytes, ended=True)


def _say(**news: Any) -> None:
    print(json.dumps(news), flush=True)


if __name__ == "__main__":
    sys.exit(main())
