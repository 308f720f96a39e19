"""Replays routing traces through the engine's replacement policies: what a cache of so many experts would hit.

Traces are recorded by the engine (`localrun.offload.cache.trace`) or synthetic. The synthetic router draws each token's experts
from logits of three parts: popularity (falling with the logarithm of the rank), a part that changes slowly from token to token, and
noise. Its two shares and its time scale were fitted to the hit rates published for V4-Flash (one LRU per layer, steady decode of
one topic); got / published at 10, 15, 25 and 30 % resident: 0.583/0.58, 0.670/0.68, 0.768/0.77, 0.800/0.80.

    python -m tools.simulate_cache --synthetic flash
    python -m tools.simulate_cache run.trace --budgets 0.1,0.2,0.4 --policies lru,s3fifo,belady --json result.json

All policies see the whole trace; what happens in its first part (`--warm-up`) is not counted, and the profile of `lru+pin` is
learned there and nowhere else. Figures are of distinct experts per layer call, as the engine's own telemetry counts them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from localrun.alignment import PAGE_BYTES
from localrun.errors import LocalrunError
from localrun.offload.cache.policy import POLICIES, TAIL_TOKENS, Belady, Key, Lru, PinnedLru, Policy
from localrun.offload.cache.profile import RoutingProfile
from localrun.offload.cache.slots import SlotTable
from localrun.offload.cache.trace import Call, Trace, TraceHeader, TraceRecorder
from localrun.units import parse_size

SKEW = 0.48
SLOW_SHARE = 0.40
SLOW_TOKENS = 12.0

SHAPES = {"flash": (43, 256, 6, 13_369_344), "pro": (61, 384, 6, 35_094_528)}
"""Name -> layers, experts, experts per token, bytes of an expert in MXFP4 (17 bytes per 32 weights, three matrices)."""

PIN_SHARE = 0.2
"""Part of the slots that `lru+pin` gives to its profiled set."""

LRU_PER_LAYER = "lru/layer"
"""As most engines do it: the slots divided evenly, one LRU per layer."""

LRU_TAIL = "lru+tail"
"""LRU for which only the last `TAIL_TOKENS` tokens of a batch count as uses."""

ENGINE = "engine"
"""The engine's own slot table, arena and all, with slots of a page."""

NAMES = (ENGINE, *POLICIES, LRU_TAIL, LRU_PER_LAYER, "belady")


# --- synthetic traces -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Workload:
    """A synthetic run.

    Attributes:
        n_layers, n_experts, n_used: shape of the model.
        n_tokens: in all.
        topic_tokens: tokens of one topic; half of the experts change their popularity with the topic. 0: one topic.
        prompt_tokens: of each topic's tokens, so many come first, in prefill calls of `chunk` tokens.
    """

    n_layers: int
    n_experts: int
    n_used: int
    n_tokens: int
    topic_tokens: int = 0
    prompt_tokens: int = 0
    chunk: int = 512
    skew: float = SKEW
    slow_share: float = SLOW_SHARE
    slow_tokens: float = SLOW_TOKENS

    @property
    def topic_starts(self) -> range:
        """First token of each topic."""
        return range(0, self.n_tokens, self.topic_tokens or self.n_tokens)


def route_layer(work: Workload, rng: np.random.Generator) -> npt.NDArray[np.int32]:
    """(n_tokens, n_used) experts of one layer, distinct per token."""
    shape = (work.n_tokens, work.n_experts)
    keep = np.exp(-1 / work.slow_tokens)
    slow = rng.standard_normal(shape, np.float32)
    slow[1:] *= np.sqrt(1 - keep * keep)
    for t in range(1, work.n_tokens):
        slow[t] += keep * slow[t - 1]
    logits = np.sqrt(work.slow_share) * slow
    logits += np.sqrt(1 - work.slow_share) * rng.standard_normal(shape, np.float32)
    bias = work.skew * rng.permutation(popularity(work.n_experts))
    for start in work.topic_starts:
        if start:
            changed = rng.permutation(work.n_experts)[: work.n_experts // 2]
            bias[changed] = bias[rng.permutation(changed)]
        logits[start : start + (work.topic_tokens or work.n_tokens)] += bias
    return np.argpartition(-logits, work.n_used - 1, axis=1)[:, : work.n_used].astype(np.int32)


def popularity(n_experts: int) -> npt.NDArray[np.float64]:
    """Bias by popularity rank: -log(rank), zero mean, unit deviation."""
    curve = -np.log(np.arange(1, n_experts + 1))
    return np.asarray((curve - curve.mean()) / max(curve.std(), 1e-9))


def synthetic_calls(work: Workload, seed: int) -> list[Call]:
    """The calls of a whole run, in the engine's order: all layers of a batch, then the next batch."""
    rng = np.random.default_rng(seed)
    layers = [route_layer(work, rng) for _ in range(work.n_layers)]
    return [Call(layer, ids[batch]) for batch in _batches(work) for layer, ids in enumerate(layers)]


def _batches(work: Workload) -> Iterator[slice]:
    for start, end in itertools.pairwise([*work.topic_starts, work.n_tokens]):
        decode_start = min(end, start + work.prompt_tokens)
        for at in range(start, decode_start, work.chunk):
            yield slice(at, min(at + work.chunk, decode_start))
        for at in range(decode_start, end):
            yield slice(at, at + 1)


# --- replay -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Outcome:
    """Counts of one replay after the warm-up."""

    hits: int
    misses: int
    n_tokens: int

    @property
    def hit_rate(self) -> float:
        """Share of distinct experts per call that were resident."""
        return self.hits / max(1, self.hits + self.misses)

    @property
    def misses_per_token(self) -> float:
        """Experts read per token."""
        return self.misses / max(1, self.n_tokens)


@dataclass(frozen=True, slots=True)
class Step:
    """One call as the cache sees it.

    Attributes:
        keys: its distinct experts, ascending.
        n_tokens: how many tokens it moves the model on.
        tail: those of its experts that its last tokens use; None: all.
    """

    keys: tuple[Key, ...]
    n_tokens: int
    tail: frozenset[Key] | None = None


def steps_of(calls: Iterable[Call]) -> list[Step]:
    """Prepares calls for any number of replays; a call's tokens count with the first layer that the trace names."""
    steps = []
    first_layer = None
    known: dict[Key, Key] = {}  # one tuple per expert instead of one per use
    for call in calls:
        first_layer = call.layer if first_layer is None else first_layer

        def keys_of(ids: npt.NDArray[np.int32], layer: int = call.layer) -> Iterator[Key]:
            return (known.setdefault((layer, e), (layer, e)) for e in np.unique(ids).tolist())

        tail = frozenset(keys_of(call.ids[-TAIL_TOKENS:])) if len(call.ids) > TAIL_TOKENS else None
        steps.append(Step(tuple(keys_of(call.ids)), len(call.ids) if call.layer == first_layer else 0, tail))
    return steps


def replay(steps: Sequence[Step], policy: Policy, n_slots: int, *, warm_up: int = 0, tail: bool = False) -> Outcome:
    """Plays a trace against a cache of `n_slots` equal experts, with the pool's rules.

    A call's experts are protected while it runs. Where they don't all fit, those computed first make room for the rest.

    Args:
        warm_up: steps that are played and not counted.
        tail: of a batch only the last tokens' experts count as used.
    """
    resident: set[Key] = set()
    hits = misses = n_tokens = 0
    for index, step in enumerate(steps):
        protected = set(step.keys)
        missing = []
        for key in step.keys:
            if key not in resident:
                missing.append(key)
            elif not tail or step.tail is None or key in step.tail:
                policy.touch(key)
        if index >= warm_up:
            hits += len(step.keys) - len(missing)
            misses += len(missing)
            n_tokens += step.n_tokens
        for key in missing:
            while len(resident) >= n_slots:
                gone = policy.victim(lambda other, protected=protected: other not in protected)  # type: ignore[misc]
                if gone is None:
                    protected = {key}
                else:
                    resident.discard(gone)
            policy.insert(key, cold=tail and step.tail is not None and key not in step.tail)
            resident.add(key)
    return Outcome(hits, misses, n_tokens)


def replay_engine(steps: Sequence[Step], header: TraceHeader, n_slots: int, *, warm_up: int = 0) -> Outcome:
    """As `replay`, through the engine's own code (`localrun.offload.cache.slots`), whose invariants are checked at the end."""
    hits = misses = n_tokens = 0
    for index, (step, missing) in enumerate(zip(steps, engine_misses(steps, header, n_slots), strict=True)):
        if index >= warm_up:
            hits += len(step.keys) - len(missing)
            misses += len(missing)
            n_tokens += step.n_tokens
    return Outcome(hits, misses, n_tokens)


def engine_misses(steps: Iterable[Step], header: TraceHeader, n_slots: int) -> Iterator[list[Key]]:
    """What each step had to read, with the engine's slot table of `n_slots` equal experts."""
    n_layers, n_experts = max(header.layers) + 1, max(n for n, _ in header.layers.values())
    table = SlotTable(n_slots * PAGE_BYTES, n_layers, n_experts)
    for step in steps:
        found = [table.peek(*key) for key in step.keys]
        pinned = [slot for slot in found if slot is not None]
        for slot in pinned:
            table.pin(slot)
            if step.tail is None or (slot.layer, slot.expert) in step.tail:
                table.touch(slot)
        missing = [key for key, slot in zip(step.keys, found, strict=True) if slot is None]
        for key in missing:
            new = table.reserve(*key, PAGE_BYTES)
            if new is None:  # what was computed makes room
                while pinned:
                    table.unpin(pinned.pop())
                new = table.reserve(*key, PAGE_BYTES)
            assert new is not None
            table.ready(new)
            if step.tail is not None and key not in step.tail:
                table.chill(new)
            table.pin(new)
            pinned.append(new)
        for slot in pinned:
            table.unpin(slot)
        yield missing
    table.check()
    table.close()


def replay_per_layer(steps: Sequence[Step], n_slots: int, *, warm_up: int = 0) -> Outcome:
    """As `replay`, the slots divided evenly among the layers, each with its own LRU."""
    of_layer: dict[int, list[Step]] = {}
    warm: dict[int, int] = {}
    for index, step in enumerate(steps):
        layer = step.keys[0][0]
        of_layer.setdefault(layer, []).append(step)
        warm[layer] = warm.get(layer, 0) + (index < warm_up)
    each = n_slots // len(of_layer)
    parts = [replay(part, Lru(), each, warm_up=warm[layer]) for layer, part in of_layer.items()]
    return Outcome(sum(p.hits for p in parts), sum(p.misses for p in parts), sum(p.n_tokens for p in parts))


def learn(calls: Iterable[Call], header: TraceHeader) -> RoutingProfile:
    """The profile that the engine would have after these calls."""
    profile = RoutingProfile(header.identity, {layer: shape[0] for layer, shape in header.layers.items()})
    for call in calls:
        experts, counts = np.unique(call.ids, return_counts=True)
        starts = np.concatenate([[0], np.cumsum(counts)])
        profile.record(call.layer, experts.astype(np.int32), starts.astype(np.int32), len(call.ids))
    return profile


# --- a study ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Row:
    """One policy at one budget."""

    policy: str
    share: float
    n_slots: int
    hit_rate: float
    misses_per_token: float


def study(
    calls: Sequence[Call],
    header: TraceHeader,
    policies: Sequence[str],
    shares: Sequence[float],
    *,
    warm_up: float,
    pin_share: float = PIN_SHARE,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Every policy at every budget (share of all experts).

    Args:
        warm_up: part of the calls that is not counted and that `lru+pin` learns its profile from.
    """
    n_warm = int(len(calls) * warm_up)
    steps = steps_of(calls)
    floor = max(used for _, used in header.layers.values())
    n_experts = sum(n for n, _ in header.layers.values())
    ranking = learn(calls[:n_warm], header).ranking() if "lru+pin" in policies else []
    rows = []
    for name, share in itertools.product(policies, shares):
        n_slots = max(floor, round(share * n_experts))
        started = time.perf_counter()
        if name == LRU_PER_LAYER:
            n_slots = max(n_slots, floor * len(header.layers))
            outcome = replay_per_layer(steps, n_slots, warm_up=n_warm)
        elif name == ENGINE:
            outcome = replay_engine(steps, header, n_slots, warm_up=n_warm)
        else:
            policy: Policy
            if name == "belady":
                policy = Belady((time, key) for time, step in enumerate(steps) for key in step.keys)
            elif name == "lru+pin":
                policy = PinnedLru(ranking[: int(pin_share * n_slots)])
            else:
                policy = Lru() if name == LRU_TAIL else POLICIES[name]()
            outcome = replay(steps, policy, n_slots, warm_up=n_warm, tail=name == LRU_TAIL)
        rows.append(Row(name, share, n_slots, outcome.hit_rate, outcome.misses_per_token))
        progress(f"{name} at {share:.0%}: {outcome.hit_rate:.3f} ({time.perf_counter() - started:.1f} s)")
    return rows


# --- showing ----------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Row], expert_bytes: int | None, disk_gbps: float | None) -> str:
    """Hit rates, one line per policy, one column per budget; below it what the best real policy means in bytes."""
    shares = sorted({row.share for row in rows})
    names = list(dict.fromkeys(row.policy for row in rows))
    cell = {(row.policy, row.share): row for row in rows}
    lines = ["hit rate     " + "".join(f"{share:>9.0%}" for share in shares)]
    lines += [f"{name:<13}" + "".join(f"{cell[name, share].hit_rate:>9.3f}" for share in shares) for name in names]
    if expert_bytes:
        shown = next((name for name in names if name == "lru"), names[0])
        gb = [cell[shown, share].misses_per_token * expert_bytes / 1e9 for share in shares]
        lines += ["", f"{'GB/token':<13}" + "".join(f"{value:>9.2f}" for value in gb) + f"   ({shown})"]
        if disk_gbps:
            tokens_per_s = "".join(f"{disk_gbps / value if value else float('inf'):>9.2f}" for value in gb)
            lines.append(f"{'tokens/s':<13}{tokens_per_s}   (at {disk_gbps:g} GB/s, if the disk is the only limit)")
    return "\n".join(lines)


def text_plot(rows: Sequence[Row], height: int = 16, width: int = 64) -> str:
    """Hit rate over budget, one letter per policy."""
    names = list(dict.fromkeys(row.policy for row in rows))
    low = min(row.hit_rate for row in rows)
    high = max(max(row.hit_rate for row in rows), low + 1e-6)
    far = max(row.share for row in rows)
    grid = [[" "] * (width + 1) for _ in range(height + 1)]
    for row in rows:
        y, x = round((high - row.hit_rate) / (high - low) * height), round(row.share / far * width)
        letter = chr(ord("a") + names.index(row.policy))
        grid[y][x] = letter if grid[y][x] in (" ", letter) else "*"
    lines = [f"{high - (high - low) * y / height:6.3f} |{''.join(cells)}" for y, cells in enumerate(grid)]
    legend = "  ".join(f"{chr(ord('a') + i)} {name}" for i, name in enumerate(names))
    return "\n".join(
        [*lines, f"{'':6} +{'-' * width}", f"{'':8}0 to {far:.0%} of the experts resident; * several", legend]
    )


def picture(rows: Sequence[Row], path: Path) -> None:
    """The same as a file, by matplotlib.

    Raises:
        LocalrunError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure
    except ImportError as error:
        raise LocalrunError(
            "matplotlib is not installed", hint="leave out --plot: the text plot needs nothing"
        ) from error
    figure = matplotlib.figure.Figure(figsize=(7, 4.5))
    axes = figure.add_subplot(xlabel="resident share of experts", ylabel="hit rate")
    for name in dict.fromkeys(row.policy for row in rows):
        own = sorted((row.share, row.hit_rate) for row in rows if row.policy == name)
        axes.plot([share for share, _ in own], [rate for _, rate in own], marker="o", label=name)
    axes.legend()
    figure.savefig(path)


# --- command line -----------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    names = NAMES
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("trace", nargs="?", type=Path, help="a recorded trace; without it a synthetic one")
    p.add_argument("--synthetic", choices=SHAPES, default="flash", help="shape of the synthetic model")
    p.add_argument("--layers", type=int, help="fewer layers than the model has: faster, same hit rates")
    p.add_argument("--tokens", type=int, default=1000, help="of the synthetic trace")
    p.add_argument("--topic-tokens", type=int, default=0, help="change the topic every so many tokens (0: never)")
    p.add_argument("--prompt-tokens", type=int, default=0, help="each topic begins with a prompt of so many tokens")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--save", type=Path, help="write the synthetic trace to this file")
    p.add_argument("--budgets", default="0.1,0.15,0.25,0.3,0.4,0.5", help="shares of all experts")
    p.add_argument("--policies", default=",".join(names), help=f"of {', '.join(names)}")
    p.add_argument("--pin-share", type=float, default=PIN_SHARE, help="part of the slots that lru+pin pins")
    p.add_argument("--warm-up", type=float, default=0.4, help="part of the trace that is not counted")
    p.add_argument("--expert-bytes", type=parse_size, metavar="SIZE", help="of one expert (known for synthetic ones)")
    p.add_argument("--disk-gbps", type=float, help="also print the tokens/s that such a disk allows")
    p.add_argument("--json", help="write the result to this file, - for stdout")
    p.add_argument("--plot", type=Path, help="write a picture (needs matplotlib)")
    return p


def load(args: argparse.Namespace) -> tuple[TraceHeader, list[Call], int | None]:
    """The trace to replay and the size of an expert, where that is known."""
    if args.trace is not None:
        trace = Trace(args.trace)
        return trace.header, list(trace), args.expert_bytes
    n_layers, n_experts, n_used, expert_bytes = SHAPES[args.synthetic]
    n_layers = args.layers or n_layers
    work = Workload(n_layers, n_experts, n_used, args.tokens, args.topic_tokens, args.prompt_tokens)
    calls = synthetic_calls(work, args.seed)
    header = TraceHeader(f"synthetic-{args.synthetic}", dict.fromkeys(range(n_layers), (n_experts, n_used)), 0.0)
    if args.save is not None:
        with TraceRecorder(args.save, header) as recorder:
            for call in calls:
                recorder.record(call.layer, call.ids)
    return header, calls, args.expert_bytes or expert_bytes


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    policies, shares = args.policies.split(","), [float(share) for share in args.budgets.split(",")]
    unknown = set(policies) - set(NAMES)
    if unknown or not all(0 < share <= 1 for share in shares) or not 0 <= args.warm_up < 1:
        parser().error(f"unknown policy {', '.join(unknown)}" if unknown else "shares must lie between 0 and 1")
    try:
        header, calls, expert_bytes = load(args)
        if not calls:
            raise LocalrunError(f"{args.trace}: the routing trace holds no calls")
        rows = study(
            calls,
            header,
            policies,
            shares,
            warm_up=args.warm_up,
            pin_share=args.pin_share,
            progress=lambda text: print(text, file=sys.stderr),
        )
        if args.plot is not None:
            picture(rows, args.plot)
    except LocalrunError as error:
        print(f"error: {error}", *([f"hint: {error.hint}"] if error.hint else []), sep="\n", file=sys.stderr)
        return 1
    result: dict[str, Any] = {
        "identity": header.identity,
        "layers": len(header.layers),
        "calls": len(calls),
        "warm_up": args.warm_up,
        "pin_share": args.pin_share,
        "expert_bytes": expert_bytes,
        "rows": [asdict(row) for row in rows],
    }
    if args.json == "-":
        json.dump(result, sys.stdout, indent=1)
        print()
        return 0
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    print(table(rows, expert_bytes, args.disk_gbps))
    print(f"\n{text_plot(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
