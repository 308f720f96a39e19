"""Describes a conversion as text and JSON: its plan, calibration results, and what was written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from localrun.units import format_bytes_rate, format_duration, format_size

if TYPE_CHECKING:
    from localrun.api.precision import FormatOptions
    from localrun.engine.measure.choose import PrecisionChoice
    from localrun.quant.checkpoint.mapping import ConversionPlan
    from localrun.quant.convert.report import PlanLine
    from localrun.quant.convert.writing import ConversionResult
    from localrun.quant.precision.solver import CopiesLimit


def describe_choice(choice: PrecisionChoice) -> list[str]:
    """What was learned, and what was decided."""
    from localrun.api.precision import dense_section
    from localrun.quant.precision.report import precision_lines

    summary = choice.importance.summary()
    learned = (
        f"learned from {summary.n_tokens:,} tokens: {summary.n_unused} of {summary.n_experts} experts were never used and get"
        f" their layer's average, {summary.n_rare} rarely used"
    )
    lines = [learned, *(precision_lines(choice.solution) if choice.solution is not None else ())]
    return [*lines, *dense_section(choice.dense)] if choice.dense is not None else lines


def describe(plan: ConversionPlan, options: FormatOptions | None = None) -> list[str]:
    """The plan for people: the source, what each part becomes, and its size."""
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
            f"  {mtp.kind} (mtp.*): {mtp.n_tensors} tensors, {format_size(mtp.n_bytes)}: skipped;"
            " llama.cpp reads draft blocks from a separate GGUF"
        )
    if options is not None and options.target is not None:
        chosen = "types of dense matrices" if plan.options.keep_experts else "base and better copies"
        if options.choose_dense and not plan.options.keep_experts:
            chosen += " and types of dense matrices"
        lines.append(f"output: {chosen} are chosen for the target after measuring them")
        return lines
    lines.append(f"output: {format_size(plan.file_size)} in one GGUF, {len(plan.tensors)} tensors")
    if plan.options.keep_experts:
        lines.append(f"  experts stay in {checkpoint.path} and are read from there: keep it unchanged")
    return lines


def describe_copies(copies: Sequence[CopiesLimit]) -> list[str]:
    """What an overlay will hold; which experts is known once they are measured."""
    return [
        f"  {'smaller' if limit.budget.smaller else 'better'} copies in {limit.budget.type.name} of at most"
        f" {limit.n_copies:,} of {limit.n_experts:,} experts: {format_size(limit.n_bytes)}, up to"
        f" {format_size(limit.copy_bytes)} each"
        for limit in copies
    ]


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


def copies_as_json(copies: Sequence[CopiesLimit]) -> list[dict[str, Any]]:
    """The same for programs."""
    return [
        {
            "type": limit.budget.type.name.lower(),
            "smaller": limit.budget.smaller,
            "most_copies": limit.n_copies,
            "experts": limit.n_experts,
            "copy_bytes": limit.copy_bytes,
            "most_bytes": limit.n_bytes,
        }
        for limit in copies
    ]


def describe_result(result: ConversionResult) -> list[str]:
    rate = result.written_bytes / result.seconds if result.seconds > 0 else 0
    lines = [
        f"wrote {result.path} ({format_size(result.file_bytes)}) in {format_duration(result.seconds)},"
        f" {format_bytes_rate(rate)}"
    ]
    for step, loss in sorted(result.losses.items()):
        lines.append(f"  {step}: relative RMS error {loss.relative_rms:.4%}")
    return lines


def result_as_json(result: ConversionResult) -> dict[str, Any]:
    return {
        "path": str(result.path),
        "output_bytes": result.file_bytes,
        "seconds": round(result.seconds, 3),
        "read_bytes": result.read_bytes,
        "written_bytes": result.written_bytes,
        "relative_rms_error": {step: loss.relative_rms for step, loss in sorted(result.losses.items())},
    }
