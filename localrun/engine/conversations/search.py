"""Searches titles and messages.

Departure from the textbook: it scans the texts with Python's case folding instead of using an index. This finds words inside
identifiers and in any script, and there is no index that could become inconsistent; one person's conversations are small.
"""

from __future__ import annotations

import sqlite3

from localrun.engine.conversations.records import SearchHit

_SNIPPET_CHARS = 120


def search(db: sqlite3.Connection, words: list[str], conversation_id: int | None, limit: int) -> list[SearchHit]:
    """Titles and messages with all words (case-folded ones), newest first; None: of all conversations."""

    def has_all(*texts: str) -> bool:
        folded = "\n".join(texts).casefold()
        return all(word in folded for word in words)

    db.create_function("has_all", -1, has_all, deterministic=True)
    titles = [
        SearchHit(row[0], row[1], None, "title", row[1], row[2])
        for row in db.execute("SELECT id, title, updated_at FROM conversations WHERE has_all(title)")
        if conversation_id is None
    ]
    where = "" if conversation_id is None else "m.conversation_id = :conversation AND "
    rows = db.execute(
        "SELECT m.conversation_id, c.title, m.id, m.role, m.content, m.reasoning, m.created_at FROM messages m"
        f" JOIN conversations c ON c.id = m.conversation_id WHERE {where} has_all(m.content, m.reasoning, m.details)"
        " ORDER BY m.id DESC LIMIT :limit",
        {"conversation": conversation_id, "limit": limit},
    )
    hits = [
        SearchHit(talk, title, message, role, _snippet(words, content, thinking), at)
        for talk, title, message, role, content, thinking, at in rows
    ]
    return [*titles, *hits][:limit]


def _snippet(words: list[str], *texts: str) -> str:
    """One line around the first word that occurs."""
    for text in texts:
        line = " ".join(text.split())
        at = min((at for word in words if (at := line.casefold().find(word)) >= 0), default=-1)
        if at >= 0:
            start = max(0, at - _SNIPPET_CHARS // 3)
            cut = line[start : start + _SNIPPET_CHARS]
            return ("…" if start else "") + cut + ("…" if start + _SNIPPET_CHARS < len(line) else "")
    return " ".join(texts[0].split())[:_SNIPPET_CHARS]
