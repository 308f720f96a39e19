"""Documents lead somewhere (every relative link is a file, every document is reached from README.md) and are sound Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterator
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


def anchors(document: Path) -> set[str]:
    """What the headings of a document can be linked by, as GitHub names them."""
    titles = re.findall(r"(?m)^#+ +(.+?) *$", re.sub(r"(?ms)^```.*?^```", "", document.read_text("utf-8")))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_into_documents_lead_to_headings(document: Path) -> None:
    found = re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", document.read_text("utf-8"))
    inside = [((document.parent / link) if link else document, anchor) for link, anchor in found if "://" not in link]
    assert [(path.name, anchor) for path, anchor in inside if anchor not in anchors(path)] == []


def test_anchors_are_github_s() -> None:
    assert {"will-it-run-on-my-box", "status-and-limits"} <= anchors(ROOT / "README.md")


def test_every_document_is_reached_from_the_readme() -> None:
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        document = waiting.pop()
        if document not in reached and document.suffix == ".md":
            reached.add(document)
            waiting += links(document)
    assert set(DOCUMENTS) <= reached


ITEM = re.compile(r"([*+-]|\d+[.)]) ")


def cells(row: str) -> int:
    return len(re.findall(r"(?<!\\)\|", row)) - 1


def layout_faults(text: str) -> Iterator[str]:
    """Lines that a reflow has damaged. Fenced code is skipped."""
    fence = header = before = ""
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        if stripped.startswith("```"):
            fence = "" if fence else f"line {number}: a fence that nothing closes"
            header = before = ""
            continue
        if fence:
            continue
        is_item = ITEM.match(line) is not None
        if re.match(r"([*+-]) \1 ", stripped):
            yield f"line {number}: a doubled bullet"
        if stripped.startswith("|") or (header and stripped and not is_item):
            header = header or stripped
            if not (stripped.startswith("|") and stripped.endswith("|")):
                yield f"line {number}: a table row broken over lines"
            elif cells(stripped) != cells(header):
                yield f"line {number}: {cells(stripped)} cells under a header with {cells(header)}"
        else:
            header = ""
            if stripped and line == line.lstrip() and not is_item and (ITEM.match(before) or before.startswith("  ")):
                yield f"line {number}: runs into the list or code above it"
        before = line
    if fence:
        yield fence


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "docs/demo-model/chats.md"], ids=lambda path: path.name)
def test_layout_is_sound(document: Path) -> None:
    assert list(layout_faults(document.read_text("utf-8"))) == []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("* * two bullets", "line 1: a doubled bullet"),
        ("| a | b |\n|---|---|\n| one | two\nthree |", "line 3: a table row broken over lines"),
        ("| a | b |\n|---|---|\n| one | two | three |", "line 3: 3 cells under a header with 2"),
        ("* an item\ntext", "line 2: runs into the list or code above it"),
        ("```\ncode", "line 1: a fence that nothing closes"),
    ],
)
def test_damaged_layout_is_found(text: str, fault: str) -> None:
    assert next(layout_faults(text)) == fault
