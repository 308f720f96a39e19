"""Request errors, independent of the API.

An `ApiError` describes the error; each API's module renders it with its own wording and status codes.
"""

from __future__ import annotations

from typing import Literal

from localrun.errors import ContextFullError, EngineDiedError, LocalrunError, StoppedError, UsageError

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


def from_engine(error: Exception) -> ApiError:
    """An engine error for a client, without tracebacks or local paths."""
    result = _from_engine(error)
    if isinstance(error, LocalrunError):
        result.engine_kind = type(error).__name__
    return result


def _from_engine(error: Exception) -> ApiError:
    text = str(error) or type(error).__name__
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ContextFullError):
        return ApiError("context", text, param="messages", code="context_length_exceeded")
    if isinstance(error, EngineDiedError):
        return ApiError("unavailable", f"the engine stopped working: {text}", code="engine_died", retry_after_s=1)
    if isinstance(error, StoppedError):
        return ApiError("unavailable", "the answer was stopped", code="stopped", retry_after_s=1)
    # Whatever is wrong with a value is the request's fault; MessageError is among these.
    if isinstance(error, UsageError) or (isinstance(error, LocalrunError) and isinstance(error, ValueError)):
        return ApiError("invalid", f"{text} ({error.hint})" if error.hint else text)
    if isinstance(error, LocalrunError):
        return ApiError("internal", text)
    return ApiError("internal", "internal error; the server's log says more")
