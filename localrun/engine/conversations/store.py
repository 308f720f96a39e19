"""The store: all operations on conversations, each change a transaction."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from localrun import paths
from localrun.engine.conversations.database import (
    BUSY_TIMEOUT_S,
    FILE_NAME,
    DamagedConversationsError,
    as_our_error,
    connect,
    prepare,
)
from localrun.engine.conversations.records import (
    CONVERSATION_COLUMNS,
    MESSAGE_COLUMNS,
    Attachment,
    Conversation,
    ImpossibleRowError,
    Message,
    MessageRole,
    MessageState,
    SearchHit,
    conversation_of,
    details_json,
    message_of,
    storable,
)
from localrun.engine.conversations.search import search

MAX_TITLE_CHARS = 200

P = ParamSpec("P")
R = TypeVar("R")


def _translated(method: Callable[P, R]) -> Callable[P, R]:
    """SQLite's exceptions become ours."""

    @wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        store = args[0]
        assert isinstance(store, ConversationStore)
        try:
            with store._lock:
                return method(*args, **kwargs)
        except (sqlite3.Error, UnicodeDecodeError) as error:
            raise as_our_error(store.path, error) from error
        except ImpossibleRowError as error:
            raise DamagedConversationsError(store.path, error) from error

    return call


class ConversationStore:
    """All conversations of one user, in one file.

    Owns the connection; one lock makes every method safe from any thread, and SQLite's own locks make several programs on
    one file safe. A method's changes are one transaction: a crash leaves all or none of them. A power failure may lose the last
    second of changes (WAL with synchronous=NORMAL), never more.
    """

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._db = connection
        self._lock = threading.RLock()
        self.path = path

    @classmethod
    def open(cls, path: Path | None = None) -> ConversationStore:
        """Opens or creates the file (default: in the user's data folder, readable only by its owner).

        Raises:
            DamagedConversationsError: it exists but is not a valid database.
            ConversationError: no permission, a full disk, or a newer version's file.
        """
        path = path or paths.data_dir() / FILE_NAME
        connection = connect(path)
        try:
            prepare(connection, path)
        except (sqlite3.Error, UnicodeDecodeError) as error:
            connection.close()
            raise as_our_error(path, error) from error
        except BaseException:
            connection.close()
            raise
        return cls(connection, path)

    @classmethod
    def in_memory(cls) -> ConversationStore:
        """A store that forgets everything at the end: for when the disk can't be written to."""
        connection = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
        prepare(connection, Path(":memory:"))
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
            f"SELECT {CONVERSATION_COLUMNS} FROM conversations WHERE id = ?", (conversation_id,)
        ).fetchone()
        if row is None:
            raise KeyError(conversation_id)
        return conversation_of(row)

    @_translated
    def conversations(self) -> list[Conversation]:
        """All, the one that was last written to first."""
        rows = self._db.execute(f"SELECT {CONVERSATION_COLUMNS} FROM conversations ORDER BY updated_at DESC, id DESC")
        return [conversation_of(row) for row in rows]

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
        role: MessageRole,
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
                    storable(content),
                    storable(reasoning),
                    state,
                    now,
                    details_json(details or {}, attachments),
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
                    storable(content),
                    storable(reasoning),
                    state,
                    details_json(merged, message.attachments),
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
        row = self._db.execute(f"SELECT {MESSAGE_COLUMNS} FROM messages WHERE id = ?", (message_id,)).fetchone()
        if row is None:
            raise KeyError(message_id)
        return message_of(row)

    @_translated
    def branch(self, conversation_id: int) -> list[Message]:
        """The messages on view, first to head."""
        columns = ", ".join(f"m.{name}" for name in MESSAGE_COLUMNS.split(", "))
        rows = self._db.execute(
            "WITH RECURSIVE up(id, parent_id, depth) AS ("
            " SELECT m.id, m.parent_id, 0 FROM messages m JOIN conversations c ON c.head = m.id WHERE c.id = ?"
            " UNION ALL SELECT m.id, m.parent_id, up.depth + 1 FROM messages m JOIN up ON m.id = up.parent_id AND m.id < up.id)"
            f" SELECT {columns} FROM up JOIN messages m ON m.id = up.id ORDER BY up.depth DESC",
            (conversation_id,),
        )
        return [message_of(row) for row in rows]

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
        """Makes `message_id` (None: nothing) the end of the visible path; messages after it remain as a branch."""
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
            "SELECT c.id FROM messages c JOIN messages p ON c.parent_id = p.id WHERE p.id = ? AND c.id > p.id"
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
            " UNION ALL SELECT m.id, m.parent_id FROM messages m JOIN up ON m.id = up.parent_id AND m.id < up.id)"
            " UPDATE messages SET active_child = up.id FROM up WHERE messages.id = up.parent_id"
            " AND messages.active_child IS NOT up.id",
            (message_id,),
        )

    # --- search

    def search(self, query: str, *, conversation_id: int | None = None, limit: int = 200) -> list[SearchHit]:
        """Messages (in all branches) and titles that contain every word of `query`, case ignored, newest first.

        Uses a separate connection, so a long search does not delay saving an answer.
        """
        words = query.casefold().split()
        if not words:
            return []
        try:
            with contextlib.closing(self._reader()) as db:
                return search(db, words, conversation_id, limit)
        except sqlite3.Error as error:
            raise as_our_error(self.path, error) from error

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
