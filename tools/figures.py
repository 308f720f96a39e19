"""Draws the measured speeds in docs/figures.toml: the chart in README.md and the table in docs/benchmarks.md.

    python -m tools.figures

Figures of whole models come first because the file lists them first. A figure without a measurement has no row.
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from localrun.errors import UsageError

ROOT = Path(__file__).parents[1]
DATA = ROOT / "docs" / "figures.toml"
CHART = ROOT / "docs" / "pictures" / "figures.svg"
PAGE = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- figures: made by tools/figures.py -->", "<!-- end of figures -->"


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One measured speed. All rates are tokens per second.

    Attributes:
        what: `answers` or `prompt`.
        machine: its description, not its key.
        context: tokens in the context at the time.
        low, high: range over the runs.
        llamacpp: stock llama.cpp on the same file and machine.
        planned: what the planner predicted for that machine, low and high.
    """

    what: str
    model: str
    experts: str
    dense: str
    machine: str
    context: int
    localrun: float
    low: float | None = None
    high: float | None = None
    llamacpp: float | None = None
    planned: tuple[float, float] | None = None
    note: str = ""


def read(path: Path = DATA) -> list[Figure]:
    """The figures, in the file's order.

    Raises:
        UsageError: a field is missing or unknown.
    """
    data = tomllib.loads(path.read_text("utf-8"))
    figures = []
    for number, row in enumerate(data["figure"], 1):
        try:
            known = row | {"machine": data["machines"][row["machine"]]}
            if "planned" in known:
                low, high = known["planned"]
                known["planned"] = (float(low), float(high))
            figures.append(Figure(**known))
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"{path.name}: figure {number}: {error}") from error
    return figures


# --- table ------------------------------------------------------------------------------------------------------------


def table(figures: Sequence[Figure]) -> str:
    """Markdown."""
    head = ("model", "experts / dense", "machine", "context", "what", "localrun", "llama.cpp", "planned", "notes")
    lines = [head, ("---",) * len(head), *(_row(figure) for figure in figures)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _row(figure: Figure) -> tuple[str, ...]:
    spread = f" ({rate(figure.low)} to {rate(figure.high)})" if figure.low and figure.high else ""
    return (
        figure.model,
        f"{figure.experts} / {figure.dense}",
        figure.machine,
        f"{figure.context:,}",
        figure.what,
        f"**{rate(figure.localrun)}**{spread}",
        rate(figure.llamacpp) if figure.llamacpp else "not measured",
        f"{rate(figure.planned[0])} to {rate(figure.planned[1])}" if figure.planned else "-",
        figure.note,
    )


def rate(tokens_per_s: float | None) -> str:
    """Three digits at most."""
    return "-" if tokens_per_s is None else f"{tokens_per_s:.3g}" if tokens_per_s < 100 else f"{tokens_per_s:.0f}"


def page_with(page: str, figures: Sequence[Figure]) -> str:
    """The page with its table replaced."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    if not after:
        raise UsageError(f"{PAGE.name} lacks the line {BEGIN} or {END}")
    return f"{before}{BEGIN}\n\n{table(figures)}\n\n{END}{after}"


# --- chart ------------------------------------------------------------------------------------------------------------

_WIDTH, _LEFT, _BAR, _ROOM = 800, 20, 18, 560
_OURS, _THEIRS = "#3b6ea5", "#b6bec9"


def chart(figures: Sequence[Figure]) -> str:
    """Bars of tokens per second, answers and prompts each on a scale of their own."""
    body = [_text(_LEFT, 30, "Measured, tokens per second", weight="bold")]
    y, shown = 48, ""
    scale = {
        what: max(max(f.localrun, f.llamacpp or 0.0) for f in figures if f.what == what)
        for what in {f.what for f in figures}
    }
    for figure in figures:
        if (heading := f"{figure.model}, on {figure.machine}") != shown:
            shown, y = heading, y + 22
            body.append(_text(_LEFT, y, heading))
        y += 22
        label = (
            f"{figure.what}, {figure.experts} experts, {figure.dense} dense, {figure.context:,} tokens in the context"
        )
        body.append(_text(_LEFT, y, label, colour="#4b5563"))
        for name, value, colour in (("localrun", figure.localrun, _OURS), ("llama.cpp", figure.llamacpp, _THEIRS)):
            if value is not None:
                wide = value / scale[figure.what] * _ROOM
                body.append(f'<rect x="{_LEFT}" y="{y + 7}" width="{wide:.1f}" height="{_BAR}" fill="{colour}"/>')
                body.append(_text(round(_LEFT + wide) + 8, y + 21, f"{rate(value)}  {name}"))
                y += _BAR + 4
        y += 8
    height = y + 20
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}">',
            f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
            *body,
            "</svg>\n",
        ]
    )


def _text(x: int, y: int, text: str, *, weight: str = "normal", colour: str = "#1f2937") -> str:
    style: Mapping[str, str] = {"font-family": "sans-serif", "font-size": "13", "font-weight": weight, "fill": colour}
    attributes = " ".join(f'{name}="{value}"' for name, value in style.items())
    return f'<text x="{x}" y="{y}" {attributes}>{escape(text)}</text>'


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    figures = read()
    CHART.write_text(chart(figures), "utf-8")
    PAGE.write_text(page_with(PAGE.read_text("utf-8"), figures), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
