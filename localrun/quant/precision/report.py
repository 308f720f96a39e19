"""The report of a conversion: `report.md` for people, `report.json` for programs, two pictures. Written into the output directory.

Formats the available results (importance, errors per format, the solver's choice, evaluation). Measures nothing.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType

from localrun.atomic import replacing
from localrun.errors import FormatError
from localrun.quant.precision.copies import BetterCopies
from localrun.quant.precision.dense import TYPES, DenseErrors, kind_of
from localrun.quant.precision.error import ErrorTable
from localrun.quant.precision.importance import PRIOR_ROWS, RARE_ROWS, ImportanceSummary
from localrun.quant.precision.pictures import curve_picture, heat_map
from localrun.quant.precision.solver import PrecisionSolution, bits_per_weight
from localrun.units import format_size

REPORT_FORMAT = 1
_EVALUATION = "## Held-out text"
"""The last section."""
REPORT_NAMES = ("report.md", "report.json", "report-curve.svg", "report-errors.svg")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A model on held-out text, against the exact one.

    Attributes:
        name: which model or format.
        n_bytes: of the expert copies used; None: unknown.
    """

    name: str
    n_tokens: int
    perplexity: float
    reference_perplexity: float
    kl_mean: float
    kl_median: float
    kl_p99: float
    top1_agreement: float
    n_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class PrecisionReport:
    """The pieces of a report; None and empty ones are omitted.

    Attributes:
        model: name of the model.
        sizes: label -> bytes, in the order shown ("base", "overlay", "dense", "source").
        options: the user's options, as text.
        evaluations: the finished model first, then formats to compare with.
        text: name of the held-out text.
        dense: what was chosen for the dense matrices, in words.
        dense_types, dense_errors: the choice, and what was measured, by matrix.
    """

    model: str
    sizes: Mapping[str, int]
    options: Mapping[str, str]
    importance: ImportanceSummary | None = None
    errors: ErrorTable | None = None
    solution: PrecisionSolution | None = None
    evaluations: Sequence[Evaluation] = ()
    text: str = ""
    dense: Sequence[str] = ()
    dense_types: Mapping[str, GGMLQuantizationType] = field(default_factory=dict)
    dense_errors: DenseErrors | None = None

    def to_json(self) -> dict[str, Any]:
        """Everything, for `report.json`."""
        value: dict[str, Any] = {
            "format": REPORT_FORMAT,
            "model": self.model,
            "sizes": dict(self.sizes),
            "options": dict(self.options),
        }
        if self.importance is not None:
            value["importance"] = asdict(self.importance)
        if self.errors is not None:
            value["errors"] = self.errors.to_json()
        if self.solution is not None:
            value["tiers"] = _solution_json(self.solution)
        if self.dense_types and self.dense_errors is not None:
            value["dense"] = {
                "types": {name: kind.name.lower() for name, kind in sorted(self.dense_types.items())},
                "errors": self.dense_errors.to_json(),
            }
        if self.evaluations:
            value["evaluation"] = _evaluation_json(self.evaluations, self.text)
        return value

    def markdown(self) -> str:
        """`report.md`."""
        lines = [f"# Conversion report: {_cell(self.model)}", ""]
        lines += [f"* {_cell(name)}: {_cell(value)}" for name, value in self.options.items()]
        lines += ["", "## Sizes", "", "| part | size |", "|---|---|"]
        lines += [f"| {_cell(name)} | {format_size(n)} |" for name, n in self.sizes.items()]
        parts = (
            _importance(self.importance),
            _tiers(self.solution),
            _dense(self),
            _errors(self.errors),
            _evaluation(self.evaluations, self.text),
        )
        for part in parts:
            if part:
                lines += ["", *part]
        return "\n".join(lines) + "\n"

    def write(self, folder: Path) -> list[Path]:
        """Writes the available pieces to `folder`, each file atomically.

        Raises:
            StoreError: it can't be written.
        """
        files = {
            "report.md": self.markdown(),
            "report.json": json.dumps(self.to_json(), indent=1, ensure_ascii=False) + "\n",
        }
        if self.solution is not None:
            files["report-curve.svg"] = curve_picture(self.solution, self.model)
        if self.errors is not None:
            files["report-errors.svg"] = heat_map(self.errors, self.model)
        return [_write(folder / name, text) for name, text in files.items()]


def add_evaluations(folder: Path, evaluations: Sequence[Evaluation], text: str) -> bool:
    """Puts a later comparison into the report in `folder`, in place of an earlier one; False: there is no report.

    Raises:
        FormatError: `report.json` is damaged.
        StoreError: it can't be written.
    """
    for_people, for_programs = folder / "report.md", folder / "report.json"
    if not (for_people.is_file() and for_programs.is_file()):
        return False
    try:
        value = json.loads(for_programs.read_text("utf-8"))
        value["evaluation"] = _evaluation_json(evaluations, text)
        before, _, _ = for_people.read_text("utf-8").partition(f"\n{_EVALUATION}\n")
    except (ValueError, TypeError) as error:
        raise FormatError(
            f"{for_programs}: damaged: {error}", hint="delete it and run the same command again"
        ) from error
    _write(for_people, "\n".join([before.rstrip("\n"), "", *_evaluation(evaluations, text)]) + "\n")
    _write(for_programs, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
    return True


def _write(path: Path, text: str) -> Path:
    with replacing(path) as file:
        file.write(text.encode("utf-8"))
    return path


def _cell(text: str) -> str:
    """Escapes text for a table cell or list item."""
    return " ".join(text.replace("|", "\\|").split())


# --- parts ------------------------------------------------------------------------------------------------------------


def _importance(summary: ImportanceSummary | None) -> list[str]:
    if summary is None:
        return []
    lines = [
        "## Calibration",
        "",
        f"Importance of input channels from {', '.join(map(_cell, summary.datasets)) or 'an unnamed text'}, "
        f"{summary.n_tokens:,} tokens (digest `{summary.digest}`).",
        f"Of {summary.n_experts:,} experts, {summary.n_unused:,} were never used and {summary.n_rare:,} fewer than "
        f"{RARE_ROWS} times. {PRIOR_ROWS:g} rows of the layer's average are mixed into every expert's own, so an unused "
        "one gets the average.",
    ]
    if summary.unused_by_layer:
        named = ", ".join(f"layer {layer}: {n}" for layer, n in summary.unused_by_layer)
        lines.append(f"Never used: {named}.")
    return lines


def precision_lines(solution: PrecisionSolution) -> list[str]:
    """The decision as text, also for the terminal."""
    better = _count(solution.plan)
    named = ", ".join(f"{n:,} in {name}" for name, n in better.items()) or "none"
    lines = [
        f"Base {solution.base.name.lower()} ({format_size(solution.base_bytes)}); {_which(solution)} copies: {named} "
        f"({format_size(solution.overlay_bytes)}).",
        f"Copies used: {format_size(solution.chosen.n_bytes)}, expected error {solution.chosen.error:.6f}.",
    ]
    if solution.streamed_bytes:
        lines.append(
            f"{format_size(solution.streamed_bytes)} don't fit into the target's memory and are streamed from the drive."
        )
    return lines


def curve_lines(solution: PrecisionSolution, *, n_points: int = 9) -> list[str]:
    """Size against expected error as a table, uniform formats and the decision marked."""
    curve = solution.curve
    picked = [curve[round(i * (len(curve) - 1) / max(1, n_points - 1))] for i in range(min(n_points, len(curve)))]
    rows = [(point.n_bytes, point.error, f"best mix over {solution.base.name.lower()}") for point in picked]
    rows += [(point.n_bytes, point.error, f"all {point.label}") for point in solution.uniform]
    rows.append((solution.chosen.n_bytes, solution.chosen.error, "**chosen**"))
    lines = ["| size of used copies | expected error | |", "|---:|---:|---|"]
    return lines + [f"| {format_size(size)} | {error:.6f} | {label} |" for size, error, label in sorted(set(rows))]


def _which(solution: PrecisionSolution) -> str:
    base = bits_per_weight(solution.base)
    smaller = {bits_per_weight(kind) < base for experts in solution.plan.formats.values() for kind in experts.values()}
    return {frozenset({True}): "smaller", frozenset({True, False}): "other"}.get(frozenset(smaller), "better")


def _count(plan: BetterCopies) -> dict[str, int]:
    counts: dict[str, int] = {}
    for by_type in plan.experts_by_type().values():
        for kind, experts in by_type.items():
            counts[kind.name.lower()] = counts.get(kind.name.lower(), 0) + len(experts)
    return counts


def _tiers(solution: PrecisionSolution | None) -> list[str]:
    if solution is None:
        return []
    return [
        "## Precision of the experts",
        "",
        *precision_lines(solution),
        "",
        "Expected error: squared error of the routed experts' outputs relative to their power, weighted by use; mean over layers.",
        "",
        "![size against expected error](report-curve.svg)",
        "",
        *curve_lines(solution),
        "",
        f"| layer | {_which(solution)} copies |",
        "|---:|---|",
        *(
            f"| {layer} | {', '.join(f'{len(experts)} {kind.name.lower()}' for kind, experts in by_type.items())} |"
            for layer, by_type in solution.plan.experts_by_type().items()
        ),
    ]


def _dense(report: PrecisionReport) -> list[str]:
    """By kind of matrix: its types over the layers, and the mean error of each type."""
    errors = report.dense_errors
    if not report.dense_types or errors is None:
        return []
    by_kind: dict[str, list[str]] = {}
    for name in report.dense_types:
        by_kind.setdefault(kind_of(name) or name, []).append(name)
    rows = []
    for kind, names in by_kind.items():
        counts = Counter(report.dense_types[name] for name in names)
        chosen = ", ".join(f"{counts[t]} {t.name.lower()}" for t in TYPES if counts[t])
        means = [
            f"{sum(errors.relative[n][t] for n in names) / len(names):.1e}"
            if all(t in errors.relative[n] for n in names)
            else "-"
            for t in TYPES[:-1]
        ]
        rows.append(f"| {kind} | {chosen} | {' | '.join(means)} |")
    return [
        "## Precision of the dense matrices",
        "",
        *report.dense,
        "",
        "Squared error of a matrix's output relative to its power, mean over layers:",
        "",
        f"| matrices | chosen | {' | '.join(kind.name.lower() for kind in TYPES[:-1])} |",
        f"|---|---|{'---:|' * (len(TYPES) - 1)}",
        *rows,
    ]


def _errors(table: ErrorTable | None) -> list[str]:
    if table is None:
        return []
    kinds = list(next(iter(table.layers.values())).relative)
    rows = (
        "rows from the calibration text"
        if table.real_rows
        else ("random rows with the imatrix's variances (no text was run)")
    )
    return [
        "## Error by format",
        "",
        f"Squared error of an expert's output on {rows}, relative to the layer's mean output power. Measured on "
        f"{table.n_measured:,} of {table.n_experts:,} experts; the others are assumed to have their layer's mean.",
        "",
        "![error by layer and format](report-errors.svg)",
        "",
        f"| layer | {' | '.join(f'{kind.name.lower()} ({bits_per_weight(kind):g} bits)' for kind in kinds)} |",
        f"|---:|{'---:|' * len(kinds)}",
        *(f"| {layer} | {' | '.join(f'{table.mean(layer, kind):.6f}' for kind in kinds)} |" for layer in table.layers),
    ]


def _evaluation(evaluations: Sequence[Evaluation], text: str) -> list[str]:
    if not evaluations:
        return []
    first = evaluations[0]
    return [
        _EVALUATION,
        "",
        f"{_cell(text) or 'Text'}, {first.n_tokens:,} tokens; KL from the exact model in nats; its perplexity is "
        f"{first.reference_perplexity:.4f}.",
        "",
        "| model | experts | perplexity | KL mean | median | 99 % | same top token |",
        "|---|---:|---:|---:|---:|---:|---:|",
        *(
            f"| {_cell(row.name)} | {format_size(row.n_bytes) if row.n_bytes is not None else '-'} | {row.perplexity:.4f} | "
            f"{row.kl_mean:.6f} | {row.kl_median:.6f} | {row.kl_p99:.6f} | {row.top1_agreement:.2%} |"
            for row in evaluations
        ),
    ]


# --- data -------------------------------------------------------------------------------------------------------------


def _evaluation_json(evaluations: Sequence[Evaluation], text: str) -> dict[str, Any]:
    return {"text": text, "models": [asdict(row) for row in evaluations]}


def _solution_json(solution: PrecisionSolution) -> dict[str, Any]:
    return {
        "base": solution.base.name.lower(),
        "base_bytes": solution.base_bytes,
        "overlay_bytes": solution.overlay_bytes,
        "streamed_bytes": solution.streamed_bytes,
        "chosen": asdict(solution.chosen),
        "curve": list(_points(solution.curve)),
        "uniform": list(_points(solution.uniform)),
        "better": solution.plan.to_json(),
    }


def _points(points: Sequence[Any]) -> Iterator[dict[str, Any]]:
    return (asdict(point) for point in points)
