"""Measures tokens and batches far into a context without reading what comes before.

    python -m tools.make_checkpoint flash DIR --layers 3 --vocab 4096 --set n_routed_experts=16
    localrun convert DIR SLICE
    python -m tools.long_context SLICE --positions 4096,32768,131072 --batches 0,32256

A token's cost at a position depends on how many rows attention and the indexer see, not on what they hold, so a session is told
that it has fed so many tokens. The rows that it has not are zeros, but for the keys of the last indexer: those are random, because
equal scores are sorted faster. So the model should have one layer of each kind (`--layers 3`), and its text makes no sense.

Prints medians and the fastest tenth (on a busy machine the better figure), and what our kernels took for attention and matrices.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from localrun.engine.engine import Engine
from localrun.engine.options import EngineOptions
from localrun.engine.session import Session
from localrun.offload.device.device import expert_device
from localrun.offload.device.layouts import PROCESS
from localrun.offload.kernels.attention import INDEXER

BATCH = 512
_SETTLE = 6
"""Tokens that are not counted: the first ones build graphs."""


def session_at(engine: Engine, position: int, rng: np.random.Generator) -> Session:
    """A session that believes it has fed so many tokens, and has fed a few."""
    session = engine.session()
    session._tokens = [0] * position
    session.feed([1])
    fields = ctypes.c_int64 * INDEXER.size
    record = fields.from_address(int(expert_device().process.fields[PROCESS.indexer]))
    n_bytes = record[INDEXER.n_keys] * record[INDEXER.key_stride]
    if n_bytes:
        halves = np.ctypeslib.as_array((ctypes.c_uint16 * (n_bytes // 2)).from_address(record[INDEXER.keys]))
        halves[:] = rng.standard_normal(halves.size).astype(np.float16).view(np.uint16)
    session.feed([1] * (_SETTLE - 1))
    return session


def measure(engine: Engine, position: int, steps: Sequence[int], rng: np.random.Generator) -> str:
    """Feeds batches of these sizes at a position; one line of milliseconds per token."""
    session = session_at(engine, position, rng)
    before, ms = engine.spent(), []
    for n_tokens in steps:
        tokens = [int(token) for token in rng.integers(0, engine.facts.n_vocab, n_tokens)]
        start = time.perf_counter()
        session.feed(tokens)
        ms.append(1e3 * (time.perf_counter() - start) / n_tokens)
    spent = engine.spent() - before
    session.close()
    attention, matrices = (1e3 * s / sum(steps) for s in (spent.attention_s, spent.matrices_s))
    return (
        f"median {np.median(ms):8.3f}, fastest tenth {np.percentile(ms, 10):8.3f} ms/token, "
        f"attention {attention:.3f}, matrices {matrices:.3f}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--positions", type=numbers, default=[4096, 32768, 131072], help="of single tokens")
    parser.add_argument("--batches", type=numbers, default=[0, 32256], help=f"of batches of {BATCH} tokens")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--kv", default="f16")
    args = parser.parse_args(arguments)
    n_ctx = max([*args.positions, *args.batches]) + args.new_tokens + 3 * BATCH
    options = EngineOptions(n_ctx=n_ctx, n_batch=BATCH, kv_type=args.kv, gpu="none")
    rng = np.random.default_rng(0)
    with Engine.open(args.model, options, learn=False) as engine:
        for position in args.positions:
            print(f"a token at {position:>7}: {measure(engine, position, [1] * args.new_tokens, rng)}", flush=True)
        for position in args.batches:
            print(f"{BATCH} tokens at {position:>5}: {measure(engine, position, [BATCH] * 2, rng)}", flush=True)


if __name__ == "__main__":
    main()
