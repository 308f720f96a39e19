"""Imports conversations: JSONL, ChatGPT exports, llama.cpp's web interface, and localrun's JSON export.

Imports text and tree structure; images, tool calls and the like are skipped. A file is imported completely or not at all.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from localrun.engine.conversations.database import ConversationError, as_our_error
from localrun.engine.conversations.records import details_json, storable
from localrun.engine.conversations.store import MAX_TITLE_CHARS, ConversationStore

MAX_BYTES = 1 << 30
_ROLES = ("user", "assistant")
_HINT = "supported: JSONL of messages, ChatGPT's conversations.json, llama.cpp exports, and localrun's /export json"


class UnknownExportError(ConversationError, ValueError):
    """The file holds no conversations of a known kind."""


@dataclass(slots=True)
class Imported:
    """One conversation: messages as (key, key of the parent or None, role, text, reasoning), parents first."""

    title: str
    messages: list[tuple[str, str | None, str, str, str]] = field(default_factory=list)
    head: str | None = None
    system: str = ""


def read_conversations(path: Path) -> list[Imported]:
    """Conversations of a file.

    Raises:
        ConversationError: it can't be read, or is not in a known format.
    """
    path = path.expanduser()
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UnknownExportError(f"{path}: too large for a conversation export", hint=_HINT)
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConversationError(f"{path}: can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UnknownExportError(f"{path}: not a text file", hint=_HINT) from error
    try:
        found = [talk for talk in _conversations(_documents(text)) if talk.messages]
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise UnknownExportError(f"{path}: not a known conversation export ({error})", hint=_HINT) from error
    if not found:
        raise UnknownExportError(f"{path}: contains no conversation", hint=_HINT)
    return found


def import_conversations(store: ConversationStore, found: Iterable[Imported]) -> list[int]:
    """Writes them in one transaction; returns their ids in the store.

    Raises:
        ConversationError: the store can't be written.
    """
    try:
        return _write(store, found)
    except sqlite3.Error as error:
        raise as_our_error(store.path, error) from error


def _write(store: ConversationStore, found: Iterable[Imported]) -> list[int]:
    ids = []
    db, now = store._db, time.time()
    with store._transaction():
        for talk in found:
            settings = json.dumps({"system": talk.system} if talk.system else {})
            row = (storable(talk.title)[:MAX_TITLE_CHARS], now, now, settings)
            conversation_id = db.execute(
                "INSERT INTO conversations (title, created_at, updated_at, settings) VALUES (?, ?, ?, ?)", row
            ).lastrowid
            known: dict[str | None, int | None] = {None: None}
            for key, parent, role, content, reasoning in talk.messages:
                known[key] = db.execute(
                    "INSERT INTO messages (conversation_id, parent_id, role, content, reasoning, state, created_at, details)"
                    " VALUES (?, ?, ?, ?, ?, 'complete', ?, ?)",
                    (
                        conversation_id,
                        known[parent],
                        role,
                        storable(content),
                        storable(reasoning),
                        now,
                        details_json({}, ()),
                    ),
                ).lastrowid
            shown = talk.head if talk.head is not None and talk.head in known else talk.messages[-1][0]
            head = known[shown]
            db.execute("UPDATE conversations SET head = ? WHERE id = ?", (head, conversation_id))
            ids.append(int(conversation_id or 0))
    return ids


def _documents(text: str) -> list[Any]:
    """One JSON document, or one a line."""
    try:
        document = json.loads(text)
    except ValueError:
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    return document if isinstance(document, list) else [document]


def _conversations(documents: list[Any]) -> Iterator[Imported]:
    if documents and all(isinstance(d, Mapping) and "role" in d and "content" in d for d in documents):
        yield _flat("", documents)
        return
    for document in documents:
        if not isinstance(document, Mapping):
            raise ValueError(f"{type(document).__name__} instead of an object")
        if "mapping" in document:
            yield _chatgpt(document)
        elif "conv" in document:
            yield _llama(document)
        elif document.get("format") == "localrun-conversation":
            yield _own(document)
        else:
            yield _flat(str(document.get("title") or ""), document["messages"])


def _flat(title: str, messages: Iterable[Mapping[str, Any]]) -> Imported:
    """Messages one after the other."""
    talk, parent = Imported(title), None
    for number, message in enumerate(messages):
        parent = _add(talk, str(number), parent, message["role"], message["content"], message.get("reasoning_content"))
    return _named(talk)


def _chatgpt(document: Mapping[str, Any]) -> Imported:
    nodes: Mapping[str, Any] = document["mapping"]
    tree = {key: (node.get("parent"), node.get("message") or {}) for key, node in nodes.items()}

    def body(message: Mapping[str, Any]) -> tuple[Any, Any, Any]:
        return (message.get("author") or {}).get("role", ""), (message.get("content") or {}).get("parts") or [], None

    return _tree(str(document.get("title") or ""), tree, body, document.get("current_node"))


def _llama(document: Mapping[str, Any]) -> Imported:
    conversation = document["conv"]
    tree = {str(m["id"]): (m.get("parent"), m if m.get("type") != "root" else {}) for m in document["messages"]}

    def body(message: Mapping[str, Any]) -> tuple[Any, Any, Any]:
        thinking = message.get("reasoningContent") or message.get("thinking")
        return message.get("role", ""), message.get("content") or "", thinking

    return _tree(str(conversation.get("name") or ""), tree, body, conversation.get("currNode"))


def _own(document: Mapping[str, Any]) -> Imported:
    tree = {str(m["id"]): (m["parent"], m) for m in document["messages"]}

    def body(message: Mapping[str, Any]) -> tuple[Any, Any, Any]:
        return message["role"], message["content"], message.get("reasoning_content")

    talk = _tree(str(document.get("title") or ""), tree, body, document.get("head"))
    talk.system = talk.system or str((document.get("settings") or {}).get("system") or "")
    return talk


def _tree(title: str, tree: Mapping[str, tuple[Any, Mapping[str, Any]]], body: Any, head: Any) -> Imported:
    """A tree with possibly empty nodes, which are skipped: their children are attached to their parents."""
    talk = Imported(title)
    kept: dict[str, str | None] = {}
    for start in tree:
        way, key = [], start
        while key in tree and key not in kept and key not in way:  # up to what is known already
            way.append(key)
            key = str(tree[key][0])
        for key in reversed(way):
            above = kept.get(str(tree[key][0]))
            role, content, thinking = body(tree[key][1])
            kept[key] = _add(talk, key, above, role, content, thinking)
    talk.head = kept.get(str(head))
    return _named(talk)


def _add(talk: Imported, key: str, parent: str | None, role: Any, content: Any, reasoning: Any) -> str | None:
    """Adds a message and returns its key; messages from neither user nor model leave the path unchanged."""
    text = _text(content)
    if role == "system" and text and not talk.system:
        talk.system = text
    if role not in _ROLES or not (text or reasoning):
        return parent
    talk.messages.append((key, parent, role, text, _text(reasoning or "")))
    return key


def _text(content: Any) -> str:
    """A string, or the texts of a list of parts."""
    if isinstance(content, str):
        return content
    parts = [p if isinstance(p, str) else p.get("text") for p in content if isinstance(p, str | Mapping)]
    return "\n".join(part for part in parts if isinstance(part, str) and part)


def _named(talk: Imported) -> Imported:
    first = next((text for _, _, role, text, _ in talk.messages if role == "user"), "")
    talk.title = talk.title.strip() or first.strip().split("\n")[0][:60]
    return talk
