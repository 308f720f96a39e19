"""What docs, docstrings and comments say of the source's own files: each one that they name is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OFFICIAL = {"encoding/encoding_dsv4.py"}
"""Of other repositories."""

NAMED = re.compile(r"`((?:[\w.-]+/)*\w+\.py)\b")


def texts() -> list[Path]:
    folders = (ROOT / "localrun", ROOT / "tools", ROOT / "docs")
    found = [path for folder in folders for kind in ("*.py", "*.md") for path in folder.rglob(kind)]
    return [*found, *ROOT.glob("*.md")]


@pytest.fixture(scope="module")
def sources() -> str:
    """Paths of all modules, one a line, each after a slash."""
    found = [path for folder in ("localrun", "tools", "tests") for path in (ROOT / folder).rglob("*.py")]
    return "".join(f"/{path.relative_to(ROOT)}\n" for path in found)


def test_files_that_are_named_exist(sources: str) -> None:
    named = [(path, name) for path in texts() for name in NAMED.findall(path.read_text(encoding="utf-8"))]
    assert len(named) > 100, "the pattern finds what it is for"
    missing = [f"{path.relative_to(ROOT)}: {name}" for path, name in named if f"/{name}\n" not in sources]
    assert [entry for entry in missing if entry.partition(": ")[2] not in OFFICIAL] == []
