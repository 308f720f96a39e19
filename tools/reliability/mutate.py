"""Opens damaged files of every kind that localrun reads.

    python -m tools.reliability mutate --cases 100000 --seed 1 [--kinds gguf,config]

A case is a kind and a number; its damage follows from seed, kind and number, so a single one can be seen again with `--kinds gguf
--only NUMBER`. Cases run in a child process that is started again when it dies or hangs. How a case may end:

  refused            an error of localrun's that names the file
  same               the damage says nothing else than the valid file
  ignored            a cache that can be made again, passed over
  found              `verify` names the damage, or a damaged database was rescued
  other, no checksum another sound file: nothing in its format could tell

Anything else is a problem: another exception, an error that names no file, a death, a hang, memory that grows, weights that differ
although checksums cover them. Each `--load`th model that still opens is loaded whole and answers a token.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import resource
import tempfile
import time
import traceback
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from localrun.errors import LocalrunError, UsageError
from localrun.paths import kernel_dir
from tools.reliability.tally import Tally

PATIENCE_S = 600.0
"""A case takes milliseconds, a first load of a child compiles, and a machine that is busy or was suspended is no hang."""

MAX_CPU_S = 30.0
"""Of one case."""

GROWTH_BYTES = 256 << 20
"""More than any case needs: the largest file has 4 MB."""

CHUNK = 500


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cases", type=int, default=100_000, help="of all kinds together")
    parser.add_argument("--kinds", default="", metavar="A,B", help="default: all")
    parser.add_argument("--load", type=int, default=200, metavar="N", help="each Nth model is loaded whole; 0: none")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="this case, with its traceback")


def run(args: argparse.Namespace, tally: Tally) -> None:
    """Raises UsageError: unknown kinds."""
    from tools.reliability.kinds import NAMES

    kinds = tuple(args.kinds.split(",")) if args.kinds else NAMES
    if unknown := set(kinds) - set(NAMES):
        raise UsageError(f"no such kind: {', '.join(sorted(unknown))}", hint=f"one of {', '.join(NAMES)}")
    os.environ.setdefault("LOCALRUN_KERNEL_DIR", str(kernel_dir()))
    if args.only is not None:
        one_case(kinds[0], args.seed, args.only)
        return
    done: dict[str, int] = tally.figures.setdefault("cases", {})
    for kind in kinds:
        until = args.cases // len(kinds)
        while done.get(kind, 0) < until:
            first = done.get(kind, 0)
            done[kind] = _in_child(kind, args, first, min(first + CHUNK * 20, until), tally)
            tally.done = sum(done.values())
            tally.save()


def _in_child(kind: str, args: argparse.Namespace, first: int, until: int, tally: Tally) -> int:
    """Runs cases in a child; the number of the next one, also if it died."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_child, args=(theirs, kind, args.seed, first, until, args.load), daemon=True)
    child.start()
    theirs.close()
    at, begun = first, False
    try:
        while True:
            if not ours.poll(PATIENCE_S):
                tally.problem(f"{kind} {at}: no end after {PATIENCE_S:g} s")
                child.kill()
                return at + 1
            try:
                message: dict[str, Any] = ours.recv()
            except EOFError:
                child.join()
                tally.problem(f"{kind} {at}: the process died: exit code {child.exitcode}")
                if not begun:
                    raise LocalrunError(f"{kind}: its child can't start") from None
                return at + 1
            begun = True
            if "at" in message:
                at = message["at"]
            else:
                _add(kind, message, tally)
            if message.get("last"):
                return until
    finally:
        ours.close()
        child.join(10)


def _add(kind: str, message: dict[str, Any], tally: Tally) -> None:
    for outcome, n in message["outcomes"].items():
        tally.outcomes[f"{kind}: {outcome}"] += n
    for problem in message["problems"]:
        tally.problem(f"{kind} {problem}")


def _child(pipe: Connection, kind: str, seed: int, first: int, until: int, load: int) -> None:
    # Cases print what they like: the pipe alone counts.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    import logging

    logging.disable(logging.CRITICAL)
    with Bench(kind, seed, load) as bench:
        for number in range(first, until):
            pipe.send({"at": number})
            bench.case(number)
            if (number + 1 - first) % CHUNK == 0 or number + 1 == until:
                pipe.send({**bench.take(), "last": number + 1 == until})


class Bench:
    """One kind's valid file, and what cases have come to since `take`."""

    def __init__(self, kind: str, seed: int, load: int) -> None:
        from tools.reliability.kinds import make

        parent = "/dev/shm" if os.path.isdir("/dev/shm") else None
        self._folder = tempfile.TemporaryDirectory(prefix=f"reliability-{kind}-", dir=parent)
        home = Path(self._folder.name)
        for name in ("CACHE", "DATA", "CONFIG"):
            os.environ[f"LOCALRUN_{name}_DIR"] = str(home / name.lower())
        (home / "m").mkdir()
        self.kind = make(kind, home / "m")
        self._valid = self.kind.path.read_bytes()
        self._expected = self.kind.look(self.kind.open)
        assert not self._expected.ignored
        assert not self._expected.found
        self._names = (str(self.kind.path), str(self.kind.open))
        self._seed, self._load = seed, load
        self._opened = 0
        self._outcomes: Counter[str] = Counter()
        self._problems: list[str] = []

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.kind.close()
        self._folder.cleanup()

    def take(self) -> dict[str, Any]:
        result = {"outcomes": dict(self._outcomes), "problems": list(self._problems)}
        self._outcomes.clear()
        self._problems.clear()
        return result

    def damaged(self, number: int) -> tuple[bytes, str]:
        """The bytes of a case."""
        return self.kind.damage(random.Random(f"{self._seed} {self.kind.name} {number}"), self._valid)

    def case(self, number: int) -> str:
        """Runs one; its outcome."""
        data, what = self.damaged(number)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began, opened = time.process_time(), self._opened
        self.kind.path.write_bytes(data)
        try:
            outcome = self._outcome(number, what)
        finally:
            self._put_back()
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        loaded = self._opened > opened and self._load and self._opened % self._load == 0  # which may compile
        if grown > GROWTH_BYTES and not loaded:
            self._problems.append(f"{number} ({what}): memory grew by {grown >> 20} MiB")
        if not loaded and (took := time.process_time() - began) > MAX_CPU_S:
            self._problems.append(f"{number} ({what}): took {took:.0f} s of processor time")
        self._outcomes[outcome] += 1
        return outcome

    def _put_back(self) -> None:
        """The valid file, without what SQLite or a rescue left beside the damaged one."""
        for other in self.kind.path.parent.glob(f"{self.kind.path.name}?*"):
            other.unlink()
        self.kind.path.write_bytes(self._valid)

    def _outcome(self, number: int, what: str) -> str:
        try:
            look = self.kind.look(self.kind.open)
            if self.kind.model:
                self._opened += 1
                if self._load and self._opened % self._load == 0:
                    self._outcomes["loaded and asked: " + load_whole(self.kind.open)] += 1
        except LocalrunError as error:
            text = f"{error} {error.hint or ''}"
            if not any(name in text for name in self._names) and self.kind.path.name not in text:
                self._problems.append(f"{number} ({what}): names no file: {error!r}")
            return "refused"
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            self._problems.append(f"{number} ({what}): {error!r} at {place.filename}:{place.lineno}")
            return "another exception"
        if look.digest == self._expected.digest and not look.found:
            return "same"
        if look.ignored or look.found:
            return "ignored" if look.ignored else "found"
        if self.kind.checked and look.payload != self._expected.payload:
            self._problems.append(f"{number} ({what}): weights differ and nothing says so")
            return "silently other weights"
        if self.kind.checked and not look.payload:
            self._problems.append(f"{number} ({what}): another content with a right checksum")
        if look.payload and look.payload != self._expected.payload:
            return "other weights, no checksum in the format"
        return "other values, no checksum"


def load_whole(path: Path) -> str:
    """Loads a model and computes one token; how that ended. Raises LocalrunError."""
    from localrun.engine.engine import Engine
    from localrun.engine.options import EngineOptions

    options = EngineOptions(n_ctx=64, n_batch=16, n_threads=1, ram_bytes=64 << 20)
    try:
        with Engine.open(path, options, learn=False) as engine, engine.session() as session:
            session.feed([1, 2, 3])
            return f"answers, {len(session.logits)} logits" if len(session.logits) else "no logits"
    except LocalrunError as error:
        if str(path) not in f"{error} {error.hint or ''}":
            raise LocalrunError(f"loading: {error}", hint=error.hint) from error
        return "refused"


def one_case(kind: str, seed: int, number: int) -> None:
    """Shows one again."""
    with Bench(kind, seed, 0) as bench:
        data, what = bench.damaged(number)
        print(f"{kind} {number}: {what}, {len(data)} bytes")
        bench.kind.path.write_bytes(data)
        print(bench.kind.look(bench.kind.open))
