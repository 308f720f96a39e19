"""Tool calls as models really write them: other spellings, other markup, wrong types, values of any length.

Sources of the shapes are public reports about engines that run this model family (vLLM, SGLang, opencode, ds4, Zotero).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localrun.engine.chat.dsml_tags import MAX_TAG
from localrun.engine.chat.messages import ToolSchema
from localrun.engine.chat.parts import DSML, EOS, Special, Text, split_protocol_text
from localrun.engine.chat.stream_parser import (
    End,
    MessageBuilder,
    StreamEvent,
    StreamParser,
    TextDelta,
    parse_completion,
)
from tests.engine.chat.test_stream_parser import normal, split_at
from tests.engine.chat_strategies import any_speed

D = DSML


def tool(name: str, required: Sequence[str] = (), **properties: object) -> ToolSchema:
    return ToolSchema({"name": name, "parameters": {"type": "object", "properties": properties, "required": required}})


STRING, INTEGER, ANY = {"type": "string"}, {"type": "integer"}, {"description": "anything"}
TOOLS = (
    tool("read", ["path"], path=STRING, first=INTEGER),
    tool("write", ["path", "content"], path=STRING, content=STRING),
    tool("edit", ["path"], path=STRING, edits={"type": "array"}, dry={"type": ["boolean", "null"]}),
    tool("now"),
    tool("any", x=ANY, both={"anyOf": [STRING, INTEGER]}, kind={"enum": ["1", "2"]}),
    ToolSchema({"name": "free"}),
)


def block(*calls: str) -> str:
    return f"\n\n<{D}tool_calls>\n" + "\n".join(calls) + f"\n</{D}tool_calls>"


def invoke(tag: str, *parameters: str, close: str = f"</{D}invoke>") -> str:
    return f"<{D}invoke{tag}\n" + "\n".join(parameters) + f"\n{close}"


def parameter(tag: str, value: str, close: str = f"</{D}parameter>") -> str:
    return f"<{D}parameter{tag}{value}{close}"


def parse(text: str, *, tools: Sequence[ToolSchema] = TOOLS, reason: str = "eos") -> MessageBuilder:
    """Read at once, letter by letter, and with tokens beside the text: all the same."""
    answers = []
    for cuts in ((), range(1, len(text))):
        for as_text in (True, False):
            parser, events = StreamParser(markup_in_text=as_text, tools=tools), list[StreamEvent]()
            for part in split_at([Text(text)] if as_text else split_protocol_text(text), cuts):
                events += parser.feed(part)
            answers.append(normal([*events, *parser.finish(reason)]))
    assert all(events == answers[0] for events in answers)
    answer = MessageBuilder()
    answer.add(answers[0])
    for call in answer.calls:
        assert isinstance(json.loads(call.arguments), dict)
    return answer


def only_call(text: str, **options: Any) -> tuple[str, object, set[str], bool]:
    answer = parse(text, **options)
    (call,) = answer.calls
    assert answer.end is not None
    return call.name, json.loads(call.arguments), {*call.problems, *answer.end.problems}, call.usable


# --- attributes -----------------------------------------------------------------------------------------------------

TAGS = [
    ' name="k" string="true">',
    ' string="true" name="k">',
    " name='k' string='true'>",
    " name=k string=true>",
    " name=“k” string=“true”>",
    " name=‘k’ string=’true’>",
    ' name = "k" string = "true">',
    ' name="k"  string="true">',
    ' name="k"\n string="true"\n>',
    '\tname="k" string="True" >',
    ' name="k"string="true">',
    ' name="k" string="true" type="string">',
    ' id="7" name="k" lang="de" string="true">',
    ' name="k" type="string">',
    ' required name="k" string="true">',
]


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("value", ["007", "3-5", "true", "null", "1 > 2 < 3", '"quoted"', ""])
def test_a_declared_string_stays_a_string_however_its_tag_is_spelled(tag: str, value: str) -> None:
    text = block(invoke(' name="f">', parameter(tag, value)))
    problems = set() if tag == TAGS[0] else {"odd_tag"}
    assert only_call(text, tools=()) == ("f", {"k": value}, problems, True)


@pytest.mark.parametrize(
    "tag", [' name="f">', ' name = "f">', " name='f'>", " name=“f”>", ' id="1" name="f">', ' name="f" x>', "\nname=f>"]
)
def test_a_tool_is_named_however_its_tag_is_spelled(tag: str) -> None:
    text = block(invoke(tag, parameter(' name="k" string="true">', "v")))
    name, arguments, problems, usable = only_call(text, tools=())
    assert (name, arguments, usable) == ("f", {"k": "v"}, True)
    assert problems <= {"odd_tag"}


def test_official_names_may_hold_quotes_and_brackets() -> None:
    text = block(invoke(' name="f">', parameter(' name="a"b>" string="false">', "1")))
    assert only_call(text, tools=()) == ("f", {'a"b>': 1}, set(), True)


@pytest.mark.parametrize(
    "tag",
    [
        ' name="my tool">',
        ' name="record_item {\ncategory: Dexes\n\n',
        ' name="record_item {\nsays "hello" > world\n',
        f' name="{"x" * 2 * MAX_TAG}',
        ' name="">',
        ">",
        ' nam="f">',
    ],
)
def test_names_that_cannot_be_names_are_not_usable(tag: str) -> None:
    text = block(invoke(tag, parameter(' name="k" string="true">', "v")))
    answer = parse(text, tools=())
    assert [call.usable for call in answer.calls] == [False]
    assert answer.message().tool_calls == ()


def test_a_parameter_whose_name_has_no_end_makes_a_call_unusable() -> None:
    text = block(invoke(' name="f">', parameter(f' name="k {"x" * MAX_TAG}', "")))
    assert not only_call(text, tools=())[3]


def test_a_tool_named_by_another_attribute_is_found_if_it_is_on_offer() -> None:
    text = block(invoke(' tool="now">'))
    assert only_call(text) == ("now", {}, {"odd_tag", "guessed_name"}, True)
    assert only_call(text, tools=())[3] is False


def test_tags_that_close_themselves() -> None:
    assert only_call(block(f'<{D}invoke name="now"/>')) == ("now", {}, {"odd_tag"}, True)
    text = block(invoke(' name="write">', f'<{D}parameter name="path" string="true"/>'))
    assert only_call(text) == ("write", {"path": ""}, {"odd_tag"}, True)


# --- closing tags ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("close", ["param", "parameters", "paramter", "arg", " parameter", "｜parameter", "para"])
def test_a_misspelt_closer_ends_the_value(close: str) -> None:
    text = block(invoke(' name="f">', parameter(' name="k" string="true">', "v", f"</{D}{close}>")))
    name, arguments, problems, usable = only_call(text, tools=())
    assert (name, arguments, usable) == ("f", {"k": "v"}, True)
    assert problems <= {"misspelt_close"}


@pytest.mark.parametrize(
    "close", [f"</{D}invocation>", f"</{D}tool_call>", f"</{D}function>", "</invoke>", "</function>"]
)
def test_a_misspelt_closer_ends_the_call(close: str) -> None:
    text = block(invoke(' name="f">', parameter(' name="k" string="true">', "v"), close=close))
    assert only_call(text, tools=()) == ("f", {"k": "v"}, {"misspelt_close"}, True)


def test_closers_of_other_formats_end_a_call_that_the_model_ended() -> None:
    written = parameter(' name="command" string="true">', "export A=1")
    text = (
        f'\n\n<{D}tool_calls>\n<{D}invoke name="exec">\n{written}\n'
        "<task>Script</task>\n</actions>\n<order>1</order>\n</tool_call>\n</function>"
    )
    name, arguments, problems, usable = only_call(text, tools=())
    assert (name, arguments, usable) == ("exec", {"command": "export A=1"}, True)
    assert problems == {"misspelt_close", "stray_text", "missing_close"}


def test_plain_closers_end_a_value_only_where_the_model_ends_too() -> None:
    opened = f'\n\n<{D}tool_calls>\n<{D}invoke name="f">\n<{D}parameter name="k" string="true">'
    tail = "</parameter>\n</invoke>\n</tool_calls>"
    assert only_call(f"{opened}v{tail}", tools=())[1:] == ({"k": "v"}, {"misspelt_close", "missing_close"}, True)
    assert only_call(f"{opened}v{tail}", tools=(), reason="length")[3] is False
    rest = f"</{D}parameter>\n</{D}invoke>\n</{D}tool_calls>"
    assert only_call(f"{opened}v{tail}{rest}", tools=()) == ("f", {"k": f"v{tail}"}, set(), True)
    assert only_call(f"{opened}v{tail} more{rest}", tools=()) == ("f", {"k": f"v{tail} more"}, set(), True)


def test_a_block_inside_a_value_is_part_of_the_value() -> None:
    quoted = "see:" + block(invoke(' name="q">', parameter(' name="z" string="true">', "1"))) + "\nend"
    text = block(invoke(' name="f">', parameter(' name="k" string="true">', quoted)))
    assert only_call(text, tools=()) == ("f", {"k": quoted}, set(), True)
    mention = f"<{D}tool_calls> starts a block"
    text = block(invoke(' name="f">', parameter(' name="k" string="true">', mention)))
    assert only_call(text, tools=()) == ("f", {"k": mention}, set(), True)


# --- types ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "mode", "value", "expected", "problems"),
    [
        ("kind", "false", "12", "12", {"retyped"}),
        ("kind", "false", '"12"', "12", set()),
        ("kind", "", "12", "12", {"odd_tag"}),
        ("both", "false", "12", 12, set()),
        ("both", "true", "12", "12", set()),
        ("both", "", "12", 12, {"odd_tag"}),
        ("x", "", "12", 12, {"odd_tag", "guessed_type"}),
        ("x", "", "twelve", "twelve", {"odd_tag", "guessed_type"}),
        ("x", "true", "12", "12", set()),
        ("x", "false", "9" * 5000, None, set()),
    ],
)
def test_schemas_decide_types_where_they_say_something(
    name: str, mode: str, value: str, expected: object, problems: set[str]
) -> None:
    declared = f' string="{mode}"' if mode else ""
    text = block(invoke(' name="any">', parameter(f' name="{name}"{declared}>', value)))
    (call,) = parse_completion(text + EOS, tools=TOOLS).calls
    assert set(call.problems) == problems
    assert call.arguments == f'{{"{name}": {value if expected is None else json.dumps(expected)}}}'


@pytest.mark.parametrize(
    ("name", "mode", "value", "expected", "problems"),
    [
        ("edits", "true", "[1, 2]", [1, 2], {"retyped"}),
        ("edits", "true", "none", "none", set()),
        ("edits", "false", "[1, ", "[1, ", {"bad_json"}),
        ("dry", "false", "True", True, {"guessed_type"}),
        ("dry", "true", "null", None, {"retyped"}),
        ("dry", "false", "None", None, {"guessed_type"}),
        ("edits", "false", '{"a": 1}', {"a": 1}, set()),
    ],
)
def test_schemas_without_strings_win_over_declared_ones_if_the_value_fits(
    name: str, mode: str, value: str, expected: object, problems: set[str]
) -> None:
    text = block(invoke(' name="edit">', parameter(f' name="{name}" string="{mode}">', value)))
    assert only_call(text) == ("edit", {name: expected}, problems, True)


# --- wrappers and wrong tags ----------------------------------------------------------------------------------------

WRAPPED = '{"path": "/x", "first": 3}'


@pytest.mark.parametrize("mode", ["true", "false"])
def test_a_wrapper_that_the_schema_does_not_know_is_taken_off(mode: str) -> None:
    text = block(invoke(' name="read">', parameter(f' name="arguments" string="{mode}">', WRAPPED)))
    assert only_call(text) == ("read", {"path": "/x", "first": 3}, {"unwrapped"}, True)
    known = tool("read", arguments=ANY)
    for tools in ((), (known,), (ToolSchema({"name": "read"}),)):
        assert only_call(text, tools=tools)[1] != {"path": "/x", "first": 3}


@pytest.mark.parametrize("value", ['{"path": "/x", "more": 1}', '{"first": 3}', "[1]", "plain"])
def test_a_wrapper_around_what_the_schema_does_not_want_stays(value: str) -> None:
    text = block(invoke(' name="read">', parameter(' name="arguments" string="true">', value)))
    assert only_call(text) == ("read", {"arguments": value}, set(), True)


def test_bare_json_in_a_call_and_a_wrapper_in_it() -> None:
    assert only_call(block(invoke(' name="read">', WRAPPED)))[1:3] == ({"path": "/x", "first": 3}, {"not_parameters"})
    text = block(invoke(' name="read">', f'{{"arguments": {WRAPPED}}}'))
    assert only_call(text)[1:3] == ({"path": "/x", "first": 3}, {"not_parameters", "unwrapped"})


def test_a_call_in_a_parameters_tag_is_read_if_its_tool_is_on_offer() -> None:
    text = (
        f'<{D} parameter name="edit">\n <{D} parameter name="edits" string="false">[1]</{D} parameter>\n'
        f' <{D} parameter name="path" string="true">/a/b.rs</{D} parameter>\n</{D} invoke>\n'
    )
    name, arguments, problems, usable = only_call(text)
    assert (name, arguments, usable) == ("edit", {"edits": [1], "path": "/a/b.rs"}, True)
    assert problems >= {"misnamed_tag", "stray_tag"}
    assert parse(text, tools=()).calls == []


# --- other markup ---------------------------------------------------------------------------------------------------

FOREIGN = [
    f"<{mark}%s" for mark in ("|DSML|", "DSML｜", "｜DSML", "｜｜DSML｜｜", "||DSML||", "DSML", "", "｜ DSML ｜")
]


def foreign(mark: str, *, bare: bool = False, name: str = "read", path: str = "/x") -> str:
    def tag(text: str) -> str:
        return mark % text if not text.startswith("/") else "</" + (mark % text[1:])[1:]

    call = (
        tag(f'invoke name="{name}">')
        + "\n"
        + tag('parameter name="path" string="true">')
        + path
        + tag("/parameter>")
        + "\n"
        + tag("/invoke>")
    )
    return call if bare else tag("tool_calls>") + "\n" + call + "\n" + tag("/tool_calls>")


@pytest.mark.parametrize("mark", FOREIGN)
@pytest.mark.parametrize("bare", [False, True])
def test_markup_without_the_token_is_read_if_the_schemas_agree(mark: str, bare: bool) -> None:
    text = f"Let me see.\n\n{foreign(mark, bare=bare)}"
    answer = parse(text)
    problem = {"other_markup"} if "｜DSML｜" not in mark else {"odd_tag", "misspelt_close"}
    assert [(call.name, call.arguments, call.usable) for call in answer.calls] == [("read", '{"path": "/x"}', True)]
    assert answer.content == "Let me see."
    assert problem <= set(answer.problems)
    if "｜DSML｜" not in mark:
        unknown = parse(text, tools=())
        assert (unknown.content, unknown.calls) == (text, [])


DOUBTFUL = {
    "in a line": f"Write {foreign('<%s')} to read.",
    "in code": f"Like this:\n\n```xml\n{foreign('<|DSML|%s')}\n```\nThat is all.",
    "unknown tool": foreign("<%s", name="reed"),
    "call never closed": foreign("<%s", bare=True).removesuffix("</invoke>"),
    "unknown parameter": foreign("<%s").replace('"path"', '"file"'),
    "required one missing": '<invoke name="write">\n<parameter name="path" string="true">x</parameter>\n</invoke>',
    "a closer in the value": foreign("<%s", path="a</invoke>b"),
    "mention": "<tool_calls>\nis how a block begins, <invoke> a call.\nAnd so on.",
    "tag at the end": "so it begins: \n<tool_calls>",
    "half a tag": "and\n\n<｜DSM",
}


@pytest.mark.parametrize("case", DOUBTFUL)
def test_markup_without_the_token_stays_text_where_there_is_doubt(case: str) -> None:
    answer = parse(DOUBTFUL[case])
    assert (answer.content, answer.calls, answer.end) == (DOUBTFUL[case], [], End("eos"))


def test_a_block_that_lacks_only_its_end_is_read() -> None:
    answer = parse(foreign("<%s").removesuffix("</tool_calls>"))
    assert [(call.name, call.usable) for call in answer.calls] == [("read", True)]
    assert (answer.content, set(answer.problems)) == ("", {"other_markup", "missing_close"})


def test_a_real_call_behind_refused_markup_is_read() -> None:
    text = "<tool_calls>\nis text." + block(invoke(' name="now">'))
    answer = parse(text)
    assert (answer.content, [call.name for call in answer.calls]) == ("<tool_calls>\nis text.", ["now"])


def test_what_only_looks_alike_is_not_held_back() -> None:
    parser = StreamParser(tools=TOOLS)
    assert parser.feed_text("a\n<input") == [TextDelta("a\n<input")]
    parser.feed_text(">\n<invoke name=")
    assert parser.feed_text('"nothing">more') == [TextDelta('\n<invoke name="nothing">more')]


fragments = st.lists(
    st.sampled_from(
        [
            *(
                "\n",
                "\n\n",
                " ",
                "x",
                "```\n",
                "<",
                "</",
                ">",
                "｜",
                "|",
                "DSML",
                f"<{D}",
                f"</{D}",
                "name=",
                '"',
                "“",
                "/>",
            ),
            *(
                "<invoke",
                "</invoke>",
                "<tool_calls>",
                "</tool_calls>",
                '<parameter name="path">',
                "</parameter>",
                "</function>",
            ),
            *(
                f"<{D}invoke name=“read”>",
                f'<{D}invoke name="any">',
                f'<{D}parameter string="true" name="x">',
                f"</{D}param>",
            ),
            *(
                f"</{D}invoke>",
                f"<{D}tool_calls>",
                f"</{D}tool_calls>",
                f'<{D}parameter name="read">',
                "</think>",
                "12",
                "{}",
            ),
            *(
                foreign("<%s"),
                foreign("<|DSML|%s", bare=True),
                block(invoke(' name="now">')),
                '{"arguments": {"path": "a"}}',
            ),
        ]
    ),
    max_size=14,
).map("".join)


@any_speed
@given(fragments, st.booleans())
def test_anything_is_read_the_same_however_it_is_cut(text: str, known: bool) -> None:
    parse(text, tools=TOOLS if known else ())


# --- long values ----------------------------------------------------------------------------------------------------

LINES = "x = 1 > 2 < 3  # line\n"
LONG = {
    "odd tag": f'<{D}parameter name="k"  string="true">%s</{D}parameter>\n',
    "official tag": f'<{D}parameter name="k" string="true">%s</{D}parameter>\n',
    "no type": f'<{D}parameter name="k">%s</{D}parameter>\n',
    "JSON": f'<{D}parameter name="k" string="false">%s</{D}parameter>\n',
    "open quote": f'<{D}parameter name="k>%s</{D}parameter>\n',
    "no parameter": "%s",
    "wrapper": f'<{D}parameter name="arguments" string="true">%s</{D}parameter>\n',
}


def work(text: str, step: int) -> float:
    """Characters looked at, for each character of the text."""
    parser = StreamParser(tools=TOOLS)
    for part in split_protocol_text(text):
        if isinstance(part, Special):
            parser.feed_special(part.token)
        else:
            for i in range(0, len(part.text), step):
                parser.feed_text(part.text[i : i + step])
    parser.finish()
    return parser.n_scanned / len(text)


@pytest.mark.parametrize("case", LONG)
def test_long_values_cost_work_in_proportion_to_their_length(case: str) -> None:
    text = block(invoke(' name="read">', LONG[case] % (LINES * 2000)))
    assert work(text, 4) < 16
    assert work(text, len(text)) < 4


@pytest.mark.parametrize("text", [LINES * 2000, f"a <{D}x" * 2000, "\n<tool_calls> " * 2000, "<invoke name=" * 2000])
def test_any_text_costs_work_in_proportion_to_its_length(text: str) -> None:
    assert work(text, 4) < 16
    assert work(block() + text, 4) < 16
    assert work(foreign("<%s", path=text), 4) < 32


@pytest.mark.parametrize("case", ["odd tag", "official tag"])
def test_strings_arrive_while_they_are_written(case: str) -> None:
    before, _, _ = (block(invoke(' name="f">', LONG[case]))).partition("%s")
    parser = StreamParser()
    for part in split_protocol_text(before):
        parser.feed(part)
    for _ in range(50):
        assert len(parser.feed_text(LINES)) == 1


def test_a_string_without_declaration_arrives_while_it_is_written_if_the_schema_says_string() -> None:
    parser = StreamParser(tools=TOOLS)
    for part in split_protocol_text(f'\n\n<{D}tool_calls>\n<{D}invoke name="write">\n<{D}parameter name="content">'):
        parser.feed(part)
    assert len(parser.feed_text(LINES)) == 1
