"""Captures llama.cpp's log instead of printing it: the last lines explain a failed load or decode, and everything goes to
`logging`."""

from __future__ import annotations

import logging
from collections import deque
from typing import Any

log = logging.getLogger("llama.cpp")

_LEVELS = {1: logging.DEBUG, 2: logging.INFO, 3: logging.WARNING, 4: logging.ERROR}  # ggml.h, enum ggml_log_level
_CONTINUATION = 5
_recent: deque[str] = deque(maxlen=40)
_callback: Any = None
_error: BaseException | None = None


def install() -> None:
    """Routes llama.cpp's and ggml's log here. Call before the first llama.cpp function; more calls do nothing."""
    global _callback
    if _callback is not None:
        return
    import llama_cpp

    @llama_cpp.llama_log_callback
    def receive(level: int, text: bytes, user_data: Any) -> None:
        global _error
        try:
            _receive(level, text.decode(errors="replace"))
        except BaseException as error:  # a callback from C: ctypes would swallow it
            _error = _error or error

    _callback = receive
    llama_cpp.llama_log_set(receive, None)


def _receive(level: int, line: str) -> None:
    if level == _CONTINUATION and _recent:
        _recent[-1] += line
        return
    if level >= 3:
        _recent.append(line)
    log.log(_LEVELS.get(level, logging.DEBUG), "%s", line.rstrip())


def take_error() -> BaseException | None:
    """The first error while lines were received (Ctrl-C, say), once."""
    global _error
    error, _error = _error, None
    return error


def recent_errors(n: int = 3) -> str:
    """The last warnings and errors as one line, for messages."""
    return "; ".join(line.strip() for line in list(_recent)[-n:])


def clear() -> None:
    """Forgets old lines; before an operation whose failure will be explained by what follows."""
    _recent.clear()
