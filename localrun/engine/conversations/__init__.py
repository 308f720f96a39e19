"""The user's conversations: an SQLite file that is written continuously and survives a crash at any moment.

A conversation is a tree of messages. `head` is the last visible message; the model sees the path from the first message to it.
Editing, regenerating and branching only add messages and move the head; nothing is overwritten except the message being
written. Knows nothing about the engine, prompts or terminals; texts are stored verbatim (`localrun.textsafe` makes them safe to
show).
"""

from __future__ import annotations

from localrun.engine.conversations.background import StoreThread
from localrun.engine.conversations.claims import Claims
from localrun.engine.conversations.damaged import Salvage, salvage
from localrun.engine.conversations.database import ConversationError, DamagedConversationsError
from localrun.engine.conversations.records import (
    Attachment,
    Conversation,
    Message,
    MessageRole,
    MessageState,
    SearchHit,
)
from localrun.engine.conversations.store import ConversationStore

__all__ = [
    "Attachment",
    "Claims",
    "Conversation",
    "ConversationError",
    "ConversationStore",
    "DamagedConversationsError",
    "Message",
    "MessageRole",
    "MessageState",
    "Salvage",
    "SearchHit",
    "StoreThread",
    "salvage",
]
