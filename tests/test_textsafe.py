"""Nothing that a terminal would obey passes."""

from __future__ import annotations

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from localrun.textsafe import visible, visible_line


def test_escape_sequences_become_pictures() -> None:
    assert visible("\x1b]52;c;aGk=\x07") == "␛]52;c;aGk=␇"
    assert visible("\x9b31m\x85\x7f") == "<9b>31m<85>␡"


def test_line_ends_and_tabs_stay_but_lone_returns_do_not() -> None:
    assert visible("a\r\n\tb\rc") == "a\n\tb␍c"


def test_text_that_reorders_what_stands_around_it_is_shown() -> None:
    assert visible("user\u202etxt.exe") == "user<U+202E>txt.exe"
    assert visible("\U000e0041") == "<U+E0041>"


def test_undecodable_bytes_of_file_names_can_be_printed() -> None:
    name = b"caf\xe9\x1b".decode("utf-8", "surrogateescape")
    assert visible_line(name).encode() == "caf<e9>␛".encode()


def test_line_form_is_one_line_and_bounded() -> None:
    assert visible_line("a\nb\tc") == "a⏎b c"
    assert visible_line("abcdefgh", max_chars=5) == "abcd…"


@given(st.text())
def test_no_control_character_survives(text: str) -> None:
    for char in visible(text):
        assert char in "\t\n" or unicodedata.category(char) not in ("Cc", "Cs", "Zl", "Zp")
    assert "\n" not in visible_line(text)


@given(st.text(alphabet=st.characters(blacklist_characters="\r")), st.integers(0, 20))
def test_chunks_give_the_same_as_the_whole(text: str, cut: int) -> None:
    assert visible(text[:cut]) + visible(text[cut:]) == visible(text)
