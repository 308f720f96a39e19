"""Simulates tokens per second of other machines: routing traces through the engine's cache code, with modelled resource times.

    python -m tools.simulator.box --model flash --tokens 800 --prompt-tokens 256
    python -m tools.simulator.box --model flash --base q2_k --boxes "24 GB GPU, 64 GB"
    python -m tools.simulator.box --model slice.lr --trace run.trace --ram 3GiB --drive-rate 1.7GB/s --memory-rate 25GB/s

Every layer call of the trace goes through `localrun.offload.cache.slots` with as many slots as the planner finds room for, at
the model's full number of experts. A call then takes what its parts take: reads of what was missing run while the experts that
are there are computed, those read are computed afterwards, a GPU computes its experts beside the CPU. The rates are the
planner's (`speed.py`); the hit rate is not, it comes out of the replay. What the planner itself predicts stands beside it.

The GPU's experts are the hottest of the trace's first part, for the whole rest: a bound from below on what exchanging them gives.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from localrun.engine.planner import speed
from localrun.engine.planner.boxes import BOXES
from localrun.engine.planner.hardware import Hardware, detect
from localrun.engine.planner.plan import Plan, PlanOptions, resident_shares
from localrun.engine.planner.planner import make_plan
from localrun.engine.planner.sizes import ModelSizes, format_of, sizes_of
from localrun.engine.planner.speed import slowest
from localrun.errors import BudgetError, LocalrunError
from localrun.offload.cache.profile import Key
from localrun.offload.cache.trace import TraceHeader
from localrun.units import parse_rate, parse_size
from tools.simulator.replay import Step, engine_misses, learn, steps_of
from tools.simulator.trace_file import Trace, TracedCall
from tools.simulator.traces import Workload, synthetic_calls

DISK_SHARE = 0.75
"""Of the drive's rate that single misses reach, where nothing is read ahead."""

READ_START_S = 0.2e-3
"""Until the first piece of a miss has arrived."""


@dataclass(frozen=True, slots=True)
class Result:
    """One box.

    Attributes:
        hit_rate: of distinct experts per decode call, GPU and RAM together.
        decode, prefill: tokens per second; prefill None without a prompt in the counted part.
        disk_gb: read per decoded token.
        planned_low, planned, planned_high: what the planner says of decode.
    """

    box: str
    slots: int
    gpu_slots: int
    hit_rate: float
    decode: float
    prefill: float | None
    disk_gb: float
    planned_low: float
    planned: float
    planned_high: float


@dataclass(slots=True)
class _Sums:
    seconds: float = 0.0
    tokens: int = 0
    hits: int = 0
    misses: int = 0


def simulate(
    name: str, sizes: ModelSizes, plan: Plan, calls: Sequence[TracedCall], header: TraceHeader, *, warm_up: float
) -> Result:
    """Replays a trace on the plan's machine.

    Args:
        warm_up: part of the trace that fills the caches, names the GPU's experts, and is not counted.
    """
    assert plan.decode is not None
    n_warm = int(warm_up * len(calls))
    at = plan.placement
    on_gpu = (
        frozenset(learn(calls[: max(1, n_warm)], header).hottest(at.gpu_experts)) if at.gpu_experts else frozenset()
    )
    steps = steps_of(calls)
    in_ram = [replace(s, keys=tuple(k for k in s.keys if k not in on_gpu)) for s in steps]
    clock = _Clock(sizes, plan)
    decode, prefill = _Sums(), _Sums()
    replay = engine_misses(in_ram, header, max(at.ram_experts, 1))
    for index, (step, rest, missing, call) in enumerate(zip(steps, in_ram, replay, calls, strict=True)):
        if index < n_warm:
            continue
        sums = decode if len(call.ids) == 1 else prefill
        sums.seconds += clock.call(step, rest, missing, call)
        sums.tokens += step.n_tokens
        sums.hits += len(step.keys) - len(missing)
        sums.misses += len(missing)
    return Result(
        box=name,
        slots=at.ram_experts,
        gpu_slots=at.gpu_experts,
        hit_rate=decode.hits / max(1, decode.hits + decode.misses),
        decode=decode.tokens / decode.seconds if decode.tokens else 0.0,
        prefill=prefill.tokens / prefill.seconds if prefill.tokens else None,
        disk_gb=decode.misses * sizes.mean_file_bytes / 1e9 / max(1, decode.tokens),
        planned_low=plan.decode.low.tokens_per_s,
        planned=plan.decode.likely.tokens_per_s,
        planned_high=plan.decode.high.tokens_per_s,
    )


class _Clock:
    """Seconds of a layer call."""

    def __init__(self, sizes: ModelSizes, plan: Plan) -> None:
        machine, at = plan.machine, plan.placement
        self._gpu = slowest([gpu.rates for gpu in machine.gpus])
        shares = resident_shares(sizes, machine, at)
        n_layers = max(1, len(sizes.shape.moe_layers))
        self._token_s = (
            sum(speed.dense_token(sizes, shares, machine, plan.options.position or 0, "f16").values()) / n_layers
        )
        batch = plan.options.n_batch
        position = plan.options.prompt_tokens // 2
        self._prompt_token_s = (
            sum(speed.dense_batch(sizes, shares, machine, batch, position).values()) / n_layers / batch
        )
        self._expert = speed.experts_on(machine, sizes)
        self._file_bytes, self._weights = sizes.mean_file_bytes, 3 * sizes.shape.n_embd * sizes.shape.n_ff
        self._read_s = sizes.mean_file_bytes / speed.drive_bytes_per_s(machine)

    def call(self, step: Step, in_ram: Step, missing: Sequence[Key], call: TracedCall) -> float:
        """One layer call of one token or a batch."""
        n_tokens, n_missing = len(call.ids), len(missing)
        n_gpu = len(step.keys) - len(in_ram.keys)
        read = n_missing * self._read_s / DISK_SHARE + (READ_START_S if n_missing else 0.0)
        if n_tokens == 1:
            present = (len(in_ram.keys) - n_missing) * self._expert.decode_s
            cpu = read + present + n_missing * self._expert.decode_s
            return self._token_s + self._both(cpu, n_gpu * self._file_bytes, n_gpu * self._weights, batch=False)
        share = len(in_ram.keys) / max(1, len(step.keys))
        pairs = call.ids.size * share
        compute = len(in_ram.keys) * self._expert.batch_s + pairs * self._expert.pair_s
        on_gpu = (call.ids.size - pairs) * self._weights
        return n_tokens * self._prompt_token_s + max(read, self._both(compute, 0.0, on_gpu, batch=True))

    def _both(self, cpu_s: float, gpu_bytes: float, gpu_macs: float, *, batch: bool) -> float:
        """Experts on the CPU and on a GPU at once."""
        if self._gpu is None or not gpu_macs:
            return cpu_s
        gpu = self._gpu
        gpu_s = gpu.latency_s + (gpu_macs / gpu.batch_macs_per_s if batch else gpu_bytes / gpu.decode_bytes_per_s)
        return max(cpu_s, gpu_s) + (1 - gpu.overlap) * min(cpu_s, gpu_s)


# --- command line -----------------------------------------------------------------------------------------------------


def boxes(args: argparse.Namespace, sizes: ModelSizes) -> Iterator[tuple[str, Hardware]]:
    """Those of `plan_table`, or the one that the options describe."""
    if args.drive_rate or args.memory_rate or args.ram:
        machine = detect(
            sizes.files,
            n_threads=args.threads,
            probe=not (args.drive_rate and args.memory_rate),
            specs=sizes.specs,
            dense=sizes.dense_format,
        )
        yield "given", machine.given(disk_bytes_per_s=args.drive_rate, memory_bytes_per_s=args.memory_rate)
        return
    wanted = [name.strip() for name in args.boxes.split(";")] if args.boxes else [box.name for box in BOXES]
    for box in BOXES:
        if box.name in wanted:
            yield box.name, box.hardware


def trace_of(args: argparse.Namespace, sizes: ModelSizes) -> tuple[list[TracedCall], TraceHeader]:
    """The recorded trace, or a synthetic one of the model's full size."""
    if args.trace is not None:
        trace = Trace(args.trace)
        return list(trace), trace.header
    shape = (len(sizes.shape.moe_layers), sizes.shape.n_experts, sizes.shape.n_used)
    work = Workload(*shape, args.tokens, args.topic_tokens, args.prompt_tokens, args.batch)
    header = TraceHeader("synthetic", dict.fromkeys(range(shape[0]), shape[1:]), 0.0)
    return synthetic_calls(work, args.seed), header


def table(results: Sequence[Result]) -> str:
    """One line per box."""
    head = f"{'box':<34}{'slots':>7}{'on GPU':>8}{'hits':>8}{'GB/token':>10}{'tokens/s':>10}{'prompt':>9}   planner"
    lines = [head]
    for r in results:
        prefill = f"{r.prefill:9.1f}" if r.prefill is not None else f"{'-':>9}"
        lines.append(
            f"{r.box:<34}{r.slots:>7}{r.gpu_slots:>8}{r.hit_rate:>8.3f}{r.disk_gb:>10.3f}{r.decode:>10.2f}{prefill}"
            f"   {r.planned_low:.2f} to {r.planned_high:.2f}, likely {r.planned:.2f}"
        )
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """This tool's options."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="flash", help="flash, pro, or whatever `localrun plan` takes")
    p.add_argument("--base", help="format of the experts of a model that is yet to be converted")
    p.add_argument("--trace", type=Path, help="a recorded trace of that model; without it a synthetic one")
    p.add_argument("--tokens", type=int, default=800, help="of the synthetic trace")
    p.add_argument("--topic-tokens", type=int, default=0, help="change the topic every so many tokens (0: never)")
    p.add_argument("--prompt-tokens", type=int, default=0, help="each topic begins with a prompt of so many tokens")
    p.add_argument("--batch", type=int, default=512)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--warm-up", type=float, default=0.4, help="part of the trace that is not counted")
    p.add_argument("--boxes", help="names of plan_table's boxes, separated by ;")
    p.add_argument("--ram", type=parse_size, help="RAM for experts on this machine, or the one described")
    p.add_argument("--drive-rate", type=parse_rate, help="such as 1.7GB/s")
    p.add_argument("--memory-rate", type=parse_rate)
    p.add_argument("--threads", type=int, default=0)
    p.add_argument("--context", type=int, default=0)
    p.add_argument("--json", action="store_true")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    results = []
    try:
        sizes = sizes_of(args.model, base=format_of(args.base) if args.base else None)
        calls, header = trace_of(args, sizes)
        for name, machine in boxes(args, sizes):
            started = time.perf_counter()
            options = PlanOptions(ram_bytes=args.ram, n_ctx=args.context, n_batch=args.batch, position=args.tokens // 2)
            try:
                plan = make_plan(sizes, machine, options, suggest=False)
            except BudgetError as error:
                print(f"{name}: {error}", file=sys.stderr)
                continue
            results.append(simulate(name, sizes, plan, calls, header, warm_up=args.warm_up))
            print(f"{name}: {time.perf_counter() - started:.1f} s", file=sys.stderr)
    except LocalrunError as error:
        print(f"error: {error}", *([f"hint: {error.hint}"] if error.hint else []), sep="\n", file=sys.stderr)
        return 1
    if args.json:
        rows: list[dict[str, Any]] = [asdict(result) for result in results]
        print(json.dumps(rows, indent=1))
    else:
        print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
