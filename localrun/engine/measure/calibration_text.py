"""Calibration texts: plain UTF-8, or conversations as JSONL. Read and checked before anything is loaded.

Conversations are rendered in the model's prompt format; plain text is split into windows. Knows nothing about what is measured.
"""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from localrun.engine.chat.format import ChatEncoder
from localrun.engine.chat.messages import Message, MessageError, message_from_json
from localrun.engine.tokenizer import Tokenizer
from localrun.errors import UsageError

LEAST_BYTES = 1000
"""A shorter text reaches too few experts."""
MAX_BYTES = 256 << 20

_HINT = "use UTF-8 text, or JSONL with one message list per line; a few hundred kilobytes of typical use are enough"


@dataclass(frozen=True, slots=True)
class CalibrationText:
    """A checked text.

    Attributes:
        name: the file's name, or "default".
        digest: xxh3_128 of the file's bytes.
        text: plain text; empty for conversations.
        conversations: message lists; empty for plain text.
    """

    name: str
    digest: str
    text: str
    conversations: tuple[tuple[Message, ...], ...] = ()

    def token_windows(self, tokenizer: Tokenizer, chat: ChatEncoder, begin: int | None, window: int) -> list[list[int]]:
        """Token lists of at most `window` tokens, each to be run in an empty context.

        Plain text: consecutive pieces, each after the begin token. Conversations: one after the other, long ones in pieces.
        """
        if not self.conversations:
            return _pieces(tokenizer.encode(self.text), begin, window)
        result = []
        for messages in self.conversations:
            ids = tokenizer.encode_parts(chat.encode_prompt(messages, mode="off").parts)
            result += [ids[:window], *_pieces(ids[window:], begin, window)]
        return result


def _pieces(ids: Sequence[int], begin: int | None, window: int) -> list[list[int]]:
    prefix = [] if begin is None else [begin]
    step = max(1, window - len(prefix))
    return [[*prefix, *ids[at : at + step]] for at in range(0, len(ids), step)]


def default_text() -> CalibrationText:
    """The neutral text that ships: prose, dialogues, code and other languages (texts/NOTICE)."""
    data = importlib.resources.files("localrun.engine.measure").joinpath("texts/calibration.txt").read_bytes()
    return _parse("default", data)


def read_calibration_text(path: Path) -> CalibrationText:
    """Reads plain text, or conversations, one per line (if the name ends in `.jsonl` or the first line is JSON).

    Raises:
        UsageError: can't be read, empty, too short, not UTF-8, or a line that is not a conversation (named).
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UsageError(f"{path}: more than {MAX_BYTES >> 20} MiB of calibration text", hint=_HINT)
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: can't be read: {error.strerror}") from error
    return _parse(str(path), data, name=path.name)


def _parse(where: str, data: bytes, *, name: str = "default") -> CalibrationText:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{where}: not UTF-8 text ({error.reason} at byte {error.start})", hint="save the file as UTF-8"
        ) from None
    if not text.strip():
        raise UsageError(f"{where}: the calibration text is empty", hint=_HINT)
    if len(data) < LEAST_BYTES:
        raise UsageError(
            f"{where}: {len(data)} bytes are too few to calibrate on; at least {LEAST_BYTES} are needed",
            hint=_HINT,
        )
    digest = xxhash.xxh3_128_hexdigest(data)
    lines = text.splitlines()
    first = next(line for line in lines if line.strip())
    if not (name.lower().endswith(".jsonl") or _is_json(first)):
        return CalibrationText(name, digest, text)
    conversations = [_conversation(f"{where}:{i + 1}", line) for i, line in enumerate(lines) if line.strip()]
    return CalibrationText(name, digest, "", tuple(conversations))


def _is_json(line: str) -> bool:
    """Whether a line is a message list or an object that holds one; prose in brackets is not."""
    if line.lstrip()[0] not in "[{":
        return False
    try:
        value = json.loads(line)
    except ValueError:
        return False
    return (isinstance(value, list) and bool(value)) or (isinstance(value, dict) and "messages" in value)


def _conversation(where: str, line: str) -> tuple[Message, ...]:
    try:
        value: Any = json.loads(line)
    except ValueError as error:
        raise UsageError(f"{where}: not JSON: {error}", hint=_HINT) from None
    messages = value.get("messages") if isinstance(value, dict) else value
    if not isinstance(messages, list) or not messages:
        raise UsageError(f"{where}: expected a list of messages or an object with 'messages'", hint=_HINT)
    try:
        return tuple(
            message_from_json(message, where=f"{where}: message {i + 1}") for i, message in enumerate(messages)
        )
    except MessageError as error:
        raise UsageError(str(error), hint=error.hint or _HINT) from None
