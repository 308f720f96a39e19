"""The file of conversations: whose it is, who may read it, and SQLite's errors in words that help."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from localrun.engine.conversations.database import (
    APPLICATION_ID,
    SCHEMA_VERSION,
    ConversationError,
    DamagedConversationsError,
    as_our_error,
    connect,
    prepare,
)


def test_a_new_file_is_ours_and_private_and_opens_again(tmp_path: Path) -> None:
    path = tmp_path / "new/c.sqlite3"
    for _ in range(2):
        db = connect(path)
        prepare(db, path)
        assert db.execute("PRAGMA application_id").fetchone()[0] == APPLICATION_ID
        assert db.execute("PRAGMA user_version").fetchone()[0] == SCHEMA_VERSION
        assert db.execute("PRAGMA foreign_keys").fetchone()[0] == 1
        db.close()
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("CREATE TABLE theirs (a)", "not a localrun database"),
        (f"PRAGMA user_version = {SCHEMA_VERSION + 1}", "written by a newer localrun"),
    ],
)
def test_another_programs_and_a_newer_file_are_refused_and_left_as_they_are(
    tmp_path: Path, statement: str, words: str
) -> None:
    path = tmp_path / "c.sqlite3"
    with sqlite3.connect(path) as other:
        other.execute(statement)
    other.close()
    db = connect(path)
    with pytest.raises(ConversationError, match=words) as caught:
        prepare(db, path)
    db.close()
    assert "LOCALRUN_DATA_DIR" in str(caught.value.hint)
    with sqlite3.connect(path) as other:
        tables = [name for (name,) in other.execute("SELECT name FROM sqlite_master")]
    other.close()
    assert tables == (["theirs"] if "theirs" in statement else [])


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConversationError, match="can't store conversations there"):
        connect(tmp_path / "file/c.sqlite3")


@pytest.mark.parametrize(
    ("code", "kind", "hint"),
    [
        (sqlite3.SQLITE_CORRUPT, DamagedConversationsError, "the damaged one is kept"),
        (sqlite3.SQLITE_NOTADB, DamagedConversationsError, "the damaged one is kept"),
        (sqlite3.SQLITE_FULL, ConversationError, "free some space"),
        (sqlite3.SQLITE_BUSY, ConversationError, "close it and try again"),
        (sqlite3.SQLITE_IOERR | 1 << 8, ConversationError, "the disk reports an error"),
    ],
)
def test_errors_say_what_to_do(code: int, kind: type[ConversationError], hint: str) -> None:
    error = sqlite3.OperationalError("words of SQLite")
    error.sqlite_errorcode = code
    ours = as_our_error(Path("c.sqlite3"), error)
    assert type(ours) is kind
    assert hint in str(ours.hint)


def test_text_that_is_no_text_is_damage() -> None:
    with pytest.raises(UnicodeDecodeError) as caught:
        b"\xff".decode()
    assert isinstance(as_our_error(Path("c"), caught.value), DamagedConversationsError)
