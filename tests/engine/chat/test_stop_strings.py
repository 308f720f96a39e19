"""Stop strings in text that comes in pieces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localrun.engine.chat.stop_strings import StopFinder


def shown(pieces: list[str], stops: list[str]) -> tuple[str, str | None]:
    finder = StopFinder(stops)
    text = "".join(finder.feed(piece) for piece in pieces) + finder.flush()
    return text, finder.found


@pytest.mark.parametrize(
    ("pieces", "stops", "expected"),
    [
        (["Hello"], [], ("Hello", None)),
        (["Hel", "lo STOP now"], ["STOP"], ("Hello ", "STOP")),
        (["a ST", "OP b"], ["STOP"], ("a ", "STOP")),
        (["a ST", "AB"], ["STOP"], ("a STAB", None)),
        (["abcd"], ["cd", "bc"], ("a", "bc")),
        (["abcd"], ["b", "bc"], ("a", "bc")),  # of two at one place the longer one
        (["\n", "\n"], ["\n\n"], ("", "\n\n")),
    ],
)
def test_text_ends_before_the_first_stop(pieces: list[str], stops: list[str], expected: tuple[str, str | None]) -> None:
    assert shown(pieces, stops) == expected


@given(st.lists(st.text("ab\n", max_size=4), max_size=8), st.lists(st.text("ab\n", min_size=1, max_size=3), max_size=3))
def test_pieces_make_no_difference_to_where_it_ends(pieces: list[str], stops: list[str]) -> None:
    whole = "".join(pieces)
    places = [place for stop in stops if (place := whole.find(stop)) >= 0]
    text, found = shown(pieces, stops)
    assert (found is not None) == bool(places)
    if not places:
        assert text == whole
    else:
        assert whole.startswith(text)
        assert text == whole[: len(text)]
        # Character by character it can't end later than the first stop that is complete.
        assert len(text) <= min(whole.find(stop) + len(stop) for stop in stops if stop in whole)
