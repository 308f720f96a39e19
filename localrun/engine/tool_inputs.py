"""Custom tools: their only argument `input` is text that follows the client's grammar, Lark or a regular expression.

The grammar of the calls allows any text for `input` and determines where it ends. Meanwhile, the client's grammar restricts the
tokens further. The two can't be merged: a lexer takes the longest match, so a terminal like `/.*/` would swallow the `</` with
which DSML ends a value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

HEAD = b'parameter name="input" string="true">'
"""The markup between DSML's token and the text."""


@dataclass(frozen=True, slots=True)
class InputWords:
    """Vocabulary data, computed once for all answers.

    Attributes:
        pieces: the bytes of each token.
        straddling: a final piece of `HEAD` -> ids that extend beyond it, where they would escape the text's grammar.
    """

    pieces: Sequence[bytes]
    straddling: Mapping[bytes, Sequence[int]]

    @classmethod
    def of(cls, pieces: Sequence[bytes]) -> InputWords:
        straddling: dict[bytes, list[int]] = {}
        for token, piece in enumerate(pieces):
            at = piece.find(b">", 0, -1)
            if at >= 0 and HEAD.endswith(piece[: at + 1]):
                straddling.setdefault(piece[: at + 1], []).append(token)
        return cls(pieces, straddling)


class InputMatcher:
    """An `LLMatcher` for calls, plus one for the text of a custom tool's `input`, with the methods that `Steering` uses.

    Args:
        calls: the matcher of the whole answer.
        inputs: a fresh matcher for each custom tool's grammar, by the tool's name.
        mark: id of DSML's token.
        closing: id of the token `</`, which ends a text.
    """

    def __init__(
        self, calls: Any, inputs: Mapping[str, Any], words: InputWords, mark: int, closing: int, ends: Sequence[int]
    ) -> None:
        self._calls, self._inputs, self._words, self._ends = calls, inputs, words, list(ends)
        self._mark, self._closing = mark, closing
        self._since_mark = b""
        self._tool = ""
        self._input: Any = None  # inside a text: its matcher
        self._may_close = False  # inside a text: the last token was `</`, and it may have been the end
        self._alive = False  # inside a text: its grammar continues with the text, including `</`

    def consume_token(self, token: int) -> bool:
        if not self._calls.consume_token(token):
            return False
        if token == self._mark:
            self._input, self._since_mark = None, b""
            return True
        if self._input is not None:
            self._may_close = token == self._closing and self._input.is_accepting()
            self._alive = self._alive and self._input.try_consume_tokens([token]) == 1
            return self._alive or self._may_close
        self._since_mark += self._words.pieces[token]
        if self._since_mark.startswith(b'invoke name="') and self._since_mark.endswith(b">\n<"):
            self._tool = self._since_mark[len(b'invoke name="') : -len(b'">\n<')].decode("utf-8", "replace")
        if self._since_mark == HEAD and self._tool in self._inputs:
            self._input, self._alive, self._may_close = self._inputs[self._tool].deep_copy(), True, False
        return True

    def compute_bitmask(self) -> bytes:
        """Bits of the ids that may come next, the lowest first."""
        mask = self._calls.compute_bitmask()
        bits = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")
        if self._input is not None:
            allowed = np.zeros_like(bits)
            if self._alive:
                inner = np.unpackbits(np.frombuffer(self._input.compute_bitmask(), np.uint8), bitorder="little")
                allowed[: len(inner)] = inner
                allowed[self._ends] = 0
                allowed[self._closing] |= self._input.is_accepting()
            allowed[self._mark] = self._may_close
            bits &= allowed
        elif self._tool in self._inputs and HEAD.startswith(self._since_mark):
            bits[list(self._words.straddling.get(HEAD[len(self._since_mark) :], ()))] = 0
        return np.packbits(bits, bitorder="little").tobytes()

    def is_stopped(self) -> bool:
        return bool(self._calls.is_stopped())

    def is_error(self) -> bool:
        return bool(self._calls.is_error() or (self._alive and self._input is not None and self._input.is_error()))

    def get_error(self) -> str:
        return str(self._calls.get_error() or (self._input.get_error() if self._input is not None else ""))
