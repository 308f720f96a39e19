"""Exports conversations as Markdown (the current branch, for people) and JSON (all branches, for programs)."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any, Literal

from localrun.atomic import replacing
from localrun.engine.conversations.database import ConversationError
from localrun.engine.conversations.records import Attachment, Message
from localrun.engine.conversations.store import ConversationStore
from localrun.errors import StoreError
from localrun.textsafe import visible_line

ExportFormat = Literal["md", "json"]

FORMAT = "localrun-conversation"
VERSION = 1

_NAMES = {"user": "You", "assistant": "Model", "system": "System", "tool": "Tool"}
_ENDINGS = {
    "stopped": "stopped by the user",
    "length": "cut off: token limit",
    "context": "cut off: context full",
    "failed": "cut off: the engine failed",
    "writing": "not finished",
}


def export_markdown(store: ConversationStore, conversation_id: int) -> str:
    """The branch on view; reasoning as a folded block, attachments as code blocks."""
    conversation = store.conversation(conversation_id)
    parts = [f"# {visible_line(conversation.title) or 'Conversation'}"]
    if system := conversation.settings.get("system"):
        parts += ["## System", str(system)]
    for message in store.branch(conversation_id):
        parts.append(f"## {_NAMES.get(message.role, message.role)}")
        parts += [_attachment_markdown(a) for a in message.attachments]
        if message.reasoning:
            parts.append(f"<details><summary>Reasoning</summary>\n\n{message.reasoning}\n\n</details>")
        if message.content:
            parts.append(message.content)
        if message.state in _ENDINGS:
            parts.append(f"*({_ENDINGS[message.state]})*")
    return "\n\n".join(parts) + "\n"


def export_json(store: ConversationStore, conversation_id: int) -> str:
    """All branches: messages with ids and parents, and the head."""
    conversation = store.conversation(conversation_id)
    ids = sorted(i for siblings in store.children(conversation_id).values() for i in siblings)
    body = {
        "format": FORMAT,
        "version": VERSION,
        "title": conversation.title,
        "created": _iso(conversation.created_at),
        "updated": _iso(conversation.updated_at),
        "head": conversation.head,
        "settings": dict(conversation.settings),
        "messages": [_message_json(store.message(i)) for i in ids],
    }
    return json.dumps(body, ensure_ascii=False, indent=2) + "\n"


def write_export(
    store: ConversationStore, conversation_id: int, kind: ExportFormat, target: Path | None = None
) -> Path:
    """Writes an export; never overwrites a file.

    Args:
        target: a file, or a folder, in which the file is named after the title; None: the working directory.

    Raises:
        ConversationError: the file exists or can't be written.
    """
    text = export_markdown(store, conversation_id) if kind == "md" else export_json(store, conversation_id)
    target = (target or Path()).expanduser()
    if target.is_dir():
        target = _free_name(target, slug(store.conversation(conversation_id).title), kind)
    if target.exists():
        raise ConversationError(f"{target}: the file already exists", hint="choose another name")
    try:
        with replacing(target) as file:
            file.write(text.encode("utf-8", "replace"))
    except StoreError as error:
        raise ConversationError(str(error)) from error
    return target


def slug(title: str) -> str:
    """A file name of a title: letters, digits and hyphens."""
    return re.sub(r"[^\w]+", "-", title.casefold()).strip("-")[:60] or "conversation"


def _free_name(folder: Path, stem: str, kind: str) -> Path:
    path, number = folder / f"{stem}.{kind}", 1
    while path.exists():
        number += 1
        path = folder / f"{stem}-{number}.{kind}"
    return path


def _attachment_markdown(attachment: Attachment) -> str:
    return f"**{visible_line(attachment.name)}**\n\n{fenced(attachment.text)}"


def fenced(text: str, info: str = "") -> str:
    """A code block whose fence is longer than any in the text."""
    longest = max((len(run) for run in re.findall(r"`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{info}\n{text.rstrip(chr(10))}\n{fence}"


def _message_json(message: Message) -> dict[str, Any]:
    body: dict[str, Any] = {
        "id": message.id,
        "parent": message.parent_id,
        "role": message.role,
        "content": message.content,
        "created": _iso(message.created_at),
        "state": message.state,
    }
    if message.reasoning:
        body["reasoning_content"] = message.reasoning
    if message.attachments:
        body["attachments"] = [{"name": a.name, "text": a.text} for a in message.attachments]
    if message.details:
        body["details"] = dict(message.details)
    return body


def _iso(moment: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(moment))
