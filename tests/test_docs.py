"""Documents lead somewhere: every relative link is a file, every document is reached from README.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def links(document: Path) -> list[Path]:
    found = re.findall(r"\]\(([^)#\s]+)", document.read_text("utf-8"))
    return [(document.parent / link).resolve() for link in found if "://" not in link]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files(document: Path) -> None:
    assert [link for link in links(document) if not link.exists()] == []


def test_every_document_is_reached_from_the_readme() -> None:
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        document = waiting.pop()
        if document not in reached and document.suffix == ".md":
            reached.add(document)
            waiting += links(document)
    assert set(DOCUMENTS) <= reached
