"""The load's plan, as text and bars, next to the last answer's measurements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from textual import events
from textual.app import ComposeResult
from textual.containers import Horizontal, VerticalScroll
from textual.content import Content
from textual.widgets import Static

from localrun.engine.facts import Timings
from localrun.engine.planner.bars import Bar, bar_lines
from localrun.textsafe import visible_line
from localrun.tui.screens.dialog import Dialog
from localrun.units import format_rate


class PlanScreen(Dialog[None]):
    """The six lines, wrapped, and below them the bars as `localrun plan` draws them.

    Args:
        lines: of the plan; empty if there is none.
        bars: of memory and of a token's time.
        measured: of the last answer.
        loaded: there is a model.
    """

    TITLE_TEXT = "Plan"

    def __init__(
        self, lines: Sequence[str], measured: Timings | None, *, loaded: bool, bars: Sequence[Bar] = ()
    ) -> None:
        super().__init__()
        self._lines, self._measured, self._loaded, self._bars = lines, measured, loaded, bars

    def compose_content(self) -> ComposeResult:
        with VerticalScroll(id="plan") as body:
            body.can_focus = True
            if not self._lines:
                why = (
                    "This model is too small to need a plan: all of it is in memory."
                    if self._loaded
                    else "No model is loaded."
                )
                yield Static(Content(why))
            for line in self._lines:
                name, _, text = line.partition(" ")
                yield from _row(name, text.strip())
            if self._measured is not None:
                yield from _row("measured", measured_line(self._measured))
            if self._bars:
                yield Static("", id="plan-bars")

    def on_mount(self) -> None:
        self.query_one("#plan").focus()

    def on_resize(self, event: events.Resize) -> None:
        if self._bars:
            self.call_after_refresh(self._draw)  # the frame has its width then

    def _draw(self) -> None:
        width = self.query_one("#plan").scrollable_content_region.width
        self.query_one("#plan-bars", Static).update(Content("\n".join(bar_lines(self._bars, width))))


def measured_line(timings: Timings) -> str:
    """Of the last answer: `answers 4.12 tokens/s, prompts 80.1 tokens/s (the last answer)`."""
    rates = (("answers", timings.decode_tokens_per_s), ("prompts", timings.prompt_tokens_per_s))
    parts = [f"{name} {format_rate(rate)} tokens/s" for name, rate in rates if rate]
    return f"{', '.join(parts) or 'nothing'} (the last answer)"


def planned(plan: Mapping[str, Any]) -> tuple[float, float] | None:
    """Tokens per second of answers in a plan's JSON, from and to; None for models too small to predict."""
    decode = plan.get("decode")
    return (decode["low"]["tokens_per_s"], decode["high"]["tokens_per_s"]) if decode else None


def _row(name: str, text: str) -> ComposeResult:
    with Horizontal(classes="plan-row"):
        yield Static(Content(name), classes="plan-name")
        yield Static(Content(visible_line(text)), classes="plan-text")
