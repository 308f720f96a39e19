"""The records of conversations, and their representation in database rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

MessageRole = Literal["system", "user", "assistant", "tool"]
MessageState = Literal["complete", "writing", "stopped", "length", "context", "failed"]
"""`writing`: the answer is under way, or the program ended in the middle of it."""

MESSAGE_COLUMNS = "id, conversation_id, parent_id, role, content, reasoning, state, created_at, details"
CONVERSATION_COLUMNS = "id, title, created_at, updated_at, head, settings"


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
        details: further information, by name: `timings`, `seed`, `model`, `think`, `thinking_s`, `warning`, `error`.
    """

    id: int
    conversation_id: int
    parent_id: int | None
    role: MessageRole
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


def storable(text: str) -> str:
    """SQLite's text is UTF-8: halves of surrogate pairs become the replacement character."""
    return text.encode("utf-8", "replace").decode() if not text.isascii() else text


def details_json(details: Mapping[str, Any], attachments: Sequence[Attachment]) -> str:
    body = dict(details)
    if attachments:
        body["attachments"] = [{"name": a.name, "text": a.text, "n_tokens": a.n_tokens} for a in attachments]
    return json.dumps(body)


class ImpossibleRowError(ValueError):
    """A row not written by localrun: SQLite stores any type in any column and does not validate JSON."""


def message_of(row: Sequence[Any]) -> Message:
    """Raises ImpossibleRowError."""
    number, conversation, parent, role, content, reasoning, state, created_at, _ = row
    if (
        not (type(number) is type(conversation) is int)
        or not (parent is None or (type(parent) is int and parent < number))  # answers are written after questions
        or role not in get_args(MessageRole)
        or state not in get_args(MessageState)
        or not (isinstance(content, str) and isinstance(reasoning, str) and isinstance(created_at, float | int))
    ):
        raise ImpossibleRowError(f"message {number}")
    details = _json_object(row[8], f"message {number}")
    try:
        attachments = tuple(Attachment(**item) for item in details.pop("attachments", ()))
    except TypeError as error:
        raise ImpossibleRowError(f"attachments of message {number}") from error
    if not all(isinstance(a.name, str) and isinstance(a.text, str) and type(a.n_tokens) is int for a in attachments):
        raise ImpossibleRowError(f"attachments of message {number}")
    fields = dict(zip(MESSAGE_COLUMNS.split(", ")[:-1], row[:-1], strict=True))
    return Message(**fields, attachments=attachments, details=details)


def conversation_of(row: Sequence[Any]) -> Conversation:
    """Raises ImpossibleRowError."""
    number, title, created_at, updated_at, head, settings = row
    if (
        type(number) is not int
        or not isinstance(title, str)
        or not (isinstance(created_at, float | int) and isinstance(updated_at, float | int))
        or not (head is None or type(head) is int)
    ):
        raise ImpossibleRowError(f"conversation {number}")
    fields = dict(zip(CONVERSATION_COLUMNS.split(", ")[:-1], row[:-1], strict=True))
    return Conversation(**fields, settings=_json_object(settings, f"conversation {number}"))


def _json_object(text: object, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ImpossibleRowError(where)
    return value
