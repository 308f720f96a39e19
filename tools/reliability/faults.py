"""Answers, and now and then loads, while reads fail.

    python -m tools.reliability faults --cases 10000 --seed 1 [--plain]

The model is converted (its manifest has checksums), or with `--plain` a GGUF, which has none. RAM holds the experts of one token's
layer, so every layer reads. A case feeds a text and injects one fault into one read; each tenth loads the model first, and the
fault comes while it does. `short`: part of what was asked for, `late`, `end`: the file seems to end, `error`: EIO, `wrong`: one to
some hundred wrong bytes, in what is used or `beside` it (direct reads take whole pages). How a case may end:

  same    the logits are those without a fault
  named   an error that names the file; afterwards the same engine gives the right answer
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
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from localrun import reading
from localrun.alignment import PAGE_BYTES
from localrun.errors import LocalrunError
from localrun.paths import kernel_dir
from localrun.quant.model.source import ModelSource
from tools.reliability.tally import Tally

if TYPE_CHECKING:
    from localrun.engine.llama import Context
    from localrun.offload.model import OffloadedModel

FAULTS = ("short", "late", "end", "error", "wrong")
PATIENCE_S = 60.0
BATCHES = (3, 1)
"""A prompt and a token."""
N_TEXTS = 8
LOAD_EVERY = 10


class FaultyReads:
    """`os.preadv` that spoils one of its calls, once armed. Called by several threads; `_lock` guards the count."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left = -1
        self._fault = ""
        self._rng = random.Random(0)
        self._used: dict[str, list[tuple[int, int]]] = {}
        self.n_calls = 0
        self.struck = False
        self.struck_beside = False

    def know(self, used: dict[str, list[tuple[int, int]]]) -> None:
        """Which bytes of which file are used: ranges from and to."""
        self._used = used

    def arm(self, fault: str, after: int, rng: random.Random) -> None:
        """The fault comes in the read after so many."""
        with self._lock:
            self._left, self._fault, self._rng = after, fault, rng
            self.struck = self.struck_beside = False

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

    def _spoilt(self, fault: str, rng: random.Random, fd: int, buffers: list[Any], offset: int) -> int:
        if fault == "error":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if fault == "end":
            return 0
        if fault == "short":  # O_DIRECT gives whole pages
            n = rng.randrange(1, len(buffers[0]) + 1)
            if len(buffers[0]) >= PAGE_BYTES:
                n = max(PAGE_BYTES, n // PAGE_BYTES * PAGE_BYTES)
            return os.preadv(fd, [buffers[0][:n]], offset)
        if fault == "late":
            time.sleep(rng.uniform(0.001, 0.1))
        done = os.preadv(fd, buffers, offset)
        if fault == "wrong":
            n = min(done, rng.choice((1, 1, 8, 512)))
            at = rng.randrange(done - n + 1)
            buffers[0][at : at + n] = bytes(byte ^ rng.randrange(1, 256) for byte in buffers[0][at : at + n])
            ranges = self._used.get(os.readlink(f"/proc/self/fd/{fd}"), [])
            first = offset + at
            self.struck_beside = not any(start < first + n and first < end for start, end in ranges)
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
        with Answers(make_model(Path(name), plain=args.plain), tally) as answers:
            while tally.done < args.cases:
                answers.case(tally.done)
                tally.done += 1
                if tally.done % 100 == 0:
                    tally.save()


def make_model(folder: Path, *, plain: bool) -> Path:
    """A small model in `folder`; its matrices are whole pages, so that no read brings bytes of another expert."""
    from tests.checkpoints import write_small
    from tests.gguf_models import TinyDeepseek4
    from tests.offload.models import write_model

    if plain:
        return write_model(folder, TinyDeepseek4(n_embd=256, n_ff=512, n_used=3))
    from localrun.quant.convert.converter import convert

    size: dict[str, Any] = {
        "hidden_size": 256,
        "moe_intermediate_size": 512,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
    }
    source = write_small(folder / "source", **size)
    convert(source, folder / "model", jobs=1)
    return folder / "model"


class Answers:
    """One open model, and what it answers without faults."""

    def __init__(self, model: Path, tally: Tally) -> None:
        from localrun.offload.model import OffloadOptions, open_offloaded
        from localrun.quant.open import open_model
        from tests.offload.models import floor_ram

        self._path = model
        source = open_model(model)
        with open_offloaded(source, OffloadOptions(n_threads=1)) as probe:
            self._options = OffloadOptions(ram_bytes=floor_ram(probe), n_threads=1)
        self._tally, self._folder = tally, str(model)
        rng = np.random.default_rng(tally.seed)
        self._texts = [rng.integers(2, 64, sum(BATCHES)).tolist() for _ in range(N_TEXTS)]
        self._reads, self._real = FaultyReads(), vars(reading)["preadv"]
        self._reads.know(_used(source))
        setattr(reading, "preadv", self._reads)  # noqa: B010
        self._open()
        self._n_load_reads = self._reads.n_calls
        self._expected = [self._logits(number) for number in range(N_TEXTS)]
        self._reads.n_calls = 0
        self._logits(0)
        self._n_reads = max(1, self._reads.n_calls)
        tally.figures |= {"reads_per_answer": self._n_reads, "reads_per_load": self._n_load_reads}

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *exc_info: object) -> None:
        setattr(reading, "preadv", self._real)  # noqa: B010
        self._close()

    def _open(self) -> None:
        from localrun.engine.llama import Context
        from localrun.engine.options import EngineOptions
        from localrun.offload.model import open_offloaded
        from localrun.quant.open import open_model

        self._context: Context | None = None
        self._model: OffloadedModel | None = None
        self._model = open_offloaded(open_model(self._path), self._options)
        self._model.pool.read_from_python()
        options = EngineOptions(n_batch=16)
        self._context = Context(self._model.model, options, n_ctx=64, n_threads=1, all_logits=True)

    def _close(self) -> None:
        if self._context is not None:
            self._context.close()
        if self._model is not None:
            self._model.close()
        self._context = self._model = None

    def _logits(self, number: int) -> npt.NDArray[np.float32]:
        """Of a text's last token."""
        assert self._context is not None
        assert self._model is not None
        self._context.clear()
        at = 0
        for n in BATCHES:
            if code := self._context.decode(self._texts[number][at : at + n], at, all_logits=False):
                raise self._model.take_error() or AssertionError(f"llama_decode gave {code} without a cause")
            at += n
        return self._context.logits(-1).copy()

    def case(self, number: int) -> str:
        """Injects one fault and looks what becomes of it."""
        rng = random.Random(f"{self._tally.seed} {number}")
        loading = number % LOAD_EVERY == LOAD_EVERY - 1
        fault, text = FAULTS[(number + number // LOAD_EVERY) % len(FAULTS)], rng.randrange(N_TEXTS)
        if loading:
            self._close()
        self._reads.arm(fault, rng.randrange(self._n_load_reads if loading else self._n_reads), rng)
        began = time.monotonic()
        try:
            if loading:
                self._open()
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
        what = ("load, " if loading else "") + (fault if self._reads.struck else "none came, all in RAM")
        what += " beside" if self._reads.struck_beside else ""
        if outcome == "other" and (fault != "wrong" or self._tally.figures["checksums"]):
            self._tally.problem(f"{number} ({what}): other logits and nothing says so")
        self._recover(number, text, fault, outcome)
        if (took := time.monotonic() - began) > PATIENCE_S:
            self._tally.problem(f"{number} ({what}): took {took:.0f} s")
        self._tally.outcomes[f"{what}: {outcome}"] += 1
        return outcome

    def _recover(self, number: int, text: int, fault: str, outcome: str) -> None:
        """The same engine still answers, and rightly; wrong bytes that nobody could tell are driven out first."""
        spoilt = fault == "wrong" and not self._tally.figures["checksums"]  # perhaps where this text did not look
        if self._context is None or (spoilt and number % LOAD_EVERY == LOAD_EVERY - 1):
            self._close()
            self._open()
        if spoilt:
            self._logits((text + 1) % N_TEXTS)
        asked = range(N_TEXTS) if number % 100 == 0 else [] if outcome == "same" else [text]
        for again in asked:
            if not np.array_equal(self._logits(again), self._expected[again]):
                self._tally.problem(f"{number}: answers afterwards are other ones")
        assert self._model is not None
        self._model.pool.residency.check()


def _used(source: ModelSource) -> dict[str, list[tuple[int, int]]]:
    """By file the ranges of bytes that answers depend on: all tensors. Headers are compared when a file is opened."""
    from localrun.quant.gguf.source import GgufSource

    assert isinstance(source, GgufSource)
    used: dict[str, list[tuple[int, int]]] = {}
    for part in source.headers:
        ranges = [(tensor.offset, tensor.offset + tensor.info.n_bytes) for tensor in part.tensors.values()]
        used[str(part.path.resolve())] = [(0, part.data_offset), *ranges]
    return used
