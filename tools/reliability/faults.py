"""Answers while reads of experts fail.

    python -m tools.reliability faults --cases 10000 --seed 1

The model is converted (its manifest has checksums), or with `--plain` a GGUF, which has none. RAM holds one layer's experts, so
every layer reads. A case feeds a text and injects one fault into one read: `short` (part of what was asked for), `late`, `end`
(the file seems to end), `error` (EIO), `wrong` (one to some hundred wrong bytes). How it may end:

  same    the logits are those without a fault
  named   an error that names the file; the next case on the same engine is answered rightly
  other   other logits after wrong bytes in a file without checksums: nobody could tell
"""

from __future__ import annotations

import argparse
import errno
import os
import random
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from localrun import reading
from localrun.alignment import PAGE_BYTES
from localrun.errors import LocalrunError
from localrun.paths import kernel_dir
from tools.reliability.tally import Tally

FAULTS = ("short", "late", "end", "error", "wrong")
PATIENCE_S = 60.0


class FaultyReads:
    """`os.preadv` that spoils one of its calls, once armed. Called by several threads; `_lock` guards the count."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left = -1
        self._fault = ""
        self._rng = random.Random(0)
        self.n_calls = 0
        self.struck = False

    def arm(self, fault: str, after: int, rng: random.Random) -> None:
        """The fault comes in the read after so many."""
        with self._lock:
            self._left, self._fault, self._rng, self.struck = after, fault, rng, False

    def disarm(self) -> None:
        with self._lock:
            self._left = -1

    def __call__(self, fd: int, buffers: list[Any], offset: int) -> int:
        with self._lock:
            self.n_calls += 1
            now = self._left == 0
            if self._left >= 0:
                self._left -= 1
            if now:
                self.struck = True
                fault, rng = self._fault, random.Random(self._rng.random())
        return self._spoilt(fault, rng, fd, buffers, offset) if now else os.preadv(fd, buffers, offset)

    @staticmethod
    def _spoilt(fault: str, rng: random.Random, fd: int, buffers: list[Any], offset: int) -> int:
        if fault == "error":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if fault == "end":
            return 0
        if fault == "short":  # O_DIRECT gives whole pages
            n = rng.randrange(PAGE_BYTES, len(buffers[0]) + 1) // PAGE_BYTES * PAGE_BYTES or PAGE_BYTES
            return os.preadv(fd, [buffers[0][:n]], offset)
        if fault == "late":
            time.sleep(rng.uniform(0.001, 0.1))
        done = os.preadv(fd, buffers, offset)
        if fault == "wrong":
            n = min(done, rng.choice((1, 1, 8, 512)))
            at = rng.randrange(done - n + 1)
            buffers[0][at : at + n] = bytes(byte ^ rng.randrange(1, 256) for byte in buffers[0][at : at + n])
        return done


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--plain", action="store_true", help="a GGUF without checksums")


def run(args: argparse.Namespace, tally: Tally) -> None:
    """All cases on one engine: what a fault leaves behind would spoil the next ones."""
    os.environ.setdefault("LOCALRUN_KERNEL_DIR", str(kernel_dir()))
    tally.figures["checksums"] = not args.plain
    parent = "/dev/shm" if os.path.isdir("/dev/shm") else None  # a drive adds nothing but time
    with tempfile.TemporaryDirectory(prefix="reliability-faults-", dir=parent) as name:
        for kind in ("CACHE", "DATA", "CONFIG"):
            os.environ[f"LOCALRUN_{kind}_DIR"] = str(Path(name, kind.lower()))
        with Answers(_model(Path(name), plain=args.plain), tally) as answers:
            while tally.done < args.cases:
                answers.case(tally.done)
                tally.done += 1
                if tally.done % 100 == 0:
                    tally.save()


def _model(folder: Path, *, plain: bool) -> Path:
    from tests.checkpoints import write_small
    from tests.offload.models import write_model

    if plain:
        return write_model(folder)
    from localrun.quant.convert.converter import convert

    source = write_small(folder / "source", n_routed_experts=16, num_experts_per_tok=3)
    convert(source, folder / "model", jobs=1)
    return folder / "model"


class Answers:
    """One open model, and what it answers without faults."""

    def __init__(self, model: Path, tally: Tally) -> None:
        from localrun.offload.model import OffloadOptions, open_offloaded
        from localrun.quant.open import open_model
        from tests.offload.models import floor_ram

        source = open_model(model)
        with open_offloaded(source, OffloadOptions(n_threads=1)) as probe:
            floor = floor_ram(probe)
        self._tally, self._folder = tally, str(model)
        self._model = open_offloaded(source, OffloadOptions(ram_bytes=floor, n_threads=1))
        rng = np.random.default_rng(tally.seed)
        self._texts = [rng.integers(2, 64, 12).tolist() for _ in range(8)]
        self._reads, self._real = FaultyReads(), vars(reading)["preadv"]
        setattr(reading, "preadv", self._reads)  # noqa: B010
        self._expected = [self._logits(number) for number in range(8)]
        self._reads.n_calls = 0
        self._logits(0)
        self._n_reads = max(1, self._reads.n_calls)
        tally.figures["reads_per_answer"] = self._n_reads

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *exc_info: object) -> None:
        setattr(reading, "preadv", self._real)  # noqa: B010
        self._model.close()

    def _logits(self, number: int) -> npt.NDArray[np.float32]:
        from tests.offload.models import logits

        return logits(self._model, self._texts[number], batch=5)

    def case(self, number: int) -> str:
        """Injects one fault and looks what becomes of it."""
        rng = random.Random(f"{self._tally.seed} {number}")
        fault, text = FAULTS[number % len(FAULTS)], rng.randrange(8)
        self._reads.arm(fault, rng.randrange(self._n_reads), rng)
        began = time.monotonic()
        try:
            same = np.array_equal(self._logits(text), self._expected[text])
            outcome = "same" if same else "other"
        except LocalrunError as error:
            outcome = "named"
            if self._folder not in str(error) or not error.hint:
                self._tally.problem(f"{number} ({fault}): {error!r}, hint {error.hint}")
        except Exception as error:
            outcome = "another exception"
            self._tally.problem(f"{number} ({fault}): {error!r}")
        self._reads.disarm()
        if not self._reads.struck:
            fault = "none came, all in RAM"
        if outcome == "other" and (fault != "wrong" or self._tally.figures["checksums"]):
            self._tally.problem(f"{number} ({fault}): other logits and nothing says so")
        if outcome != "same":
            self._recover(number)
        if (took := time.monotonic() - began) > PATIENCE_S:
            self._tally.problem(f"{number} ({fault}): took {took:.0f} s")
        self._tally.outcomes[f"{fault}: {outcome}"] += 1
        return outcome

    def _recover(self, number: int) -> None:
        """The same engine still answers, and rightly; wrong bytes that nobody could tell are driven out first."""
        self._model.pool.residency.table.check()
        for _ in range(2):
            for text in range(8):
                same = np.array_equal(self._logits(text), self._expected[text])
        if not same:
            self._tally.problem(f"{number}: answers afterwards are other ones")
