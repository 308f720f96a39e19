"""Processes that are killed at random moments while they write.

    python -m tools.reliability kills --cases 1000 --seed 1 [--jobs convert,repair,state,conversation]

A case starts one job in a process of its own and kills it after a random part of the time that the job takes:

  convert       a checkpoint is converted; killed ones go on where they were, sometimes to be killed again
  repair        `localrun verify --repair` of a model with damage in every kind of place, a missing file among them
  state         states of conversations are saved
  conversation  messages are added to the conversations file

Afterwards nothing that was there or was acknowledged may be lost, nothing unfinished may look finished, and the next run must end
as if nothing had happened: converted and repaired models are compared byte by byte.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import shutil
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from localrun import cli
from localrun.engine.conversations import ConversationStore
from localrun.engine.snapshots import SnapshotStore
from localrun.errors import LocalrunError, UsageError
from localrun.paths import kernel_dir
from localrun.quant.convert.converter import convert, remove_leftovers
from localrun.quant.convert.split import split_model
from localrun.quant.model.manifest import MANIFEST_NAME, WORK_NAME
from localrun.quant.open import open_model
from tools.reliability.tally import Tally

PATIENCE_S = 300.0
"""For a job that nobody kills."""

KEEP_KILLED = 0.8
"""Share of killed conversions and repairs that are killed again before they may end."""

KILLED = "killed"


class Job(Protocol):
    """Something that writes. What it says is wrong is a problem."""

    def work(self, rng: random.Random, acknowledge: Callable[[], None]) -> None:
        """In the child. `acknowledge` tells the parent that one more thing is safe."""
        ...

    def after(self, n_acknowledged: int) -> list[str]:
        """After a kill."""
        ...

    def finish(self) -> list[str]:
        """Runs to the end, looks at the outcome, and makes ready for the next case."""
        ...


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cases", type=int, default=1000, help="kills, of all jobs together")
    parser.add_argument("--jobs", default="", metavar="A,B", help="default: all")


def run(args: argparse.Namespace, tally: Tally) -> None:
    """Raises UsageError: unknown jobs."""
    names = tuple(args.jobs.split(",")) if args.jobs else tuple(JOBS)
    if unknown := set(names) - set(JOBS):
        raise UsageError(f"no such job: {', '.join(sorted(unknown))}", hint=f"one of {', '.join(JOBS)}")
    with own_folders() as folder:
        benches = {name: Bench(name, folder / name, tally) for name in names}
        number = sum(tally.outcomes.values())
        while tally.done < args.cases:
            tally.done += benches[names[number % len(names)]].case(number) == KILLED
            number += 1
            if number % 20 == 0:
                tally.save()


@contextlib.contextmanager
def own_folders() -> Iterator[Path]:
    """A folder in memory, which survives kills as well as a drive does; cache, data and settings lie there, too."""
    os.environ.setdefault("LOCALRUN_KERNEL_DIR", str(kernel_dir()))
    parent = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(prefix="reliability-kills-", dir=parent) as name:
        for kind in ("CACHE", "DATA", "CONFIG"):
            os.environ[f"LOCALRUN_{kind}_DIR"] = str(Path(name, kind.lower()))
        yield Path(name)


class Bench:
    """Runs one job again and again; learns how long it takes."""

    def __init__(self, name: str, folder: Path, tally: Tally) -> None:
        folder.mkdir()
        self._name, self._tally = name, tally
        self._job = JOBS[name](folder)
        self._took: list[float] = []
        for _ in range(2):  # the first one compiles
            self._took = [self._whole()]

    def case(self, number: int) -> str:
        """One kill; how far the job had come."""
        rng = random.Random(f"{self._tally.seed} {number}")
        wait = rng.uniform(0, 1.1 * statistics.median(self._took[-9:]))
        began = time.monotonic()
        pid, acknowledged = self._start(rng)
        killed = not ended(pid, began + wait)
        if killed:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        else:
            self._took.append(time.monotonic() - began)
        n_acknowledged = len(os.read(acknowledged, 1 << 16))
        os.close(acknowledged)
        self._report(number, self._job.after(n_acknowledged))
        if not killed or rng.random() >= KEEP_KILLED:
            self._report(number, self._job.finish())
        outcome = KILLED if killed else "ended before"
        self._tally.outcomes[f"{self._name}: {outcome}"] += 1
        return outcome

    def _whole(self) -> float:
        began = time.monotonic()
        pid, acknowledged = self._start(random.Random(self._tally.seed))
        if not ended(pid, began + PATIENCE_S):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            self._tally.problem(f"{self._name}: no end after {PATIENCE_S:g} s")
        took = time.monotonic() - began
        self._report(-1, self._job.after(len(os.read(acknowledged, 1 << 16))) + self._job.finish())
        os.close(acknowledged)
        return took

    def _start(self, rng: random.Random) -> tuple[int, int]:
        """Forks: imports and compiled code are there already. This process has one thread. (pid, pipe of acknowledgements)."""
        ours, theirs = os.pipe()
        pid = os.fork()
        if pid:
            os.close(theirs)
            os.set_blocking(ours, False)
            return pid, ours
        status = 1
        try:
            silence()
            self._job.work(rng, lambda: tell(theirs))
            status = 0
        finally:
            os._exit(status)

    def _report(self, number: int, problems: list[str]) -> None:
        for problem in problems:
            self._tally.problem(f"{self._name} {number}: {problem}")


def ended(pid: int, deadline: float) -> bool:
    """Waits for a child until then; the last look is after the deadline."""
    while True:
        late = time.monotonic() >= deadline
        if os.waitpid(pid, os.WNOHANG)[0]:
            return True
        if late:
            return False
        time.sleep(min(0.002, max(0.0, deadline - time.monotonic())))


def silence() -> None:
    """In a child: nothing is read from or written to the parent's terminal."""
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)


def tell(pipe: int) -> None:
    """One thing more is safe."""
    os.write(pipe, b"x")


def in_child(work: Callable[[], object]) -> bool:
    """Runs something in a process of its own, because this one must stay without threads; whether it went well."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            silence()
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1] == 0


def contents(folder: Path) -> dict[str, bytes]:
    """All files by name, but for the manifest's own statements about times."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST_NAME)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


class _Model:
    """What conversions and repairs share: a checkpoint and what becomes of it."""

    def __init__(self, folder: Path) -> None:
        from tests.checkpoints import write_small

        self.source = write_small(folder / "source", n_routed_experts=8)
        self._source_bytes = contents(self.source)
        self.target, self.whole = folder / "model", folder / "whole"
        in_child(lambda: convert(self.source, self.whole, jobs=1))
        self.expected = contents(self.whole)

    def looks(self, *, may_be_damaged: bool) -> list[str]:
        """Whatever opens as a model is the whole one, or `verify` says that it is not."""
        problems = []
        if contents(self.source) != self._source_bytes:
            problems.append("the checkpoint has changed")
        if self.target.exists() and not self.is_whole():
            if may_be_damaged:
                if in_child(lambda: must_be_zero(["verify", str(self.target)])):
                    problems.append("verify finds nothing in a model that is damaged")
            else:
                with contextlib.suppress(LocalrunError):
                    open_model(self.target)
                    problems.append("an unfinished model opens")
        return problems

    def is_whole(self) -> bool:
        """Whether the manifest and all files of the model are there. The work folder may be, too: it goes after the manifest."""
        found = contents(self.target)
        model = {name: data for name, data in found.items() if not name.startswith(f"{WORK_NAME}/")}
        return (self.target / MANIFEST_NAME).exists() and model == self.expected

    def is_right(self) -> list[str]:
        if not self.target.exists():
            return ["no model after a whole run"]
        if (found := contents(self.target)) != self.expected:
            return [
                f"other bytes in {sorted(n for n in found.keys() | self.expected if found.get(n) != self.expected.get(n))}"
            ]
        if left := [path.name for path in self.target.parent.iterdir() if "partial" in path.name]:
            return [f"left over: {left}"]
        return [] if in_child(lambda: must_be_zero(["verify", str(self.target)])) else ["verify finds damage"]


def must_be_zero(arguments: list[str]) -> None:
    """Runs a command of localrun in this process.

    Raises:
        LocalrunError: it refused, and said why.
        AssertionError: it ended in a way that no command may end in.
    """
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = cli.main(arguments)
    if code not in (0, 1, 2) or "bug in localrun" in said.getvalue():
        raise AssertionError(f"{arguments}: exit code {code}: {said.getvalue()}")
    if code:
        raise LocalrunError(said.getvalue())


class _Convert:
    def __init__(self, folder: Path) -> None:
        self._model = _Model(folder)

    def work(self, rng: random.Random, acknowledge: Callable[[], None]) -> None:
        convert(self._model.source, self._model.target, jobs=rng.choice((1, 2)))

    def after(self, n_acknowledged: int) -> list[str]:
        return self._model.looks(may_be_damaged=False)

    def finish(self) -> list[str]:
        done = self._model.is_whole()
        remove_leftovers(self._model.target)
        if not done and not in_child(lambda: convert(self._model.source, self._model.target, jobs=1)):
            return ["the next conversion failed"]
        problems = self._model.is_right()
        shutil.rmtree(self._model.target, ignore_errors=True)
        return problems


class _Repair:
    def __init__(self, folder: Path) -> None:
        self._model = _Model(folder)
        in_child(lambda: split_model(self._model.whole, 200_000))
        self._model.expected = contents(self._model.whole)
        self._damage()

    def _damage(self) -> None:
        """A flipped bit in each file, one file too short, one missing."""
        shutil.rmtree(self._model.target, ignore_errors=True)
        shutil.copytree(self._model.whole, self._model.target)
        files = sorted(self._model.target.glob("*.gguf"))
        for path in files:
            data = bytearray(path.read_bytes())
            data[len(data) * 2 // 3] ^= 0x40
            path.write_bytes(data)
        os.truncate(files[-2], files[-2].stat().st_size // 3)
        files[-1].unlink()

    def _arguments(self) -> list[str]:
        return ["verify", str(self._model.target), "--repair", str(self._model.source)]

    def work(self, rng: random.Random, acknowledge: Callable[[], None]) -> None:
        must_be_zero(self._arguments())

    def after(self, n_acknowledged: int) -> list[str]:
        return self._model.looks(may_be_damaged=True)

    def finish(self) -> list[str]:
        problems = [] if in_child(lambda: must_be_zero(self._arguments())) else ["the next repair failed"]
        problems += self._model.is_right()
        self._damage()
        return problems


class _State:
    """States of random sizes; each one's bytes follow from its number."""

    N = 12

    def __init__(self, folder: Path) -> None:
        self._folder, self._safe = folder, 0

    @staticmethod
    def _state(number: int) -> tuple[list[int], bytes]:
        rng = random.Random(number)
        return list(range(number, number + 40)), rng.randbytes(rng.randrange(1 << 10, 1 << 20))

    def work(self, rng: random.Random, acknowledge: Callable[[], None]) -> None:
        store = SnapshotStore(self._folder, "key", disk_bytes=64 << 20)
        for number in range(self.N):
            store.put(*self._state(number))
        store.close()
        acknowledge()

    def after(self, n_acknowledged: int) -> list[str]:
        store = SnapshotStore(self._folder, "key", disk_bytes=64 << 20)
        problems, n_found = [], 0
        for number in range(self.N):
            tokens, state = self._state(number)
            found = store.longest_prefix([*tokens, 1])
            n_found += found is not None
            if found is not None and found[1] != state:
                problems.append(f"state {number} is another one than these {len(state)} bytes")
        if n_found < (self.N if n_acknowledged else self._safe):
            problems.append(f"{n_found} states left of {self._safe}")
        self._safe = n_found
        return problems

    def finish(self) -> list[str]:
        if not in_child(lambda: self.work(random.Random(0), lambda: None)):
            return ["saving failed"]
        problems = self.after(1)
        shutil.rmtree(self._folder)
        self._folder.mkdir()
        self._safe = 0
        return problems


class _Conversation:
    """Messages in turn; each is acknowledged when the store has it."""

    N = 60

    def __init__(self, folder: Path) -> None:
        self._path, self._safe = folder / "conversations.sqlite3", 0

    @staticmethod
    def _text(number: int) -> str:
        return f"{number} about the sea " * (1 + number * 37 % 300)

    def work(self, rng: random.Random, acknowledge: Callable[[], None]) -> None:
        with ConversationStore.open(self._path) as store:
            known = store.conversations()
            number = known[0].id if known else store.create("Talk").id
            for _ in range(self.N):
                branch = store.branch(number)
                parent = branch[-1].id if branch else None
                role = ("user", "assistant")[len(branch) % 2]
                store.add(number, parent, role, self._text(len(branch)))  # type: ignore[arg-type]
                acknowledge()

    def after(self, n_acknowledged: int) -> list[str]:
        self._safe += n_acknowledged
        with ConversationStore.open(self._path) as store:
            known = store.conversations()
            said = [message.content for message in store.branch(known[0].id)] if known else []
        problems = []
        if said != [self._text(number) for number in range(len(said))]:
            problems.append("messages are other ones")
        if not self._safe <= len(said) <= self._safe + 1:
            problems.append(f"{len(said)} messages, {self._safe} acknowledged")
        self._safe = len(said)
        return problems

    def finish(self) -> list[str]:
        before = self._safe
        if not in_child(lambda: self.work(random.Random(0), lambda: None)):
            return ["adding messages failed"]
        problems = self.after(self.N)
        if self._safe != before + self.N:
            problems.append(f"{self._safe} messages of {before + self.N}")
        for path in self._path.parent.iterdir():
            path.unlink()
        self._safe = 0
        return problems


JOBS: dict[str, Callable[[Path], Job]] = {
    "convert": _Convert,
    "repair": _Repair,
    "state": _State,
    "conversation": _Conversation,
}
