"""Streamed text: what can't be part of a tag is taken at once, the rest waits, and nothing is scanned again and again."""

from __future__ import annotations

import re

from localrun.engine.chat.dsml_tags import DSML_MARK
from localrun.engine.chat.parts import DSML
from localrun.engine.chat.pending_text import Held, PendingText

BRACKET: Held = [(re.compile(r"<[a-z]*\Z"), 8)]


def decided(pending: PendingText, *, final: bool = False, in_markup: bool = False, held: Held = BRACKET) -> str:
    return pending.decided(held, final=final, in_markup=in_markup, other=None)


def test_an_end_that_may_become_a_tag_waits_and_the_rest_is_taken() -> None:
    pending = PendingText()
    pending.text = "hello <too"
    assert decided(pending) == "hello "
    pending.text += "l"
    assert decided(pending) == ""
    pending.text += " >"
    assert decided(pending) == "<tool >"
    assert decided(pending) == ""


def test_only_so_many_characters_wait_as_a_pattern_can_match() -> None:
    pending = PendingText()
    pending.text = "<" + "a" * 20
    assert decided(pending) == pending.text


def test_at_the_end_nothing_waits_but_a_bracket_of_markup_is_no_text() -> None:
    for in_markup, expected in ((False, "text <"), (True, "text ")):
        pending = PendingText()
        pending.text = "text <"
        assert decided(pending, final=True, in_markup=in_markup) == expected
        assert pending.at == len(pending.text)


def test_text_before_a_token_ends_at_its_bracket_without_line_breaks() -> None:
    pending = PendingText()
    pending.text = f"answer\n\n<{DSML_MARK}"
    assert decided(pending) == "answer"
    assert decided(pending) == "", "the tag is not whole"


def test_what_was_taken_can_be_put_back_and_what_is_done_forgotten() -> None:
    pending = PendingText()
    pending.text = "one two"
    assert decided(pending) == "one two"
    pending.put_back("two")
    assert (pending.text, pending.at) == ("two", 0)
    pending.at = 1
    pending.drop_done()
    assert (pending.text, pending.at) == ("wo", 0)


def test_tokens_are_spelled_out_as_text() -> None:
    pending = PendingText()
    pending.text = f"a{DSML_MARK}b"
    assert pending.literal(len(pending.text)) == f"a{DSML}b"
    tag = pending.tag(final=True)
    assert tag is not None
    assert (tag.kind, pending.before(tag)) == ("?", "a"), "a token alone is no tag that is known"
    assert pending.n_scanned == tag.end == 1 + len(DSML_MARK)
