"""Every UI test has data folders of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from textual import _wait
from textual.pilot import Pilot

from tests.tui.support import PATIENCE_S, Setup


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DATA", "CACHE", "CONFIG"):
        monkeypatch.setenv(f"LOCALRUN_{name}_DIR", str(tmp_path / name.lower()))
    monkeypatch.chdir(tmp_path)
    # Textual's pilot sleeps after each key in steps of 20 ms until less than 5 % of a step were computed: most of a test's time.
    monkeypatch.setattr(_wait, "SLEEP_GRANULARITY", 0.003)
    monkeypatch.setattr(_wait, "SLEEP_IDLE", 0.0006)
    monkeypatch.setattr(Pilot._wait_for_screen, "__defaults__", (PATIENCE_S,))  # 30 s; a click fails after that


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(tmp_path)
