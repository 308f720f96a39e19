"""Compares what contexts of a model take with what the planner says they would.

    python -m tools.context_bytes MODEL --contexts 4096,131072,1048576 --kv f16,q8_0 --ram 8GiB

Prints a row per context: the planned KV cache, what llama.cpp says that it allocated, how much the process's resident size grew,
and by how much the growth differs from the plan, both with llama.cpp's bookkeeping, which the planner counts as the process's; then
buffers: planned, allocated, and, with `--feed`, how much grew with a token and a batch at the context's end, where they need most.
(On a model whose experts are not all in RAM, their slots grow, too.) Growth counts pages that were touched.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from localrun.engine.engine import Engine
from localrun.engine.llama import Context
from localrun.engine.memory import resident_bytes
from localrun.engine.options import EngineOptions
from localrun.engine.planner.compute_buffers import compute_bytes
from localrun.engine.session import Session
from localrun.units import parse_size

MIB = 1 << 20


class Sizes(logging.Handler):
    """Sums up the buffers that llama.cpp reports."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def mib(self, kind: str) -> float:
        """Of all lines about buffers of this kind."""
        return sum(float(mib) for mib in re.findall(rf"{kind} buffer size = +([0-9.]+) MiB", "\n".join(self.lines)))


@dataclass(frozen=True, slots=True)
class Row:
    """One context, in MiB: cache and buffers as planned, as allocated, and as the resident size grew."""

    n_ctx: int
    kv_type: str
    cache: tuple[float, float, float]
    buffers: tuple[float, float, float]

    def __str__(self) -> str:
        planned, said, grown = self.cache
        return (
            f"| {self.n_ctx} | {self.kv_type} | {planned:.1f} | {said:.1f} | {grown:.1f} | {grown / planned - 1:+.1%} | "
            + " | ".join(f"{mib:.1f}" for mib in self.buffers)
            + " |"
        )


def measure(engine: Engine, n_ctx: int, kv_type: str, *, feed: bool) -> Row:
    """Makes a context, perhaps feeds a token and a batch at its end, and frees it."""
    plan, options = engine.plan, replace(engine.options, kv_type=kv_type)
    assert plan is not None
    handler, log = Sizes(), logging.getLogger("llama.cpp")
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    gc.collect()
    _trim()
    before = resident_bytes()
    try:
        context = Context(
            engine._loaded.model, options, n_ctx=n_ctx, n_threads=engine.facts.n_threads, all_logits=False
        )
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
    grown = resident_bytes() - before
    context.small_operations, used = True, 0
    with Session(engine, context) as session:
        if feed:
            batch = min(options.n_batch, n_ctx // 2)
            session._tokens = [0] * (n_ctx - batch - 2)
            session.feed([1])
            session.feed([1] * batch)
            used = resident_bytes() - before - grown
    n_batch = min(options.n_batch, n_ctx)
    return Row(
        n_ctx,
        kv_type,
        (plan.sizes.kv_bytes(n_ctx, kv_type, n_batch) / MIB, handler.mib("KV") + handler.mib("state"), grown / MIB),
        (compute_bytes(plan.sizes, n_ctx, n_batch) / MIB, handler.mib("compute"), used / MIB),
    )


def _trim() -> None:
    """Returns freed memory to the system, where the allocator can: else it would serve the next context unseen."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument(
        "--contexts", type=lambda text: [int(n) for n in text.split(",")], default=[4096, 32768, 131072]
    )
    parser.add_argument("--kv", default="f16,q8_0", help="types of the cache, separated by commas")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--ram", type=parse_size, help="as localrun's; contexts come on top")
    parser.add_argument("--feed", action="store_true", help="compute with each context")
    args = parser.parse_args(arguments)
    options = EngineOptions(n_ctx=min(args.contexts), n_batch=args.batch, gpu="none", ram_bytes=args.ram)
    print("| context | cache | planned, MiB | allocated | resident | off | buffers planned | allocated | touched |")
    print("|---|---|---|---|---|---|---|---|---|")
    with Engine.open(args.model, options, learn=False) as engine:
        engine.session().close()  # what the first one alone brings
        for n_ctx in args.contexts:
            for kv_type in args.kv.split(","):
                print(measure(engine, n_ctx, kv_type, feed=args.feed), flush=True)


if __name__ == "__main__":
    main()
