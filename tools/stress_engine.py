"""Random commands to one engine process from several threads, to find hangs, crashes and lost answers.

    python -m tools.stress_engine --steps 5000 --seed 1 [--threads 4] [--model PATH]

Each thread asks, counts, looks at the map, stops, saves and restores states, loads, freezes, closes and kills the engine, as its
random numbers say. Allowed to fail: what a kill, a close or a stop ended. Everything else is a problem: an engine that dies by
itself, an answer without its end, a wrong count, an unexpected exception, a step longer than `PATIENCE_S` (then all stacks are
printed, the engine's into its log). Without `--model` a tiny random model is made. Prints the figures as JSON; exit code 1 with
problems.

What each thread does follows from the seed; how the threads meet does not.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from localrun.engine.options import EngineOptions, SamplingOptions
from localrun.engine.process.process import EngineProcess
from localrun.engine.process.protocol import CountTokens, Delta, Finished, Generate, PromptProgress, Ready
from localrun.errors import EngineDiedError, LocalrunError, StoppedError
from localrun.paths import kernel_dir

PATIENCE_S = 120.0
"""Longest step. Far more than any takes, on a busy machine, too: a load waits for the answers before it."""

OPTIONS = EngineOptions(n_ctx=512, n_batch=64, n_threads=1, ram_bytes=64 << 20)
BIG = 1 << 20
"""Bytes of a large message: a pipe holds 64 KiB."""


@dataclass
class Report:
    """What happened.

    Attributes:
        done: steps by kind.
        failed: steps that ended with an error which they may end with, by kind of error.
        problems: what must not happen; one line each.
        longest_s: longest step by kind.
        deaths: how often the engine's death was told.
    """

    seed: int
    n_threads: int
    done: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    longest_s: dict[str, float] = field(default_factory=dict)
    deaths: int = 0
    elapsed_s: float = 0.0

    def to_json(self) -> dict[str, Any]:
        longest = {kind: round(seconds, 3) for kind, seconds in sorted(self.longest_s.items())}
        return {
            "seed": self.seed,
            "threads": self.n_threads,
            "steps": sum(self.done.values()),
            "elapsed_s": round(self.elapsed_s, 1),
            "done": dict(sorted(self.done.items())),
            "failed": dict(sorted(self.failed.items())),
            "deaths": self.deaths,
            "longest_s": longest,
            "problems": self.problems,
        }


class Stress:
    """One run. Threads share the engine, and each does its share of the steps, which a seed decides; `_lock` guards the report."""

    def __init__(self, model: Path, folder: Path, *, n_steps: int, seed: int, n_threads: int) -> None:
        self._model, self._folder, self._seed = model, folder, seed
        self._n_steps = n_steps
        self._lock = threading.Lock()
        self._begun: dict[int, float] = {}  # thread -> time at which its step began
        self._counts: dict[str, int] = {}  # text -> tokens, as first counted
        self.report = Report(seed, n_threads)
        self.engine = EngineProcess(on_death=self._died)
        self._steps: dict[str, tuple[int, Callable[[random.Random], None]]] = {
            "generate": (28, self._generate),
            "abandon": (8, self._abandon),
            "count": (18, self._count),
            "stats": (18, self._stats),
            "stop": (8, lambda rng: self.engine.stop()),
            "snapshot": (6, self._snapshot),
            "restore": (6, self._restore),
            "big": (4, self._big),
            "load": (2, self._load),
            "freeze": (1, self._freeze),
            "kill": (1, self._kill),
            "close": (1, self._close),
        }

    def run(self) -> Report:
        """All steps, then a last load and answer, which must succeed."""
        started = time.monotonic()
        self._load(random.Random(0))
        threads = [
            threading.Thread(target=self._work, args=(number,), name=f"stress-{number}", daemon=True)
            for number in range(self.report.n_threads)
        ]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            self._watch()
            time.sleep(0.05)
        try:
            self._load(random.Random(0))
            pid = self.engine.pid
            *_, last = self.engine.generate(_question(random.Random(0)))
            if not isinstance(last, Finished):
                self._problem("the last answer has no end")
            self.engine.close()
            if pid is not None and Path(f"/proc/{pid}").exists():
                self._problem("the engine is still there after it was closed")
        except Exception as error:
            self._problem(f"at the end: {error!r}")
        self.report.elapsed_s = time.monotonic() - started
        return self.report

    def _work(self, number: int) -> None:
        rng = random.Random(self._seed * 1000 + number)
        kinds, weights = list(self._steps), [weight for weight, _ in self._steps.values()]
        for _ in range(number, self._n_steps, self.report.n_threads):
            (kind,) = rng.choices(kinds, weights)
            began = self._begun[number] = time.monotonic()
            failed = None
            try:
                self._steps[kind][1](rng)
            except (EngineDiedError, StoppedError, TimeoutError) as error:
                failed = type(error).__name__
            except LocalrunError as error:
                failed = _harmless(error)
                if failed is None:
                    self._problem(f"{kind}: {error!r} {error.hint or ''}")
            except BaseException as error:
                self._problem(f"{kind}: {error!r}")
            del self._begun[number]
            took = time.monotonic() - began
            with self._lock:
                self.report.done[kind] += 1
                self.report.longest_s[kind] = max(took, self.report.longest_s.get(kind, 0.0))
                if failed is not None:
                    self.report.failed[f"{kind}: {failed}"] += 1

    def _problem(self, text: str) -> None:
        with self._lock:
            self.report.problems.append(text[:500])

    def _watch(self) -> None:
        """Ends the program with everybody's stacks if a step takes too long."""
        slowest = min(list(self._begun.values()), default=time.monotonic())
        if time.monotonic() - slowest < PATIENCE_S:
            return
        faulthandler.dump_traceback(sys.stderr)
        if (pid := self.engine.pid) is not None:
            os.kill(pid, signal.SIGABRT)
            time.sleep(2.0)
        print("\n".join(["the engine's log:", *self.engine.log_tail()]), file=sys.stderr)
        print(json.dumps({**self.report.to_json(), "hangs": True}, indent=1))
        os._exit(1)

    def _died(self, error: EngineDiedError) -> None:
        with self._lock:
            self.report.deaths += 1
        if "SIGKILL" not in str(error):
            self._problem(f"the engine died by itself: {error}\n" + "\n".join(self.engine.log_tail()[-30:]))

    # --- steps

    def _load(self, rng: random.Random) -> None:
        *_, last = self.engine.load(self._model, OPTIONS)
        if not isinstance(last, Ready):
            self._problem("a load has no end")

    def _generate(self, rng: random.Random) -> None:
        command = _question(rng)
        events = list(self.engine.generate(command))
        progress = [event for event in events if isinstance(event, PromptProgress)]
        finished = events[-1]
        if not isinstance(finished, Finished):
            self._problem("an answer has no end")
            return
        tokens = [token for event in events for token in getattr(event, "tokens", ())]
        if finished.reason == "length" and len(tokens) != command.max_tokens:
            self._problem(f"{len(tokens)} tokens arrived, {command.max_tokens} were computed")
        if [event.done for event in progress] != sorted(event.done for event in progress):
            self._problem("progress goes back")
        if finished.reason != "stopped" and {event.reused for event in progress} != {finished.timings.reused_tokens}:
            self._problem("progress and timings disagree about what was reused")

    def _abandon(self, rng: random.Random) -> None:
        events = self.engine.generate(_question(rng, max_tokens=200))
        wanted = rng.randrange(4)
        for event in events:
            wanted -= isinstance(event, Delta)
            if wanted <= 0:
                break
        events.close()  # type: ignore[attr-defined]

    def _count(self, rng: random.Random) -> None:
        text = f"{rng.randrange(20)} bottles of beer, " * rng.choice((1, 50, 5000))
        n = self.engine.count_tokens(text, timeout_s=PATIENCE_S / 2)
        with self._lock:
            expected = self._counts.setdefault(text, n)
        if n != expected:
            self._problem(f"a text has {n} tokens, {expected} before")
        self.engine.count(CountTokens(messages=_question(rng).messages), timeout_s=PATIENCE_S / 2)

    def _stats(self, rng: random.Random) -> None:
        stats = self.engine.stats(expert_map=True, timeout_s=PATIENCE_S / 2)
        if stats.experts is not None and len({len(row["where"]) for row in stats.experts["layers"]}) != 1:
            self._problem("the map has rows of different lengths")

    def _snapshot(self, rng: random.Random) -> None:
        self.engine.snapshot(self._folder / f"{rng.randrange(3)}.state")

    def _restore(self, rng: random.Random) -> None:
        self.engine.restore(self._folder / f"{rng.randrange(3)}.state")

    def _big(self, rng: random.Random) -> None:
        """A megabyte there and a megabyte back."""
        with suppress(EngineDiedError, StoppedError):
            try:
                self.engine.restore("/" + "x" * BIG)
            except EngineDiedError:
                raise
            except LocalrunError as error:
                if len(str(error)) < BIG and _harmless(error) is None:
                    raise

    def _freeze(self, rng: random.Random) -> None:
        """Stops the engine for a moment: it neither reads nor writes."""
        if (pid := self.engine.pid) is None:
            return
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            time.sleep(rng.uniform(0, 0.3))
            self.engine.stop()
            os.kill(pid, signal.SIGCONT)

    def _close(self, rng: random.Random) -> None:
        self.engine.close()
        self._load(rng)  # a closed engine has forgotten its model: the others could only fail

    def _kill(self, rng: random.Random) -> None:
        if (pid := self.engine.pid) is not None:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _question(rng: random.Random, *, max_tokens: int | None = None) -> Generate:
    messages = [{"role": "user", "content": f"Question {rng.randrange(5)}. " * rng.choice((1, 3, 10))}]
    if rng.random() < 0.5:
        messages += [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": f"And {rng.randrange(5)}?"}]
    return Generate(
        messages=tuple(messages),
        sampling=SamplingOptions(temperature=0, seed=1),
        max_tokens=max_tokens or rng.randint(1, 20),
        ignore_eos=True,
    )


def _harmless(error: LocalrunError) -> str | None:
    """What kind of failure another thread's close, load or snapshot explains; None: nothing does."""
    for text in ("no model is loaded", "no model was loaded", "No such file"):
        if text in str(error):
            return text
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--model", type=Path, help="default: a tiny random one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="stress-engine-") as name:
        folder = Path(name)
        os.environ.setdefault("LOCALRUN_KERNEL_DIR", str(kernel_dir()))  # before the cache moves
        os.environ["LOCALRUN_CACHE_DIR"] = os.environ["LOCALRUN_DATA_DIR"] = name
        model = args.model or _tiny_model(folder / "chat.gguf")
        report = Stress(model, folder, n_steps=args.steps, seed=args.seed, n_threads=args.threads).run()
    print(json.dumps(report.to_json(), indent=1))
    return 1 if report.problems else 0


def _tiny_model(path: Path) -> Path:
    from tests.engine.models import write_chat_model

    return write_chat_model(path)


if __name__ == "__main__":
    sys.exit(main())
