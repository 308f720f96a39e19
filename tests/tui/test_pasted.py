"""A paste is one text, whatever bytes it has and however they arrive; nothing in it is ever a key."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from textual import events
from textual.widgets import Input

from localrun.textsafe import visible
from localrun.tui.pasted import END, START, Pasted, PasteSplitter
from localrun.tui.screens.search import SearchScreen
from localrun.tui.sealed import pictures, sealed, unsealed
from tests.tui.support import Setup

COLOUR_LOG = "why does this fail?\n\x1b[1mgcc -c a.c\x1b[0m\n\x1b[31merror:\x1b[0m no header\nplease explain\n"
QUITS = "log \x1b]0;x\x11y\x07 done, why so slow?"
PROGRESS = "50%\x1b[K\r100%\x1b[K\r\ndone\x00\x1b\x1b[A\x03"


def split(*chunks: str) -> tuple[str, list[str]]:
    """Keys and pastes of what is read chunk by chunk, then nothing for a while."""
    splitter = PasteSplitter()
    pieces = [piece for chunk in chunks for piece in splitter.feed(chunk)] + list(splitter.quiet())
    assert not splitter.waiting
    return "".join(p for p in pieces if isinstance(p, str)), [p.text for p in pieces if isinstance(p, Pasted)]


@pytest.mark.parametrize("text", [COLOUR_LOG, QUITS, "", "\x1b", "\x1b[200", f"inside {END} too", f"{START}{START}"])
def test_a_paste_arrives_whole_however_it_is_cut(text: str) -> None:
    data = f"a{START}{text}{END}\x1b[B"
    expected = text.replace("\r", "\n")
    if END in text or START in text:  # what looks like marks can't be told from the terminal's own in any case
        keys, pastes = split(data)
        assert "".join(pastes).replace(START, "").replace(END, "") == expected.replace(START, "").replace(END, "")
        assert keys == "a\x1b[B"
        return
    for n in range(1, len(data)):
        assert split(data[:n], data[n:]) == ("a\x1b[B", [expected])
    assert split(*data) == ("a\x1b[B", [expected])


@settings(deadline=None)
@given(st.lists(st.text(alphabet="\x1b[]20~1\r\n\x11ab", max_size=30), max_size=4), st.integers(1, 7))
def test_nothing_of_a_paste_becomes_a_key(texts: list[str], size: int) -> None:
    texts = [text for text in texts if START not in text and END not in text and not text.endswith(END[:-1])]
    data = "".join(f"{START}{text}{END}" for text in texts)
    chunks = [data[i : i + size] for i in range(0, len(data), size)]
    assert split(*chunks) == ("", [text.replace("\r\n", "\n").replace("\r", "\n") for text in texts])


def test_a_lone_escape_is_a_key_as_soon_as_nothing_follows() -> None:
    splitter = PasteSplitter()
    assert list(splitter.feed("\x1b")) == []
    assert splitter.waiting
    assert list(splitter.quiet()) == ["\x1b"]
    assert list(splitter.feed(f"{START}half")) == []
    assert list(splitter.quiet()) == [], "the rest is still to come"
    assert list(splitter.feed(f" whole{END}")) == []
    assert list(splitter.quiet()) == [Pasted("half whole")]


@settings(deadline=None)
@given(st.text())
@example("\U0010f000\0\U0010fffd\U0010fffd")
def test_sealed_text_is_the_same_text_and_its_pictures_are_harmless(text: str) -> None:
    text = text.replace("\r\n", "\n")
    assert unsealed(sealed(text)) == text
    assert sealed(text).splitlines() == sealed(text).split("\n")[: len(sealed(text).splitlines())]
    shown = pictures(sealed(text))
    assert len(shown) == len(sealed(text))
    assert visible(shown) == shown


@pytest.mark.parametrize("text", [COLOUR_LOG, QUITS, PROGRESS])
async def test_what_is_pasted_stands_in_the_input_and_is_sent_as_it_was(setup: Setup, text: str) -> None:
    async with setup.start() as talk:
        talk.app.post_message(events.Paste(text))
        await talk.until(lambda: talk.screen.prompt.text)
        expected = text.replace("\r\n", "\n")
        assert talk.screen.prompt.text == expected
        assert talk.shown == []
        drawn = "\n".join(strip.text for strip in talk.app.screen._compositor.render_strips())
        assert visible(drawn) == drawn
        await talk.press("enter")
        await talk.idle()
        assert talk.shown[0] == ("user", expected)
        assert talk.engine.commands[0].messages[-1]["content"] == expected
        await talk.press("up")
        assert talk.screen.prompt.text == expected


async def test_a_paste_goes_to_the_input_from_anywhere_in_the_chat(setup: Setup) -> None:
    async with setup.start() as talk:
        await talk.ask("one")
        await talk.press("f6")
        talk.app.post_message(events.Paste("two\nlines"))
        await talk.until(lambda: talk.screen.prompt.text == "two\nlines")
        assert talk.screen.prompt.area.has_focus


async def test_other_fields_get_no_control_characters(setup: Setup) -> None:
    async with setup.start() as talk:
        await talk.press("ctrl+g")
        assert isinstance(talk.app.screen, SearchScreen)
        talk.app.post_message(events.Paste("a\x1b[31mb\nnext"))
        await talk.until(lambda: talk.app.screen.query_one(Input).value)
        assert talk.app.screen.query_one(Input).value == "a␛[31mb"
