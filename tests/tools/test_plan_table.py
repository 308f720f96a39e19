"""The predictions in the documentation are the planner's."""

from __future__ import annotations

from pathlib import Path

from localrun.engine.planner.boxes import BOXES
from localrun.engine.planner.plan import PlanOptions
from localrun.engine.planner.sizes import format_of, sizes_of
from tools.plan_table import no_gpu_table, rows, short_table, table

ROOT = Path(__file__).parents[2]


def test_the_readme_has_what_the_planner_says() -> None:
    assert short_table() in (ROOT / "README.md").read_text("utf-8"), "run: python -m tools.plan_table --short"


def test_the_planners_page_has_what_the_planner_says() -> None:
    models = [sizes_of(name, base=format_of(kind)) for name in ("flash", "pro") for kind in ("mxfp4", "q2_k")]
    expected = table(rows(models, BOXES, PlanOptions(n_ctx=32768)))
    assert expected in (ROOT / "docs" / "planner.md").read_text("utf-8"), "run: python -m tools.plan_table"


def test_the_table_without_a_gpu_has_what_the_planner_says() -> None:
    expected = no_gpu_table()
    assert expected in (ROOT / "docs" / "quantization.md").read_text("utf-8"), (
        "run: python -m tools.plan_table --no-gpu"
    )
