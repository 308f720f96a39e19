"""Texts that models are measured on."""

from __future__ import annotations

from pathlib import Path

from localrun.errors import UsageError


def read_text(path: Path) -> str:
    """A text to measure on. Raises UsageError: not UTF-8, or nothing in it."""
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    if not text.strip():
        raise UsageError(f"{path}: the text is empty")
    return text
