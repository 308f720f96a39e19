"""Every UI test has data folders of its own."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from textual import _wait
from textual.css.model import RuleSet
from textual.css.stylesheet import Stylesheet
from textual.css.types import CSSLocation
from textual.pilot import Pilot

from tests.tui.support import PATIENCE_S, Setup

_parse_rules = Stylesheet._parse_rules


@cache
def _rules(variables: tuple[tuple[str, str], ...], css: str, place: CSSLocation, *about: object) -> list[RuleSet]:
    return _parse_rules(Stylesheet(variables=dict(variables)), css, place, *about)  # type: ignore[arg-type]


def _rules_parsed_once(
    sheet: Stylesheet,
    css: str,
    read_from: CSSLocation,
    is_default_rules: bool = False,
    tie_breaker: int = 0,
    scope: str = "",
) -> list[RuleSet]:
    """As `Stylesheet._parse_rules`, whose own memory ends with its app: what a process's next app parses is the same."""
    return _rules(tuple(sheet._variables.items()), css, read_from, is_default_rules, tie_breaker, scope)


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DATA", "CACHE", "CONFIG"):
        monkeypatch.setenv(f"LOCALRUN_{name}_DIR", str(tmp_path / name.lower()))
    monkeypatch.chdir(tmp_path)
    # Textual's pilot sleeps after each key in steps of 20 ms until less than 5 % of a step were computed: most of a test's time.
    monkeypatch.setattr(_wait, "SLEEP_GRANULARITY", 0.003)
    monkeypatch.setattr(_wait, "SLEEP_IDLE", 0.0006)
    monkeypatch.setattr(Stylesheet, "_parse_rules", _rules_parsed_once)
    monkeypatch.setattr(Pilot._wait_for_screen, "__defaults__", (PATIENCE_S,))  # 30 s; a click fails after that


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(tmp_path)
