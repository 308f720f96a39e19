"""The user's conversations: a SQLite file that is written as things happen and survives a crash at any moment.

A conversation is a tree of messages. `head` names the last message on view, the path from the first message to it is what
the model sees. Editing, regenerating and branching only add messages and move the head; nothing is ever overwritten except
the message that is being written. Knows nothing about the engine, prompts or terminals; texts are kept as they were written
(`localrun.textsafe` makes them safe to show).

Departure from the textbook: search scans the texts with Python's case folding instead of an index. Words are then found
inside identifiers and in any script, and there is no index that could disagree with the texts; one person's conversations
are small.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

from localrun import paths
from localrun.errors import LocalrunError

SCHEMA_VERSION = 1
FILE_NAME = "conversations.sqlite3"
APPLICATION_ID = 0x4C52434E
"""SQLite's header field that says whose file it is ("LRCN")."""

BUSY_TIMEOUT_S = 10.0
"""Another localrun may be writing; its transactions take milliseconds."""

MAX_TITLE_CHARS = 200

Role = Literal["system", "user", "assistant", "tool"]
MessageState = Literal["complete", "writing", "stopped", "length", "context", "failed"]
"""`writing`: the answer is under way, or the program ended in the middle of it."""

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

_MESSAGE_COLUMNS = "id, conversation_id, parent_id, role, content, reasoning, state, created_at, details"
_CONVERSATION_COLUMNS = "id, title, created_at, updated_at, head, settings"

P = ParamSpec("P")
R = TypeVar("R")


class ConversationError(LocalrunError):
    """The file of conversations can't be read or written."""


class DamagedConversationsError(ConversationError):
    """The file is no sound database; `salvage` rescues what can be read."""

    def __init__(self, path: Path, cause: object) -> None:
        super().__init__(
            f"{path}: the conversations are damaged ({cause})",
            hint="what can be read is copied into a new file when you choose so; the damaged one is kept",
        )
        self.path = path


@dataclass(frozen=True, slots=True)
class Attachment:
    """A text file that goes with a user's message."""

    name: str
    text: str
    n_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a tree. `parent_id` is None for the first one of a branch.

    Attributes:
        details: what else is known, by name: `timings`, `seed`, `model`, `think`, `thinking_s`, `warning`, `error`.
    """

    id: int
    conversation_id: int
    parent_id: int | None
    role: Role
    content: str
    reasoning: str = ""
    state: MessageState = "complete"
    created_at: float = 0.0
    attachments: tuple[Attachment, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Conversation:
    """A tree of messages with a name.

    Attributes:
        head: last message of the path on view; None: empty.
        settings: free JSON of the user interface (think mode, sampling, system prompt, model).
    """

    id: int
    title: str
    created_at: float
    updated_at: float
    head: int | None
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SearchHit:
    """A message (or, with `message_id` None, a title) that contains all words.

    Attributes:
        snippet: one line around the first word.
    """

    conversation_id: int
    title: str
    message_id: int | None
    role: str
    snippet: str
    created_at: float


def _translated(method: Callable[P, R]) -> Callable[P, R]:
    """SQLite's exceptions become ours."""

    @wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        store = args[0]
        assert isinstance(store, ConversationStore)
        try:
            with store._lock:
                return method(*args, **kwargs)
        except sqlite3.Error as error:
            raise _as_our_error(store.path, error) from error

    return call


class ConversationStore:
    """All conversations of one user, in one file.

    Owns the connection; one lock makes every method safe from any thread, and SQLite's own locks make several programs on
    one file safe. A method's changes are one transaction: after a crash they are there as a whole or not at all. A power
    failure may lose the last second's (WAL with synchronous=NORMAL), never more.
    """

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._db = connection
        self._lock = threading.RLock()
        self.path = path

    @classmethod
    def open(cls, path: Path | None = None) -> ConversationStore:
        """Opens or makes the file (default: in the user's data folder, readable by nobody else).

        Raises:
            DamagedConversationsError: it is there but no sound database.
            ConversationError: no permission, a full disk, or a file of a newer version.
        """
        path = path or paths.data_dir() / FILE_NAME
        connection = _connect(path)
        try:
            _prepare(connection, path)
        except sqlite3.Error as error:
            connection.close()
            raise _as_our_error(path, error) from error
        except BaseException:
            connection.close()
            raise
        return cls(connection, path)

    @classmethod
    def in_memory(cls) -> ConversationStore:
        """A store that forgets everything at the end: for when the disk can't be written to."""
        connection = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
        _prepare(connection, Path(":memory:"))
        return cls(connection, Path(":memory:"))

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def __enter__(self) -> ConversationStore:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # --- conversations

    @_translated
    def create(self, title: str = "", settings: Mapping[str, Any] | None = None) -> Conversation:
        """A new, empty conversation."""
        now = time.time()
        row = (title[:MAX_TITLE_CHARS], now, now, json.dumps(dict(settings or {})))
        with self._transaction():
            cursor = self._db.execute(
                "INSERT INTO conversations (title, created_at, updated_at, settings) VALUES (?, ?, ?, ?)", row
            )
        return self.conversation(int(cursor.lastrowid or 0))

    @_translated
    def conversation(self, conversation_id: int) -> Conversation:
        """Raises KeyError if there is none (any more)."""
        row = self._db.execute(
            f"SELECT {_CONVERSATION_COLUMNS} FROM conversations WHERE id = ?", (conversation_id,)
        ).fetchone()
        if row is None:
            raise KeyError(conversation_id)
        return _conversation(row)

    @_translated
    def conversations(self) -> list[Conversation]:
        """All, the one that was last written to first."""
        rows = self._db.execute(f"SELECT {_CONVERSATION_COLUMNS} FROM conversations ORDER BY updated_at DESC, id DESC")
        return [_conversation(row) for row in rows]

    @_translated
    def rename(self, conversation_id: int, title: str) -> None:
        with self._transaction():
            self._db.execute(
                "UPDATE conversations SET title = ? WHERE id = ?", (title.strip()[:MAX_TITLE_CHARS], conversation_id)
            )

    @_translated
    def save_settings(self, conversation_id: int, settings: Mapping[str, Any]) -> None:
        with self._transaction():
            self._db.execute(
                "UPDATE conversations SET settings = ? WHERE id = ?", (json.dumps(dict(settings)), conversation_id)
            )

    @_translated
    def delete(self, conversation_id: int) -> None:
        """Removes a conversation with all its branches, for good."""
        with self._transaction():
            self._db.execute("DELETE FROM messages WHERE conversation_id = ?", (conversation_id,))
            self._db.execute("DELETE FROM conversations WHERE id = ?", (conversation_id,))

    # --- messages

    @_translated
    def add(
        self,
        conversation_id: int,
        parent_id: int | None,
        role: Role,
        content: str,
        *,
        reasoning: str = "",
        state: MessageState = "complete",
        attachments: Sequence[Attachment] = (),
        details: Mapping[str, Any] | None = None,
    ) -> Message:
        """Adds a message below `parent_id` (None: as the first of a new branch) and makes it the head."""
        now = time.time()
        with self._transaction():
            cursor = self._db.execute(
                "INSERT INTO messages (conversation_id, parent_id, role, content, reasoning, state, created_at, details)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    conversation_id,
                    parent_id,
                    role,
                    _storable(content),
                    _storable(reasoning),
                    state,
                    now,
                    _details_json(details or {}, attachments),
                ),
            )
            message_id = int(cursor.lastrowid or 0)
            self._move_head(conversation_id, message_id)
            self._db.execute("UPDATE conversations SET updated_at = ? WHERE id = ?", (now, conversation_id))
        return self.message(message_id)

    @_translated
    def write(
        self,
        message: Message,
        *,
        content: str,
        reasoning: str,
        state: MessageState,
        details: Mapping[str, Any] | None = None,
    ) -> Message:
        """Replaces what an answer under way holds so far; `details` are added to those that are there."""
        merged = {**message.details, **(details or {})}
        with self._transaction():
            self._db.execute(
                "UPDATE messages SET content = ?, reasoning = ?, state = ?, details = ? WHERE id = ?",
                (
                    _storable(content),
                    _storable(reasoning),
                    state,
                    _details_json(merged, message.attachments),
                    message.id,
                ),
            )
            self._db.execute(
                "UPDATE conversations SET updated_at = ? WHERE id = ?", (time.time(), message.conversation_id)
            )
        return self.message(message.id)

    @_translated
    def discard_empty(self, message: Message) -> bool:
        """Removes an answer that never began (no text, no branches) and puts the view on its question; returns whether."""
        with self._transaction():
            removed = self._db.execute(
                "DELETE FROM messages WHERE id = ? AND content = '' AND reasoning = ''"
                " AND NOT EXISTS (SELECT 1 FROM messages c WHERE c.parent_id = messages.id)",
                (message.id,),
            ).rowcount
            if removed:
                self._db.execute(
                    "UPDATE conversations SET head = ? WHERE id = ? AND head = ?",
                    (message.parent_id, message.conversation_id, message.id),
                )
        return bool(removed)

    @_translated
    def message(self, message_id: int) -> Message:
        """Raises KeyError if there is none (any more)."""
        row = self._db.execute(f"SELECT {_MESSAGE_COLUMNS} FROM messages WHERE id = ?", (message_id,)).fetchone()
        if row is None:
            raise KeyError(message_id)
        return _message(row)

    @_translated
    def branch(self, conversation_id: int) -> list[Message]:
        """The messages on view, first to head."""
        columns = ", ".join(f"m.{name}" for name in _MESSAGE_COLUMNS.split(", "))
        rows = self._db.execute(
            "WITH RECURSIVE up(id, parent_id, depth) AS ("
            " SELECT m.id, m.parent_id, 0 FROM messages m JOIN conversations c ON c.head = m.id WHERE c.id = ?"
            " UNION ALL SELECT m.id, m.parent_id, up.depth + 1 FROM messages m JOIN up ON m.id = up.parent_id)"
            f" SELECT {columns} FROM up JOIN messages m ON m.id = up.id ORDER BY up.depth DESC",
            (conversation_id,),
        )
        return [_message(row) for row in rows]

    @_translated
    def children(self, conversation_id: int) -> dict[int | None, tuple[int, ...]]:
        """Who branches from whom: parent -> its children in the order of their making; None -> first messages."""
        tree: dict[int | None, list[int]] = {}
        for message_id, parent_id in self._db.execute(
            "SELECT id, parent_id FROM messages WHERE conversation_id = ? ORDER BY id", (conversation_id,)
        ):
            tree.setdefault(parent_id, []).append(message_id)
        return {parent: tuple(ids) for parent, ids in tree.items()}

    @_translated
    def show(self, conversation_id: int, message_id: int) -> None:
        """Puts the branch that contains `message_id` on view, down to where it was last read."""
        with self._transaction():
            leaf = message_id
            while (below := self._active_child(leaf)) is not None:
                leaf = below
            self._move_head(conversation_id, leaf)

    @_translated
    def rewind(self, conversation_id: int, message_id: int | None) -> None:
        """Makes `message_id` (None: nothing) the end of what is on view; what followed stays as a branch."""
        with self._transaction():
            if message_id is None:
                self._db.execute("UPDATE conversations SET head = NULL WHERE id = ?", (conversation_id,))
            else:
                self._move_head(conversation_id, message_id)

    @_translated
    def recent_user_texts(self, limit: int = 200) -> list[str]:
        """What the user wrote last, in all conversations, oldest first, without repetitions: the input's history."""
        rows = self._db.execute(
            "SELECT content, max(id) AS last FROM messages WHERE role = 'user' AND content != ''"
            " GROUP BY content ORDER BY last DESC LIMIT ?",
            (limit,),
        )
        return [str(row[0]) for row in rows][::-1]

    def _active_child(self, message_id: int) -> int | None:
        """The child that was last on view, or else the newest."""
        row = self._db.execute(
            "SELECT c.id FROM messages c JOIN messages p ON c.parent_id = p.id WHERE p.id = ?"
            " ORDER BY c.id = p.active_child DESC, c.id DESC LIMIT 1",
            (message_id,),
        ).fetchone()
        return int(row[0]) if row else None

    def _move_head(self, conversation_id: int, message_id: int) -> None:
        """Sets the head and, for `show`, every ancestor's active child."""
        (parent_id,) = self._db.execute("SELECT parent_id FROM messages WHERE id = ?", (message_id,)).fetchone()
        (head,) = self._db.execute("SELECT head FROM conversations WHERE id = ?", (conversation_id,)).fetchone()
        self._db.execute("UPDATE conversations SET head = ? WHERE id = ?", (message_id, conversation_id))
        if parent_id is not None and parent_id == head:  # the common case: ancestors are on view already
            self._db.execute("UPDATE messages SET active_child = ? WHERE id = ?", (message_id, parent_id))
            return
        self._db.execute(
            "WITH RECURSIVE up(id, parent_id) AS ("
            " SELECT id, parent_id FROM messages WHERE id = ?"
            " UNION ALL SELECT m.id, m.parent_id FROM messages m JOIN up ON m.id = up.parent_id)"
            " UPDATE messages SET active_child = up.id FROM up WHERE messages.id = up.parent_id"
            " AND messages.active_child IS NOT up.id",
            (message_id,),
        )

    # --- search

    def search(self, query: str, *, conversation_id: int | None = None, limit: int = 200) -> list[SearchHit]:
        """Messages (in all branches) and titles that contain every word of `query`, case ignored, newest first.

        Reads through a connection of its own: a long search does not delay the saving of an answer.
        """
        words = query.casefold().split()
        if not words:
            return []
        try:
            with contextlib.closing(self._reader()) as db:
                return _search(db, words, conversation_id, limit)
        except sqlite3.Error as error:
            raise _as_our_error(self.path, error) from error

    def _reader(self) -> sqlite3.Connection:
        if self.path == Path(":memory:"):
            copy = sqlite3.connect(":memory:")
            with self._lock:
                self._db.backup(copy)
            return copy
        return sqlite3.connect(f"{self.path.absolute().as_uri()}?mode=ro", uri=True, timeout=BUSY_TIMEOUT_S)

    # --- small state of the user interface

    @_translated
    def get_state(self, name: str, default: Any = None) -> Any:
        """A JSON value saved by `set_state`."""
        row = self._db.execute("SELECT value FROM state WHERE name = ?", (name,)).fetchone()
        return default if row is None else json.loads(row[0])

    @_translated
    def set_state(self, name: str, value: Any) -> None:
        with self._transaction():
            self._db.execute("INSERT OR REPLACE INTO state VALUES (?, ?)", (name, json.dumps(value)))

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")


# --- opening --------------------------------------------------------------------------------------------------------


def _connect(path: Path) -> sqlite3.Connection:
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Conversations are private: SQLite gives its side files the mode of the main one.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError as error:
        raise ConversationError(
            f"{path}: conversations can't be kept there: {error.strerror}",
            hint="set LOCALRUN_DATA_DIR to another folder",
        ) from error
    return sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, check_same_thread=False, isolation_level=None)


def _prepare(db: sqlite3.Connection, path: Path) -> None:
    """Checks what is there and makes what is not."""
    db.execute("PRAGMA foreign_keys = ON")
    version = int(db.execute("PRAGMA user_version").fetchone()[0])
    if version > SCHEMA_VERSION:
        raise ConversationError(
            f"{path}: written by a newer localrun (format {version}, this one knows {SCHEMA_VERSION})",
            hint="update localrun, or set LOCALRUN_DATA_DIR to another folder",
        )
    db.execute("PRAGMA journal_mode = WAL")
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
                f"{path}: a database, but not one of localrun's", hint="move it away or set LOCALRUN_DATA_DIR"
            )
        for statement in _SCHEMA.split(";"):
            db.execute(statement)
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    db.execute("COMMIT")


def _as_our_error(path: Path, error: sqlite3.Error) -> ConversationError:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return DamagedConversationsError(path, error)
    hints = {
        sqlite3.SQLITE_FULL: "the disk is full: free some space",
        sqlite3.SQLITE_READONLY: "make the file and its folder writable, or set LOCALRUN_DATA_DIR",
        sqlite3.SQLITE_CANTOPEN: "make the folder writable, or set LOCALRUN_DATA_DIR",
        sqlite3.SQLITE_BUSY: "another program holds the file: close it and try again",
        sqlite3.SQLITE_IOERR: "the disk reports an error: look at its health before anything else",
    }
    return ConversationError(f"{path}: {error}", hint=hints.get(code))


# --- rows -----------------------------------------------------------------------------------------------------------


def _storable(text: str) -> str:
    """SQLite's text is UTF-8: halves of surrogate pairs become the replacement character."""
    return text.encode("utf-8", "replace").decode() if not text.isascii() else text


def _details_json(details: Mapping[str, Any], attachments: Sequence[Attachment]) -> str:
    body = dict(details)
    if attachments:
        body["attachments"] = [{"name": a.name, "text": a.text, "n_tokens": a.n_tokens} for a in attachments]
    return json.dumps(body)


def _message(row: Sequence[Any]) -> Message:
    details = json.loads(row[8])
    attachments = tuple(Attachment(**item) for item in details.pop("attachments", ()))
    fields = dict(zip(_MESSAGE_COLUMNS.split(", ")[:-1], row[:-1], strict=True))
    return Message(**fields, attachments=attachments, details=details)


def _conversation(row: Sequence[Any]) -> Conversation:
    fields = dict(zip(_CONVERSATION_COLUMNS.split(", ")[:-1], row[:-1], strict=True))
    return Conversation(**fields, settings=json.loads(row[-1]))


# --- search ---------------------------------------------------------------------------------------------------------

_SNIPPET_CHARS = 120


def _search(db: sqlite3.Connection, words: list[str], conversation_id: int | None, limit: int) -> list[SearchHit]:
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


# --- salvage --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Salvage:
    """What `salvage` did: where the damaged file is now and how much of it could be read."""

    damaged: Path
    n_conversations: int
    n_messages: int


def salvage(path: Path | None = None) -> Salvage:
    """Moves a damaged file aside (`….damaged-TIME`, never deleted) and makes a new one of everything that can be read.

    Raises:
        ConversationError: the folder can't be written to.
    """
    path = path or paths.data_dir() / FILE_NAME
    aside = path.with_name(f"{path.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
    try:
        for suffix in (
            "-wal",
            "-shm",
            "",
        ):  # the main file last: until it moves, a crash here changes nothing that counts
            side = path.with_name(path.name + suffix)
            if side.exists():
                side.rename(aside.with_name(aside.name + suffix))
    except OSError as error:
        raise ConversationError(f"{path}: can't be moved aside: {error.strerror}") from error
    with ConversationStore.open(path) as new, contextlib.closing(sqlite3.connect(aside, isolation_level=None)) as old:
        db = new._db
        db.execute("PRAGMA foreign_keys = OFF")
        with new._transaction():
            for row in _readable_rows(old, "conversations", _CONVERSATION_COLUMNS):
                with contextlib.suppress(sqlite3.Error, ValueError):
                    json.loads(row[5])
                    db.execute(f"INSERT INTO conversations ({_CONVERSATION_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?)", row)
            for row in _readable_rows(old, "messages", _MESSAGE_COLUMNS):
                with contextlib.suppress(sqlite3.Error, ValueError, TypeError):
                    _message(row)
                    db.execute(f"INSERT INTO messages ({_MESSAGE_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
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
                last, step = int(row[0]), 1
                yield row
            return
        except (sqlite3.Error, ValueError, OverflowError):
            last, step = last + step, step * 2


def _mend(db: sqlite3.Connection) -> None:
    """Makes whole trees of what was read: lost conversations get a name, lost parents make a new beginning."""
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
