"""Files mentioned in a message: `@notes.txt` attaches that file."""

from __future__ import annotations

import os
import re
from pathlib import Path

from localrun.alignment import ceil_div
from localrun.engine.conversations import Attachment
from localrun.engine.conversations.attachments import read_attachment

_MENTION = re.compile(r"(?:^|(?<=\s))@(\S+)")
_AT_END = re.compile(r"(?:^|\s)@(\S*)\Z")
MAX_COMPLETIONS = 8

LONG_PASTE_CHARS = 4000
LONG_PASTE_LINES = 30
"""From here on a paste is folded: it goes with the message as a file does, and the input stays readable."""


def mentioned_files(text: str) -> list[Attachment]:
    """Texts of the files mentioned as `@path`, in order, each once. Anything that is not a file (a mail address, a handle) is
    just text.

    Raises:
        AttachmentError: there is such a file, and it can't be attached.
    """
    paths = dict.fromkeys(Path(word.rstrip(".,;:!?)")).expanduser() for word in _MENTION.findall(text))
    return [read_attachment(path) for path in paths if path.is_file()]


def completions(before_cursor: str) -> list[str]:
    """Paths that continue the `@word` before the cursor, folders with a slash at the end; empty: there is no such word."""
    match = _AT_END.search(before_cursor)
    if match is None:
        return []
    typed = match[1]
    folder, slash, start = typed.rpartition("/")
    try:
        with os.scandir(Path(folder + slash if slash else ".").expanduser()) as entries:
            names = [
                entry.name + ("/" if entry.is_dir() else "")
                for entry in entries
                if entry.name.startswith(start)
                and entry.name.isprintable()
                and not any(c.isspace() for c in entry.name)
            ]
    except (OSError, RuntimeError):
        return []
    shown = [name for name in names if start.startswith(".") or not name.startswith(".")]
    return [folder + slash + name for name in sorted(shown)[:MAX_COMPLETIONS]]


def is_long_paste(text: str) -> bool:
    """It would fill the input."""
    return len(text) > LONG_PASTE_CHARS or text.count("\n") > LONG_PASTE_LINES


def estimate_tokens(text: str) -> int:
    """A rough count without a tokenizer: 4 bytes of UTF-8 per token."""
    return ceil_div(len(text.encode("utf-8", "replace")), 4)
