"""The engine panel: tiers with bytes and rates, and the map of experts."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

from textual.app import ComposeResult
from textual.containers import Vertical
from textual.content import Content
from textual.widgets import Static

from localrun.engine.facts import ModelFacts
from localrun.engine.process.protocol import Stats
from localrun.tui.expert_grid import GPU, RAM, ExpertGrid, TierRates, read_grid, tier_rates
from localrun.tui.widgets.expert_map import ExpertMap
from localrun.units import format_bytes_rate, format_size

HISTORY = 60
"""Looks that the hit rate's curve covers."""

CURVE_ROWS = 2


class EnginePanel(Vertical):
    """Tiers, rates, map. The screen feeds it `Stats`; it keeps the previous sample to compute rates.

    Attributes:
        rates: between the last two looks at which anything had happened.
        seconds_per_look: cost of the last look as the interface saw it (waiting included).
    """

    def __init__(self) -> None:
        super().__init__(id="engine")
        self.rates = TierRates()
        self.grid: ExpertGrid | None = None
        self.seconds_per_look = 0.0
        self._before: Stats | None = None
        self._hits: deque[float] = deque(maxlen=HISTORY)

    def compose(self) -> ComposeResult:
        with Vertical(id="engine-numbers"):
            yield Static("Engine", classes="panel-title")
            yield Static("no model", id="engine-text")
            yield Static("", id="hit-label")
            yield Static("", id="hit-curve")
            yield Static("", id="map-legend")
            yield Static("F3 larger / off · F9 map view", classes="panel-foot")
        yield ExpertMap()

    @property
    def map(self) -> ExpertMap:
        return self.query_one(ExpertMap)

    def forget(self) -> None:
        """Another model."""
        self._before, self.rates, self.grid = None, TierRates(), None
        self._hits.clear()
        self.map.show(None)

    def show(self, stats: Stats, facts: ModelFacts | None, seconds: float) -> None:
        """A new look at the engine."""
        rates = tier_rates(self._before, stats, facts)
        if rates.hit_rate is not None:
            self.rates = rates
            self._hits.append(rates.hit_rate)
        self._before, self.seconds_per_look = stats, seconds
        if stats.experts is not None:
            self.grid = read_grid(stats.experts)
        if not self.display:
            return
        self.query_one("#engine-text", Static).update(Content("\n".join(_lines(stats, facts, self.rates, self.grid))))
        curve = self.query_one("#hit-curve", Static)
        label = self.query_one("#hit-label", Static)
        curve.display = label.display = len(self._hits) > 1
        label.update(f"hit rate, 0 to 100 %, last {len(self._hits)} samples")
        curve.update(Content("\n".join(bar_chart(list(self._hits)[-max(1, curve.size.width) :], CURVE_ROWS))))
        if stats.experts is not None:
            self.map.show(self.grid)
        self.call_after_refresh(self.show_legend)  # it depends on the map's width

    def show_legend(self) -> None:
        text = f"{self.map.view}: {self.map.legend()}" if self.grid else "this engine has no map"
        self.query_one("#map-legend", Static).update(Content(text))


def bar_chart(shares: Sequence[float], n_rows: int) -> list[str]:
    """One column for each share, as high as it is: 0 is a thin line, 1 fills all rows. The top row first."""
    eighths = [max(1, round(8 * n_rows * min(max(share, 0.0), 1.0))) for share in shares]
    return ["".join(_EIGHTHS[min(max(n - 8 * row, 0), 8)] for n in eighths) for row in reversed(range(n_rows))]


_EIGHTHS = " ▁▂▃▄▅▆▇█"


def ram_bytes(facts: ModelFacts, grid: ExpertGrid | None, stats: Stats | None) -> int | None:
    """Bytes of experts in RAM: counted on the map, otherwise as reported by the engine."""
    if grid is not None:
        return grid.count(RAM) * facts.expert_bytes
    value = stats.telemetry.get("ram_bytes") if stats is not None else None
    return value if isinstance(value, int) else None


def _lines(stats: Stats, facts: ModelFacts | None, rates: TierRates, grid: ExpertGrid | None) -> Iterator[str]:
    if facts is None:
        yield "no model"
        return
    yield f"{facts.n_layers} layers, {facts.n_experts} experts, {facts.n_experts_used} per token, {facts.n_threads} threads"
    if grid is not None:
        n_all = grid.n_all
        on_gpu, in_ram = grid.count(GPU), grid.count(RAM)
        if on_gpu or facts.gpus:
            yield _tier("GPU", on_gpu, n_all, on_gpu * facts.expert_bytes)
        yield _tier("RAM", in_ram, n_all, in_ram * facts.expert_bytes)
        yield _tier("disk", n_all - on_gpu - in_ram, n_all, (n_all - on_gpu - in_ram) * facts.expert_bytes)
    yield f"RAM for experts  {format_size(facts.ram_bytes)}   process {format_size(stats.rss_bytes)}"
    hit = "–" if rates.hit_rate is None else f"{100 * rates.hit_rate:.1f} %"
    per_token = "–" if rates.bytes_per_token is None else format_size(rates.bytes_per_token)
    disk = "–" if rates.disk_bytes_per_s is None else format_bytes_rate(rates.disk_bytes_per_s)
    wait = "–" if rates.wait_share is None else f"{100 * rates.wait_share:.0f} %"
    total = stats.telemetry.get("bytes_read")
    if isinstance(total, int):
        yield f"read since loading  {format_size(total)}"
    yield f"disk {disk}   waiting {wait}"
    yield f"hits {hit}   {per_token} per token"


def _tier(name: str, n: int, n_all: int, n_bytes: int) -> str:
    cells = 12
    filled = round(cells * n / n_all) if n_all else 0
    return f"{name:<4} {'█' * filled}{'░' * (cells - filled)} {n:>6,}  {format_size(n_bytes)}"
