"""Pictures of a conversion report, as hand-generated SVG, to keep plotting libraries out of a package that must run air-gapped.

Colours are Paul Tol's; colour never carries meaning alone (marks have labels, cells have titles).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape

from localrun.quant.precision.error import ErrorTable
from localrun.quant.precision.solver import CurvePoint, PrecisionSolution
from localrun.units import format_size

_FONT = "font-family='system-ui, sans-serif' font-size='13'"
_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT, _BOTTOM = 900, 460, 90, 60, 120, 60


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 12, weight: str = "normal") -> str:
    return (
        f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' font-size='{size}' font-weight='{weight}' fill='#222222'>"
        f"{escape(text)}</text>"
    )


def _page(width: float, height: float, title: str, summary: str, body: Iterator[str]) -> str:
    return "\n".join(
        [
            f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width:.0f} {height:.0f}' role='img' {_FONT}>",
            f"<title>{escape(title)}</title>",
            f"<desc>{escape(summary)}</desc>",
            f"<rect width='{width:.0f}' height='{height:.0f}' fill='#ffffff'/>",
            _text(20, 26, title, size=16, weight="bold"),
            *body,
            "</svg>",
            "",
        ]
    )


# --- size against error -----------------------------------------------------------------------------------------------


def curve_picture(solution: PrecisionSolution, model: str) -> str:
    """Expected error (logarithmic; exact at the bottom) over the size of the copies used."""
    points = [*solution.curve, *solution.uniform, solution.chosen]
    summary = "; ".join(f"all {p.label}: {format_size(p.n_bytes)}, {p.error:.6f}" for p in solution.uniform)
    summary += f"; chosen: {format_size(solution.chosen.n_bytes)}, {solution.chosen.error:.6f}"
    return _page(_WIDTH, _HEIGHT, f"{model}: size against expected error", summary, _curve(solution, points))


def _curve(solution: PrecisionSolution, points: Sequence[CurvePoint]) -> Iterator[str]:
    low_x, high_x = min(p.n_bytes for p in points), max(p.n_bytes for p in points)
    errors = [p.error for p in points if p.error > 0] or [1.0]
    high_y = math.ceil(math.log10(max(errors)))
    # Errors of nearly finished curves would stretch the picture over many irrelevant decades.
    low_y = max(math.floor(math.log10(min(errors))), high_y - 4)

    def place(point: CurvePoint) -> tuple[float, float]:
        x = _LEFT + (point.n_bytes - low_x) / max(1, high_x - low_x) * (_WIDTH - _LEFT - _RIGHT)
        height = max(low_y, math.log10(point.error)) - low_y if point.error > 0 else 0.0
        return x, _HEIGHT - _BOTTOM - height / max(1, high_y - low_y) * (_HEIGHT - _TOP - _BOTTOM)

    for decade in range(low_y, high_y + 1):
        y = place(CurvePoint(low_x, 10.0**decade))[1]
        yield f"<line x1='{_LEFT}' x2='{_WIDTH - _RIGHT}' y1='{y:.1f}' y2='{y:.1f}' stroke='#dddddd'/>"
        label = f"1e{decade}" if decade > low_y else f"≤ 1e{decade}"
        yield _text(_LEFT - 8, y + 4, label, anchor="end")
    for i in range(5):
        size = low_x + i * (high_x - low_x) / 4
        x = place(CurvePoint(round(size), 1.0))[0]
        yield _text(x, _HEIGHT - _BOTTOM + 20, format_size(size), anchor="middle")
    yield _text(_WIDTH / 2, _HEIGHT - 14, "size of the copies used", anchor="middle")
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, solution.curve))
    yield f"<polyline points='{line}' fill='none' stroke='#4477aa' stroke-width='2'/>"
    x, y = place(solution.curve[len(solution.curve) // 2])
    yield _text(x + 8, y - 8, f"best mix over {solution.base.name.lower()}")
    for point in solution.uniform:
        x, y = place(point)
        yield f"<circle cx='{x:.1f}' cy='{y:.1f}' r='5' fill='#228833'><title>{escape(point.label)}</title></circle>"
        yield _text(x + 9, y + 4, f"all {point.label}")
    x, y = place(solution.chosen)
    yield f"<path d='M{x - 7:.1f},{y:.1f} l7,-7 l7,7 l-7,7 z' fill='#aa3377'><title>chosen</title></path>"
    yield _text(x + 11, y - 8, "chosen", weight="bold")


# --- error by layer and format ----------------------------------------------------------------------------------------


def heat_map(errors: ErrorTable, model: str) -> str:
    """One cell per format and layer: the mean error of the layer's measured experts, logarithmic."""
    kinds = list(next(iter(errors.layers.values())).relative)
    cell = min(60.0, max(12.0, (_WIDTH - 110.0) / max(1, len(errors.layers))))
    height = _TOP + 34 * len(kinds) + 70
    summary = "; ".join(
        f"{kind.name.lower()}: {', '.join(f'{errors.mean(layer, kind):.5f}' for layer in errors.layers)}"
        for kind in kinds
    )
    width = max(_WIDTH, 110 + cell * len(errors.layers))
    return _page(width, height, f"{model}: output error by layer and format", summary, _cells(errors, cell))


def _cells(errors: ErrorTable, cell: float) -> Iterator[str]:
    kinds = list(next(iter(errors.layers.values())).relative)
    values = [v for layer in errors.layers for kind in kinds if (v := errors.mean(layer, kind)) > 0]
    low, high = (math.log10(min(values)), math.log10(max(values))) if values else (0.0, 1.0)
    for row, kind in enumerate(kinds):
        y = _TOP + 34 * row
        yield _text(90, y + 21, kind.name.lower(), anchor="end")
        for column, layer in enumerate(errors.layers):
            value = errors.mean(layer, kind)
            shade = (math.log10(value) - low) / max(1e-9, high - low) if value > 0 else 0.0
            fill = _shade(shade) if value > 0 else "#ffffff"
            x = 100 + column * cell
            yield (
                f"<rect x='{x:.1f}' y='{y}' width='{cell - 1:.1f}' height='32' fill='{fill}' stroke='#cccccc'>"
                f"<title>layer {layer}, {kind.name.lower()}: {value:.6f}</title></rect>"
            )
            if cell >= 44:
                colour = "#ffffff" if shade > 0.6 else "#222222"
                label = f"{value:.4f}" if value else "exact"
                yield _text(x + cell / 2, y + 21, label, anchor="middle", size=11).replace("#222222", colour)
    y = _TOP + 34 * len(kinds) + 18
    step = max(1, round(24 / cell))
    for column, layer in enumerate(errors.layers):
        if column % step == 0:
            yield _text(100 + (column + 0.5) * cell, y, str(layer), anchor="middle")
    yield _text(100, y + 24, "layer; darker is worse (logarithmic); white is exact")


def _shade(part: float) -> str:
    """From pale to dark blue."""
    light, dark = (0xE6, 0xEE, 0xF6), (0x1B, 0x3A, 0x5E)
    return "#" + "".join(f"{round(a + (b - a) * part):02x}" for a, b in zip(light, dark, strict=True))
