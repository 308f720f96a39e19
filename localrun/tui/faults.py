"""Wraps unexpected exceptions for a screen that shows errors and continues."""

from __future__ import annotations

import traceback

from localrun.errors import LocalrunError


def as_ours(error: Exception) -> LocalrunError:
    """An unexpected exception as one that can be shown, with its traceback for the details."""
    if isinstance(error, LocalrunError):
        return error
    ours = LocalrunError(
        f"unexpected {type(error).__name__}: {error}", hint="please report this, including the details"
    )
    ours.add_note("".join(traceback.format_exception(error)))
    return ours
