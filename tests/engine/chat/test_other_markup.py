"""Where markup without the format's token may be a call: at the beginning of a line, outside of code, of a known tool."""

from __future__ import annotations

import pytest

from localrun.engine.chat.dsml_tags import DSML_MARK
from localrun.engine.chat.other_markup import OtherMarkup, ends_with_call, official

CALL = '<invoke name="f">\n<parameter name="a">1</parameter>\n</invoke>'


def opened(before: str, text: str = CALL) -> OtherMarkup | None:
    """After `before`, at the opener of `text`; None: it is none."""
    markup = OtherMarkup({"f"})
    markup.passed(before)
    match = markup.find(text, 0, len(text))
    if match is None or not markup.opens(match):
        return None
    markup.begin(match)
    return markup


@pytest.mark.parametrize(
    ("before", "text", "is_opener"),
    [
        ("", CALL, True),
        ("I call:\n", CALL, True),
        ("I call:", "\n\n" + CALL, True),
        ("Write ", CALL, False),
        ("```\n", CALL, False),
        ("```\ncode\n```\n", CALL, True),
        ("~~~ xml\n", CALL, False),
        ("", "<|DSML|invoke name='f'>", True),
        ("", "<｜｜DSML｜｜tool_calls>", True),
        ("", "<invoked>", False),
        ("", "<parameter name='a'>", False),
    ],
)
def test_an_opener_begins_a_line_outside_of_code(before: str, text: str, is_opener: bool) -> None:
    assert (opened(before, text) is not None) == is_opener


def test_a_block_within_a_line_is_an_example_and_so_is_all_that_follows() -> None:
    markup = OtherMarkup({"f"})
    markup.passed("as in ")
    block = "<tool_calls>"
    match = markup.find(block, 0, len(block))
    assert match is not None
    assert not markup.opens(match)
    assert markup.find(CALL, 0, len(CALL)) is None


def test_a_call_is_collected_to_its_end_and_no_further() -> None:
    markup = opened("")
    assert markup is not None
    rest = CALL.removeprefix("<invoke") + " and more"
    taken, total = None, 0
    for char in rest:
        taken = markup.add(char)
        if taken is not None:
            break
        total += 1
    assert total + (taken or 0) == len(rest) - len(" and more")
    assert markup.collected() == ("<invoke", CALL.removeprefix("<invoke"))


def test_a_tool_that_is_not_on_offer_is_no_call_at_once() -> None:
    markup = opened("", CALL.replace('"f"', '"g"'))
    assert markup is not None
    assert markup.add(' name="g">') == -1


def test_a_head_that_names_nothing_is_given_up_and_after_eight_of_them_nothing_is_held_back() -> None:
    markup = OtherMarkup({"f"})
    for _ in range(8):
        match = markup.find(CALL, 0, len(CALL))
        assert match is not None
        markup.begin(match)
        assert markup.add(" " * 511) is None
        assert markup.add(" ") == -1
        markup.refuse()
    assert markup.find(CALL, 0, len(CALL)) is None
    assert markup.held_from("text <inv") == len("text <inv")


@pytest.mark.parametrize(
    ("text", "held"),
    [
        ("plain", ""),
        ("text <", "<"),
        ("text <inv", "<inv"),
        ("text <|DS", "<|DS"),
        ("text\n\n<tool_", "\n\n<tool_"),
        ("text\n<tool_", "\n<tool_"),
        ("text <div", ""),
        ("1 < 2", ""),
    ],
)
def test_what_may_become_an_opener_is_held_back(text: str, held: str) -> None:
    at = OtherMarkup({"f"}).held_from(text)
    assert text[at:] == held


def test_markup_becomes_official_and_ends_with_its_call() -> None:
    assert official("<|DSML|invoke name='f'></ invoke>") == f"<{DSML_MARK}invoke name='f'></{DSML_MARK}invoke>"
    assert official("<b>1</b>") == "<b>1</b>"
    assert ends_with_call(CALL + " \n")
    assert not ends_with_call(CALL + " and more")
