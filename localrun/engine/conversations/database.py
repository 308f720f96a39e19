"""The file: its tables, opening and checking it, and helpful messages for SQLite's errors."""

from __future__ import annotations

import os
import sqlite3
import time
from pathlib import Path

from localrun.errors import LocalrunError

SCHEMA_VERSION = 1
FILE_NAME = "conversations.sqlite3"
APPLICATION_ID = 0x4C52434E
"""SQLite's application id ("LRCN")."""

BUSY_TIMEOUT_S = 5.0
"""Another localrun may be writing; its transactions take milliseconds."""

OPEN_TIMEOUT_S = 0.5
"""When opening, the user is waiting for the program to start, so a locked file is reported quickly."""
_RETRY_S = 0.01

_SCHEMA = """
CREATE TABLE conversations (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    title TEXT NOT NULL,
    created_at REAL NOT NULL,
    updated_at REAL NOT NULL,
    head INTEGER,
    settings TEXT NOT NULL
);
CREATE TABLE messages (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    conversation_id INTEGER NOT NULL REFERENCES conversations(id) ON DELETE CASCADE,
    parent_id INTEGER REFERENCES messages(id) ON DELETE CASCADE,
    role TEXT NOT NULL,
    content TEXT NOT NULL,
    reasoning TEXT NOT NULL,
    state TEXT NOT NULL,
    created_at REAL NOT NULL,
    active_child INTEGER,
    details TEXT NOT NULL
);
CREATE INDEX messages_of_conversation ON messages(conversation_id, parent_id);
CREATE INDEX messages_by_parent ON messages(parent_id);
CREATE TABLE state (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""


class ConversationError(LocalrunError):
    """The file of conversations can't be read or written."""


class DamagedConversationsError(ConversationError):
    """The file is not a valid database; `salvage` recovers what is readable."""

    def __init__(self, path: Path, cause: object) -> None:
        super().__init__(
            f"{path}: the conversation database is damaged ({cause})",
            hint="localrun can copy what is readable into a new file; the damaged one is kept",
        )
        self.path = path


def connect(path: Path) -> sqlite3.Connection:
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Conversations are private: SQLite gives its side files the mode of the main one.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError as error:
        raise ConversationError(
            f"{path}: can't store conversations there: {error.strerror}",
            hint="set LOCALRUN_DATA_DIR to another folder",
        ) from error
    return sqlite3.connect(path, timeout=OPEN_TIMEOUT_S, check_same_thread=False, isolation_level=None)


def prepare(db: sqlite3.Connection, path: Path) -> None:
    """Checks existing tables and creates missing ones; afterwards, locks are waited for longer."""
    _check(db, path)
    db.execute(f"PRAGMA busy_timeout = {round(1000 * BUSY_TIMEOUT_S)}")


def _write_ahead(db: sqlite3.Connection) -> None:
    """Switches the file to write-ahead logging. Where several programs begin that at once, SQLite reports a locked database
    without waiting for its timeout, so this tries again."""
    deadline = time.monotonic() + OPEN_TIMEOUT_S
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(_RETRY_S)
        else:
            return


def _check(db: sqlite3.Connection, path: Path) -> None:
    db.execute("PRAGMA foreign_keys = ON")
    version = int(db.execute("PRAGMA user_version").fetchone()[0])
    if version > SCHEMA_VERSION:
        raise ConversationError(
            f"{path}: written by a newer localrun (format {version}, this one reads {SCHEMA_VERSION})",
            hint="update localrun, or set LOCALRUN_DATA_DIR to another folder",
        )
    _write_ahead(db)
    db.execute("PRAGMA synchronous = NORMAL")
    if version:
        problem = str(db.execute("PRAGMA quick_check(1)").fetchone()[0])
        if problem != "ok":
            raise DamagedConversationsError(path, problem)
        return
    db.execute("BEGIN IMMEDIATE")
    # A second program may have made the tables while we waited for the lock.
    if not db.execute("PRAGMA user_version").fetchone()[0]:
        if db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            db.execute("ROLLBACK")
            raise ConversationError(
                f"{path}: not a localrun database", hint="move it elsewhere or set LOCALRUN_DATA_DIR"
            )
        for statement in _SCHEMA.split(";"):
            db.execute(statement)
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    db.execute("COMMIT")


def as_our_error(path: Path, error: sqlite3.Error | UnicodeDecodeError) -> ConversationError:
    """Translates a database error into a helpful one.

    Args:
        error: SQLite's; UnicodeDecodeError: Python could not even read its message, which quotes a damaged schema.
    """
    if isinstance(error, UnicodeDecodeError) or "Could not decode to UTF-8" in str(error):  # this one has no code
        return DamagedConversationsError(path, "text that is not valid UTF-8")
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return DamagedConversationsError(path, error)
    hints = {
        sqlite3.SQLITE_FULL: "the disk is full: free some space",
        sqlite3.SQLITE_READONLY: "make the file and its folder writable, or set LOCALRUN_DATA_DIR",
        sqlite3.SQLITE_CANTOPEN: "make the folder writable, or set LOCALRUN_DATA_DIR",
        sqlite3.SQLITE_BUSY: "another program has the file locked: close it and try again",
        sqlite3.SQLITE_LOCKED: "another program has the file locked: close it and try again",
        sqlite3.SQLITE_IOERR: "the disk reports an error: check its health first",
    }
    what = "in use by another program" if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED) else error
    return ConversationError(f"{path}: {what}", hint=hints.get(code))
