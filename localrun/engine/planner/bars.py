"""Draws a plan: where memory goes and how a token's time is spent, as bars of characters or as SVG.

All numbers are the plan's. In a terminal each segment has its own glyph, so colours are not needed to read them. Bars are computed
with the plan and drawn elsewhere: the plan's JSON contains them (`bars_json`, `read_bars`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import TYPE_CHECKING, Any, Literal

from localrun.units import format_size

if TYPE_CHECKING:
    from localrun.engine.planner.plan import Plan

REST = "·"
"""What is free, or of the drive: nowhere else."""

_GLYPHS = "█▓▒░#=+"
_COLOURS = ("#3b6ea5", "#d98b2b", "#5a9e6f", "#a05195", "#8c6d4f", "#c44e52", "#64748b")
_REST_COLOUR = "#e5e7eb"
_NAME_CELLS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A piece of a bar; `rest`: it is what nothing of the plan takes."""

    name: str
    value: float
    rest: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One bar, as long as its segments together.

    Attributes:
        unit: of the segments' values.
    """

    name: str
    title: str
    segments: tuple[Segment, ...]
    unit: Literal["bytes", "s"] = "bytes"

    @property
    def total(self) -> float:
        return sum(segment.value for segment in self.segments)

    def show(self, value: float) -> str:
        """A value with its unit."""
        return format_size(value) if self.unit == "bytes" else _ms(value)


def bars(plan: Plan) -> list[Bar]:
    """RAM, GPU if there is one, drive if there are experts, and a token of an answer if it can be predicted."""
    found = [_ram(plan), _gpu(plan), _drive(plan), _token(plan)]
    return [bar for bar in found if bar is not None and bar.total > 0]


def bars_json(plan: Plan) -> list[dict[str, Any]]:
    """The bars as they stand in the plan's JSON."""
    return [asdict(bar) | {"segments": [asdict(segment) for segment in bar.segments]} for bar in bars(plan)]


def read_bars(plan: Mapping[str, Any]) -> list[Bar]:
    """The bars of a plan's JSON; none where it has none."""
    return [
        Bar(
            name=bar["name"],
            title=bar["title"],
            unit=bar["unit"],
            segments=tuple(Segment(**segment) for segment in bar["segments"]),
        )
        for bar in plan.get("bars", ())
    ]


def _bar(name: str, title: str, segments: Sequence[Segment], unit: Literal["bytes", "s"] = "bytes") -> Bar:
    return Bar(name=name, title=title, segments=tuple(segment for segment in segments if segment.value > 0), unit=unit)


def _ram(plan: Plan) -> Bar:
    from localrun.engine.planner.hardware import PROCESS_BYTES  # here, because who only draws needs none of it

    at, machine = plan.placement, plan.machine
    segments = [
        Segment(name="process", value=PROCESS_BYTES),
        Segment(name="experts", value=at.ram_experts * plan.sizes.mean_slot_bytes),
    ]
    if not at.dense_on_gpu:
        segments[:0] = _fixed(plan, 1 - at.dense_share)
    elif at.embedding_bytes:
        segments[:0] = [Segment(name="embedding", value=at.embedding_bytes)]
    if at.cache_in_ram:
        segments[:0] = [Segment(name="cache", value=at.kv_bytes)]
    if machine.ram_bytes is None or machine.total_ram_bytes is None:
        return _bar("RAM", "used by the plan", segments)
    segments.append(Segment(name="other programs", value=machine.total_ram_bytes - machine.ram_bytes))
    free = machine.total_ram_bytes - sum(segment.value for segment in segments)
    segments.append(Segment(name="free", value=free, rest=True))
    return _bar("RAM", format_size(machine.total_ram_bytes), segments)


def _gpu(plan: Plan) -> Bar | None:
    at, machine = plan.placement, plan.machine
    if not machine.gpus:
        return None
    fixed = _fixed(plan, at.dense_share) if at.dense_share else []
    if at.cache_in_ram:
        fixed = [segment for segment in fixed if segment.name != "cache"]
    segments = [*fixed, Segment(name="experts", value=at.gpu_expert_bytes)]
    free = machine.vram_bytes - sum(segment.value for segment in segments)
    names = " and ".join(gpu.name for gpu in machine.gpus)
    return _bar(
        "GPU", f"{format_size(machine.vram_bytes)}, {names}", [*segments, Segment(name="free", value=free, rest=True)]
    )


def _fixed(plan: Plan, share: float) -> list[Segment]:
    """What `share` of the dense model's layers takes; llama.cpp's buffers are on both sides."""
    at = plan.placement
    return [
        Segment(name="dense model", value=share * at.dense_bytes - at.embedding_bytes),
        Segment(name="cache", value=share * at.kv_bytes),
        Segment(name="buffers", value=at.compute_bytes),
    ]


def _drive(plan: Plan) -> Bar | None:
    sizes, at = plan.sizes, plan.placement
    if not sizes.n_copies:
        return None
    each = sizes.expert_file_bytes / sizes.n_copies
    only = sizes.n_copies - at.ram_experts - at.gpu_experts
    segments = [
        Segment(name="also in RAM", value=at.ram_experts * each),
        Segment(name="also on a GPU", value=at.gpu_experts * each),
        Segment(name="drive only", value=only * each, rest=True),
    ]
    title = f"{format_size(sizes.expert_file_bytes)} of experts"
    if plan.decode is not None:
        title += f", {plan.decode.likely.disk_bytes / 1e9:.2f} GB read per token"
    return _bar("drive", title, segments)


def _token(plan: Plan) -> Bar | None:
    if plan.decode is None:
        return None
    likely = plan.decode.likely
    segments = [Segment(name=name, value=seconds) for name, seconds in likely.seconds.items()]
    title = f"{_ms(1 / likely.tokens_per_s)} per token, likely {likely.tokens_per_s:.2f} tokens/s"
    return _bar("token", title, segments, "s")


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms"


# --- characters -------------------------------------------------------------------------------------------------------


def bar_lines(drawn: Sequence[Bar], width: int) -> list[str]:
    """Bars with their legends, at most `width` cells wide (40 at least)."""
    room = max(40, width) - _NAME_CELLS
    lines: list[str] = []
    for bar in drawn:
        glyphs = _glyphs(bar)
        cells = "".join(
            glyph * n for glyph, n in zip(glyphs, shares([p.value for p in bar.segments], room), strict=True)
        )
        lines += [f"{bar.name:<{_NAME_CELLS}}{bar.title}"[: max(40, width)], " " * _NAME_CELLS + cells]
        line = ""
        for glyph, segment in zip(glyphs, bar.segments, strict=True):
            word = f"{glyph} {segment.name} {bar.show(segment.value)}"
            if line and len(line) + 2 + len(word) > room:
                lines.append(" " * _NAME_CELLS + line)
                line = ""
            line += f"{'  ' if line else ''}{word}"
        lines += [" " * _NAME_CELLS + line, ""]
    return lines[:-1]


def _glyphs(bar: Bar) -> list[str]:
    taken = iter(_GLYPHS)
    return [REST if segment.rest else next(taken, "?") for segment in bar.segments]


def shares(values: Sequence[float], cells: int) -> list[int]:
    """Proportional whole cells that add up exactly: the largest remainders are rounded up."""
    total = sum(values)
    exact = [value / total * cells if total else 0.0 for value in values]
    whole = [int(value) for value in exact]
    by_remainder = sorted(range(len(values)), key=lambda i: whole[i] - exact[i])
    for i in by_remainder[: cells - sum(whole) if total else 0]:
        whole[i] += 1
    return whole


# --- SVG --------------------------------------------------------------------------------------------------------------

_WIDTH, _LEFT, _BAR_HEIGHT, _LINE = 800, 20, 26, 18


def bars_svg(drawn: Sequence[Bar], heading: str) -> str:
    """The bars as an SVG, 800 pixels wide, with the viewer's fonts."""
    body = [_text(_LEFT, 30, heading, bold=True)]
    y = 56
    for bar in drawn:
        body.append(_text(_LEFT, y, f"{bar.name}: {bar.title}"))
        y += 8
        x = float(_LEFT)
        colours = iter(_COLOURS)
        legend_x, legend_y = _LEFT, y + _BAR_HEIGHT + _LINE
        for segment in bar.segments:
            colour = _REST_COLOUR if segment.rest else next(colours, _COLOURS[-1])
            wide = segment.value / bar.total * (_WIDTH - 2 * _LEFT)
            label = f"{segment.name} {bar.show(segment.value)}"
            body.append(
                f'<rect x="{x:.1f}" y="{y}" width="{wide:.1f}" height="{_BAR_HEIGHT}" fill="{colour}">'
                f"<title>{escape(label)}</title></rect>"
            )
            x += wide
            legend_wide = 24 + 8 * len(label)
            if legend_x + legend_wide > _WIDTH - _LEFT and legend_x > _LEFT:
                legend_x, legend_y = _LEFT, legend_y + _LINE
            body.append(f'<rect x="{legend_x}" y="{legend_y - 10}" width="10" height="10" fill="{colour}"/>')
            body.append(_text(legend_x + 15, legend_y, label))
            legend_x += legend_wide
        y = legend_y + 2 * _LINE
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {y}" width="{_WIDTH}" height="{y}">',
            f'<rect width="{_WIDTH}" height="{y}" fill="white"/>',
            *body,
            "</svg>\n",
        ]
    )


def _text(x: float, y: float, text: str, *, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x}" y="{y}" font-family="sans-serif" font-size="13" fill="#1f2937"{weight}>{escape(text)}</text>'
