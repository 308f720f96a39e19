"""`localrun convert SRC DST`: an official checkpoint becomes a directory that localrun and llama.cpp run.

Talks to people (stderr) and programs (`--json`, stdout); the work is `localrun.quant.convert.converter`'s.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localrun.commands import convert_tiers
from localrun.commands import split as splitting
from localrun.commands.convert_output import ConvertOutput
from localrun.errors import DiskSpaceError, LocalrunError, UsageError
from localrun.units import format_duration, format_size

if TYPE_CHECKING:
    from localrun.commands.convert_tiers import FormatOptions
    from localrun.engine.measure.choose import PrecisionChoice
    from localrun.quant.checkpoint.directory import Checkpoint
    from localrun.quant.checkpoint.mapping import ConversionPlan
    from localrun.quant.convert.converter import ConversionResult
    from localrun.quant.convert.report import PlanLine
    from localrun.quant.precision.solver import PrecisionSolution

DENSE_DEFAULT = "q8_0"
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
  localrun convert ~/downloads/DeepSeek-V4-Flash ~/models/v4-small --base q2_k --hot mxfp4:12GiB
  localrun convert ~/downloads/DeepSeek-V4-Flash ~/models/v4-small --hot mxfp4:20GiB     (another overlay, same base)
  localrun convert ~/downloads/DeepSeek-V4-Pro ~/models/v4-pro --target 24GiB-vram,128GiB-ram
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `localrun convert`."""
    parser.epilog = EXAMPLES
    parser.add_argument("source", metavar="SRC", type=Path, help="checkpoint directory: config.json and safetensors")
    parser.add_argument(
        "target_folder", metavar="DST", type=Path, help="directory to write; a killed run goes on where it was"
    )
    parser.add_argument(
        "--dense",
        choices=DENSE_CHOICES,
        default=None,
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
    splitting.add_argument(parser)
    parser.add_argument(
        "--json", action="store_true", help="progress and result for a program: one JSON object a line on stdout"
    )
    convert_tiers.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    out = ConvertOutput(as_json=args.json)
    try:
        return _run(args, out)
    except KeyboardInterrupt:
        out.note("interrupted; the same command goes on from here")
        out.event("interrupted", {})
        raise
    except LocalrunError as error:
        out.failed(error)
        raise
    except OSError as error:
        out.failed(LocalrunError(f"{error.filename or args.target_folder}: {error.strerror or error}"))
        raise


def _run(args: argparse.Namespace, out: ConvertOutput) -> int:
    """Finds out what there is to do."""
    from localrun.quant.convert.converter import DEFAULT_JOBS, LEARNED_NAME
    from localrun.quant.model.manifest import MANIFEST_NAME

    jobs = DEFAULT_JOBS if args.jobs is None else args.jobs
    if not 1 <= jobs <= 256:
        raise UsageError(f"--jobs {jobs}: expected 1 to 256")
    options = convert_tiers.format_options(args, DENSE_DEFAULT)
    if not (args.target_folder / MANIFEST_NAME).is_file():
        return _convert(args, options, jobs, out)
    # An overlay alone can be begun anew; what a target chose must fit the base that is there already.
    if (args.target_folder / LEARNED_NAME).is_dir() and not options.hot and not options.remove_overlay:
        return _complete(args, options, jobs, out)
    if args.split is not None and splitting.is_waiting(args.source, args.target_folder) and not args.dry_run:
        splitting.split(args.target_folder, args.split, out)
        if not options.hot:
            out.event("finished", {"path": str(args.target_folder)})
            return 0
    return _change_overlay(args, options, jobs, out)


def _convert(args: argparse.Namespace, options: FormatOptions, jobs: int, out: ConvertOutput) -> int:
    """Everything from a checkpoint."""
    from localrun.commands.eval import read_text
    from localrun.engine.measure.choose import check_precision_request
    from localrun.quant.checkpoint.mapping import DENSE_TYPES, PlanOptions, make_plan
    from localrun.quant.convert.converter import check_space, check_target, open_checkpoint, write_plan
    from localrun.quant.open import open_model
    from localrun.quant.precision.solver import bytes_for_experts

    if options.remove_overlay:
        raise UsageError(f"{args.target_folder} holds no converted model, so it has no overlay")
    check_target(args.source, args.target_folder)
    out.status("checking the source")
    checkpoint = open_checkpoint(args.source)
    plan = make_plan(checkpoint, PlanOptions(DENSE_TYPES[options.dense], options.base))
    request = convert_tiers.precision_request(args, options)
    if convert_tiers.needs_learning(options, args):
        check_precision_request(open_model(args.source), request)
        if options.target is not None:
            bytes_for_experts(options.target, _dense_bytes(plan))
    for line in (*(f"warning: {warning}" for warning in plan.warnings), *describe(plan, options)):
        out.note(line)
    if args.split is not None:
        splitting.check(plan, args.split, out)
    if args.evaluate is not None:
        read_text(args.evaluate)
    convert_tiers.evaluation_types(args, open_model(args.source).moe_layers if args.evaluate_types else {})
    if args.dry_run:
        # The plan first: it is what was asked for, also where the disk turns out to be too small.
        out.event("plan", plan_as_json(plan))
        needed = check_space(plan, args.target_folder)
        out.note(f"dry run: nothing written; the disk has room for the {format_size(needed)} that are needed")
        out.event("finished", {"path": None})
        return 0
    if options.target is None:
        check_space(plan, args.target_folder)
    choice, plan = _choose(args, checkpoint, options, jobs, plan, out)
    _check_space_for_both(plan, choice.solution if choice is not None else None, args.target_folder)
    _describe_choice(choice, out)
    result = write_plan(plan, args.target_folder, jobs=jobs, progress=out.progress("base"))
    _say_result(result, out)
    return _after_base(args, options, checkpoint, choice, result, jobs, out)


def _choose(
    args: argparse.Namespace,
    checkpoint: Checkpoint,
    options: FormatOptions,
    jobs: int,
    plan: ConversionPlan,
    out: ConvertOutput,
) -> tuple[PrecisionChoice | None, ConversionPlan]:
    """What is learned where something must be, and the plan of the base that follows from it."""
    from localrun.quant.checkpoint.mapping import DENSE_TYPES, PlanOptions, make_plan

    if not convert_tiers.needs_learning(options, args):
        return None, plan
    choice = convert_tiers.learn(args, checkpoint, options, jobs, _dense_bytes(plan), out)
    if choice is None:
        return None, plan
    base = choice.solution.base if choice.solution is not None else options.base
    return choice, make_plan(checkpoint, PlanOptions(DENSE_TYPES[options.dense], base, choice.importance))


def _dense_bytes(plan: ConversionPlan) -> int:
    return sum(tensor.info.n_bytes for tensor in plan.tensors.values() if not tensor.is_experts)


def _after_base(
    args: argparse.Namespace,
    options: FormatOptions,
    checkpoint: Checkpoint,
    choice: PrecisionChoice | None,
    result: ConversionResult,
    jobs: int,
    out: ConvertOutput,
) -> int:
    """Everything that follows once the base is finished; each step finds out whether it is done already."""
    from localrun.quant.convert.overlay import write_overlay

    if args.split is not None and splitting.is_waiting(args.source, args.target_folder):
        splitting.split(args.target_folder, args.split, out)  # before the overlay, which names the base's files
    if choice is not None:
        sections = {"profile": convert_tiers.profile_section(choice)}
        _add_to_manifest(args.target_folder, sections)
        if choice.solution is not None and choice.solution.plan.n_experts:
            overlay = write_overlay(
                checkpoint,
                choice.solution.plan,
                args.target_folder,
                choice.importance,
                jobs=jobs,
                progress=out.progress("overlay"),
                sections=sections,
            )
            _say_result(overlay, out)
    return _finish(args, options, choice, result, out)


def _complete(args: argparse.Namespace, options: FormatOptions, jobs: int, out: ConvertOutput) -> int:
    """The rest of a conversion that was killed after its base was finished: what it learned is still there."""
    from localrun.quant.checkpoint.mapping import DENSE_TYPES, PlanOptions, make_plan
    from localrun.quant.convert.converter import ConversionResult, described_options
    from localrun.quant.convert.journal import describe_changes
    from localrun.quant.convert.overlay import open_overlay_source, read_base

    folder, manifest = args.target_folder, read_base(args.target_folder)
    checkpoint = open_overlay_source(args.source, folder)
    plan = make_plan(checkpoint, PlanOptions(DENSE_TYPES[options.dense], options.base))
    choice, plan = _choose(args, checkpoint, options, jobs, plan, out)
    changes = describe_changes(
        {"options": manifest.options, "identity": manifest.source.get("identity"), "source": str(checkpoint.path)},
        {"options": described_options(plan), "identity": checkpoint.identity, "source": str(checkpoint.path)},
    )
    if changes:
        raise UsageError(
            f"{folder}: an unfinished conversion can't go on: {'; '.join(changes)}",
            hint=f"use the same options; delete {folder} to start again; or give its base better copies by --hot",
        )
    out.note("the base is finished; going on with what comes after it")
    _describe_choice(choice, out)
    size = sum(file.size_bytes for file in manifest.files)
    return _after_base(args, options, checkpoint, choice, ConversionResult(folder, size, 0.0, 0, 0, {}), jobs, out)


def _change_overlay(args: argparse.Namespace, options: FormatOptions, jobs: int, out: ConvertOutput) -> int:
    """Another overlay, or none, for a model that was converted before; the base stays as it is."""
    from localrun.engine.measure.choose import check_precision_request
    from localrun.quant.checkpoint.mapping import BASE_TYPES
    from localrun.quant.convert.overlay import open_overlay_source, read_base, remove_overlay, write_overlay
    from localrun.quant.open import open_model

    folder = args.target_folder
    if options.remove_overlay:
        remove_overlay(folder)
        convert_tiers.remove_report(folder)
        out.note(f"{folder}: the overlay is gone, and the report about it")
        out.event("finished", {"path": str(folder)})
        return 0
    manifest = read_base(folder)
    has = next(iter(open_model(folder).moe_layers.values())).types[0]
    if not options.hot or options.target is not None:
        raise UsageError(
            f"{folder} holds a finished model with a base in {has.name.lower()}",
            hint="--hot TYPE:SIZE gives it another overlay; for anything else choose another directory",
        )
    if options.base is not None and options.base != has:
        raise UsageError(
            f"{folder} has a base in {has.name.lower()}, not {options.base.name.lower()}",
            hint="leave out --base, or choose another directory",
        )
    if args.dense is not None and args.dense != manifest.options.get("dense"):
        raise UsageError(
            f"{folder} has dense matrices in {manifest.options.get('dense')}, not {args.dense}",
            hint="leave out --dense, or choose another directory",
        )
    checkpoint = open_overlay_source(args.source, folder)
    options = replace(options, base=BASE_TYPES[has.name.lower()])
    check_precision_request(open_model(args.source), convert_tiers.precision_request(args, options))
    if args.dry_run:
        out.note("dry run: nothing written")
        out.event("finished", {"path": None})
        return 0
    choice = convert_tiers.learn(args, checkpoint, options, jobs, 0, out)
    assert choice is not None
    assert choice.solution is not None
    _describe_choice(choice, out)
    result = write_overlay(
        checkpoint,
        choice.solution.plan,
        folder,
        choice.importance,
        jobs=jobs,
        progress=out.progress("overlay"),
        sections={"profile": convert_tiers.profile_section(choice)},
    )
    _say_result(result, out)
    return _finish(args, options, choice, result, out)


def _finish(
    args: argparse.Namespace,
    options: FormatOptions,
    choice: PrecisionChoice | None,
    result: ConversionResult,
    out: ConvertOutput,
) -> int:
    """Comparison with the source, report, JSON."""
    from localrun.quant.checkpoint.mapping import DENSE_TYPES
    from localrun.quant.model.manifest import MANIFEST_NAME, read_manifest

    dense = DENSE_TYPES[str(read_manifest(args.target_folder / MANIFEST_NAME).options.get("dense", DENSE_DEFAULT))]
    importance = choice.importance if choice is not None else None
    evaluations = convert_tiers.evaluate(args, args.source, dense, importance, out)
    if choice is not None or evaluations:
        convert_tiers.write_report(args, options, choice, args.source.resolve().name, evaluations)
        out.note(f"report: {args.target_folder / 'report.md'}")
    out.event("finished", _result_as_json(result))
    return 0


def _add_to_manifest(folder: Path, sections: Mapping[str, Mapping[str, object]]) -> None:
    from localrun.quant.model.manifest import MANIFEST_NAME, read_manifest, write_manifest

    write_manifest(replace(read_manifest(folder / MANIFEST_NAME), **sections), folder)  # type: ignore[arg-type]


def _check_space_for_both(plan: ConversionPlan, solution: PrecisionSolution | None, folder: Path) -> None:
    from localrun.quant.convert.converter import check_space

    needed = check_space(plan, folder) + (solution.overlay_bytes if solution is not None else 0)
    existing = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise DiskSpaceError(
            f"{folder}: base and overlay need {format_size(needed)}, the disk has {format_size(free)} free",
            hint=f"free {format_size(needed - free)}, or ask for less",
        )


def _describe_choice(choice: PrecisionChoice | None, out: ConvertOutput) -> None:
    from localrun.quant.precision.report import precision_lines

    if choice is None:
        return
    summary = choice.importance.summary()
    out.note(
        f"learned from {summary.n_tokens:,} tokens: {summary.n_unused} of {summary.n_experts} experts were never used and are"
        f" taken as their layer's average, {summary.n_rare} rarely"
    )
    for line in precision_lines(choice.solution) if choice.solution is not None else []:
        out.note(line)


def _say_result(result: ConversionResult, out: ConvertOutput) -> None:
    for line in _describe_result(result):
        out.note(line)


def describe(plan: ConversionPlan, options: FormatOptions | None = None) -> list[str]:
    """The plan for people: what is there, what becomes of it, how large it gets."""
    from localrun.quant.convert.report import summarize

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
    if options is not None and options.target is not None:
        lines.append("output: base and better copies are chosen for the target after a look at the experts")
        return lines
    lines.append(f"output: {format_size(plan.file_size)} in one GGUF, {len(plan.tensors)} tensors")
    for budget in options.hot if options is not None else ():
        lines.append(f"  and better copies in {budget.type.name}: at most {format_size(budget.n_bytes)}")
    return lines


def _describe_line(line: PlanLine) -> str:
    how = "exact" if line.exact else "rounded"
    return (
        f"  {line.kind:<7} {line.n_tensors:>5} x {line.source:>7} -> {line.target:<6} {how:<8}"
        f" {format_size(line.source_bytes):>12} -> {format_size(line.target_bytes):>12}"
    )


def plan_as_json(plan: ConversionPlan) -> dict[str, Any]:
    """The plan for programs."""
    from localrun.quant.convert.report import summarize

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
