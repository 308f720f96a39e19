"""Shows a benchmark: tables for people, JSON for programs, and an SVG picture of where a token's time goes.

The SVG is written by hand: no plotting library in a package that is to run air-gapped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from html import escape
from typing import Any

from localrun.engine.facts import ModelFacts
from localrun.engine.measure.benchmark import FORMAT, Benchmark, Machine, Phase
from localrun.engine.planner.plan import Plan
from localrun.engine.planner.speed import Range
from localrun.units import format_size

PARTS = (
    ("dense", "dense model", "#4477aa"),
    ("compute", "experts", "#228833"),
    ("wait", "waiting", "#aa3377"),
    ("other", "other", "#777777"),
)
"""Field of `Split`, label, colour (Paul Tol's bright scheme, safe for the colour-blind and dark enough for white figures)."""


# --- text -------------------------------------------------------------------------------------------------------------


def headline(facts: ModelFacts, machine: Machine) -> list[str]:
    """What was measured, and on what."""
    model = f"{facts.name}: {format_size(facts.file_bytes)}, {facts.n_layers} layers"
    if facts.n_moe_layers:
        model += (
            f", {facts.n_experts} experts of {format_size(facts.expert_bytes)} in {facts.n_moe_layers} of them, "
            f"{facts.n_experts_used} per token, {format_size(facts.ram_bytes)} of RAM for experts"
        )
    return [model, machine_line(machine)]


def machine_line(machine: Machine) -> str:
    """Everything about the machine in one line."""
    parts = [machine.cpu, f"{machine.n_cores} cores", f"{format_size(machine.ram_bytes)} RAM"]
    if machine.memory_bytes_per_s:
        parts.append(f"memory {machine.memory_bytes_per_s / 1e9:.1f} GB/s")
    if machine.disk is not None and machine.disk.bytes_per_s is not None:
        disk = machine.disk
        parts.append(
            f"drive {machine.disk.bytes_per_s / 1e9:.2f} GB/s ({disk.lanes} reads of {format_size(disk.piece_bytes)})"
        )
    if machine.load_average is not None:
        parts.append(f"load {machine.load_average:.1f}")
    parts += [machine.system, *(f"{name} {version}" for name, version in machine.versions.items())]
    return ", ".join(parts)


def table(result: Benchmark) -> list[str]:
    """One line per phase."""
    head = (
        f"{'phase':<18}{'tokens':>7}{'tokens/s':>10}{'ms/token':>10}{'median':>9}{'p90':>9}"
        f"{'dense':>9}{'experts':>9}{'waiting':>9}{'other':>8}{'hits':>7}{'read':>11}{'GB/s':>7}"
    )
    lines = [head]
    for phase in result.phases:
        lines.append(
            f"{f'{phase.kind} at {phase.context}':<18}{phase.n_tokens:>7}{phase.tokens_per_s:>10.2f}"
            f"{phase.ms_per_token:>10.2f}{_steps(phase)}{_split(phase)}{_reads(phase)}"
        )
    lines += [f"skipped: {text}" for text in result.skipped]
    end = result.phases[-1].rss_bytes if result.phases else 0
    lines.append(
        f"resident: {format_size(result.rss_start_bytes)} after loading, {format_size(end)} at the end, "
        f"{format_size(result.peak_rss_bytes)} at peak"
    )
    return lines


def prediction_lines(result: Benchmark, plan: Plan | None) -> list[str]:
    """What the load's plan says of each phase, and how wrong it is; nothing for models too small to predict."""
    lines = []
    for phase, expected in _predictions(result, plan):
        error = expected.error(phase.tokens_per_s)
        verdict = f"{abs(error):.0%} too {'fast' if error > 0 else 'slow'}"
        inside = "in" if expected.covers(phase.tokens_per_s) else "outside"
        lines.append(
            f"predicted for {phase.kind} at {phase.context}: {expected.likely.tokens_per_s:.2f} tokens/s, {verdict}; "
            f"the measurement is {inside} the range of {expected.low.tokens_per_s:.2f} to {expected.high.tokens_per_s:.2f}"
        )
    return lines


def _predictions(result: Benchmark, plan: Plan | None) -> Iterator[tuple[Phase, Range]]:
    for phase in result.phases if plan is not None and plan.decode is not None else ():
        assert plan is not None
        yield phase, plan.decode_at(phase.context) if phase.kind == "decode" else plan.prefill_of(phase.n_tokens)


def comparison_lines(result: Benchmark, plain: Benchmark, plan: Plan | None) -> list[str]:
    """llama.cpp's measurements of the same phases beside ours, and what the plan says of it."""
    theirs = {(phase.kind, phase.context): phase for phase in plain.phases}
    lines = []
    for phase in result.phases:
        other = theirs.get((phase.kind, phase.context))
        if other is not None:
            ratio = phase.tokens_per_s / other.tokens_per_s
            lines.append(
                f"llama.cpp, {phase.kind} at {phase.context}: {other.tokens_per_s:.2f} tokens/s; "
                f"localrun is {ratio:.2f} times as fast"
            )
    lines.append(
        f"llama.cpp, resident: {format_size(plain.peak_rss_bytes)} at peak, including localrun's run before it"
    )
    if plan is not None and plan.plain is not None:
        lines.append(f"predicted for llama.cpp's answers: {plan.plain.tokens_per_s:.2f} tokens/s")
    return lines


def layer_table(phase: Phase) -> list[str]:
    """One line per layer of a phase."""
    lines = [
        f"{phase.kind} at {phase.context}, per layer",
        f"{'layer':>5}{'calls':>8}{'hits':>8}{'missed':>9}{'ahead':>7}{'read':>12}{'experts ms':>12}{'waiting ms':>12}",
    ]
    for row in phase.layers:
        touched = row["hits"] + row["misses"]
        lines.append(
            f"{row['layer']:>5}{row['calls']:>8}{_percent(row['hits'], touched):>8}{row['misses']:>9}"
            f"{row['prefetched']:>7}{format_size(row['bytes_read']):>12}"
            f"{row['compute_ns'] / 1e6 / phase.n_tokens:>12.3f}{row['wait_ns'] / 1e6 / phase.n_tokens:>12.3f}"
        )
    return lines


def _steps(phase: Phase) -> str:
    if phase.kind == "prefill":  # batches differ in size: their times are no distribution
        return f"{'':>9}{'':>9}"
    return f"{phase.percentile(50):>9.2f}{phase.percentile(90):>9.2f}"


def _split(phase: Phase) -> str:
    if phase.split is None:
        return " " * 35
    dense, experts, waiting, other = (ms for _, _, _, ms in _parts(phase))
    return f"{dense:>9.2f}{experts:>9.2f}{waiting:>9.2f}{other:>8.2f}"


def _reads(phase: Phase) -> str:
    return (
        f"{_percent(phase.hits, phase.hits + phase.misses):>7}{format_size(phase.bytes_read):>11}"
        f"{phase.read_bytes_per_s / 1e9:>7.2f}"
    )


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


# --- data -------------------------------------------------------------------------------------------------------------


def to_json(
    result: Benchmark,
    facts: ModelFacts,
    machine: Machine,
    load_s: float,
    plan: Plan | None = None,
    plain: Benchmark | None = None,
) -> dict[str, Any]:
    """Everything that was measured, llama.cpp's own run included if there was one, and what the load's plan had said."""
    return {
        "format": FORMAT,
        "model": asdict(facts),
        "machine": asdict(machine),
        "options": asdict(result.options),
        "load_s": load_s,
        "phases": [phase.to_json() for phase in result.phases],
        "skipped": list(result.skipped),
        "rss_start_bytes": result.rss_start_bytes,
        "rss_end_bytes": result.phases[-1].rss_bytes if result.phases else 0,
        "peak_rss_bytes": result.peak_rss_bytes,
        "llama_cpp": None if plain is None else {"phases": [phase.to_json() for phase in plain.phases]},
        "plan": plan.to_json() if plan is not None else None,
        "predictions": [
            {
                "kind": phase.kind,
                "context": phase.context,
                "tokens_per_s": phase.tokens_per_s,
                "low": expected.low.tokens_per_s,
                "likely": expected.likely.tokens_per_s,
                "high": expected.high.tokens_per_s,
                "error": expected.error(phase.tokens_per_s),
            }
            for phase, expected in _predictions(result, plan)
        ],
    }


# --- picture ----------------------------------------------------------------------------------------------------------

_WIDTH, _LEFT, _RIGHT, _BAR, _GAP = 900, 150, 170, 26, 12
_FONT = "font-family='system-ui, sans-serif' font-size='13'"


def svg(result: Benchmark, facts: ModelFacts, machine: Machine) -> str:
    """Stacked bars, one per phase: milliseconds per token, decode and prefill each on its own scale."""
    body: list[str] = []
    y = 72
    for kind, title in (("decode", "Decode: ms per token"), ("prefill", "Prefill: ms per token")):
        phases = [phase for phase in result.phases if phase.kind == kind]
        if phases:
            body.append(_text(20, y, title, weight="bold"))
            y += 12
            body += _bars(phases, y)
            y += len(phases) * (_BAR + _GAP) + 26
    body += _legend(y)
    y += 34
    summary = "; ".join(
        f"{phase.kind} at {phase.context} tokens: {phase.ms_per_token:.2f} ms per token" for phase in result.phases
    )
    name = escape(f"localrun bench: {facts.name}")
    return "\n".join(
        [
            f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {_WIDTH} {y}' role='img' {_FONT}>",
            f"<title>{name}</title>",
            f"<desc>{escape(summary)}</desc>",
            f"<rect width='{_WIDTH}' height='{y}' fill='#ffffff'/>",
            _text(20, 24, f"localrun bench: {facts.name}", weight="bold", size=16),
            _text(20, 42, _short_machine(machine), size=11, fill="#555555"),
            *body,
            "</svg>",
            "",
        ]
    )


def _bars(phases: Sequence[Phase], top: int) -> Iterator[str]:
    longest = max(phase.ms_per_token for phase in phases)
    scale = (_WIDTH - _LEFT - _RIGHT) / longest
    for i, phase in enumerate(phases):
        y = top + i * (_BAR + _GAP)
        yield _text(_LEFT - 10, y + 17, f"{phase.context} tokens before", anchor="end", size=12)
        x = float(_LEFT)
        for _, label, colour, ms in _parts(phase):
            width = ms * scale
            yield (
                f"<rect x='{x:.1f}' y='{y}' width='{width:.1f}' height='{_BAR}' fill='{colour}'>"
                f"<title>{label}: {ms:.2f} ms</title></rect>"
            )
            if width > 46:
                yield _text(x + width / 2, y + 17, f"{ms:.2f}", anchor="middle", size=11, fill="#ffffff")
            x += width
        yield _text(x + 8, y + 17, f"{phase.ms_per_token:.2f} ms ({phase.tokens_per_s:.1f}/s)", size=12)


def _legend(y: int) -> Iterator[str]:
    x = _LEFT
    for _, label, colour in PARTS:
        yield f"<rect x='{x}' y='{y}' width='14' height='14' fill='{colour}'/>"
        yield _text(x + 20, y + 12, label, size=12)
        x += 40 + 8 * len(label)


def _parts(phase: Phase) -> Iterator[tuple[str, str, str, float]]:
    """Field, label, colour, milliseconds per token. Without a split all of it is llama.cpp's."""
    for name, label, colour in PARTS:
        seconds = phase.seconds if name == "dense" else 0.0
        if phase.split is not None:
            seconds = getattr(phase.split, f"{name}_s")
        yield name, label, colour, 1e3 * seconds / phase.n_tokens


def _short_machine(machine: Machine) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in list(machine.versions.items())[:2])
    return f"{machine.cpu}, {machine.n_cores} cores, {format_size(machine.ram_bytes)} RAM; {versions}"


def _text(
    x: float,
    y: float,
    text: str,
    *,
    anchor: str = "start",
    size: int = 13,
    weight: str = "normal",
    fill: str = "#222222",
) -> str:
    return (
        f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' font-size='{size}' font-weight='{weight}' "
        f"fill='{fill}'>{escape(text)}</text>"
    )
