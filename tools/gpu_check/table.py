"""A campaign's JSON as the table of docs/gpu.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_HEAD = (
    "| | experts on the card | prompt, tokens/s | answers, tokens/s | the plan said | load, s |",
    "|---|---|---|---|---|---|",
)


def table(result: Mapping[str, Any]) -> str:
    """Markdown: one line for each measurement, then what failed and what was left out."""
    machine = result["machine"]
    lines = [f"{result['card'] or 'No card'}; {machine['cpu']}, {machine['n_cores']} cores.", "", *_HEAD]
    lines += [_line(task) for task in result["tasks"] if "error" not in task]
    notes = [f"* {task['name']}: {task['error']}" for task in result["tasks"] if "error" in task]
    notes += [f"* left out: {text}" for text in result["left_out"]]
    return "\n".join([*lines, *([""] if notes else []), *notes])


def _line(task: Mapping[str, Any]) -> str:
    phases: Sequence[Mapping[str, Any]] = task["phases"]
    prompt = [phase["tokens_per_s"] for phase in phases if phase["kind"] == "prefill"]
    answers = [phase["tokens_per_s"] for phase in phases if phase["kind"] == "decode"]
    cells = [
        task["name"],
        str(task["gpu_experts"]),
        _rate(prompt[-1:]),
        _rate(answers[-1:]),
        _planned(task),
        f"{task['load_s']:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def _rate(rates: Sequence[float]) -> str:
    return f"{rates[0]:.3g}" if rates else "-"


def _planned(task: Mapping[str, Any]) -> str:
    speed = ((task["plan"] or {}).get("decode") or {}).get("tokens_per_s")
    if isinstance(speed, Mapping):
        return f"{speed['low']:.3g} to {speed['high']:.3g}"
    return f"{speed:.3g}" if speed else "-"
