"""Text files that go with a message: read, checked to be text, and put before what the user wrote."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from localrun.engine.conversations import Attachment
from localrun.engine.conversations.export import fenced
from localrun.errors import LocalrunError
from localrun.units import format_size

MAX_BYTES = 16 << 20
"""About four million tokens: more than any context."""


class AttachmentError(LocalrunError, ValueError):
    """The file can't be attached."""


def read_attachment(path: Path) -> Attachment:
    """The file as text, its tokens not counted yet.

    Raises:
        AttachmentError: it can't be read, is too large, or is not text in UTF-8 or UTF-16 with a mark.
    """
    path = path.expanduser()
    try:
        if path.is_dir():
            raise AttachmentError(f"{path}: a folder", hint="attach its files one by one")
        if not path.is_file():
            raise AttachmentError(f"{path}: no such file" if not path.exists() else f"{path}: not a regular file")
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise AttachmentError(f"{path}: {format_size(size)}, at most {format_size(MAX_BYTES)} can be attached")
        data = path.read_bytes()
    except OSError as error:
        raise AttachmentError(f"{path}: can't be read: {error.strerror}") from error
    try:
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise AttachmentError(f"{path}: not a text file", hint="the model reads text only")
    return Attachment(path.name, text)


def with_attachments(attachments: Iterable[Attachment], text: str) -> str:
    """What the model reads: each file with its name in a fence, then the text."""
    parts = [f"File `{a.name}`:\n\n{fenced(a.text)}" for a in attachments]
    return "\n\n".join([*parts, text])
