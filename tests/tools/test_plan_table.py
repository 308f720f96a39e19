"""The README's predictions are the planner's."""

from __future__ import annotations

from pathlib import Path

from tools.plan_table import short_table

README = Path(__file__).parents[2] / "README.md"


def test_the_readme_has_what_the_planner_says() -> None:
    assert short_table() in README.read_text("utf-8")
