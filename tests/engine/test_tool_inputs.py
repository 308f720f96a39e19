"""Two grammars at once: that of the calls, and inside a custom tool's `input` the client's. Both are scripted here."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from localrun.engine.tool_inputs import HEAD, InputMatcher, InputWords

PIECES = [
    b"MARK",
    b"</",
    b'invoke name="patch">\n<',
    HEAD,
    b"a",
    b"b",
    b'parameter name="input" string="true"',
    b">",
    b">a",
    b"EOS",
]
MARK, CLOSING, INVOKE, WHOLE_HEAD, A, B, HEAD_BEGUN, ANGLE, STRADDLING, EOS = range(len(PIECES))
ALL = set(range(len(PIECES)))


class Scripted:
    """A grammar that knows which tokens may come and whether it may end; `consumed` is what it took."""

    def __init__(self, allowed: set[int], accepting: bool = False) -> None:
        self.allowed, self.accepting, self.consumed = allowed, accepting, list[int]()
        self.copies: list[Scripted] = []

    def deep_copy(self) -> Scripted:
        self.copies.append(Scripted(set(self.allowed), self.accepting))
        return self.copies[-1]

    def consume_token(self, token: int) -> bool:
        return self.try_consume_tokens([token]) == 1

    def try_consume_tokens(self, tokens: Sequence[int]) -> int:
        if tokens[0] not in self.allowed:
            return 0
        self.consumed.append(tokens[0])
        return 1

    def compute_bitmask(self) -> bytes:
        bits = np.zeros(16, np.uint8)
        bits[sorted(self.allowed)] = 1
        return np.packbits(bits, bitorder="little").tobytes()

    def is_accepting(self) -> bool:
        return self.accepting

    def is_stopped(self) -> bool:
        return False

    def is_error(self) -> bool:
        return False

    def get_error(self) -> str:
        return ""


def matcher(inputs: Scripted, tool: str = "patch") -> InputMatcher:
    return InputMatcher(Scripted(ALL), {tool: inputs}, InputWords.of(PIECES), MARK, CLOSING, [EOS])


def allowed(of: InputMatcher) -> set[int]:
    bits = np.unpackbits(np.frombuffer(of.compute_bitmask(), np.uint8), bitorder="little")
    return {int(i) for i in np.flatnonzero(bits)}


def feed(of: InputMatcher, *tokens: int) -> list[bool]:
    return [of.consume_token(token) for token in tokens]


def test_words_that_go_on_behind_the_head_are_known() -> None:
    assert InputWords.of(PIECES).straddling == {b">": [STRADDLING]}


def test_outside_of_an_input_the_calls_grammar_alone_counts() -> None:
    both = matcher(Scripted({A}))
    assert allowed(both) == ALL
    assert feed(both, A, B) == [True, True]


def test_inside_an_input_the_clients_grammar_restricts_and_may_end_only_where_it_accepts() -> None:
    inputs = Scripted({A, EOS})
    both = matcher(inputs)
    assert feed(both, MARK, INVOKE, MARK, WHOLE_HEAD) == [True] * 4
    (own,) = inputs.copies
    assert allowed(both) == {A}, "neither the end of the text nor the end of all"
    assert feed(both, A) == [True]
    assert own.consumed == [A]
    own.accepting = True
    assert allowed(both) == {A, CLOSING}
    assert feed(both, CLOSING) == [True]
    assert allowed(both) == {MARK}, "`</` was no part of the text, so its tag goes on"
    assert feed(both, MARK) == [True]
    assert allowed(both) == ALL
    assert inputs.consumed == [], "the next call begins anew"


def test_a_token_against_the_clients_grammar_is_refused() -> None:
    both = matcher(Scripted({A}))
    feed(both, MARK, INVOKE, MARK, WHOLE_HEAD)
    assert feed(both, B) == [False]


def test_a_token_that_would_carry_text_past_the_grammar_is_not_allowed_at_the_heads_end() -> None:
    both = matcher(Scripted({A}))
    feed(both, MARK, INVOKE, MARK, HEAD_BEGUN)
    assert allowed(both) == ALL - {STRADDLING}
    feed(both, ANGLE)
    assert allowed(both) == {A}


def test_other_tools_are_left_alone() -> None:
    both = matcher(Scripted({A}), tool="other")
    feed(both, MARK, INVOKE, MARK, WHOLE_HEAD)
    assert allowed(both) == ALL
