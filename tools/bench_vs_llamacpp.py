"""Stock llama.cpp against localrun, alternating on the same GGUF and tokens: ratios of decode and prefill time.

    python -m tools.bench_vs_llamacpp slice.gguf
    python -m tools.bench_vs_llamacpp slice.gguf --memory-limit 5GB --prompt-tokens 512 --new-tokens 16 --json result.json

Each measurement is a process of its own (A B A B), because both engines keep caches, and machines drift. Both are at their best:
llama.cpp repacks experts for the CPU where that works, and maps the file where repacking would be killed (under a memory limit, or
with a model larger than RAM);
localrun gets as much RAM for experts as the limit leaves. Both go through the same Python loop with the same batch size. Before a
run under a limit the file is dropped from the page cache, which would otherwise be memory outside the limit.

The logits are compared (`logit_agreement`): a fast wrong answer is an error (exit code 1), not a result. For that, llama.cpp
computes the first pair's tokens once more after its measurement, in other batches and with a BF16 cache.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from localrun.errors import LocalrunError
from localrun.units import format_size, parse_size
from tools import logit_agreement, memory_limit
from tools.engine_run import ChildDiedError, EngineName, Measured, Task, run_child

VARIANTS = ("default", "experts", "none")
"""How llama.cpp places weights, best first: by its own choice (repacking, AMX); only experts repacked, where its choice crashes
(builds for AMX on machines that don't let programs use it); as they lie in the file."""

OVERHEAD_BYTES = 700 << 20
"""Interpreter, libraries, compute buffers and KV cache of a localrun process, taken from a limit before the experts' share."""


class Comparison:
    """Runs the pairs and keeps what they gave."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._gguf, self._files, self._dense_bytes = _model_files(args.model)
        self._limit_bytes: int | None = args.memory_limit
        self._streams = self._limit_bytes is not None or _exceeds_ram(self._files)
        self.variant = args.llamacpp or ("none" if self._streams else "default")
        self.runs: list[Measured] = []
        self.notes: list[str] = []
        self.agreements: list[logit_agreement.Agreement] = []

    def run(self) -> None:
        """All pairs.

        Raises:
            LocalrunError: an engine can't run at all.
        """
        with tempfile.TemporaryDirectory(prefix="localrun-bench-") as folder, _log(self._args.log) as log:
            paths: dict[EngineName, Path] = {
                "llama.cpp": Path(folder) / "llamacpp.npz",
                "localrun": Path(folder) / "localrun.npz",
            }
            reference = Path(folder) / "reference.npz"
            order: tuple[EngineName, EngineName] = ("llama.cpp", "localrun")
            for pair in range(self._args.pairs):
                for engine in order:
                    _status(f"pair {pair + 1} of {self._args.pairs}: {engine}")
                    again = pair == 0 and engine == "llama.cpp"
                    self.runs.append(self._measure(engine, paths[engine], log, again=again))
                if pair == 0:
                    paths["llama.cpp"].rename(reference)
                self._compare(reference, paths["localrun"])

    def _measure(self, engine: EngineName, logits_path: Path, log: Any, *, again: bool) -> Measured:
        while True:
            try:
                return self._one(engine, logits_path, log, again=again)
            except ChildDiedError as error:
                # Not for memory: then a variant that needs less would be another machine's result.
                following = VARIANTS.index(self.variant) + 1
                if engine != "llama.cpp" or error.out_of_memory or self._args.llamacpp or following == len(VARIANTS):
                    raise
                self.variant = VARIANTS[following]
                self.notes.append(f"{error}; continued with {self.variant}")
                _status(self.notes[-1])

    def _one(self, engine: EngineName, logits_path: Path, log: Any, *, again: bool) -> Measured:
        args = self._args
        with contextlib.ExitStack() as stack:
            limit = None
            if self._limit_bytes is not None:
                limit = stack.enter_context(memory_limit.MemoryLimit(self._limit_bytes))
                _drop_from_page_cache(self._files)
            task = Task(
                engine=engine,
                variant=self.variant if engine == "llama.cpp" else "",
                gguf=str(self._gguf),
                model=str(args.model.absolute()),
                prompt_tokens=args.prompt_tokens,
                new_tokens=args.warm_up + args.new_tokens,
                seed=args.seed,
                threads=args.threads,
                ram_bytes=self._ram_bytes(),
                warm_up=args.warm_up,
                warm_rounds=0 if self._streams else args.warm_rounds,
                again=again,
                group=str(limit.folder) if limit is not None else None,
            )
            stack.enter_context(_busy_processes(args.busy))
            return run_child(task, logits_path, log, args.timeout, limit)

    def _ram_bytes(self) -> int | None:
        if self._args.ram is not None or self._limit_bytes is None:
            return None if self._args.ram is None else int(self._args.ram)
        return max(0, self._limit_bytes - self._dense_bytes - OVERHEAD_BYTES)

    def _compare(self, reference: Path, other: Path) -> None:
        import numpy as np

        with np.load(reference) as theirs, np.load(other) as ours:
            n = len(theirs["again"])
            found = logit_agreement.compare(theirs["logits"][-n:], theirs["again"], ours["logits"][-n:])
            self.agreements.append(found)

    @property
    def fault(self) -> str | None:
        """Why the measurement means nothing; None if it counts."""
        faults = [agreement.fault(self._args.min_agreement) for agreement in self.agreements]
        return next((fault for fault in faults if fault is not None), None)

    def summary(self) -> dict[str, float]:
        """Medians, and medians of the ratios within each pair (llama.cpp's time over ours)."""
        theirs = [run for run in self.runs if run.engine == "llama.cpp"]
        ours = [run for run in self.runs if run.engine == "localrun"]
        pairs = list(zip(theirs, ours, strict=True))
        return {
            "llamacpp_decode_ms": statistics.median(run.decode_median_ms for run in theirs),
            "localrun_decode_ms": statistics.median(run.decode_median_ms for run in ours),
            "llamacpp_prefill_s": statistics.median(run.prefill_s for run in theirs),
            "localrun_prefill_s": statistics.median(run.prefill_s for run in ours),
            "decode_ratio": statistics.median(a.decode_median_ms / b.decode_median_ms for a, b in pairs),
            "prefill_ratio": statistics.median(a.prefill_s / b.prefill_s for a, b in pairs),
        }


def _model_files(model: Path) -> tuple[Path, list[Path], int]:
    """The GGUF that llama.cpp opens, all files, and the size of everything that is no expert."""
    from localrun.engine.engine import dense_bytes
    from localrun.quant.checkpoint.kept import KeptSource
    from localrun.quant.open import open_model

    source = open_model(model)
    if isinstance(source, KeptSource):
        raise LocalrunError(
            f"{model}: its experts are in the checkpoint {source.checkpoint}, where llama.cpp can't read them",
            hint="`localrun convert` without --keep-experts makes a GGUF for both",
        )
    files = [Path(path) for path in source.files]
    if not files or files[0].suffix != ".gguf":
        raise LocalrunError(f"{model}: llama.cpp needs a GGUF", hint="`localrun convert` makes one from a checkpoint")
    return files[0].absolute(), files, dense_bytes(source)


def _exceeds_ram(files: Sequence[Path]) -> bool:
    """Repacked weights would have to fit as a whole."""
    from localrun.engine.memory import total_memory

    total = total_memory()
    return total is not None and sum(path.stat().st_size for path in files) > 0.8 * total


def _drop_from_page_cache(files: Sequence[Path]) -> None:
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


@contextlib.contextmanager
def _busy_processes(count: int) -> Iterator[None]:
    """Other programs that compute all the time, at the same priority."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


@contextlib.contextmanager
def _log(path: Path | None) -> Iterator[Any]:
    if path is None:
        yield subprocess.DEVNULL
    else:
        with path.open("w") as file:
            yield file


def _status(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def report(comparison: Comparison) -> list[str]:
    """The table."""
    lines = [
        f"{'engine':<20}{'load s':>8}{'prefill s':>11}{'decode ms':>11}{'best':>9}{'RSS':>12}{'hits':>8}{'read':>12}"
    ]
    for run in comparison.runs:
        hits, misses = (run.counters.get(f"decode_{name}", 0) for name in ("hits", "misses"))
        n_bytes = sum(run.counters.get(f"{phase}_bytes_read", 0) for phase in ("prefill", "decode"))
        name = f"{run.engine} {run.variant}".strip()
        best = min(run.decode_ms[run.warm_up :])
        lines.append(
            f"{name:<20}{run.load_s:>8.1f}{run.prefill_s:>11.2f}{run.decode_median_ms:>11.2f}{best:>9.2f}"
            f"{format_size(run.peak_rss_bytes):>12}"
            + (f"{hits / (hits + misses):>8.1%}{format_size(n_bytes):>12}" if hits + misses else "")
        )
    values = comparison.summary()
    lines += [
        "",
        f"decode : {values['llamacpp_decode_ms']:.2f} -> {values['localrun_decode_ms']:.2f} ms per token, "
        f"ratio {values['decode_ratio']:.2f}",
        f"prefill: {values['llamacpp_prefill_s']:.2f} -> {values['localrun_prefill_s']:.2f} s, "
        f"ratio {values['prefill_ratio']:.2f}",
        *max(comparison.agreements, key=lambda agreement: agreement.typical_kl).lines(),
        *comparison.notes,
    ]
    if comparison.fault is not None:
        lines.append(f"THE ENGINES DISAGREE ({comparison.fault}): these times mean nothing")
    return lines


def parser() -> argparse.ArgumentParser:
    """The options, for the tests too."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", type=Path, help="a GGUF or a converted directory")
    p.add_argument("--prompt-tokens", type=int, default=512)
    p.add_argument("--new-tokens", type=int, default=32)
    p.add_argument(
        "--warm-up", type=int, default=0, metavar="N", help="decode N tokens more, before those that medians count"
    )
    p.add_argument("--pairs", type=int, default=3)
    p.add_argument("--busy", type=int, default=0, metavar="N", help="beside N processes that compute all the time")
    p.add_argument("--threads", type=int, default=0, help="0: one per core")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--memory-limit", type=parse_size, metavar="SIZE", help="of each process, page cache included")
    p.add_argument(
        "--ram", type=parse_size, metavar="SIZE", help="localrun's RAM for experts (default: what the limit leaves)"
    )
    p.add_argument(
        "--llamacpp", choices=VARIANTS, help="which weights llama.cpp repacks (default: the best that works)"
    )
    p.add_argument("--warm-rounds", type=int, default=4, help="most whole prefills before a measurement in RAM")
    p.add_argument(
        "--min-agreement",
        type=float,
        default=0.9,
        help="share of equal argmaxes, where rounding can't change them, below which the result is void",
    )
    p.add_argument("--timeout", type=float, default=1800, metavar="S", help="of one measurement")
    p.add_argument("--log", type=Path, metavar="FILE", help="keep what the processes print")
    p.add_argument("--json", metavar="FILE", help="write everything to this file, - for stdout")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parser().parse_args(argv)
    try:
        comparison = Comparison(args)
        comparison.run()
    except LocalrunError as error:
        print(f"error: {error}", *([f"hint: {error.hint}"] if error.hint else []), sep="\n", file=sys.stderr)
        return 1
    lines = report(comparison)
    if args.json:
        text = json.dumps(_result(args, comparison), indent=1) + "\n"
        if args.json == "-":
            sys.stdout.write(text)
        else:
            Path(args.json).write_text(text)
    print("\n".join(lines), file=sys.stderr if args.json == "-" else sys.stdout)
    return 0 if comparison.fault is None else 1


def _result(args: argparse.Namespace, comparison: Comparison) -> dict[str, Any]:
    from localrun.engine.measure.benchmark import machine

    return {
        "model": str(args.model),
        "options": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        "machine": asdict(machine(args.model)),
        "environment": {key: value for key, value in os.environ.items() if key.startswith(("OMP_", "GOMP_", "NUMBA_"))},
        "notes": comparison.notes,
        "runs": [asdict(run) for run in comparison.runs],
        "summary": comparison.summary(),
        "agreement": [asdict(agreement) for agreement in comparison.agreements],
        "fault": comparison.fault,
    }


if __name__ == "__main__":
    sys.exit(main())
