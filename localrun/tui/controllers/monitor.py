"""Shows the engine's counters in the status line and the engine panel, and decides when to poll them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from textual.screen import Screen

from localrun.engine.process.protocol import Stats
from localrun.tui.controllers.asking import Asking
from localrun.tui.controllers.conversation import OpenConversation
from localrun.tui.controllers.model import ModelSwitch
from localrun.tui.controllers.panels import Panels
from localrun.tui.controllers.work import Handler, Invocation
from localrun.tui.live_answer import prompt_time_left
from localrun.tui.messages import StatsArrived
from localrun.tui.screens.plan import PlanScreen
from localrun.tui.widgets.engine_panel import EnginePanel, ram_bytes
from localrun.tui.widgets.status_bar import Status, StatusBar, time_left

IDLE_STATS_EVERY = 3
"""While nothing is computed the counters hardly change."""

MAP_EVERY = 3
"""Counter polls per map poll. A map of Flash's 11,008 experts takes the engine 26 ms at most (measured on a busy machine),
mostly for JSON; every 3 s that is less than 1 % of its time."""


class Monitor:
    """Owns the last sample of the counters.

    Args:
        extra: other activity for the status line (a conversion).
    """

    def __init__(
        self,
        screen: Screen[Any],
        model: ModelSwitch,
        asking: Asking,
        current: OpenConversation,
        panels: Panels,
        *,
        extra: Callable[[], str],
    ) -> None:
        self._screen, self._model, self._asking = screen, model, asking
        self._current, self._panels, self._extra = current, panels, extra
        self.last_stats: Stats | None = None
        self._tick = 0

    def commands(self) -> dict[str, Handler]:
        return {"plan": self._plan}

    @property
    def _panel(self) -> EnginePanel:
        return self._screen.query_one(EnginePanel)

    def forget(self) -> None:
        """Another model."""
        self.last_stats = None
        self._panel.forget()

    def look(self) -> None:
        """Asks now, for the map too where it is on view."""
        self._model.link.ask_stats(expert_map=self._panels.engine != "off")

    def tick_live(self) -> None:
        """A few times a second: what changes while an answer is written."""
        self._screen.query_one(StatusBar).show(self.status())

    def tick_stats(self) -> None:
        """Once a second."""
        self._tick += 1
        closed = self._panels.engine == "off"
        if not self._asking.answering.running and (closed or self._tick % IDLE_STATS_EVERY):
            return
        if self._model.facts is not None:
            self._model.link.ask_stats(expert_map=not closed and self._tick % MAP_EVERY == 0)

    def show(self, event: StatsArrived) -> None:
        self.last_stats = event.stats
        self._panel.show(event.stats, self._model.facts, event.seconds)

    # --- the status line

    @property
    def context_used(self) -> int:
        """Tokens."""
        answer = self._asking.answering.answer
        if self._asking.answering.running and answer is not None and answer.context_used:
            return answer.context_used
        return self.last_stats.context_used if self.last_stats is not None else 0

    @property
    def room(self) -> int:
        """Tokens that are left in the context; 0: not known."""
        facts = self._model.facts
        return max(0, facts.n_ctx - self.context_used) if facts is not None else 0

    def status(self) -> Status:
        """What the status line shows now."""
        facts, panel = self._model.facts, self._panel
        answer = self._asking.answering.answer
        return Status(
            activity=self._activity(),
            decode_tokens_per_s=None if answer is None else answer.decode_tokens_per_s,
            prompt_tokens_per_s=None if answer is None else answer.prompt_tokens_per_s,
            context_used=self.context_used,
            n_ctx=facts.n_ctx if facts is not None else 0,
            planned=self._model.planned if facts is not None else None,
            hit_rate=panel.rates.hit_rate,
            ram_bytes=None if facts is None else ram_bytes(facts, panel.grid, self.last_stats),
            ram_budget=None if facts is None else facts.ram_bytes,
            think=self._current.options.think,
            extra=self._extra(),
        )

    def _activity(self) -> str:
        if self._model.loading:
            return "loading"
        if self._model.facts is None:
            return "no model"
        answer = self._asking.answering.answer
        if not self._asking.answering.running or answer is None:
            return ""
        progress = answer.progress
        if progress is not None and progress.done < progress.total:
            percent = 100 * progress.done / max(1, progress.total)
            return f"reading {percent:.0f}% {time_left(prompt_time_left(progress))}".strip()
        return "thinking" if answer.is_thinking else "writing" if answer.n_tokens else "reading"

    # --- the plan

    def _plan(self, call: Invocation) -> None:
        """The plan of the load, and what was measured since."""
        answer = self._asking.answering.answer
        measured = None if answer is None or answer.finished is None else answer.finished.timings
        loaded = self._model.facts is not None
        bars = self._model.plan_bars if loaded else ()
        self._screen.app.push_screen(PlanScreen(self._model.plan_lines, measured, loaded=loaded, bars=bars))
