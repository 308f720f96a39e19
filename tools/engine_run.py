"""One measurement of one engine in a process of its own, for `bench_vs_llamacpp`: the task, the process, and what comes back."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from localrun.errors import LocalrunError
from tools import memory_limit

EngineName = Literal["llama.cpp", "localrun"]

AGAIN_TOKENS = 64
"""Most positions at which llama.cpp is compared with itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a child measures; travels as JSON.

    Attributes:
        gguf: what llama.cpp opens.
        model: what localrun opens.
        warm_rounds: prefills before the measurement until localrun misses nothing any more; 0: a few tokens only.
        warm_up: the first of the new tokens, which medians leave out.
        again: compute the tokens once more after the measurement, rounded differently, to see what that does to the logits.
    """

    engine: EngineName
    variant: str
    gguf: str
    model: str
    prompt_tokens: int
    new_tokens: int
    seed: int
    threads: int
    ram_bytes: int | None
    warm_rounds: int
    warm_up: int
    again: bool
    group: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What came back from one child.

    Attributes:
        decode_ms: of each new token, the first `warm_up` included.
    """

    engine: EngineName
    variant: str
    load_s: float
    prefill_s: float
    decode_ms: list[float]
    warm_up: int
    rss_bytes: int
    peak_rss_bytes: int
    counters: dict[str, float] = field(default_factory=dict)

    @property
    def decode_median_ms(self) -> float:
        return statistics.median(self.decode_ms[self.warm_up :])


class ChildDiedError(LocalrunError):
    """A measurement ended by a signal.

    Attributes:
        out_of_memory: the kernel ended it because of the limit.
    """

    def __init__(self, message: str, *, out_of_memory: bool) -> None:
        super().__init__(message, hint="--log FILE keeps what the process printed")
        self.out_of_memory = out_of_memory


# --- in the child -----------------------------------------------------------------------------------------------------


def child(task: Task, logits_path: Path) -> Measured:
    """One engine's measurement, in a fresh process."""
    if task.group is not None:
        memory_limit.join(Path(task.group))
    import numpy as np

    from localrun.engine import memory
    from localrun.engine.measure.benchmark import peak_resident_bytes, random_tokens

    started = time.perf_counter()
    with _open(task) as engine:
        load_s = time.perf_counter() - started
        session = engine.session()
        n_vocab = engine.facts.n_vocab
        _warm_up(engine, session, task)
        tokens = random_tokens(task.prompt_tokens + task.new_tokens, n_vocab, task.seed)
        before = _counters(engine)
        start = time.perf_counter()
        session.feed(tokens[: task.prompt_tokens])
        rows = [session.logits]
        prefill_s = time.perf_counter() - start
        between = _counters(engine)
        decode_ms = []
        for token in tokens[task.prompt_tokens :]:
            start = time.perf_counter()
            session.feed([token])
            rows.append(session.logits)
            decode_ms.append(1e3 * (time.perf_counter() - start))
        after = _counters(engine)
        counters = {
            f"{phase}_{name}": new[name] - old[name]
            for phase, old, new in (("prefill", before, between), ("decode", between, after))
            for name in new
        }
        measured = Measured(
            engine=task.engine,
            variant=task.variant,
            load_s=load_s,
            prefill_s=prefill_s,
            decode_ms=decode_ms,
            warm_up=task.warm_up,
            rss_bytes=memory.resident_bytes(),
            peak_rss_bytes=peak_resident_bytes(),
            counters=counters,
        )
        session.close()
        again = {"again": _again(engine, tokens)[-len(rows) :]} if task.again else {}
        np.savez(logits_path, logits=np.stack(rows), **again)
        return measured


def _again(engine: Any, tokens: Sequence[int]) -> Any:
    """(up to `AGAIN_TOKENS`, n_vocab) logits after the last tokens, computed as one batch.

    Batches alone may change nothing: at first all sums are the same. A BF16 cache has 8 significant bits, as rounded activations
    have; both programs round those alike, except for their scales.
    """
    import numpy as np

    engine.options = replace(engine.options, kv_type="bf16")
    with engine.session(all_logits=True) as session:
        before = len(tokens) - min(len(tokens), AGAIN_TOKENS)
        if before:
            session.feed(tokens[:before])
        return np.concatenate(list(session.feed_all_logits(tokens[before:])))


def _open(task: Task) -> Any:
    from localrun.engine.engine import Engine
    from localrun.engine.options import DEFAULT_BATCH, EngineOptions

    n_ctx = max(1024, task.prompt_tokens + task.new_tokens)
    options = EngineOptions(n_ctx=n_ctx, n_batch=DEFAULT_BATCH, n_threads=task.threads, ram_bytes=task.ram_bytes)
    if task.engine == "localrun":
        return Engine.open(task.model, options, learn=False)
    from localrun.engine.measure.stock import open_stock

    return open_stock(Path(task.gguf), options, task.variant)


def _warm_up(engine: Any, session: Any, task: Task) -> None:
    """A few tokens, so that code is compiled; then, where all fits into RAM, whole prefills until nothing is read any more."""
    from localrun.engine.measure.benchmark import random_tokens

    some = random_tokens(6, engine.facts.n_vocab, task.seed + 1)
    session.feed(some[:4])
    for token in some[4:]:
        session.feed([token])
    session.reset()
    for round_ in range(task.warm_rounds if task.engine == "localrun" else min(1, task.warm_rounds)):
        misses = _counters(engine).get("misses", 0)
        session.feed(random_tokens(session.n_ctx, engine.facts.n_vocab, task.seed + 2 + round_))
        session.reset()
        if _counters(engine).get("misses", 0) == misses:
            break
    session.reset()


def _counters(engine: Any) -> dict[str, float]:
    stats = engine.stats()
    names = ("hits", "misses", "bytes_read", "wait_s", "compute_s", "total_s")
    return {name: stats[name] for name in names if name in stats}


# --- in the parent ----------------------------------------------------------------------------------------------------


def run_child(
    task: Task, logits_path: Path, log: Any, timeout_s: float, limit: memory_limit.MemoryLimit | None
) -> Measured:
    """Starts a measurement and waits for it.

    Raises:
        ChildDiedError: a signal ended it.
        LocalrunError: it failed and said why.
    """
    command = [sys.executable, "-m", "tools.engine_run", json.dumps(asdict(task)), str(logits_path)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        cwd=Path(__file__).resolve().parent.parent,
        env={**os.environ, "GGML_NO_BACKTRACE": "1"},  # ggml would start a debugger when it aborts
    )
    try:
        out, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise LocalrunError(f"{task.engine} took longer than {timeout_s:.0f} s", hint="give --timeout") from None
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    if process.returncode < 0:
        killed = limit is not None and limit.out_of_memory_kills() > 0
        cause = "was killed: out of memory" if killed else f"ended by signal {-process.returncode}"
        raise ChildDiedError(f"{task.engine} ({task.variant}) {cause}", out_of_memory=killed)
    answer = json.loads(out.splitlines()[-1]) if out.strip() else {"error": f"exit code {process.returncode}"}
    if "error" in answer:
        raise LocalrunError(f"{task.engine}: {answer['error']}", hint=answer.get("hint"))
    return Measured(**answer)


def main(task: str, logits_path: Path) -> int:
    try:
        print(json.dumps(asdict(child(Task(**json.loads(task)), logits_path))))
        return 0
    except LocalrunError as error:
        print(json.dumps({"error": str(error), "hint": error.hint}))
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
