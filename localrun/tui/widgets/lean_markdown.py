"""Markdown whose lists and tables are one widget each.

Textual creates four widgets per list item and one per table cell. Mounting a widget takes milliseconds, and conversations are
paged through, so here a plain list or table draws itself. Lists that contain code, tables or quotations are left to Textual.
Departure: no mouse selection inside lists and tables (the copy commands give the source).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from markdown_it import MarkdownIt
from markdown_it.rules_core import StateCore
from markdown_it.token import Token
from rich.segment import Segment
from textual.app import ComposeResult
from textual.content import Content
from textual.css.styles import RulesMap
from textual.strip import Strip
from textual.style import Style
from textual.visual import RenderOptions, Visual
from textual.widgets import Markdown
from textual.widgets._markdown import (
    MarkdownBlock,
    MarkdownBulletList,
    MarkdownList,
    MarkdownListItem,
    MarkdownOrderedList,
    MarkdownParagraph,
    MarkdownTable,
)

from localrun.textsafe import visible, visible_line

MIN_COLUMN = 4
_GAP = " │ "


@dataclass(frozen=True, slots=True)
class Row:
    """A paragraph of a list: what stands before its first line, and how far the others are moved in."""

    prefix: str
    content: Content

    @property
    def indent(self) -> int:
        return len(self.prefix)


class RowsVisual(Visual):
    """Paragraphs with hanging indents."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def changed(self, each: Callable[[Content], Content]) -> RowsVisual:
        """The same with other contents."""
        return RowsVisual([replace(row, content=each(row.content)) for row in self._rows])

    def render_strips(self, width: int, height: int | None, style: Style, options: RenderOptions) -> list[Strip]:
        plain = RenderOptions(options.get_style, options.rules)
        strips: list[Strip] = []
        for row in self._rows:
            lines = row.content.render_strips(max(1, width - row.indent), None, style, plain) or [Strip([])]
            for number, line in enumerate(lines):
                before = row.prefix if number == 0 else " " * row.indent
                strips.append(Strip([Segment(before, style.rich_style), *line]))
        return strips[:height]

    def get_optimal_width(self, rules: RulesMap, container_width: int) -> int:
        return max(
            (row.indent + row.content.get_optimal_width(rules, container_width) for row in self._rows), default=0
        )

    def get_height(self, rules: RulesMap, width: int) -> int:
        return sum(max(1, row.content.get_height(rules, max(1, width - row.indent))) for row in self._rows)


class TableVisual(Visual):
    """A table with as much width for each column as it needs, or, if there is too little, as is fair."""

    def __init__(self, header: Sequence[Content], rows: Sequence[Sequence[Content]]) -> None:
        self._header = [cell.stylize("bold") for cell in header]
        self._rows = [list(row) for row in rows]
        n_columns = max([len(self._header), *map(len, self._rows)])
        for row in (self._header, *self._rows):
            row.extend([Content("")] * (n_columns - len(row)))

    def changed(self, each: Callable[[Content], Content]) -> TableVisual:
        """The same with other contents."""
        return TableVisual([each(cell) for cell in self._header], [[each(cell) for cell in row] for row in self._rows])

    def render_strips(self, width: int, height: int | None, style: Style, options: RenderOptions) -> list[Strip]:
        plain = RenderOptions(options.get_style, options.rules)
        widths = self._widths(width)
        rule = Strip([Segment("─┼─".join("─" * w for w in widths), style.rich_style)])
        strips = [*self._row_strips(self._header, widths, style, plain), rule]
        for row in self._rows:
            strips += self._row_strips(row, widths, style, plain)
        return [strip.crop(0, width) for strip in strips][:height]

    def _row_strips(
        self, row: Sequence[Content], widths: Sequence[int], style: Style, options: RenderOptions
    ) -> Iterable[Strip]:
        cells = [cell.render_strips(w, None, style, options) for cell, w in zip(row, widths, strict=True)]
        gap = Segment(_GAP, style.rich_style)
        for line in range(max(1, *map(len, cells))):
            segments: list[Segment] = []
            for number, (cell, w) in enumerate(zip(cells, widths, strict=True)):
                part = cell[line] if line < len(cell) else Strip([])
                segments += [*([gap] if number else []), *part.adjust_cell_length(w, style.rich_style)]
            yield Strip(segments)

    def _widths(self, width: int) -> list[int]:
        wanted = [
            max(1, *(cell.cell_length for cell in column)) for column in zip(self._header, *self._rows, strict=True)
        ]
        room = width - len(_GAP) * (len(wanted) - 1)
        while sum(wanted) > room and max(wanted) > MIN_COLUMN:
            wanted[wanted.index(max(wanted))] -= 1
        return wanted

    def get_optimal_width(self, rules: RulesMap, container_width: int) -> int:
        return sum(self._widths(container_width)) + len(_GAP) * (len(self._header) - 1)

    def get_height(self, rules: RulesMap, width: int) -> int:
        widths = self._widths(width)
        heights = [
            max(1, *(cell.get_height(rules, w) for cell, w in zip(row, widths, strict=True)))
            for row in (self._header, *self._rows)
        ]
        return sum(heights) + 1


class _LeanBlock(MarkdownBlock):
    """A block that draws itself if it can (`lean_visual`), and else has Textual's widgets."""

    lean = False

    def lean_visual(self) -> Visual | None:
        """The drawing of this block; None if it can't be drawn. Leaves `_blocks` alone."""
        raise NotImplementedError

    def compose(self) -> ComposeResult:
        visual = self.lean_visual()
        if visual is None:
            yield from super().compose()
            return
        self.lean = True
        self._blocks.clear()
        self.update(visual)

    async def _update_from_block(self, block: MarkdownBlock) -> None:
        if self.lean and isinstance(block, type(self)) and (visual := block.lean_visual()) is not None:
            self._copy_context(block)
            self.update(visual)
        else:
            # Not the parent's way for tables, which looks for Textual's widgets in it.
            await MarkdownBlock._update_from_block(self, block)


class LeanBulletList(_LeanBlock, MarkdownBulletList):
    def lean_visual(self) -> Visual | None:
        return _list_visual(self)


class LeanOrderedList(_LeanBlock, MarkdownOrderedList):
    def lean_visual(self) -> Visual | None:
        return _list_visual(self)


class LeanTable(_LeanBlock, MarkdownTable):
    def lean_visual(self) -> Visual | None:
        header, rows = self._get_headers_and_rows()
        return TableVisual(header, rows) if header else None


def _list_visual(block: MarkdownList) -> Visual | None:
    rows = _list_rows(block, 0)
    return RowsVisual(rows) if rows else None


def _list_rows(block: MarkdownList, indent: int) -> list[Row] | None:
    """Rows of a list and the lists in it; None if there is something else in it."""
    items = [item for item in block._blocks if isinstance(item, MarkdownListItem)]
    ordered = isinstance(block, MarkdownOrderedList)
    first = int(items[0].bullet) if ordered and items and items[0].bullet.isdecimal() else 1
    size = len(f"{first + len(items) - 1}. ")
    rows: list[Row] = []
    for number, item in enumerate(items, first):
        bullet = " " * indent + (f"{number}. ".rjust(size) if ordered else item.bullet)
        for part in item._blocks:
            if isinstance(part, MarkdownParagraph):
                rows.append(Row(bullet, part._content))
            elif isinstance(part, MarkdownList) and (inner := _list_rows(part, len(bullet))) is not None:
                rows += inner
            else:
                return None
            bullet = " " * len(bullet)
        if not item._blocks:
            rows.append(Row(bullet, Content("")))
    return rows


class LeanMarkdown(Markdown):
    """Markdown of a message. HTML is text for us: Textual would drop it, and answers about HTML are full of it."""

    BLOCKS = {  # noqa: RUF012
        **Markdown.BLOCKS,
        "bullet_list_open": LeanBulletList,
        "ordered_list_open": LeanOrderedList,
        "table_open": LeanTable,
    }

    def __init__(self, markdown: str) -> None:
        super().__init__(markdown, parser_factory=markdown_parser, open_links=False)


def markdown_parser() -> MarkdownIt:
    """Like `parse_markdown`, but the result is safe for a terminal, including text written as entities."""
    parser = _plain_parser()
    parser.core.ruler.push("visible", _make_visible)
    return parser


def parse_markdown(text: str) -> Sequence[Token]:
    """Raw model output, for copying, not for display."""
    return _plain_parser().parse(text)


def _plain_parser() -> MarkdownIt:
    return MarkdownIt("gfm-like", {"html": False})


def _make_visible(state: StateCore) -> None:
    """The last rule: entities (`&#x202e;`) and percent signs are decoded by now."""
    for token in state.tokens:
        _make_token_visible(token)


def _make_token_visible(token: Token) -> None:
    token.content = visible(token.content)
    token.info = visible_line(token.info)
    for name, value in token.attrs.items():
        if isinstance(value, str):
            token.attrs[name] = visible_line(value)
    for child in token.children or ():
        _make_token_visible(child)
