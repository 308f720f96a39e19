"""Pictures and tables in the documentation are made from the data and the code as they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from localrun.errors import UsageError
from tools import figures, plan_picture

ROOT = Path(__file__).parents[2]


def test_the_chart_is_current() -> None:
    assert figures.CHART.read_text("utf-8") == figures.chart(figures.read()), "run: python -m tools.figures"


def test_the_table_is_current() -> None:
    page = figures.PAGE.read_text("utf-8")
    assert page == figures.page_with(page, figures.read()), "run: python -m tools.figures"


async def test_the_plan_beside_the_map_is_current() -> None:
    drawn = (ROOT / plan_picture.PICTURE).read_text("utf-8")
    assert drawn == await plan_picture.picture("gpu-24-ram-64"), "run: python -m tools.plan_picture"


def test_the_map_has_what_the_plan_has_room_for() -> None:
    plan = plan_picture.flash_plan("gpu-24-ram-64")
    grid = plan_picture.simulated_grid(plan)
    assert len(grid.layers) == 43
    assert grid.count("g") == plan.placement.gpu_experts
    assert grid.count("r") == plan.placement.ram_experts


def test_an_optional_figure_is_drawn_and_an_unknown_field_is_refused(tmp_path: Path) -> None:
    row = """[machines]\nbox = "a box"\n[[figure]]\nwhat = "answers"\nmodel = "Flash"\nexperts = "Q2_K"\ndense = "Q4_K"
machine = "box"\ncontext = 512\nlocalrun = 2.5\nllamacpp = 0.5\nplanned = [2, 3]\n"""
    path = tmp_path / "figures.toml"
    path.write_text(row, "utf-8")
    (figure,) = figures.read(path)
    assert "| 512 | answers | **2.5** | 0.5 | 2 to 3 |" in figures.table([figure])
    assert "0.5  llama.cpp" in figures.chart([figure])
    path.write_text(row + "speed = 3\n", "utf-8")
    with pytest.raises(UsageError, match=r"figures\.toml: figure 1: .*speed"):
        figures.read(path)
