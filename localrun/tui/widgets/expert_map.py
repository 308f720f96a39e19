"""Layers x experts as coloured glyphs: each expert's location, precision or use.

Every meaning has its own glyph, so the map is readable without colours. If there are more layers than lines, they are arranged
in columns, so that all are visible as long as cells stay meaningful. Cells are aggregated to the available width and drawn only
for visible lines, so a refresh costs about as much as a line of text per layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

from rich.segment import Segment
from rich.style import Style
from textual.color import Color, ColorParseError
from textual.geometry import Size
from textual.scroll_view import ScrollView
from textual.strip import Strip

from localrun.alignment import ceil_div
from localrun.tui.expert_grid import DISK, GPU, LOADING, RAM, ExpertGrid, LayerExperts, bits_of, column_groups

MapView = Literal["residency", "precision", "heat"]
VIEWS: tuple[MapView, ...] = ("residency", "precision", "heat")

_LABEL_CELLS = 4
_GAP_CELLS = 2
MIN_CELLS = 12
"""Of a row; columns are not made narrower: the map scrolls."""
_PLACES = ((GPU, "█", "success"), (LOADING, "◌", "warning"), (RAM, "▓", "primary"), (DISK, "·", "foreground-muted"))
_SHARES = "·░▒▓"
_HEAT = " .:-=+*#%@"
_BITS_COLOURS = {"1": "error", "2": "warning", "3": "secondary", "4": "primary", "8": "success", "g": "accent"}


class ExpertMap(ScrollView, can_focus=True):
    """Draws an `ExpertGrid`; scrolls if there are more layers than columns of lines hold."""

    def __init__(self) -> None:
        super().__init__(id="expert-map")
        self.grid: ExpertGrid | None = None
        self.view: MapView = "residency"

    def show(self, grid: ExpertGrid | None) -> None:
        self.grid = grid
        self._fit()

    def on_resize(self) -> None:
        self._fit()

    def _fit(self) -> None:
        self.virtual_size = Size(self.size.width, self._n_lines if self.grid else 0)
        self.refresh()

    def next_view(self) -> MapView:
        self.view = VIEWS[(VIEWS.index(self.view) + 1) % len(VIEWS)]
        self.refresh()
        return self.view

    def legend(self) -> str:
        """What the glyphs mean."""
        if self.view == "residency":
            shared = "" if self.grid is None or self._cell_experts == 1 else " ░▒ part"
            gpu = "█ GPU " if self.grid is None or self.grid.count(GPU) else ""
            return f"{gpu}▓ RAM{shared} ◌ read · disk"
        if self.view == "precision":
            return "digit: bits per weight  (1 2 3 4 5 6 8, g: 16)"
        return "use:  . : - = + * # % @  (logarithmic)"

    @property
    def _cell_experts(self) -> int:
        return len(column_groups(self.grid.n_experts, self._cells)[0]) if self.grid else 1

    @property
    def _n_columns(self) -> int:
        """As many as it takes to have all layers on view, as far as there is room."""
        n_layers = len(self.grid.layers) if self.grid else 0
        wanted = ceil_div(n_layers, max(1, self.size.height))
        room = (self.size.width + _GAP_CELLS) // (_LABEL_CELLS + MIN_CELLS + _GAP_CELLS)
        return max(1, min(wanted, room))

    @property
    def _n_lines(self) -> int:
        return ceil_div(len(self.grid.layers), self._n_columns) if self.grid else 0

    @property
    def _cells(self) -> int:
        """Of one row, without its label."""
        n_columns = self._n_columns
        width = self.scrollable_content_region.width - _GAP_CELLS * (n_columns - 1)
        return max(1, width // n_columns - _LABEL_CELLS)

    def render_line(self, y: int) -> Strip:
        line, width = y + round(self.scroll_offset.y), self.size.width
        if self.grid is None or line >= self._n_lines:
            return Strip.blank(width, self.rich_style)
        cells = self._cells
        runs: list[Segment] = []
        for number in range(line, len(self.grid.layers), self._n_lines):
            if runs:
                runs.append(Segment(" " * _GAP_CELLS, self.rich_style))
            row = list(self._row(self.grid.layers[number], self.grid, cells))
            missing = _LABEL_CELLS + cells - sum(segment.cell_length for segment in row)
            runs += [*row, Segment(" " * missing, self.rich_style)]
        return Strip(runs).adjust_cell_length(width, self.rich_style).crop(0, width)

    def _row(self, row: LayerExperts, grid: ExpertGrid, cells: int) -> Iterator[Segment]:
        """A layer: its number and its cells, those of one colour in one piece."""
        yield Segment(f"{row.layer:>3} ", self._style("foreground-muted"))
        last_colour, text = "", ""
        for glyph, colour in map_cells(row, grid, cells, self.view):
            if colour != last_colour and text:
                yield Segment(text, self._style(last_colour))
                text = ""
            last_colour, text = colour, text + glyph
        yield Segment(text, self._style(last_colour))

    def _style(self, colour: str) -> Style:
        value = self.app.theme_variables.get(colour, "")
        try:
            parsed = Color.parse(value)
        except ColorParseError:  # "auto" and the like
            return self.rich_style
        solid = (
            parsed if parsed.a == 1 or parsed.ansi is not None else self.background_colors[1].blend(parsed, parsed.a)
        )
        return self.rich_style + Style(color=solid.rich_color)


def map_cells(row: LayerExperts, grid: ExpertGrid, width: int, view: MapView) -> list[tuple[str, str]]:
    """(glyph, name of a theme colour) of each cell of a row."""
    groups = column_groups(grid.n_experts, width)
    if view == "residency":
        return [_place(row.where[group.start : group.stop]) for group in groups]
    if view == "precision":
        return [_precision(row, group) for group in groups]
    return [_heat(max(row.heat[group.start : group.stop], default=0.0), grid.hottest) for group in groups]


def _place(where: str) -> tuple[str, str]:
    """A cell of several experts shows the fastest place that holds at least half of them, or the part that RAM holds."""
    if len(set(where)) == 1:
        return next(((glyph, colour) for place, glyph, colour in _PLACES if place == where[0]), ("?", "error"))
    if 2 * where.count(GPU) >= len(where):
        return "█", "success"
    share = (len(where) - where.count(DISK)) / max(1, len(where))
    return _SHARES[min(3, math.ceil(3 * share))], "primary" if share else "foreground-muted"


def _precision(row: LayerExperts, group: range) -> tuple[str, str]:
    """The best precision in the group."""
    digits = [bits_of(row.types[index]) for index in row.type_of[group.start : group.stop]]
    digit = max(digits, default="·")
    return digit, _BITS_COLOURS.get(digit, "foreground")


def _heat(value: float, hottest: float) -> tuple[str, str]:
    if value <= 0 or hottest <= 0:
        return _HEAT[0], "foreground-muted"
    level = math.log1p(value) / math.log1p(hottest)
    glyph = _HEAT[max(1, min(len(_HEAT) - 1, math.ceil(level * (len(_HEAT) - 1))))]
    return glyph, "primary" if level < 0.4 else "warning" if level < 0.75 else "error"
