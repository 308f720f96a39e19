"""Request errors, independent of the API.

An `ApiError` describes the error; each API's module renders it with its own wording and status codes.
"""

from __future__ import annotations

import logging
import re
from typing import Literal

from localrun.errors import (
    BudgetError,
    ContextFullError,
    DiskSpaceError,
    EngineDiedError,
    HostError,
    LocalrunError,
    MessageError,
    StoppedError,
    UsageError,
)

log = logging.getLogger(__name__)

Kind = Literal[
    "invalid",  # the request is wrong
    "context",  # the prompt does not fit
    "too_large",  # the body does not fit
    "unauthorized",
    "forbidden",
    "not_found",
    "overloaded",  # the queue is full
    "unavailable",  # no model, or the server stops
    "internal",
]

STATUS: dict[Kind, int] = {
    "invalid": 400,
    "context": 400,
    "too_large": 413,
    "unauthorized": 401,
    "forbidden": 403,
    "not_found": 404,
    "overloaded": 429,
    "unavailable": 503,
    "internal": 500,
}


class ApiError(Exception):
    """A request that gets an error instead of an answer.

    Attributes:
        kind: category of error; determines the status.
        param: path of the request field in question (`messages[2].content`).
        code: OpenAI's error code, where clients check it.
        retry_after_s: when to try again, if that helps.
        engine_kind: name of the original class in `localrun.errors`.
    """

    def __init__(
        self,
        kind: Kind,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.kind, self.message = kind, message
        self.param, self.code, self.retry_after_s = param, code, retry_after_s
        self.engine_kind = "LocalrunError"

    @property
    def status(self) -> int:
        return STATUS[self.kind]


def invalid(param: str | None, message: str, *, code: str | None = None) -> ApiError:
    """A 400 that names the field."""
    return ApiError("invalid", f"{param}: {message}" if param else message, param=param, code=code)


def unsupported(param: str, what: str) -> ApiError:
    """A 400 for something that the model or this server can't do: refused by name, never ignored."""
    return ApiError("invalid", f"{param}: {what}", param=param, code="unsupported_value")


def prompt_too_long(n_tokens: int, n_ctx: int) -> ApiError:
    """In the words that Claude Code looks for, with the code that Codex looks for."""
    return ApiError(
        "context",
        f"prompt is too long: {n_tokens} tokens > {n_ctx} maximum",
        param="messages",
        code="context_length_exceeded",
    )


_FOLDERS = re.compile(r"(?<![\w.:/~])~?/(?:(?:[^/\n:]|:(?!\s))*[^/\s:'\"(]/)*")
"""The folders of a path: from its first slash to its last. Names may contain spaces; `: ` ends a path, as in our messages."""


def from_engine(error: Exception, *, loading: bool = False) -> ApiError:
    """An engine error for a client, without tracebacks or local folders. What isn't the request's fault is logged in full.

    Args:
        loading: it kept the model from being loaded, so that nothing of it is about the request.
    """
    result = _from_engine(error, loading)
    if isinstance(error, LocalrunError):
        result.engine_kind = type(error).__name__
    return result


def _from_engine(error: Exception, loading: bool) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, StoppedError):
        return ApiError("unavailable", "the answer was stopped", code="stopped", retry_after_s=1)
    if isinstance(error, ContextFullError):
        return ApiError("context", _text(error), param="messages", code="context_length_exceeded")
    if isinstance(error, UsageError | MessageError) and not loading:
        return ApiError("invalid", _text(error))
    if not isinstance(error, LocalrunError | TimeoutError):
        log.error("an unexpected error", exc_info=error)
        return ApiError("internal", "internal error; the server's log says more")
    text = _text(error)
    log.error("%s: %s", type(error).__name__, text)
    shown = _FOLDERS.sub("", text)
    if isinstance(error, EngineDiedError):
        return ApiError("unavailable", f"the engine stopped working: {shown}", code="engine_died", retry_after_s=1)
    if loading:
        return ApiError("unavailable", f"the model can't be loaded: {shown}", code="model_not_loaded", retry_after_s=5)
    if isinstance(error, BudgetError | DiskSpaceError | HostError):  # another try may find the machine less busy
        return ApiError("unavailable", shown, code="out_of_resources", retry_after_s=5)
    if isinstance(error, TimeoutError):
        return ApiError("unavailable", shown, retry_after_s=1)
    return ApiError("internal", shown)


def _text(error: Exception) -> str:
    """Message and hint."""
    text = str(error) or type(error).__name__
    return f"{text} ({error.hint})" if isinstance(error, LocalrunError) and error.hint else text
