"""A few phrases that read as translated stay out of documents, help and messages."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent

STIFF = {
    r"\bshall\b": "must, or a plain statement",
    r"\bnobody\b": "no one; better: name what does not happen",
    r"\b(?:as|where) (?:they|it) (?:lies?|stands?)\b": "unchanged, in place",
    r"\bwhat (?:stands|lies)\b": "what is",
    r"\bstands? (?:behind|beside|in the table)\b": "follows, is next to, is in",
    r"\bis none of\b": "is not one of",
    r"(?<!there )\bis no (?:model|text|name|value|table|GGUF|file|number)\b": "is not a",
    r"\bare wanted\b": "expected",
    r"\bmust lie\b": "must be",
    r"\b(?:converted|split|waiting) already\b": "already converted",
    r"\bare free to\b|\bfree are\b": "are available",
    r"\banew\b": "again, over",
    r"\bmend(?:s|ed)?\b": "fix",
    r"\b(?:s|ms|bytes|experts?|bits) a (?:token|weight)\b": "per token",
    r"\bas many as make\b": "the number that makes",
    r"\bis handed\b": "gets",
}
"""Pattern -> what to write instead."""

ANY = re.compile("|".join(STIFF), re.IGNORECASE)


def documents() -> Iterator[tuple[str, str]]:
    for path in sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]):
        yield str(path.relative_to(ROOT)), path.read_text("utf-8")


def messages() -> Iterator[tuple[str, str]]:
    """All text in the package's code that is not a docstring, of modules that may hold a hit."""
    for path in sorted((ROOT / "localrun").rglob("*.py")):
        source = path.read_text("utf-8")
        if not ANY.search(source):
            continue
        docstrings = set()
        for node in ast.walk(ast.parse(source)):  # a statement comes before its value
            if isinstance(node, ast.Expr):
                docstrings.add(id(node.value))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                yield f"{path.relative_to(ROOT)}:{node.lineno}", node.value


def test_documents_and_messages_are_idiomatic() -> None:
    found = [
        f"{where}: '{match[0]}': {instead}"
        for where, text in [*documents(), *messages()]
        if ANY.search(text)
        for pattern, instead in STIFF.items()
        if (match := re.search(pattern, text, re.IGNORECASE))
    ]
    assert found == []
