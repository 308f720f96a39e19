"""Text files attached to a message: read, checked to be text, and put before the user's text."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterable
from pathlib import Path

from localrun.engine.conversations.export import fenced
from localrun.engine.conversations.records import Attachment
from localrun.errors import LocalrunError, UsageError
from localrun.units import format_size

MAX_BYTES = 16 << 20
"""About four million tokens: more than any context."""


class AttachmentError(LocalrunError, ValueError):
    """The file can't be attached."""

    exit_code = UsageError.exit_code


def read_attachment(path: Path, *, pipes: bool = False) -> Attachment:
    """The file as text, its tokens not counted yet.

    Args:
        pipes: also read `-` (standard input) and pipes (`<(...)`) to their end, however long their writer takes.

    Raises:
        AttachmentError: it can't be read, is too large, or is not UTF-8 text (or UTF-16 with a byte order mark).
    """
    name = path.name
    try:
        if pipes and str(path) == "-":
            path, name = Path("standard input"), "standard input"
            data = _read_input()
        else:
            path = path.expanduser()
            data = _read(path, pipes=pipes)
    except OSError as error:
        if isinstance(error, AttachmentError):
            raise
        raise AttachmentError(f"{path}: can't be read: {error.strerror}") from error
    if len(data) > MAX_BYTES:
        raise AttachmentError(f"{path}: at most {format_size(MAX_BYTES)} can be attached")
    try:
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise AttachmentError(f"{path}: not a text file", hint="the model reads text only")
    return Attachment(name, text)


def _read_input() -> bytes:
    if sys.stdin is None or sys.stdin.isatty():
        raise AttachmentError("standard input is a terminal: pipe a file in", hint="localrun run --file - < FILE")
    return sys.stdin.buffer.read(MAX_BYTES + 1)


def _read(path: Path, *, pipes: bool) -> bytes:
    """At most one byte too many of a file."""
    if path.is_dir():
        raise AttachmentError(f"{path}: a folder", hint="attach its files one by one")
    if not path.exists():
        raise AttachmentError(f"{path}: no such file")
    mode = path.stat().st_mode
    if stat.S_ISREG(mode):
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise AttachmentError(f"{path}: {format_size(size)}, at most {format_size(MAX_BYTES)} can be attached")
        return path.read_bytes()
    if not (pipes and stat.S_ISFIFO(mode)):
        raise AttachmentError(f"{path}: not a regular file")
    # Opening a pipe without a writer would block forever; non-blocking, it is at its end immediately.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(descriptor, True)
    with open(descriptor, "rb") as file:
        data = file.read(MAX_BYTES + 1)
    if not data:
        raise AttachmentError(f"{path}: nothing was written to this pipe")
    return data


def with_attachments(attachments: Iterable[Attachment], text: str) -> str:
    """The text for the model: each file with its name, fenced, then the message."""
    parts = [f"File `{a.name}`:\n\n{fenced(a.text)}" for a in attachments]
    return "\n\n".join([*parts, text])
