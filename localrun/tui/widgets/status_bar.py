"""The status line: rates, context, cache hits, memory; while the prompt is read, its progress."""

from __future__ import annotations

from dataclasses import dataclass

from textual.content import Content
from textual.widgets import Static

from localrun.units import format_duration


@dataclass(frozen=True, slots=True)
class Status:
    """The line's values. None: unknown, shown as a dash.

    Attributes:
        activity: what the engine is doing (`loading 40 %`, `reading 512/2,048, 12s left`); empty: nothing.
        planned: range of decode tokens per second that the plan predicts; None: no prediction.
        hit_rate: recent share of experts found in memory.
        ram_bytes, ram_budget: experts in RAM, and their budget.
        extra: other activity (a conversion).
    """

    activity: str = ""
    decode_tokens_per_s: float | None = None
    planned: tuple[float, float] | None = None
    prompt_tokens_per_s: float | None = None
    context_used: int = 0
    n_ctx: int = 0
    hit_rate: float | None = None
    ram_bytes: int | None = None
    ram_budget: int | None = None
    think: str = ""
    extra: str = ""


class StatusBar(Static):
    """Shows a `Status`; leaves out what the width has no room for, least important first."""

    def __init__(self) -> None:
        super().__init__("", id="status")
        self.status = Status()

    def show(self, status: Status) -> None:
        if status != self.status:
            self.status = status
            self.refresh(layout=False)

    def render(self) -> Content:
        return Content(status_line(self.status, self.size.width))


def status_line(status: Status, width: int) -> str:
    """One line of at most `width` cells."""
    # (importance, text), in the order of display
    parts = [
        (0, status.activity),
        (1, f"decode {_tokens_per_s(status.decode_tokens_per_s)}"),
        (4, "" if status.planned is None else f"planned {_span(*status.planned)}"),
        (2, f"prefill {_tokens_per_s(status.prompt_tokens_per_s)}"),
        (1, _context(status)),
        (1, f"hit {'–' if status.hit_rate is None else f'{100 * status.hit_rate:.0f}%'}"),
        (2, _ram(status)),
        (3, f"think {status.think}" if status.think else ""),
        (3, status.extra),
    ]
    parts = [(importance, text) for importance, text in parts if text]
    while len(line := " │ ".join(text for _, text in parts)) > width and len(parts) > 1:
        parts.remove(max(reversed(parts), key=lambda part: part[0]))
    return line[: max(width, 0)]


def _tokens_per_s(rate: float | None) -> str:
    if rate is None:
        return "– t/s"
    return f"{rate:.0f} t/s" if rate >= 100 else f"{rate:.1f} t/s"


def _span(low: float, high: float) -> str:
    digits = 0 if low >= 20 else 1
    return f"{low:.{digits}f} to {high:.{digits}f}"


def _context(status: Status) -> str:
    if not status.n_ctx:
        return "ctx –"
    percent = 100 * status.context_used / status.n_ctx
    return f"ctx {short_count(status.context_used)}/{short_count(status.n_ctx)} {percent:.0f}%"


def _ram(status: Status) -> str:
    if status.ram_budget is None:
        return "RAM –"
    budget = short_size(status.ram_budget)
    return f"RAM {budget}" if status.ram_bytes is None else f"RAM {short_size(status.ram_bytes)}/{budget}"


def short_count(n: int) -> str:
    """`32768` -> `32k` (1k = 1024 where it is a whole number of them, else 1000)."""
    if n < 1024 or (n < 10_000 and n % 1024):
        return f"{n:,}"
    if n % 1024 == 0:
        return f"{n // 1024}k"
    return f"{n / 1000:.1f}k" if n < 100_000 else f"{n / 1000:.0f}k"


def short_size(n_bytes: int | None) -> str:
    """`17179869184` -> `16.0G`: binary units."""
    if n_bytes is None:
        return "–"
    for unit, size in (("T", 2**40), ("G", 2**30), ("M", 2**20), ("K", 2**10)):
        if n_bytes >= size:
            return f"{n_bytes / size:.1f}{unit}" if n_bytes < 100 * size else f"{n_bytes / size:.0f}{unit}"
    return f"{n_bytes}B"


def time_left(seconds: float | None) -> str:
    return "" if seconds is None else f"{format_duration(seconds)} left"
