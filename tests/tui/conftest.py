"""Every UI test has data folders of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tui.support import Setup


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DATA", "CACHE", "CONFIG"):
        monkeypatch.setenv(f"LOCALRUN_{name}_DIR", str(tmp_path / name.lower()))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(tmp_path)
