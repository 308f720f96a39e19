"""Makes docs/pictures/plan-and-map.svg: a plan for a whole V4-Flash, and the map of its experts on that machine.

    python -m tools.plan_picture [--box gpu-24-ram-64] [--out docs/pictures/plan-and-map.svg]

The plan is the planner's and the map is the terminal UI's own widget. No machine that has been measured is this large, so
the experts' places are simulated: synthetic routing of one topic, a least recently used cache of the size that the plan gives.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import textwrap
from pathlib import Path

from textual.app import App, ComposeResult
from textual.containers import Horizontal
from textual.content import Content
from textual.widgets import Static

from localrun.engine.planner.bars import bar_lines, bars
from localrun.engine.planner.boxes import BY_SLUG
from localrun.engine.planner.hit_rates import Curve
from localrun.engine.planner.plan import Plan
from localrun.engine.planner.planner import make_plan
from localrun.engine.planner.sizes import sizes_of
from localrun.offload.cache.trace import TraceHeader
from localrun.tui.expert_grid import DISK, GPU, RAM, ExpertGrid, LayerExperts
from localrun.tui.widgets.expert_map import ExpertMap
from tools.simulator.replay import learn, steps_of
from tools.simulator.trace_file import TracedCall
from tools.simulator.traces import Workload, synthetic_calls

PICTURE = Path("docs/pictures/plan-and-map.svg")
SIZE = (160, 46)
PLAN_CELLS = 76
NAME_CELLS = 9
"""Before the text of a plan's line."""

N_TOKENS = 160
"""Of the synthetic answer: enough to fill the cache."""


def flash_plan(box: str) -> Plan:
    """Flash in MXFP4, with the published hit rates."""
    return make_plan(sizes_of("flash"), BY_SLUG[box].hardware, suggest=False, rates=Curve())


def simulated_grid(plan: Plan) -> ExpertGrid:
    """Where the plan's experts are after an answer: the hottest on the GPU, the last used of the others in RAM."""
    shape = plan.sizes.shape
    n_layers = len(shape.moe_layers)
    header = TraceHeader("synthetic", dict.fromkeys(range(n_layers), (shape.n_experts, shape.n_used)), 0.0)
    calls: list[TracedCall] = synthetic_calls(Workload(n_layers, shape.n_experts, shape.n_used, N_TOKENS), seed=0)
    places = dict.fromkeys(learn(calls, header).hottest(plan.placement.gpu_experts), GPU)
    recent = dict.fromkeys(key for step in reversed(steps_of(calls)) for key in step.keys if key not in places)
    places |= dict.fromkeys(list(recent)[: plan.placement.ram_experts], RAM)
    rows = [
        LayerExperts(
            layer=block,
            where="".join(places.get((number, expert), DISK) for expert in range(shape.n_experts)),
            types=("MXFP4",),
            type_of=(0,) * shape.n_experts,
            heat=(),
        )
        for number, block in enumerate(shape.moe_layers)
    ]
    return ExpertGrid(shape.n_experts, tuple(rows))


class PlanAndMap(App[None]):
    """The plan at the left, the map at the right."""

    CSS = f"""
    Horizontal {{ padding: 1 2; }}
    #plan {{ width: {PLAN_CELLS}; margin: 0 3 0 0; }}
    #expert-map {{ height: 1fr; }}
    """

    def __init__(self, plan: Plan, grid: ExpertGrid) -> None:
        super().__init__()
        self._plan, self._grid = plan, grid

    def compose(self) -> ComposeResult:
        with Horizontal():
            lines = self._plan.lines(faster=False)
            wrapped = [textwrap.fill(line, PLAN_CELLS, subsequent_indent=" " * NAME_CELLS) for line in lines]
            drawn = "\n".join(bar_lines(bars(self._plan), PLAN_CELLS))
            yield Static(Content("\n\n".join(wrapped) + "\n\n\n" + drawn), id="plan")
            yield ExpertMap()

    def on_mount(self) -> None:
        self.query_one(ExpertMap).show(self._grid)


async def picture(box: str) -> str:
    """SVG."""
    plan = flash_plan(box)
    grid = simulated_grid(plan)
    app = PlanAndMap(plan, grid)
    async with app.run_test(size=SIZE) as pilot:
        await pilot.pause()
        legend = app.query_one(ExpertMap).legend()
        svg = app.export_screenshot(title=f"localrun plan flash --box {box}; a simulated map ({legend})")
    # No picture may ask a server for a font.
    return re.sub(r"@font-face\s*\{[^}]*\}", "", svg)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--box", choices=sorted(BY_SLUG), default="gpu-24-ram-64")
    parser.add_argument("--out", type=Path, default=PICTURE)
    args = parser.parse_args()
    args.out.write_text(asyncio.run(picture(args.box)), encoding="utf-8")


if __name__ == "__main__":
    main()
