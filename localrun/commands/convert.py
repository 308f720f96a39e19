"""`localrun convert SRC DST`: an official checkpoint becomes a directory that localrun and llama.cpp run.

Talks to people (stderr) and programs (`--json`, stdout); the work is `localrun.quant.convert`'s.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localrun.commands.output import Output
from localrun.errors import UsageError
from localrun.units import format_duration, format_size

if TYPE_CHECKING:
    from localrun.quant.conversion_report import PlanLine
    from localrun.quant.convert import ConversionResult, Progress
    from localrun.quant.plan import ConversionPlan

DENSE_CHOICES = ("q8_0", "q6_k", "q5_k", "q4_k", "bf16", "f32")
BASE_CHOICES = (
    *("mxfp4", "q8_0", "q6_k", "q5_k", "q4_k", "iq4_xs", "q3_k", "iq3_s", "iq3_xxs"),
    *("q2_k", "iq2_s", "iq2_xs", "iq2_xxs", "bf16", "f32"),
)
"""Repeated from `quant.plan`, so that `--help` need not load it; a test compares them."""

EXAMPLES = """\
examples:
  localrun convert ~/downloads/DeepSeek-V4-Flash ~/models/v4-flash
  localrun convert ~/downloads/DeepSeek-V4-Flash ~/models/v4-flash --dense bf16 --dry-run
"""

_BAR_WIDTH = 30
_LINE_SECONDS = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `localrun convert`."""
    parser.epilog = EXAMPLES
    parser.add_argument("source", metavar="SRC", type=Path, help="checkpoint directory: config.json and safetensors")
    parser.add_argument(
        "target", metavar="DST", type=Path, help="directory to write; a killed run goes on where it was"
    )
    parser.add_argument(
        "--dense",
        choices=DENSE_CHOICES,
        default="q8_0",
        metavar="TYPE",
        help="type of FP8 attention and shared-expert matrices: q8_0 (default), smaller: q6_k, q5_k, q4_k, exact: bf16, f32",
    )
    parser.add_argument(
        "--base",
        choices=BASE_CHOICES,
        default=None,
        metavar="TYPE",
        help="type of the experts: mxfp4 (default for FP4 checkpoints, exact), q8_0 (default for FP8), smaller:"
        " q4_k, iq4_xs, q3_k, iq3_s, iq3_xxs, q2_k, iq2_s, iq2_xs, iq2_xxs, larger: q5_k, q6_k, bf16, f32",
    )
    parser.add_argument(
        "--jobs", type=int, default=None, metavar="N", help="threads that read, convert and write (8, or one per core)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check the source, print sizes and the plan, write nothing"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON on stdout")


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    from localrun.quant.convert import DEFAULT_JOBS, check_space, check_target, open_checkpoint, write_plan
    from localrun.quant.plan import BASE_TYPES, DENSE_TYPES, PlanOptions, make_plan

    out = Output()
    jobs = DEFAULT_JOBS if args.jobs is None else args.jobs
    if not 1 <= jobs <= 256:
        raise UsageError(f"--jobs {jobs}: expected 1 to 256")
    check_target(args.source, args.target)
    out.status("checking the source")
    checkpoint = open_checkpoint(args.source)
    options = PlanOptions(DENSE_TYPES[args.dense], None if args.base is None else BASE_TYPES[args.base])
    plan = make_plan(checkpoint, options)
    for line in (*(f"warning: {warning}" for warning in plan.warnings), *describe(plan)):
        out.note(line)
    if args.dry_run:
        # The plan first: it is what was asked for, also where the disk turns out to be too small.
        if args.json:
            out.json(plan_as_json(plan))
        needed = check_space(plan, args.target)
        out.note(f"dry run: nothing written; the disk has room for the {format_size(needed)} that are needed")
        return 0
    try:
        result = write_plan(plan, args.target, jobs=jobs, progress=ProgressPrinter(out))
    except KeyboardInterrupt:
        out.note("interrupted; the same command goes on from here")
        raise
    for line in _describe_result(result):
        out.note(line)
    if args.json:
        out.json(_result_as_json(result))
    return 0


def describe(plan: ConversionPlan) -> list[str]:
    """The plan for people: what is there, what becomes of it, how large it gets."""
    from localrun.quant.conversion_report import summarize

    checkpoint, config = plan.checkpoint, plan.checkpoint.config
    lines = [
        f"source: {checkpoint.path}: {checkpoint.n_tensors:,} tensors, {format_size(checkpoint.n_bytes)} in"
        f" {len(checkpoint.shards)} files",
        f"model:  {config.num_hidden_layers} layers, hidden size {config.hidden_size}, {config.n_routed_experts} experts of"
        f" {config.moe_intermediate_size}, {config.num_experts_per_tok} used",
        *(_describe_line(line) for line in summarize(plan)),
    ]
    mtp = checkpoint.mtp
    if mtp is not None:
        lines.append(
            f"  {mtp.kind} (mtp.*): {mtp.n_tensors} tensors, {format_size(mtp.n_bytes)}: left out;"
            " llama.cpp takes drafting blocks from a GGUF of their own"
        )
    lines.append(f"output: {format_size(plan.file_size)} in one GGUF, {len(plan.tensors)} tensors")
    return lines


def _describe_line(line: PlanLine) -> str:
    how = "exact" if line.exact else "rounded"
    return (
        f"  {line.kind:<7} {line.n_tensors:>5} x {line.source:>7} -> {line.target:<6} {how:<8}"
        f" {format_size(line.source_bytes):>12} -> {format_size(line.target_bytes):>12}"
    )


def plan_as_json(plan: ConversionPlan) -> dict[str, Any]:
    """The plan for programs."""
    from localrun.quant.conversion_report import summarize

    mtp = plan.checkpoint.mtp
    return {
        "source": str(plan.checkpoint.path),
        "source_bytes": plan.checkpoint.n_bytes,
        "source_tensors": plan.checkpoint.n_tensors,
        "output_bytes": plan.file_size,
        "output_tensors": len(plan.tensors),
        "steps": [
            {
                "kind": line.kind,
                "from": line.source,
                "to": line.target,
                "tensors": line.n_tensors,
                "source_bytes": line.source_bytes,
                "output_bytes": line.target_bytes,
                "exact": line.exact,
            }
            for line in summarize(plan)
        ],
        "left_out": None if mtp is None else {"kind": mtp.kind, "tensors": mtp.n_tensors, "bytes": mtp.n_bytes},
        "warnings": list(plan.warnings),
    }


def _describe_result(result: ConversionResult) -> list[str]:
    rate = result.written_bytes / result.seconds if result.seconds > 0 else 0
    lines = [
        f"wrote {result.path} ({format_size(result.file_bytes)}) in {format_duration(result.seconds)},"
        f" {rate / 1e9:.2f} GB/s"
    ]
    for step, loss in sorted(result.losses.items()):
        lines.append(f"  {step}: relative RMS error {loss.relative_rms:.4%}")
    return lines


def _result_as_json(result: ConversionResult) -> dict[str, Any]:
    return {
        "path": str(result.path),
        "output_bytes": result.file_bytes,
        "seconds": round(result.seconds, 3),
        "read_bytes": result.read_bytes,
        "written_bytes": result.written_bytes,
        "relative_rms_error": {step: loss.relative_rms for step, loss in sorted(result.losses.items())},
    }


class ProgressPrinter:
    """Progress for people: a bar that redraws itself on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, out: Output) -> None:
        self._out = out
        self._noted_at = 0.0

    def __call__(self, progress: Progress) -> None:
        share = progress.done_bytes / max(1, progress.total_bytes)
        remaining = progress.remaining_s
        left = "" if remaining is None else f", {format_duration(remaining)} left"
        sizes = f"{format_size(progress.done_bytes)} of {format_size(progress.total_bytes)}"
        text = f"{share:4.0%}  {sizes}  {progress.bytes_per_s / 1e9:.2f} GB/s{left}"
        if self._out.err_is_terminal:
            filled = int(share * _BAR_WIDTH)
            self._out.status(f"[{'#' * filled}{'.' * (_BAR_WIDTH - filled)}] {text}")
        elif progress.elapsed_s - self._noted_at >= _LINE_SECONDS:
            self._noted_at = progress.elapsed_s
            self._out.note(text)
