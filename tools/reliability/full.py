"""Writers on drives that are full, become full meanwhile, or may not be written to.

    python -m tools.reliability full --cases 400 --seed 1 [--jobs convert,repair,state,conversation,answer,split,calibrate,export]

The jobs are those of `kills`, those of `outputs`, and `answer`: `localrun run` with the demo model, whose converted copy, cache and
settings lie there.
Each has a small file system in memory (root only), which for one run is `full`, has a random `little` room, is filled up at a
random moment (`filled`), or is `read-only`. A run may end well, or with an error of localrun's that names what could not be
written. Afterwards nothing that was there may be lost, nothing unfinished may look finished, and with room again the next run must
end well.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from localrun.engine import snapshots
from localrun.errors import LocalrunError, UsageError
from tools.reliability import kills, outputs
from tools.reliability.tally import Tally

ROOM = 256 << 20
WAYS = ("full", "little", "filled", "read-only")
_UNEXPECTED = b"unexpected: "


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cases", type=int, default=400)
    parser.add_argument("--jobs", default="", metavar="A,B", help="default: all")


def run(args: argparse.Namespace, tally: Tally) -> None:
    """Raises UsageError: unknown jobs; LocalrunError: this user can't mount anything."""
    names = tuple(args.jobs.split(",")) if args.jobs else tuple(JOBS)
    if unknown := set(names) - set(JOBS):
        raise UsageError(f"no such job: {', '.join(sorted(unknown))}", hint=f"one of {', '.join(JOBS)}")
    snapshots.MIN_FREE_BYTES = 0  # else no state would be written to so small a place
    with kills.own_folders() as folder, contextlib.ExitStack() as mounts:
        benches = {name: Bench(name, mounts.enter_context(_mounted(folder / name)), tally) for name in names}
        while tally.done < args.cases:
            way = WAYS[tally.done // len(names) % len(WAYS)]
            benches[names[tally.done % len(names)]].case(tally.done, way)
            tally.done += 1
            if tally.done % 20 == 0:
                tally.save()


@contextlib.contextmanager
def _mounted(folder: Path) -> Iterator[Path]:
    folder.mkdir()
    _mount("-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", str(folder))
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def _mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise LocalrunError(f"mount: {done.stderr.strip()}", hint="run it as root")


class Answer:
    """`localrun run`: what it prints stays the same, and what it keeps can be made again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._expected = ""
        self._expected = self._run()

    def _run(self) -> str:
        environment = {**os.environ, **{f"LOCALRUN_{kind}_DIR": str(self._folder / kind) for kind in ("CACHE", "DATA")}}
        command = [sys.executable, "-m", "localrun", "run", "-p", "Hello", "--temp", "0", "--max-tokens", "8"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL)
        if done.returncode not in (0, 1, 2) or "Traceback" in done.stderr or "bug in" in done.stderr:
            raise AssertionError(f"exit code {done.returncode}: {done.stderr}")
        if done.returncode:
            raise LocalrunError(done.stderr)
        if self._expected and done.stdout != self._expected:
            raise AssertionError(f"another answer: {done.stdout!r}")
        return done.stdout

    def work(self, rng: random.Random, acknowledge: Callable[[], None]) -> None:
        if rng.random() < 0.5:
            shutil.rmtree(self._folder / "CACHE", ignore_errors=True)
        self._run()

    def after(self, n_acknowledged: int) -> list[str]:
        return []

    def finish(self) -> list[str]:
        try:
            self._run()
        except (LocalrunError, AssertionError) as error:
            return [f"with room again: {error}"]
        return []


JOBS: dict[str, Callable[[Path], kills.Job]] = {**kills.JOBS, **outputs.JOBS, "answer": Answer}


class Bench:
    """One job in a file system of its own."""

    def __init__(self, name: str, folder: Path, tally: Tally) -> None:
        self._name, self._folder, self._tally = name, folder, tally
        (folder / "job").mkdir()
        self._job = JOBS[name](folder / "job")
        self._took: list[float] = []
        before = self._used()
        for _ in range(2):  # the first one compiles
            began = time.monotonic()
            said = self._end(*self._start(random.Random(0)))
            self._took = [time.monotonic() - began]
            self._needs = max(1 << 16, self._used() - before)
            self._report(-1, self._job.after(len(said)) + self._job.finish())

    def case(self, number: int, way: str) -> str:
        """One run in a bad place; how it ended."""
        rng = random.Random(f"{self._tally.seed} {number}")
        filler: Path | None = None
        if way == "read-only":
            self._remount("ro")
        elif way == "full":
            filler = self._fill()
        elif way == "little":
            self._remount(f"size={self._used() + rng.randrange(4096, int(1.2 * self._needs) + 8192)}")
        began = time.monotonic()
        pid, pipe = self._start(rng)
        if way == "filled":
            ended = kills.ended(pid, began + rng.uniform(0, statistics.median(self._took[-9:])))
            filler = self._fill()
            said = self._end(None if ended else pid, pipe)
        else:
            said = self._end(pid, pipe)
        self._took += [time.monotonic() - began] if not said.strip(b"x") else []
        if filler is not None:
            filler.unlink()
        self._remount(f"rw,size={ROOM}")
        error = said.lstrip(b"x").decode()
        if error.startswith(_UNEXPECTED.decode()) or (error and str(self._folder) not in error):
            self._tally.problem(f"{self._name} {number} ({way}): {error[-500:]}")
        outcome = "refused" if error else "well"
        self._tally.outcomes[f"{self._name}, {way}: {outcome}"] += 1
        n_acknowledged = len(said) - len(said.lstrip(b"x"))
        self._report(number, self._job.after(0 if self._name == "state" else n_acknowledged))  # states may get lost
        self._report(number, self._job.finish())
        return outcome

    def _used(self) -> int:
        state = os.statvfs(self._folder)
        return (state.f_blocks - state.f_bfree) * state.f_frsize

    def _remount(self, options: str) -> None:
        _mount("-o", f"remount,{options}", str(self._folder))

    def _fill(self) -> Path:
        """Takes all the room that there is, while others may be taking it, too."""
        path = self._folder / "filler"
        with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
            for size in (1 << 20, 4096):
                with contextlib.suppress(OSError):
                    while file.write(b"\1" * size) == size:
                        pass
        return path

    def _start(self, rng: random.Random) -> tuple[int, int]:
        """Forks; the pipe says an `x` for each thing acknowledged, and then the error, if there is one."""
        ours, theirs = os.pipe()
        pid = os.fork()
        if pid:
            os.close(theirs)
            return pid, ours
        try:
            kills.silence()
            self._job.work(rng, lambda: kills.tell(theirs))
        except LocalrunError as error:
            os.write(theirs, f"{error} | {error.hint}".encode()[:60_000])
        except BaseException:
            os.write(theirs, _UNEXPECTED + traceback.format_exc().encode()[-60_000:])
        finally:
            os._exit(0)

    @staticmethod
    def _end(pid: int | None, pipe: int) -> bytes:
        with open(pipe, "rb") as file:
            said = file.read()
        if pid is not None:
            os.waitpid(pid, 0)
        return said

    def _report(self, number: int, problems: list[str]) -> None:
        for problem in problems:
            self._tally.problem(f"{self._name} {number}: {problem}")
