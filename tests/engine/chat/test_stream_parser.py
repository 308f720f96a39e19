"""Streaming answers: whatever the pieces, the same events; whatever the markup, no leak and no loss."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localrun.engine.chat.format import ENCODERS
from localrun.engine.chat.messages import AssistantMessage, MessageToolCall, UserMessage
from localrun.engine.chat.parts import (
    ASSISTANT,
    DSML,
    EOS,
    PROTOCOL_TOKENS,
    THINK_END,
    THINK_START,
    USER,
    PromptPart,
    Special,
    Text,
    render,
    split_protocol_text,
)
from localrun.engine.chat.stream_parser import (
    End,
    MessageBuilder,
    StreamEvent,
    StreamParser,
    TextDelta,
    ThinkingDelta,
    ToolCallDelta,
    ToolCallEnd,
    ToolCallStart,
    parse_completion,
)
from tests.engine.chat_strategies import any_speed, assistant_messages, texts

V4 = ENCODERS["v4"]
OPEN, CLOSE = f"\n\n<{DSML}tool_calls>\n", f"</{DSML}tool_calls>"
PARAMETERS = (
    f'<{DSML}parameter name="city" string="true">Oslo</{DSML}parameter>\n'
    f'<{DSML}parameter name="days" string="false">[1, 2]</{DSML}parameter>\n'
)
CALL = f'<{DSML}invoke name="weather">\n{PARAMETERS}</{DSML}invoke>\n'
ARGUMENTS = '{"city": "Oslo", "days": [1, 2]}'


def run(parts: Iterable[PromptPart], start: str = "content", *, markup_in_text: bool = False) -> list[StreamEvent]:
    parser = StreamParser("thinking" if start == "thinking" else "content", markup_in_text=markup_in_text)
    events = [event for part in parts for event in parser.feed(part)]
    return normal(events + parser.finish())


def normal(events: Sequence[StreamEvent]) -> list[StreamEvent]:
    """Neighbouring deltas of a kind joined: where one ends is not part of the promise."""
    joined: list[StreamEvent] = []
    for event in events:
        match joined[-1] if joined else None, event:
            case (ThinkingDelta(a), ThinkingDelta(b)):
                joined[-1] = ThinkingDelta(a + b)
            case (TextDelta(a), TextDelta(b)):
                joined[-1] = TextDelta(a + b)
            case (ToolCallDelta(i, a), ToolCallDelta(j, b)) if i == j:
                joined[-1] = ToolCallDelta(i, a + b)
            case _:
                joined.append(event)
    return joined


def completion(message: AssistantMessage) -> tuple[list[PromptPart], str]:
    """What a model that writes `message` would put out after the prompt, and how the prompt says it begins."""
    prompt = V4.encode_prompt([UserMessage("q")])
    answered = V4.encode_prompt([UserMessage("q"), message])
    return list(answered.parts[len(prompt.parts) :]), str(prompt.completion)


def split_at(parts: Iterable[PromptPart], cuts: Sequence[int]) -> list[PromptPart]:
    """The same stream with its texts cut at these characters of the whole."""
    pieces: list[PromptPart] = []
    position = 0
    for part in parts:
        if isinstance(part, Special):
            pieces.append(part)
            continue
        edges = sorted({0, len(part.text), *(cut - position for cut in cuts if 0 < cut - position < len(part.text))})
        pieces += [Text(part.text[a:b]) for a, b in pairwise(edges)]
        position += len(part.text)
    return pieces


# --- well-formed answers ----------------------------------------------------------------------------------------------


def test_events_of_an_answer_with_thinking_text_and_a_call() -> None:
    parts = split_protocol_text(f"why{THINK_END}Let me see.{OPEN}{CALL}{CLOSE}{EOS}")
    assert run(parts, "thinking") == [
        ThinkingDelta("why"),
        TextDelta("Let me see."),
        ToolCallStart(0, "weather"),
        ToolCallDelta(0, ARGUMENTS),
        ToolCallEnd(0, "weather", ARGUMENTS, "call_0"),
        End("eos"),
    ]


def test_text_is_passed_on_at_once() -> None:
    parser = StreamParser()
    assert parser.feed_text("Hello") == [TextDelta("Hello")]
    assert parser.feed_text(" wor") == [TextDelta(" wor")]
    assert parser.feed_text("ld\n\n<") == [TextDelta("ld")]
    assert parser.feed_text("b>") == [TextDelta("\n\n<b>")]


def test_string_arguments_stream_while_they_are_written() -> None:
    parser = StreamParser()
    for part in split_protocol_text(f'{OPEN}<{DSML}invoke name="f">\n<{DSML}parameter name="text" string="true">'):
        events = parser.feed(part)
    assert events == [ToolCallDelta(0, '{"text": "')]
    assert parser.feed_text('say "hi"') == [ToolCallDelta(0, 'say \\"hi\\"')]


@any_speed
@given(assistant_messages)
def test_what_is_encoded_is_parsed_back(message: AssistantMessage) -> None:
    parts, start = completion(message)
    answer = MessageBuilder()
    answer.add(run(parts, start))
    assert answer.problems == ()
    parsed = answer.message()
    assert (parsed.reasoning, parsed.content) == (message.reasoning, message.content)
    assert [(c.name, json.loads(c.arguments), c.id) for c in parsed.tool_calls] == [
        (c.name, json.loads(c.arguments), c.id) for c in message.tool_calls
    ]
    # Once more there and back changes nothing: the model sees its own call as it wrote it.
    assert render(completion(parsed)[0]) == render(parts)


@any_speed
@given(assistant_messages, st.data())
def test_cutting_the_text_anywhere_gives_the_same_events(message: AssistantMessage, data: st.DataObject) -> None:
    parts, start = completion(message)
    length = sum(len(part.text) for part in parts if isinstance(part, Text))
    cuts = data.draw(st.lists(st.integers(0, length), max_size=8))
    assert run(split_at(parts, cuts), start) == run(parts, start)
    assert run(split_at(parts, range(length)), start) == run(parts, start)


garbled = st.lists(
    st.one_of(
        texts,
        st.sampled_from(
            [
                *(
                    OPEN,
                    CLOSE,
                    CALL,
                    PARAMETERS,
                    THINK_END,
                    THINK_START,
                    EOS,
                    f"<{DSML}",
                    f"</{DSML}",
                    "\n",
                    "\n\n",
                    "<",
                    " ",
                ),
                *(
                    f"</{DSML}invoke>",
                    f"</{DSML}parameter>",
                    f'<{DSML}invoke name="f">\n',
                    f"<{DSML}invoke>",
                    "tool_calls>",
                ),
                *(f'<{DSML}parameter name="k" string="true">', f'<{DSML}parameter name="k" string="false">'),
                *(f'<{DSML}parameter name="k">', "{}", '{"a": 1}', "NaN", f"<{DSML}function_calls>", f"<{DSML}inv"),
            ]
        ),
    ),
    max_size=10,
).map("".join)


@any_speed
@given(garbled, st.sampled_from(["thinking", "content"]), st.booleans(), st.data())
def test_cutting_garbled_output_anywhere_gives_the_same_events(
    text: str, start: str, as_text: bool, data: st.DataObject
) -> None:
    parts = [Text(text)] if as_text else split_protocol_text(text)
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=6))
    expected = run(parts, start, markup_in_text=as_text)
    assert run(split_at(parts, cuts), start, markup_in_text=as_text) == expected
    assert run(split_at(parts, range(len(text))), start, markup_in_text=as_text) == expected


@any_speed
@given(garbled, st.sampled_from(["thinking", "content"]))
def test_tokens_in_the_text_mean_the_same_as_tokens_beside_it(text: str, start: str) -> None:
    assert run([Text(text)], start, markup_in_text=True) == run(split_protocol_text(text), start)


@any_speed
@given(garbled, st.sampled_from(["thinking", "content"]))
def test_events_of_garbled_output_are_well_formed(text: str, start: str) -> None:
    """One end and nothing behind it; every call has a start, then deltas that add up to a JSON object, then its end."""
    events = run(split_protocol_text(text), start)
    assert [type(event) for event in events].count(End) == 1
    assert isinstance(events[-1], End)
    n_calls, open_call, arguments = 0, False, ""
    for event in events:
        match event:
            case ToolCallStart(index, _):
                assert (index, open_call) == (n_calls, False)
                open_call, arguments = True, ""
            case ToolCallDelta(index, delta):
                assert (index, open_call) == (n_calls, True)
                arguments += delta
            case ToolCallEnd():
                assert (event.index, open_call, event.arguments) == (n_calls, True, arguments)
                assert isinstance(json.loads(arguments), dict)
                n_calls, open_call = n_calls + 1, False
            case _:
                assert not open_call or isinstance(event, TextDelta | ThinkingDelta)
    assert not open_call


# --- lenient reading --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "thinking", "content", "problems"),
    [
        (f"why{OPEN}{CALL}{CLOSE}{THINK_END}ok{EOS}", "why", "ok", ()),
        (f"why{OPEN}{CALL}{CLOSE}\n{THINK_END}{EOS}", "why", "", ()),
        (f"why{OPEN}{CALL}{CLOSE} and more{THINK_END}ok{EOS}", "why and more", "ok", ()),
        (f"why{OPEN}{CALL}{THINK_END}ok{EOS}", "why", "ok", ("missing_close",)),
        (f"why{OPEN}{CALL}{CLOSE}{EOS}", "why", "", ("unclosed_think",)),
        (f"why{THINK_END}ok{OPEN}{CALL}{EOS}", "why", "ok", ("missing_close",)),
        (f"why{THINK_END}ok{OPEN}{CALL}{CLOSE}\n{EOS}", "why", "ok", ()),
        (f"why{THINK_END}ok{OPEN}{CALL}{CLOSE}\n\nmore{EOS}", "why", "ok\n\nmore", ()),
        (f"why{THINK_END}ok{OPEN}hm{CALL}{CLOSE}{EOS}", "why", "okhm", ("stray_text",)),
        (f"why{THINK_END}ok\n{CALL}{CLOSE}{EOS}", "why", "ok", ("stray_tag",)),
        (f"why{THINK_END}ok{CLOSE}{OPEN}{CALL}{CLOSE}{EOS}", "why", "ok", ("stray_tag",)),
        (f"why{THINK_END}ok{OPEN.replace('tool', 'function')}{CALL}{CLOSE}{EOS}", "why", "ok", ()),
        (f"{THINK_START}why{THINK_END}ok{OPEN}{CALL}{CLOSE}{EOS}", "why", "ok", ("stray_think",)),
        (f"why{THINK_END}o{THINK_END}k{OPEN}{CALL}{CLOSE}{EOS}", "why", "ok", ("stray_think",)),
        (f"why{THINK_END}ok{OPEN}{CALL}{CLOSE}{USER}next?", "why", "ok", ("role_token",)),
        (f"w{THINK_END}o{THINK_START}hy{THINK_END}k{OPEN}{CALL}{CLOSE}{EOS}", "why", "ok", ()),
    ],
)
def test_a_whole_call_survives_what_is_wrong_around_it(
    text: str, thinking: str, content: str, problems: tuple[str, ...]
) -> None:
    answer = MessageBuilder()
    answer.add(run(split_protocol_text(text), "thinking"))
    assert (answer.reasoning, answer.content) == (thinking, content)
    assert [(call.name, call.arguments, call.problems, call.usable) for call in answer.calls] == [
        ("weather", ARGUMENTS, (), True)
    ]
    assert answer.end == End("eos", problems)  # type: ignore[arg-type]


def value(text: str, mode: str = ' string="true"', close: str = f"</{DSML}parameter>") -> str:
    return f'<{DSML}parameter name="k"{mode}>{text}{close}\n'


JSON_MODE = ' string="false"'


@pytest.mark.parametrize(
    ("body", "arguments", "problems"),
    [
        (value("true", JSON_MODE), {"k": True}, ()),
        (value('\n {"a": [1.5e3, "\\u00fc"]} \n', JSON_MODE), {"k": {"a": [1500.0, "ü"]}}, ()),
        (value("True", JSON_MODE), {"k": "True"}, ("bad_json",)),
        (value('{"a": ', JSON_MODE), {"k": '{"a": '}, ("bad_json",)),
        (value("NaN", JSON_MODE), {"k": "NaN"}, ("bad_json",)),
        (value("", JSON_MODE), {"k": ""}, ("bad_json",)),
        (value("5", ""), {"k": 5}, ("odd_tag", "guessed_type")),
        (value("five", ""), {"k": "five"}, ("odd_tag", "guessed_type")),
        (value("5"), {"k": "5"}, ()),
        (value("a\n"), {"k": "a\n"}, ()),
        (value("<b>&amp;</b>\n</"), {"k": "<b>&amp;</b>\n</"}, ()),
        (value(f"{THINK_START}x{THINK_END}"), {"k": f"{THINK_START}x{THINK_END}"}, ()),
        (value(f"a {DSML} <{DSML}b"), {"k": f"a {DSML} <{DSML}b"}, ()),
        (value("a", close=""), {"k": "a"}, ("missing_close",)),
        (value("a", close="") + PARAMETERS, {"k": "a", "city": "Oslo", "days": [1, 2]}, ("missing_close",)),
        (value("a") + value("b"), {"k": "a"}, ("duplicate_parameter",)),
        (value("a") + "and then\n", {"k": "a"}, ("stray_text",)),
        ("", {}, ()),
        ('{"city": "Oslo", "n": 1}\n', {"city": "Oslo", "n": 1}, ("not_parameters",)),
        ("city = Oslo\n", {"arguments": "city = Oslo"}, ("not_parameters",)),
        ("[1]\n", {"arguments": "[1]"}, ("not_parameters",)),
        ('{"city": \n', {"arguments": '{"city":'}, ("not_parameters",)),
    ],
)
def test_arguments_are_read_leniently_and_flagged(
    body: str, arguments: dict[str, object], problems: tuple[str, ...]
) -> None:
    text = f'{OPEN}<{DSML}invoke name="f">\n{body}</{DSML}invoke>\n{CLOSE}{EOS}'
    answer = MessageBuilder()
    answer.add(run(split_protocol_text(text)))
    (call,) = answer.calls
    assert (json.loads(call.arguments), call.problems, call.usable) == (arguments, problems, True)
    assert answer.content == ""
    assert answer.message().tool_calls == (MessageToolCall("f", call.arguments, "call_0"),)


def test_a_block_that_breaks_off_anywhere_neither_leaks_nor_yields_a_call_to_run() -> None:
    whole = split_protocol_text(OPEN + CALL + CLOSE)
    n_characters = sum(len(part.text) for part in whole if isinstance(part, Text))
    stream = split_at(whole, range(n_characters))
    end_of_call = n_whole = None
    for n in range(4, len(stream)):  # behind "\n\n<" and the token: before that it may be text
        parser, answer = StreamParser(), MessageBuilder()
        answer.add(parser.feed_text("ok"))
        for part in stream[:n]:
            answer.add(parser.feed(part))
        answer.add(parser.finish("length"))
        assert answer.content == "ok"
        if any(call.usable for call in answer.calls):
            end_of_call = end_of_call or n
            assert [call.arguments for call in answer.calls] == [ARGUMENTS]
        else:
            n_whole = n
    # Usable from the last letter of the closing tag on, and never before.
    assert end_of_call is not None
    assert n_whole == end_of_call - 1
    assert render(stream[:end_of_call]).endswith(f"</{DSML}invoke")


def test_a_call_that_the_model_itself_ends_between_parameters_is_whole() -> None:
    text = f'{OPEN}<{DSML}invoke name="weather">\n{PARAMETERS}'
    for reason, usable in (("eos", True), ("length", False)):
        parser, answer = StreamParser(), MessageBuilder()
        for part in split_protocol_text(text):
            answer.add(parser.feed(part))
        answer.add(parser.finish(reason))
        assert [(call.arguments, call.usable) for call in answer.calls] == [(ARGUMENTS, usable)]


def test_two_calls_and_a_second_block_are_numbered_through() -> None:
    answer = parse_completion(f"a{OPEN}{CALL}{CALL}{CLOSE}b{OPEN}{CALL}{CLOSE}{EOS}")
    assert [(call.index, call.id) for call in answer.calls] == [(0, "call_0"), (1, "call_1"), (2, "call_2")]
    assert answer.content == "ab"


def test_missing_end_of_a_call_before_the_next_one() -> None:
    answer = parse_completion(f"{OPEN}{CALL.replace(f'</{DSML}invoke>', '')}{CALL}{CLOSE}{EOS}")
    assert [(call.arguments, call.problems) for call in answer.calls] == [
        (ARGUMENTS, ("missing_close",)),
        (ARGUMENTS, ()),
    ]


def test_a_call_without_a_name_or_with_an_impossible_one_is_no_part_of_the_message() -> None:
    text = f"{OPEN}<{DSML}invoke>\n{PARAMETERS}</{DSML}invoke>\n{CALL.replace('weather', 'two words')}{CLOSE}{EOS}"
    answer = parse_completion(text)
    assert [(call.name, call.usable) for call in answer.calls] == [("", False), ("two words", False)]
    assert answer.message().tool_calls == ()


def test_thinking_that_never_ends_can_be_continued() -> None:
    parser, answer = StreamParser("thinking"), MessageBuilder()
    answer.add([*parser.feed_text("still thin"), *parser.finish("length")])
    message = answer.message()
    assert message == AssistantMessage("", "still thin", thinking_open=True)
    prompt = V4.encode_prompt([UserMessage("q"), message], resume=True)
    assert prompt.render().endswith(f"{ASSISTANT}{THINK_START}still thin")


def test_markup_that_the_model_spells_out_is_text() -> None:
    text = f"{OPEN}{CALL}{CLOSE}{THINK_END}{EOS}"
    assert run([Text(text)], "thinking") == [ThinkingDelta(text), End("eos", ("unclosed_think",))]


def test_other_special_tokens_show_as_text() -> None:
    assert run([Text("a"), Special("<｜search▁begin｜>"), Special(PROTOCOL_TOKENS[-1])]) == [
        TextDelta(f"a<｜search▁begin｜>{PROTOCOL_TOKENS[-1]}"),
        End("eos"),
    ]


def test_nothing_follows_the_end() -> None:
    parser = StreamParser()
    assert parser.feed_special(EOS) == [End("eos")]
    assert parser.ended
    assert parser.feed_text("more") + parser.feed_special(THINK_END) + parser.finish("length") == []


def test_half_surrogates_from_a_broken_decoder_cannot_imitate_markup() -> None:
    assert run([Text("<\ud800tool_calls>")]) == [TextDelta("<\ufffdtool_calls>"), End("eos")]
