"""Every error that a user may see, with a hint how to fix it.

A message says what went wrong and where (`file: tensor`), what was found and what was expected; `hint` says what to do next.
The command line prints both without a traceback. `assert` is for our own bugs only.
"""

from __future__ import annotations

import errno
from typing import ClassVar


class LocalrunError(Exception):
    """Base of all expected failures.

    Args:
        message: one line, names the file and the tensor where there is one.
        hint: one line, the next step for the user, or None.

    Attributes:
        exit_code: of a command that ends with it; see docs/run.md.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class FormatError(LocalrunError, ValueError):
    """A file is damaged or is not what its name says."""


class CheckpointError(FormatError):
    """An official checkpoint lacks a tensor, has one too many, or one of another shape or dtype."""


class UnsupportedModelError(LocalrunError, ValueError):
    """The files are sound but hold a model that localrun does not run."""


class BudgetError(LocalrunError, ValueError):
    """A memory budget is below what one layer's experts need, or above what the machine has."""


class GpuMemoryError(BudgetError):
    """A GPU has less memory than it said."""


class DiskSpaceError(LocalrunError, OSError):
    """The target disk can't hold the result."""


class StoreError(LocalrunError, OSError):
    """Expert bytes could not be read: I/O error, short read, vanished file."""


class ChecksumError(StoreError):
    """Bytes were read but differ from what the manifest promises."""


class DecodeError(LocalrunError, RuntimeError):
    """llama.cpp or our device failed in the middle of a batch; the session must be rewound."""


class StoppedError(DecodeError):
    """The user stopped the running command; not a fault."""


class ContextFullError(LocalrunError, RuntimeError):
    """The tokens do not fit into the context that the session was opened with."""


class EngineDiedError(LocalrunError, RuntimeError):
    """The engine process ended without being asked to."""


class IncompatibleLibraryError(LocalrunError, ImportError):
    """The installed llama.cpp is not the build that our structures were written for."""


class MessageError(LocalrunError, ValueError):
    """A chat message, a tool schema or a tool call that the protocol has no place for."""


class UsageError(LocalrunError, ValueError):
    """What the user typed or wrote himself can't be: an option, a value, a setting, a path or name where nothing is, a text that
    can't be read. What programs wrote (models, importance, exports) is a `FormatError` if it is unsound.
    """

    exit_code = 2


class HostError(LocalrunError, OSError):
    """The system refuses what every program needs: a home folder, processes, threads, memory, files."""


_NO_MEMORY, _LESS_MEMORY = (
    "out of memory",
    "close other programs, or lower --ram",
)


def host_error(error: BaseException) -> HostError | None:
    """A HostError for an exception caused by the machine rather than by localrun; None for any other."""
    if isinstance(error, MemoryError):
        return HostError(_NO_MEMORY, hint=_LESS_MEMORY)
    text = str(error)
    if isinstance(error, RuntimeError) and "can't start new thread" in text:
        return HostError(
            "this user's thread limit is reached",
            hint="raise the limit (ulimit -u, the container's pids limit), or lower --threads",
        )
    if isinstance(error, RuntimeError) and "home directory" in text:
        return HostError("no home folder to expand ~ to", hint="set HOME, or write the path without ~")
    if isinstance(error, OSError) and not isinstance(error, LocalrunError):
        if error.errno == errno.EAGAIN and error.filename is None:
            return HostError(
                "this user's process limit is reached",
                hint="raise the limit (ulimit -u, the container's pids limit)",
            )
        if error.errno in (errno.EMFILE, errno.ENFILE):
            return HostError("too many open files", hint="raise the limit (ulimit -n)")
        if error.errno == errno.ENOMEM:
            return HostError(_NO_MEMORY, hint=_LESS_MEMORY)
        if error.strerror:
            return HostError(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
    return None
