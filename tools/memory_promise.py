"""Whether a model takes the memory that was planned for it, while another program allocates and frees some.

    python -m tools.memory_promise MODEL --tokens 2000 --neighbour 2GiB
    python -m tools.memory_promise SLICE --tokens 2000 --neighbour 500MiB --limit 6GiB      # on a machine of that size

Feeds a prompt of one whole batch, which takes the compute buffers, then random tokens one by one or in batches; meanwhile a second
process takes the neighbour's memory, holds it and frees it, over and over. `--limit` puts both into a control group, which
counts as the machine (`tools.memory_limit`). One line of JSON per 50 tokens: what is resident, planned, given back (see
`offload/memory_watch.py`) and available, with the extremes since the line before.

Exit code 1 if the resident size was ever further above the plan, or, once the experts' memory had been filled, further below it
than `--tolerance`, or if the neighbour was killed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from localrun.engine import memory
from localrun.engine.engine import Engine
from localrun.engine.measure.benchmark import random_tokens
from localrun.engine.options import EngineOptions
from localrun.engine.planner.hardware import PROCESS_BYTES
from localrun.engine.planner.plan import Plan
from localrun.errors import LocalrunError
from localrun.units import format_size, parse_size
from tools import memory_limit
from tools.memory_limit import MemoryLimit

LINE_TOKENS = 50
"""At least; a whole batch."""
_SAMPLE_S = 0.1
_NEIGHBOUR = """
import mmap, os, sys, time
size, rate, hold, pause = int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])
parent, step = os.getppid(), 16 << 20
while os.getppid() == parent:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    started = time.monotonic()
    for begin in range(0, size, step):
        end = min(begin + step, size)
        memory[begin:end:4096] = bytes(-(-(end - begin) // 4096))
        if rate:
            time.sleep(max(0.0, started + end / rate - time.monotonic()))
    took = time.monotonic() - started
    print(f"neighbour: {size / 1e9 / took:.2f} GB/s", file=sys.stderr, flush=True)
    time.sleep(hold)
    memory.close()
    time.sleep(pause)
"""


def planned_bytes(plan: Plan) -> int:
    """What a model without a GPU is to take, its process included."""
    at, all_experts = plan.placement, plan.sizes.expert_slot_bytes + plan.sizes.staging_bytes
    experts = all_experts if at.ram_bytes is None else min(at.ram_bytes, all_experts)
    return PROCESS_BYTES + at.dense_bytes + at.kv_bytes + at.compute_bytes + experts


@dataclass(slots=True)
class Extremes:
    """What was seen since the last line, in bytes."""

    most_resident: int = 0
    least_resident: int = 1 << 62
    least_available: int = 1 << 62
    most_given_back: int = 0


@dataclass(slots=True)
class Watcher:
    """Samples this process and the machine; `run` on a thread of its own, until `closing` is set.

    Attributes:
        is_filled: the experts' memory has been full once.
        lock: of the extremes.
    """

    engine: Engine
    extremes: Extremes = field(default_factory=Extremes)
    is_filled: bool = False
    closing: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self) -> None:
        while not self.closing.wait(_SAMPLE_S):
            with self.lock:
                self.sample()

    def sample(self) -> tuple[int, int]:
        """What this process has, and what is free, now."""
        resident, available = memory.resident_bytes(), memory.available_memory() or 0
        given_back = given_back_bytes(self.engine)
        seen = self.extremes
        seen.most_resident = max(seen.most_resident, resident)
        seen.least_available = min(seen.least_available, available)
        seen.most_given_back = max(seen.most_given_back, given_back)
        if self.is_filled:
            seen.least_resident = min(seen.least_resident, resident)
        return resident, available

    def line(self, n_tokens: int, planned: int, started: float) -> dict[str, Any]:
        """Everything since the last line."""
        with self.lock:
            resident, available = self.sample()
            seen, self.extremes = self.extremes, Extremes()
        stats = self.engine.stats()
        # Something had to go: the memory is full, as far as it may be used.
        self.is_filled = self.is_filled or bool(stats["evictions"]) or bool(seen.most_given_back)
        return {
            "tokens": n_tokens,
            "seconds": round(time.monotonic() - started, 1),
            "planned": planned,
            "resident": resident,
            "most_resident": seen.most_resident,
            "least_resident": seen.least_resident if seen.least_resident < 1 << 62 else None,
            "available": available,
            "least_available": seen.least_available,
            "slot_bytes": stats["slot_bytes"],
            "given_back": given_back_bytes(self.engine),
            "most_given_back": seen.most_given_back,
            "hit_rate": round(float(str(stats["hit_rate"])), 3),
        }


def given_back_bytes(engine: Engine) -> int:
    """Of the experts' memory, what the system has."""
    return int(str(engine.stats()["withheld_bytes"]))


def deviation(line: dict[str, Any]) -> float:
    """The furthest from the plan, as a share of it; what was below before the memory had been filled does not count."""
    planned = line["planned"]
    above = max(0.0, line["most_resident"] / planned - 1)
    below = 1 - line["least_resident"] / planned if line["least_resident"] is not None else 0.0
    return float(above if above >= below else -below)


def measure(options: argparse.Namespace) -> bool:
    """Runs; True: the promise was kept."""
    engine_options = EngineOptions(n_ctx=options.context, ram_bytes=options.ram)
    with Engine.open(options.model, engine_options, learn=False) as engine, contextlib.ExitStack() as stack:
        assert engine.plan is not None
        planned = planned_bytes(engine.plan)
        session = stack.enter_context(engine.session())
        tokens = random_tokens(options.tokens, engine.facts.n_vocab, seed=1)
        print(f"planned {format_size(planned)}, {memory.describe()}", file=sys.stderr)
        watcher = Watcher(engine)
        thread = threading.Thread(target=watcher.run, daemon=True)
        thread.start()
        stack.callback(thread.join)
        stack.callback(watcher.closing.set)
        habits = [str(n) for n in (options.neighbour, options.rate, options.hold, options.pause)]
        neighbour = subprocess.Popen([sys.executable, "-c", _NEIGHBOUR, *habits])
        stack.callback(neighbour.wait)
        stack.callback(neighbour.kill)
        session.feed(random_tokens(engine.facts.n_batch, engine.facts.n_vocab, seed=2))
        started, worst, least = time.monotonic(), 0.0, 1 << 62
        n_line = max(LINE_TOKENS, options.batch)
        for first in range(0, len(tokens), n_line):
            end = min(first + n_line, len(tokens))
            for at in range(first, end, options.batch):
                batch = tokens[at : min(at + options.batch, end)]
                if session.position + len(batch) > session.n_ctx:
                    session.reset()
                session.feed(batch)
            line = watcher.line(end, planned, started)
            print(json.dumps(line), flush=True)
            worst, least = max(worst, deviation(line), key=abs), min(least, line["least_available"])
        killed = neighbour.poll() is not None
    print(
        f"{len(tokens)} tokens in {time.monotonic() - started:.0f} s: at most {worst:+.1%} from the plan, at least "
        f"{format_size(least)} available" + (", the neighbour was killed" if killed else ""),
        file=sys.stderr,
    )
    return not killed and abs(worst) <= options.tolerance


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="memory_promise", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=1, help="tokens fed at a time (1)")
    parser.add_argument("--ram", type=parse_size, help="for experts; default: as the plan chooses")
    parser.add_argument("--neighbour", type=parse_size, default=2 << 30, help="memory of the other program (2GiB)")
    parser.add_argument(
        "--rate",
        type=parse_size,
        default=10**9,
        help="bytes per second at which it takes it (1GB); 0: as fast as it can",
    )
    parser.add_argument("--hold", type=float, default=20.0, help="seconds that it keeps it (20)")
    parser.add_argument("--pause", type=float, default=20.0, help="seconds that it does without (20)")
    parser.add_argument("--limit", type=parse_size, help="memory of both together: a control group; needs root")
    parser.add_argument("--tolerance", type=float, default=0.03, help="share of the plan (0.03)")
    options = parser.parse_args(arguments)
    try:
        with contextlib.ExitStack() as stack:
            if options.limit is not None:
                limit = stack.enter_context(MemoryLimit(options.limit))
                stack.callback(memory_limit.leave, limit.folder)
                memory_limit.join(limit.folder)
            return 0 if measure(options) else 1
    except LocalrunError as error:
        print(f"error: {error}", *([f"hint: {error.hint}"] if error.hint else []), sep="\n", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
