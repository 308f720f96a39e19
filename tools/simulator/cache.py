"""Replays routing traces through replacement policies: hit rates by cache size.

Traces are recorded by the engine (`localrun.offload.cache.trace`) or synthetic (`traces`).

    python -m tools.simulator.cache --synthetic flash
    python -m tools.simulator.cache run.trace --budgets 0.1,0.2,0.4 --policies lru,s3fifo,belady --json result.json

All policies see the whole trace; what happens in its first part (`--warm-up`) is not counted, and the profile of `lru+pin` is
learned there and nowhere else. Figures are of distinct experts per layer call, as the engine's own telemetry counts them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from localrun.errors import LocalrunError
from localrun.offload.cache.trace import TraceHeader, TraceRecorder
from localrun.units import parse_rate, parse_size
from tools.simulator.estimates import RECIPES, replay_estimated
from tools.simulator.policies import POLICIES, Belady, Lru, PinnedLru, Policy
from tools.simulator.replay import learn, replay, replay_engine, replay_per_layer, steps_of
from tools.simulator.trace_file import Trace, TracedCall
from tools.simulator.traces import Workload, synthetic_calls

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

NAMES = (ENGINE, *POLICIES, LRU_TAIL, LRU_PER_LAYER, *RECIPES, "belady")


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
    calls: Sequence[TracedCall],
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
        elif name in RECIPES:
            outcome = replay_estimated(calls, header, n_slots, RECIPES[name], warm_up=n_warm)
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


def table(rows: Sequence[Row], expert_bytes: int | None, drive_bytes_per_s: float | None) -> str:
    """Hit rates, one line per policy, one column per budget; below it what the best real policy means in bytes."""
    shares = sorted({row.share for row in rows})
    names = list(dict.fromkeys(row.policy for row in rows))
    cell = {(row.policy, row.share): row for row in rows}
    lines = [f"{'hit rate':<24}" + "".join(f"{share:>9.0%}" for share in shares)]
    lines += [f"{name:<24}" + "".join(f"{cell[name, share].hit_rate:>9.3f}" for share in shares) for name in names]
    if expert_bytes:
        shown = next((name for name in names if name == "lru"), names[0])
        gb = [cell[shown, share].misses_per_token * expert_bytes / 1e9 for share in shares]
        lines += ["", f"{'GB/token':<24}" + "".join(f"{value:>9.2f}" for value in gb) + f"   ({shown})"]
        if drive_bytes_per_s:
            tokens_per_s = "".join(
                f"{drive_bytes_per_s / 1e9 / value if value else float('inf'):>9.2f}" for value in gb
            )
            at = f"at {drive_bytes_per_s / 1e9:g} GB/s, if the drive is the only limit"
            lines.append(f"{'tokens/s':<24}{tokens_per_s}   ({at})")
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
    """This tool's options."""
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
    p.add_argument(
        "--drive-rate", type=parse_rate, metavar="RATE", help="also print the tokens/s that such a drive allows"
    )
    p.add_argument("--json", help="write the result to this file, - for stdout")
    p.add_argument("--plot", type=Path, help="write a picture (needs matplotlib)")
    return p


def load(args: argparse.Namespace) -> tuple[TraceHeader, list[TracedCall], int | None]:
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
    print(table(rows, expert_bytes, args.drive_rate))
    print(f"\n{text_plot(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
