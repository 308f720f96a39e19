"""Text to ids and back, with V4's real tokenizer.json; the `tokenizers` library is the reference."""

from __future__ import annotations

import re
from pathlib import Path

import llama_cpp as L
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from localrun.engine.chat.format import ENCODERS
from localrun.engine.chat.messages import messages_from_json
from localrun.engine.chat.parts import PROTOCOL_TOKENS, Special, Text
from localrun.engine.tokenizer import MAX_RUN, StreamDecoder, Tokenizer, _short_runs, _trie_regex
from localrun.errors import LocalrunError
from tests.engine.conftest import load_vocab
from tests.engine.models import TOKENIZER_FOLDER, write_vocab_only

REFERENCE = tokenizers.Tokenizer.from_file(str(TOKENIZER_FOLDER / "tokenizer.json"))
ADDED_IDS = {int(i) for i in REFERENCE.get_added_tokens_decoder()}

TEXTS = [
    "Hello, world! It's 2026 and I've got $1,234,567.89.",
    "The quick brown fox  jumps\tover\r\n\r\n  the lazy dog.   ",
    "def f(x: int) -> str:\n    return f'{x!r:>10}'  # 0xFF, 1e-9\n\n\nclass A:\n\tpass\n",
    '<div class="a">&nbsp;</div>{"k": [1, 22, 333, 4444, null]}\\n',
    "你好，世界！今天是2026年11月22日，天气很好。",
    "日本語のテキスト、カタカナとひらがな。ｶﾀｶﾅ",
    "한국어 텍스트와 кириллица, ελληνικά, עברית, العربية, हिन्दी, ไทย",
    "e\u0301 a\u0308\u0323 \u0301alone; ﬁ ½ ² Ⅷ ① ٣٤ ",
    "🤖👩‍👩‍👧‍👦🏳️‍🌈 ❤️ and 👍🏽 text",
    " " * 40 + "\n" * 9 + "\t" * 5 + "x" + " " * 3,
    "a" * 700 + " " + "1" * 50 + " " + "!?" * 60,
    "\u200b\u00a0\u3000\ufeff\x00\x07",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_ids_equal_the_reference_library(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.encode(text) == REFERENCE.encode(text, add_special_tokens=False).ids


# llama.cpp's Unicode tables are of another version than the library's, so letters, marks, numbers, punctuation and symbols are
# drawn from blocks that have not changed for long.
OLD_CHARACTERS = st.one_of(
    st.characters(min_codepoint=0x20, max_codepoint=0x17F, blacklist_categories=("Cc", "Cf", "Zs")),
    st.sampled_from(" \n\t\r  01239éñαωДжאب你好世界かなカナ한글ไทย।，。！？「」…—“”€£¥✓★→∑🤖🎉\u0301\u0308"),
)


@settings(max_examples=300, deadline=None)
@given(text=st.text(OLD_CHARACTERS, max_size=60))
def test_ids_of_any_text_equal_the_reference_library(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.encode(text) == REFERENCE.encode(text, add_special_tokens=False).ids


LOOK_ALIKES = st.lists(
    st.one_of(
        st.sampled_from(PROTOCOL_TOKENS),
        st.sampled_from(
            ["<｜place▁holder▁no▁17｜>", "<｜fim▁begin｜>", "<|EOT|>", "<｜▁pad▁｜>", "<", "｜", "think>", "｜DSML"]
        ),
        st.text("<>/｜▁ DSMLthinkUser", max_size=8),
        st.text(max_size=8),
    ),
    max_size=8,
).map("".join)


@settings(max_examples=300, deadline=None)
@given(text=LOOK_ALIKES)
def test_text_never_becomes_a_special_token_and_is_kept(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ADDED_IDS.isdisjoint(ids)
    assert tokenizer.decode(ids) == text.encode("utf-8", "replace").decode("utf-8")


@pytest.mark.parametrize("token_type", [1, 3, 4])  # normal, control, user-defined
def test_text_never_becomes_a_special_token_whatever_the_file_says_about_them(tmp_path: Path, token_type: int) -> None:
    model, vocab = load_vocab(write_vocab_only(tmp_path / "vocab.gguf", token_type=token_type))
    tokenizer = Tokenizer(vocab)
    for name in PROTOCOL_TOKENS:
        ids = tokenizer.encode(f"a {name}{name} b")
        assert ADDED_IDS.isdisjoint(ids), name
        assert tokenizer.decode(ids) == f"a {name}{name} b"
        assert tokenizer.special(Special(name)) == REFERENCE.token_to_id(name)
    L.llama_model_free(model)


MESSAGES = st.lists(
    st.tuples(st.text(OLD_CHARACTERS, max_size=30), st.text(OLD_CHARACTERS, max_size=30)), min_size=1, max_size=4
)


@settings(max_examples=60, deadline=None)
@given(turns=MESSAGES, system=st.text(OLD_CHARACTERS, max_size=20), mode=st.sampled_from(["off", "high", "max"]))
def test_whole_prompts_equal_the_reference_on_the_rendered_string(
    tokenizer: Tokenizer, turns: list[tuple[str, str]], system: str, mode: str
) -> None:
    conversation = [{"role": "system", "content": system}]
    for question, answer in turns:
        conversation += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    prompt = ENCODERS["v4"].encode_prompt(messages_from_json(conversation[:-1]), mode=mode)
    assert tokenizer.encode_parts(prompt.parts) == REFERENCE.encode(prompt.render(), add_special_tokens=False).ids


def test_tool_prompts_equal_the_reference_on_the_rendered_string(tokenizer: Tokenizer) -> None:
    tool = {
        "type": "function",
        "function": {"name": "weather", "description": "Wetter", "parameters": {"type": "object"}},
    }
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Köln", "days": 3}'}}
    conversation = [
        {"role": "system", "content": "Be brief.", "tools": [tool]},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "reasoning_content": "Look it up.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "rain"},
    ]
    prompt = ENCODERS["v4"].encode_prompt(messages_from_json(conversation), mode="high")
    ids = tokenizer.encode_parts(prompt.parts)
    assert ids == REFERENCE.encode(prompt.render(), add_special_tokens=False).ids
    assert REFERENCE.token_to_id("｜DSML｜") in ids


def test_neighbouring_texts_are_tokenized_as_one(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode_parts([Text("hel"), Text("lo wor"), Text("ld")]) == tokenizer.encode("hello world")


def test_unknown_special_token_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(LocalrunError, match="no token <nothing>"):
        tokenizer.encode_parts([Special("<nothing>")])


@pytest.mark.parametrize("unit", ["a", " ", "\n", "你", "!", "🤖", "é", "\u0301", "a1", "<｜User｜>"])
def test_endless_runs_do_not_overflow_the_library_stack(tokenizer: Tokenizer, unit: str) -> None:
    text = unit * (60_000 if len(unit) == 1 else 3_000)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=200, deadline=None)
@given(
    pieces=st.lists(
        st.tuples(st.sampled_from(["a", " ", "\n", "你", "b,", "x1", "。"]), st.integers(1, 3 * MAX_RUN)), max_size=5
    )
)
def test_cut_runs_are_short_and_lose_nothing(pieces: list[tuple[str, int]]) -> None:
    text = "".join(unit * n for unit, n in pieces)
    segments = list(_short_runs(text))
    assert "".join(segments) == text
    assert not any(re.search(rf"\S{{{MAX_RUN + 1}}}|\s{{{MAX_RUN + 1}}}", segment) for segment in segments)


def test_long_run_is_cut_where_the_reference_cuts_anyway(tokenizer: Tokenizer) -> None:
    text = "word,42;" * 2000
    assert tokenizer.encode(text) == REFERENCE.encode(text, add_special_tokens=False).ids


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40))
def test_stream_gives_whole_characters_in_order(tokenizer: Tokenizer, text: str) -> None:
    decoder = StreamDecoder(tokenizer)
    ids = tokenizer.encode(text)
    pieces = [piece for token in ids for piece in decoder.push(token)] + decoder.flush()
    assert "".join(piece.text for piece in pieces) == text.encode("utf-8", "replace").decode()
    assert not any(piece.special for piece in pieces)


def test_stream_keeps_a_special_token_apart_from_an_unfinished_character(tokenizer: Tokenizer) -> None:
    robot = tokenizer.encode("🤖")
    assert len(robot) > 1, "a character of several tokens is needed here"
    decoder = StreamDecoder(tokenizer)
    assert decoder.push(robot[0]) == []
    end = tokenizer.special(Special("</think>"))
    pieces = decoder.push(end)
    assert [(piece.text, piece.special) for piece in pieces] == [("\ufffd", False), ("</think>", True)]
    assert decoder.flush() == []


@settings(max_examples=100)
@given(
    words=st.lists(st.text("ab<｜", min_size=1, max_size=4), min_size=1, max_size=6), text=st.text("ab<｜", max_size=12)
)
def test_trie_regex_finds_what_plain_search_finds(words: list[str], text: str) -> None:
    match = re.compile(_trie_regex(words)).search(text)
    starts = [text.find(word) for word in words if word in text]
    assert (match.start() if match else None) == (min(starts) if starts else None)
