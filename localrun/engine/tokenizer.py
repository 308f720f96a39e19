"""Converts text to token ids and back, guaranteeing that text never becomes a special token.

llama.cpp matches user-defined tokens (DeepSeek's role tokens among them) inside ordinary text even when told not to parse
specials. Here every occurrence of a special token's name in a text is split before llama.cpp sees it, whatever type the GGUF
gives that token, and the resulting ids are checked again. Special tokens enter a prompt only by name (`Special`).

All other text gets llama.cpp's ids, which equal those of the `tokenizers` library.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from localrun.engine.chat.parts import PROTOCOL_TOKENS, PromptPart, Sampled, Special, Text, merge_texts
from localrun.engine.llama import ATTR_CONTROL, ATTR_UNKNOWN, ATTR_USER_DEFINED, Vocab
from localrun.errors import LocalrunError

MAX_RUN = 2000
"""Maximum run of whitespace or non-whitespace characters passed to llama.cpp in one piece.

Its pre-tokenizer is a recursive std::regex: a run of 30,000 letters overflows the stack (8,000 were fine).
"""

_LONG_RUN = re.compile(rf"\S{{{MAX_RUN + 1},}}|\s{{{MAX_RUN + 1},}}")
# Places inside a run where the pre-tokenizer cuts anyway: a Latin letter before punctuation or a digit, the end of CJK text.
_CJK = "[\u4e00-\u9fa5\u3040-\u30ff]"
_BREAK = re.compile(rf"(?<=[A-Za-z])(?=[!-@\[-`{{-~])|(?<={_CJK})(?!{_CJK})")

_SPECIAL_ATTRIBUTES = ATTR_UNKNOWN | ATTR_CONTROL | ATTR_USER_DEFINED


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer: text, or the name of one special token."""

    text: str
    special: bool


class Tokenizer:
    """A model's tokenizer. Immutable; any thread."""

    def __init__(self, vocab: Vocab) -> None:
        """Reads all special tokens of the vocabulary.

        Raises:
            LocalrunError: the model has no tokenizer.
        """
        if not vocab.has_tokenizer:
            raise LocalrunError(
                "the model has no tokenizer", hint="convert it with its tokenizer.json, or pass token ids"
            )
        self._vocab = vocab
        self._specials = _special_tokens(vocab)
        self._special_ids = frozenset(self._specials.values())
        self._look_alike = re.compile(_trie_regex(self._specials))

    @property
    def specials(self) -> dict[str, int]:
        """Special tokens by name; a copy."""
        return dict(self._specials)

    def encode(self, text: str) -> list[int]:
        (
            """Ids of anyone's text, never a special token. Lone surrogates, which UTF-8 can't carry, become `?`.

        Raises:
            LocalrunError: llama.cpp could not tokenize the text, or made a special token of it.
        """
            ""
        )
        ids: list[int] = []
        for segment in self._segments(text):
            ids += self._vocab.tokenize(segment.encode("utf-8", "replace"))
        if not self._special_ids.isdisjoint(ids):
            raise LocalrunError(
                "the tokenizer turned ordinary text into a special token",
                hint="please report this with the model's name",
            )
        return ids

    def encode_parts(self, parts: Iterable[PromptPart]) -> list[int]:
        """Ids of a prompt. Adjacent texts are tokenized as one.

        Raises:
            LocalrunError: the vocabulary lacks a special token of the prompt.
        """
        ids: list[int] = []
        for part in merge_texts(parts):
            if isinstance(part, Text):
                ids += self.encode(part.text)
            elif isinstance(part, Sampled):
                ids += part.ids
            else:
                ids.append(self.special(part))
        return ids

    def special(self, part: Special) -> int:
        """The id of a special token. Raises LocalrunError if the vocabulary has no such token."""
        try:
            return self._specials[part.token]
        except KeyError:
            raise LocalrunError(
                f"the model's vocabulary has no token {part.token}", hint="it was not made for this prompt format"
            ) from None

    def decode(self, ids: Sequence[int]) -> str:
        """Text of complete ids, special tokens by name; invalid UTF-8 becomes U+FFFD."""
        decoder = StreamDecoder(self)
        pieces = [piece for token in ids for piece in decoder.push(token)]
        return "".join(piece.text for piece in (*pieces, *decoder.flush()))

    def is_special(self, token: int) -> bool:
        return token in self._special_ids

    def piece(self, token: int) -> bytes:
        """The token's bytes; a special token's name."""
        return self._vocab.piece(token)

    def _segments(self, text: str) -> Iterator[str]:
        """Splits `text` so that no segment contains a special token's name: after the first character of each occurrence.

        A segment ends one character into the leftmost name that starts in it, so it can't hold a whole name, except one of a single
        character; the check in `encode` finds those.
        """
        start = 0
        while match := self._look_alike.search(text, start):
            cut = match.start() + 1
            yield from _short_runs(text[start:cut])
            start = cut
        yield from _short_runs(text[start:])


class StreamDecoder:
    """Turns ids into text while they arrive: a character is given out when its last byte is there. One per answer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> list[Piece]:
        """Pieces that `token` completes; none while a character is unfinished."""
        data = self._tokenizer.piece(token)
        if self._tokenizer.is_special(token):
            return [*self.flush(), Piece(data.decode("utf-8", "replace"), special=True)]
        text = self._utf8.decode(data)
        return [Piece(text, special=False)] if text else []

    def flush(self) -> list[Piece]:
        """What an unfinished character leaves: U+FFFD, or nothing."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return [Piece(text, special=False)] if text else []


def _short_runs(text: str) -> Iterator[str]:
    """Splits `text` so that no run is longer than MAX_RUN, if possible where it does not change the ids."""
    start = 0
    for run in _LONG_RUN.finditer(text):
        while run.end() - start > MAX_RUN and (limit := max(start, run.start()) + MAX_RUN) < run.end():
            breaks = [match.start() for match in _BREAK.finditer(text, limit - MAX_RUN // 2, limit)]
            cut = breaks[-1] if breaks else limit
            yield text[start:cut]
            start = cut
    yield text[start:]


def _special_tokens(vocab: Vocab) -> dict[str, int]:
    """Name -> id of everything that is not ordinary text.

    By type, and the protocol's tokens also by name, in case a GGUF marks them as normal.
    """
    specials = {}
    protocol = set(PROTOCOL_TOKENS)
    for token in range(vocab.n_tokens):
        if vocab.attributes(token) & _SPECIAL_ATTRIBUTES:
            specials[vocab.piece(token).decode("utf-8", "replace")] = token
        elif (name := vocab.text(token)) in protocol:
            specials[name] = token
    specials.pop("", None)
    return specials


def _trie_regex(words: Iterable[str]) -> str:
    """A regex that finds any of `words` in one pass: alternatives share their prefixes, so a thousand words cost like one."""
    trie: dict[str, dict] = {}  # type: ignore[type-arg]  # recursive
    for word in words:
        node = trie
        for character in word:
            node = node.setdefault(character, {})
        node[""] = {}

    def pattern(node: dict) -> str:  # type: ignore[type-arg]
        if "" in node:  # the shortest word decides: its end need not be known
            return ""
        branches = [re.escape(character) + pattern(child) for character, child in node.items()]
        return branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"

    return pattern(trie) if trie else r"(?!)"
