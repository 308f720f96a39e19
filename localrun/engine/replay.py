"""Remembers the tokens of the model's answers, for conversations that clients send back.

Clients send the whole conversation with each question, but not earlier answers verbatim: arguments of tool calls are
reserialized, spaces are trimmed, reasoning is omitted. Even identical text may have different tokens, because a model does not
always tokenize like its tokenizer. Any difference invalidates the saved state after it. So every answer's ids are kept, and
when an answer comes back, recognized by the ids of its tool calls or by the conversation before it, those ids are used in the
prompt.

An answer that a client has changed in substance (different text or arguments) is used as sent.
Kept in memory and in a file with one JSON line per answer; both are bounded, oldest dropped first. Use from one thread.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import xxhash

from localrun.engine.chat.messages import (
    AssistantMessage,
    Message,
    MessageToolCall,
    SampledAnswer,
    ToolMessage,
    role_of,
)

log = logging.getLogger(__name__)

MAX_ANSWERS = 4000
MAX_IDS = 4_000_000
"""Bounds of the memory; the file is rewritten when it has become twice as long."""


@dataclass(frozen=True, slots=True)
class _Record:
    """One answer: its content, for comparison, and its ids."""

    content: str
    calls: tuple[tuple[str, str], ...]  # (name, arguments without whitespace)
    sampled: SampledAnswer


class AnswerMemory:
    """Answers, indexed by what identifies them.

    Args:
        path: the file, readable only by its owner because it holds model output; None: memory only.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._records: OrderedDict[str, _Record] = OrderedDict()
        self._n_ids = 0
        self._n_lines = 0
        if path is not None:
            self._read(path)

    def recall(self, messages: Sequence[Message]) -> list[Message]:
        """The conversation with `sampled` set in every answer that is known."""
        result: list[Message] = []
        before = xxhash.xxh3_128()
        for message in messages:
            shown = message
            if isinstance(message, AssistantMessage):
                record = self._find(message, before.hexdigest())
                if record is not None:
                    shown = replace(message, sampled=record.sampled)
            result.append(shown)
            _add(before, message)
        return result

    def remember(self, messages: Sequence[Message], answer: AssistantMessage, sampled: SampledAnswer) -> None:
        """Keeps an answer to `messages`."""
        before = xxhash.xxh3_128()
        for message in messages:
            _add(before, message)
        record = _Record(answer.content.strip(), tuple(_comparable(call) for call in answer.tool_calls), sampled)
        keys = [call.id for call in answer.tool_calls if call.id] or [before.hexdigest()]
        for key in keys:
            self._put(key, record)
        self._write(keys, record)

    def _find(self, message: AssistantMessage, before: str) -> _Record | None:
        keys = [call.id for call in message.tool_calls if call.id] if message.tool_calls else [before]
        for key in keys:
            record = self._records.get(key)
            if record is None:
                continue
            self._records.move_to_end(key)
            calls = tuple(_comparable(call) for call in message.tool_calls)
            if record.calls == calls and record.content == message.content.strip():
                return record
        return None

    def _put(self, key: str, record: _Record) -> None:
        old = self._records.pop(key, None)
        self._n_ids += len(record.sampled) - (len(old.sampled) if old is not None else 0)
        self._records[key] = record
        while len(self._records) > MAX_ANSWERS or self._n_ids > MAX_IDS:
            _, gone = self._records.popitem(last=False)
            self._n_ids -= len(gone.sampled)

    # --- the file

    def _read(self, path: Path) -> None:
        try:
            lines = path.read_bytes().splitlines()
        except FileNotFoundError:
            return
        except OSError as error:
            log.warning("%s: can't reuse earlier answers: %s", path, error.strerror)
            return
        self._n_lines = len(lines)
        for line in lines[-2 * MAX_ANSWERS :]:
            with contextlib.suppress(ValueError, KeyError, TypeError):  # from another version, or truncated
                keys, record = _from_line(line)
                for key in keys:
                    self._put(key, record)

    def _write(self, keys: Sequence[str], record: _Record) -> None:
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._n_lines > 2 * MAX_ANSWERS:
                self._path.unlink(missing_ok=True)  # rewritten from memory
                self._n_lines = 0
                for key, kept in self._records.items():
                    self._append(_to_line([key], kept))
            else:
                self._append(_to_line(keys, record))
        except OSError as error:
            log.warning("%s: could not save an answer's tokens: %s", self._path, error.strerror)

    def _append(self, line: bytes) -> None:
        assert self._path is not None
        with open(os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as file:
            file.write(line)  # in one piece: another program may append, too
        self._n_lines += 1


def _add(hasher: Any, message: Message) -> None:
    """The part of a message that identifies a conversation and survives clients: without reasoning and surrounding whitespace."""
    content = message.content.strip()
    parts = [role_of(message), content]
    if isinstance(message, AssistantMessage):
        parts += [call.id or call.name for call in message.tool_calls]
    elif isinstance(message, ToolMessage):
        parts.append(message.tool_call_id)
    hasher.update(json.dumps(parts).encode())


def _comparable(call: MessageToolCall) -> tuple[str, str]:
    try:
        arguments = json.dumps(json.loads(call.arguments), sort_keys=True)
    except (ValueError, RecursionError):
        arguments = call.arguments
    return call.name, arguments


def _to_line(keys: Sequence[str], record: _Record) -> bytes:
    sampled = record.sampled
    body = {
        "keys": list(keys),
        "content": record.content,
        "calls": [list(call) for call in record.calls],
        "thinking": None if sampled.thinking is None else list(sampled.thinking),
        "rest": list(sampled.rest),
        "text": sampled.text,
    }
    return json.dumps(body, separators=(",", ":")).encode() + b"\n"


def _from_line(line: bytes) -> tuple[list[str], _Record]:
    body = json.loads(line)
    thinking = None if body["thinking"] is None else tuple(map(int, body["thinking"]))
    sampled = SampledAnswer(thinking, tuple(map(int, body["rest"])), str(body["text"]))
    calls = tuple((str(name), str(arguments)) for name, arguments in body["calls"])
    return [str(key) for key in body["keys"]], _Record(str(body["content"]), calls, sampled)
