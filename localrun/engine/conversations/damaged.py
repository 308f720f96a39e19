"""Recovers the readable parts of a damaged file into a new one."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localrun import paths
from localrun.engine.conversations.database import FILE_NAME, ConversationError
from localrun.engine.conversations.records import CONVERSATION_COLUMNS, MESSAGE_COLUMNS, conversation_of, message_of
from localrun.engine.conversations.store import ConversationStore


@dataclass(frozen=True, slots=True)
class Salvage:
    """What `salvage` did: where the damaged file is now and how much of it could be read."""

    damaged: Path
    n_conversations: int
    n_messages: int


def salvage(path: Path | None = None) -> Salvage:
    """Moves a damaged file aside (`….damaged-TIME`, never deleted) and recovers everything readable into a new one.

    Raises:
        ConversationError: the folder can't be written to.
    """
    path = path or paths.data_dir() / FILE_NAME
    aside = path.with_name(f"{path.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
    try:
        # The main file last: until it is moved, a crash here has no effect.
        for suffix in ("-wal", "-shm", ""):
            side = path.with_name(path.name + suffix)
            if side.exists():
                side.rename(aside.with_name(aside.name + suffix))
    except OSError as error:
        raise ConversationError(f"{path}: can't be moved aside: {error.strerror}") from error
    with ConversationStore.open(path) as new, contextlib.closing(sqlite3.connect(aside, isolation_level=None)) as old:
        db = new._db
        db.execute("PRAGMA foreign_keys = OFF")
        with new._transaction():
            for row in _readable_rows(old, "conversations", CONVERSATION_COLUMNS):
                with contextlib.suppress(sqlite3.Error, ValueError, OverflowError):
                    conversation_of(row)
                    db.execute(f"INSERT INTO conversations ({CONVERSATION_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?)", row)
            for row in _readable_rows(old, "messages", MESSAGE_COLUMNS):
                if isinstance(row[2], int) and row[2] >= row[0]:
                    row = (*row[:2], None, *row[3:])  # a parent that is younger would make a circle
                with contextlib.suppress(sqlite3.Error, ValueError, OverflowError):
                    message_of(row)
                    db.execute(f"INSERT INTO messages ({MESSAGE_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
            _mend(db)
        counts = [
            int(db.execute(f"SELECT count(*) FROM {table}").fetchone()[0]) for table in ("conversations", "messages")
        ]
    return Salvage(aside, *counts)


def _readable_rows(db: sqlite3.Connection, table: str, columns: str) -> Iterator[tuple[Any, ...]]:
    """Rows by ascending id; a damaged page is jumped over in growing steps."""
    last, step = 0, 1
    while step < 1 << 20:
        try:
            for row in db.execute(f"SELECT {columns} FROM {table} WHERE id > ? ORDER BY id", (last,)):
                if int(row[0]) <= last:  # pages that refer to each other in a circle would be read for ever
                    raise ValueError("ids do not ascend")
                last, step = int(row[0]), 1
                yield row
            return
        except (sqlite3.Error, ValueError, TypeError, OverflowError):
            last, step = last + step, step * 2


def _mend(db: sqlite3.Connection) -> None:
    """Repairs trees: messages without a conversation get a new one, messages without a parent become roots."""
    now = time.time()
    db.execute(
        "INSERT INTO conversations (id, title, created_at, updated_at, settings)"
        " SELECT DISTINCT conversation_id, 'recovered', ?, ?, '{}' FROM messages"
        " WHERE conversation_id NOT IN (SELECT id FROM conversations)",
        (now, now),
    )
    db.execute("UPDATE messages SET parent_id = NULL WHERE parent_id NOT IN (SELECT id FROM messages)")
    db.execute(
        "UPDATE conversations SET head = (SELECT max(id) FROM messages WHERE conversation_id = conversations.id)"
        " WHERE head IS NULL OR head NOT IN (SELECT id FROM messages)"
    )
