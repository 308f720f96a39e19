"""Paths are completed from the file system, one step at a time."""

from __future__ import annotations

from pathlib import Path

import pytest

from localrun.tui.screens.attach import PathSuggester


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "draft.md").touch()
    (tmp_path / "notes.txt").touch()
    (tmp_path / "bad\x1bname").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("no", "notes.txt"),  # sorted as names with a slash
        ("notes/", None),
        ("notes/dr", "notes/draft.md"),
        ("notes.txt", "notes.txt"),
        ("x", None),
        ("bad", None),
        ("absent/x", None),
        ("", None),
    ],
)
async def test_what_a_path_may_go_on_with(folder: Path, value: str, expected: str | None) -> None:
    found = await PathSuggester().get_suggestion(value)
    if value == "no":
        assert found in ("notes.txt", "notes/")
        assert found == sorted(["notes/", "notes.txt"])[0]
    else:
        assert found == expected


async def test_absolute_paths_and_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    assert await PathSuggester().get_suggestion(f"{folder}/notes/d") == f"{folder}/notes/draft.md"
    assert await PathSuggester().get_suggestion("~/notes/d") == "~/notes/draft.md"
