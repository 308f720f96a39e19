"""The parts of a prompt: special tokens and text, kept separate so that text can never become a special token.

The official encoder builds one string and lets the tokenizer find the role tokens in it, so a user who types `<｜User｜>` creates
a role token. Here a prompt is a sequence of `Special` (one token of the vocabulary, by its string) and `Text` (ordinary text,
tokenized without matching added tokens).

A tokenizer first splits its input at added tokens, so tokenizing part by part gives exactly the ids of the whole string,
provided that adjacent texts are merged (`merge_texts`). Earlier model output may be included as its ids (`Sampled`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
LATEST_REMINDER = "<｜latest_reminder｜>"
THINK_START = "<think>"
THINK_END = "</think>"
DSML = "｜DSML｜"
EXTRACTED_URL = "<｜extracted_url｜>"
TASK_TOKENS: Mapping[str, str] = MappingProxyType(
    {name: f"<｜{name}｜>" for name in ("action", "query", "authority", "domain", "title", "read_url")}
)
"""Quick-instruction tasks and the tokens that ask for them."""

PROTOCOL_TOKENS = (
    *(BOS, EOS, USER, ASSISTANT, LATEST_REMINDER, THINK_START, THINK_END, DSML, EXTRACTED_URL),
    *TASK_TOKENS.values(),
)
"""Every special token that the encoder writes or the stream parser understands."""

_PROTOCOL_TOKEN = re.compile("(" + "|".join(re.escape(token) for token in PROTOCOL_TOKENS) + ")")


@dataclass(frozen=True, slots=True)
class Special:
    """One token of the vocabulary, named by its string."""

    token: str


@dataclass(frozen=True, slots=True)
class Text:
    """Text to be tokenized as ordinary text, whatever it looks like."""

    text: str


@dataclass(frozen=True, slots=True)
class Sampled:
    """Model output as the sampled ids, which are not recomputed from the text."""

    ids: tuple[int, ...]
    text: str


PromptPart: TypeAlias = Special | Text | Sampled


def split_protocol_text(text: str) -> list[PromptPart]:
    """Parts of a text in which token strings do mean tokens: a fixed header of our own, or a model's raw output."""
    pieces = _PROTOCOL_TOKEN.split(text)
    parts: list[PromptPart] = []
    for i, piece in enumerate(pieces):
        if i % 2:
            parts.append(Special(piece))
        elif piece:
            parts.append(Text(piece))
    return parts


class TokenFinder:
    """Finds protocol tokens in text that comes in pieces."""

    _BEGINNINGS = frozenset(token[:n] for token in PROTOCOL_TOKENS for n in range(1, len(token)))
    _LONGEST = max(len(token) for token in PROTOCOL_TOKENS)

    def __init__(self) -> None:
        self._held = ""

    def feed(self, text: str) -> list[PromptPart]:
        """The parts that are certain; a tail that may become a token is held back."""
        text = self._held + text
        *parts, last = split_protocol_text(text) or [Text("")]
        self._held = ""
        if isinstance(last, Text):
            text = last.text
            for start in range(max(0, len(text) - self._LONGEST + 1), len(text)):
                if text[start:] in self._BEGINNINGS:
                    text, self._held = text[:start], text[start:]
                    break
            last = Text(text)
        return [*parts, last]

    def flush(self) -> list[PromptPart]:
        """The tail that was held back, which did not become a token."""
        held, self._held = self._held, ""
        return [Text(held)] if held else []


def merge_texts(parts: Iterable[PromptPart]) -> list[PromptPart]:
    """The same prompt with neighbouring texts joined and empty ones left out."""
    merged: list[PromptPart] = []
    for part in parts:
        if isinstance(part, Text):
            if not part.text:
                continue
            if merged and isinstance(last := merged[-1], Text):
                merged[-1] = Text(last.text + part.text)
                continue
        merged.append(part)
    return merged


def render(parts: Iterable[PromptPart]) -> str:
    """The string that the official encoder would give: for tests and for people, not for tokenising."""
    return "".join(part.token if isinstance(part, Special) else part.text for part in parts)
