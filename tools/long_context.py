"""Measures tokens and batches far into a context without reading what comes before, on a slice or a whole model.

    python -m tools.make_checkpoint flash DIR --layers 3 --vocab 4096 --set n_routed_experts=16
    localrun convert DIR SLICE
    python -m tools.long_context SLICE --positions 4096,32768,131072 --batches 0,32256 --kv f16,q8_0
    python -m tools.long_context MODEL --positions 4096,131072 --ram 10GiB --new-tokens 8 --rounds 3

A token's cost at a position depends on how many rows attention and the indexer see, not on what they hold, so a session is told
that it has fed so many tokens. The rows that it has not are zeros, but for the indexers' keys: those are random, because equal
scores are sorted faster. Its text makes no sense.

Positions and cache types take turns within one loaded model, so a machine's moods and the experts in RAM are the same for all.
Prints medians and the fastest tenth (on a busy machine the better figure), and where the time went on average.
With `--states`, states are saved and restored at the same positions, too: size, times, by how much memory grew at
most, and whether the next tokens' logits are those that a state in memory gives.
"""

from __future__ import annotations

import argparse
import ctypes
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import llama_cpp as L
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, quantize

from localrun.engine import states
from localrun.engine.engine import Engine
from localrun.engine.llama import Context
from localrun.engine.memory import resident_bytes
from localrun.engine.options import EngineOptions
from localrun.engine.planner.sizes import padded
from localrun.engine.session import Session
from localrun.offload.device.device import expert_device
from localrun.offload.device.layouts import PROCESS
from localrun.offload.kernels.attention import INDEXER
from localrun.quant.model.shape import CSA
from localrun.units import parse_size

BATCH = 512
_SETTLE = 3
"""Tokens after a move that are not counted: the first ones build graphs."""
_RANDOM_KEYS = 4099
"""Different rows of keys; a prime, so no chunk of a power of two repeats."""


def random_keys(kv_type: str, n_values: int, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Some different rows of an indexer's keys, as a cache of that type holds them."""
    values = rng.standard_normal((_RANDOM_KEYS, n_values), np.float32)
    rows: npt.NDArray[np.uint8] = quantize(values, GGMLQuantizationType[kv_type.upper()]).view(np.uint8)
    return rows


class Faked:
    """A session that believes that it has fed many tokens. Owns it; one thread."""

    def __init__(self, engine: Engine, kv_type: str, rng: np.random.Generator) -> None:
        self._engine, self._rng, self._kv_type = engine, rng, kv_type
        facts, options = engine.facts, replace(engine.options, kv_type=kv_type)
        context = Context(engine._loaded.model, options, n_ctx=facts.n_ctx, n_threads=facts.n_threads, all_logits=False)
        context.small_operations = True
        self.session = Session(engine, context)
        self._has_keys = False

    def move_to(self, position: int) -> None:
        """The next tokens come after so many others."""
        context = self.session._context
        L.llama_memory_clear(L.llama_get_memory(context.handle), False)  # the rows stay
        self.session._tokens = [0] * position
        self.session.feed([1])
        if not self._has_keys:
            self._fill_keys()
            self._has_keys = True
        self.session.feed([1] * (_SETTLE - 1))

    def _fill_keys(self) -> None:
        """All indexers' keys; the last one's were read just now, the others' lie before them in the same buffer."""
        fields = ctypes.c_int64 * INDEXER.size
        record = fields.from_address(int(expert_device().process.fields[PROCESS.indexer]))
        plan, n_values, stride = self._engine.plan, record[INDEXER.n_values], record[INDEXER.key_stride]
        assert plan is not None
        n_csa = plan.sizes.shape.n_layers_of(CSA)
        if not n_csa:
            return
        rows = padded(-(-self.session.n_ctx // CSA))
        start, n_rows = record[INDEXER.keys] - (n_csa - 1) * rows * stride, n_csa * rows
        keys = np.ctypeslib.as_array((ctypes.c_uint8 * (n_rows * stride)).from_address(start)).reshape(n_rows, stride)
        some = random_keys(self._kv_type, n_values, self._rng)
        for row in range(0, n_rows, _RANDOM_KEYS):
            keys[row : row + _RANDOM_KEYS] = some[: n_rows - row]


@dataclass
class Samples:
    """What was measured at one place."""

    ms: list[float] = field(default_factory=list)
    parts: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    seconds: float = 0.0
    n_tokens: int = 0

    def add(self, engine: Engine, session: Session, steps: Sequence[int], rng: np.random.Generator) -> None:
        """Feeds batches of these sizes."""
        before = engine.spent()
        for n_tokens in steps:
            tokens = [int(token) for token in rng.integers(0, engine.facts.n_vocab, n_tokens)]
            start = time.perf_counter()
            session.feed(tokens)
            _ = session.logits
            seconds = time.perf_counter() - start
            self.ms.append(1e3 * seconds / n_tokens)
            self.seconds += seconds
            self.n_tokens += n_tokens
        spent = engine.spent() - before
        ours = {
            "attention": spent.attention_s,
            "matrices": spent.matrices_s,
            "experts": spent.experts_s,
            "waiting": spent.waiting_s,
        }
        for name, seconds in ours.items():
            self.parts[name] += seconds

    def __str__(self) -> str:
        rest = self.seconds - sum(self.parts.values())
        parts = ", ".join(f"{name} {1e3 * s / self.n_tokens:.2f}" for name, s in [*self.parts.items(), ("rest", rest)])
        return f"median {np.median(self.ms):8.3f}, fastest tenth {np.percentile(self.ms, 10):8.3f} ms/token; {parts}"


def measure(
    engine: Engine,
    kv_types: Sequence[str],
    places: Mapping[int, Sequence[int]],
    n_rounds: int,
    rng: np.random.Generator,
    *,
    n_warm_up: int,
) -> dict[tuple[int, str], Samples]:
    """Samples by position and cache type.

    Args:
        places: position -> sizes of the batches that are fed there in each round.
        n_warm_up: tokens that are fed before, not counted.
    """
    sessions = {kv_type: Faked(engine, kv_type, rng) for kv_type in kv_types}
    samples: dict[tuple[int, str], Samples] = defaultdict(Samples)
    warm_up = next(iter(sessions.values()))
    warm_up.move_to(min(places, default=0))
    warm_up.session.feed([int(token) for token in rng.integers(0, engine.facts.n_vocab, n_warm_up)])
    for _ in range(n_rounds):
        for position, steps in places.items():
            for kv_type, faked in sessions.items():
                faked.move_to(position)
                samples[position, kv_type].add(engine, faked.session, steps, rng)
    for faked in sessions.values():
        faked.session.close()
    return samples


def measure_states(engine: Engine, kv_type: str, positions: Sequence[int], folder: Path) -> Iterator[str]:
    """A line per position."""
    faked = Faked(engine, kv_type, np.random.default_rng(0))
    session, path = faked.session, folder / f"{kv_type}.state"
    for position in positions:
        faked.move_to(position)
        file_s, file_peak = timed(partial(states.write, session._context, path, engine.state_key, session.tokens))
        memory_s, memory_peak = timed(session.snapshot)
        state = session.snapshot()
        read_s, read_peak = timed(partial(session.restore, path))
        found = next_logits(session)
        load_s, _ = timed(partial(session.restore, state))
        same = all(np.array_equal(a, b) for a, b in zip(found, next_logits(session), strict=True))
        yield (
            f"state at {position:>7} {kv_type:>4}: {path.stat().st_size / 2**20:7.1f} MiB; file: written in {file_s:.2f} s, "
            f"read in {read_s:.2f} s, memory +{max(file_peak, read_peak) / 2**20:.1f} MiB; in memory: saved in {memory_s:.2f} s, "
            f"restored in {load_s:.2f} s, +{memory_peak / 2**20:.1f} MiB; next tokens {'equal' if same else 'DIFFER'}"
        )
        path.unlink()
    session.close()


def next_logits(session: Session) -> list[npt.NDArray[np.float32]]:
    """After each of some tokens."""
    rows = []
    for token in range(4):
        session.feed([token])
        rows.append(session.logits)
    return rows


def timed(action: Callable[[], object]) -> tuple[float, int]:
    """Seconds, and by how many bytes the resident size grew at most (0 where the system does not say)."""
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    before = resident_bytes()
    if clear.exists():
        clear.write_text("5")  # forgets the largest size so far (proc(5))
    start = time.perf_counter()
    action()
    seconds = time.perf_counter() - start
    peak = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if clear.exists() else None
    return seconds, max(0, int(peak[1]) * 1024 - before) if peak else 0


def main(arguments: Sequence[str] | None = None) -> None:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",") if part]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--positions", type=numbers, default=[4096, 32768, 131072], help="of single tokens")
    parser.add_argument("--batches", type=numbers, default=[], help="of batches")
    parser.add_argument("--batch", type=int, default=BATCH, help=f"tokens of a batch ({BATCH})")
    parser.add_argument("--new-tokens", type=int, default=8, help="in each round (8)")
    parser.add_argument("--warm-up", type=int, default=8, help="tokens before all others that are not counted (8)")
    parser.add_argument("--rounds", type=int, default=3, help="times that every place has its turn (3)")
    parser.add_argument("--kv", default="f16", help="types of the cache, separated by commas")
    parser.add_argument("--states", type=Path, metavar="FOLDER", help="save and restore states there")
    parser.add_argument("--ram", type=parse_size, help="as localrun's; the caches of further types come on top")
    args = parser.parse_args(arguments)
    kv_types = args.kv.split(",")
    n_ctx = max([*args.positions, *args.batches]) + args.new_tokens + args.warm_up + 3 * args.batch
    options = EngineOptions(n_ctx=n_ctx, n_batch=args.batch, kv_type=kv_types[0], gpu="none", ram_bytes=args.ram)
    rng = np.random.default_rng(0)
    with Engine.open(args.model, options, learn=False) as engine:
        tokens = {position: [1] * args.new_tokens for position in args.positions}
        batches = {position: [args.batch] for position in args.batches}
        for places, what in (tokens, "a token"), (batches, f"{args.batch} tokens"):
            if args.rounds == 0:
                continue
            warm_up = args.warm_up if places is tokens else 0
            for (position, kv_type), found in measure(
                engine, kv_types, places, args.rounds, rng, n_warm_up=warm_up
            ).items():
                print(f"{what} at {position:>7} {kv_type:>4}: {found}", flush=True)
        for kv_type in kv_types if args.states is not None else ():
            for line in measure_states(engine, kv_type, args.positions, args.states):
                print(line, flush=True)


if __name__ == "__main__":
    main()
