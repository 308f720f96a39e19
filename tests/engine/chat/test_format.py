"""The prompt format, against the official description and, as an independent oracle, against llama.cpp's templates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import Environment, Template

from localrun.engine.chat.format import ENCODERS, Boundary, ChatEncoder, Prompt, encoder_for
from localrun.engine.chat.messages import (
    AssistantMessage,
    DeveloperMessage,
    LatestReminderMessage,
    Message,
    MessageError,
    MessageToolCall,
    SystemMessage,
    Task,
    ToolMessage,
    ToolSchema,
    UserMessage,
    messages_from_json,
    tool_to_json,
)
from localrun.engine.chat.parts import (
    ASSISTANT,
    BOS,
    EOS,
    THINK_END,
    THINK_START,
    USER,
    PromptPart,
    Special,
    Text,
    merge_texts,
)
from localrun.errors import UnsupportedModelError, UsageError
from tests.engine.chat.message_json import message_to_json
from tests.engine.chat_strategies import (
    any_speed,
    conversations,
    json_values,
    plain_text,
    texts,
    tool_calls,
    tool_schemas,
)

V4, V4_0731 = ENCODERS["v4"], ENCODERS["v4-0731"]
TOOL = ToolSchema({"name": "f", "description": "ü", "parameters": {"type": "object"}})
B, U, A, T, E, R = BOS, USER, ASSISTANT, THINK_START, EOS, THINK_END


def render(*messages: Message, encoder: ChatEncoder = V4, mode: str | None = None, **options: Any) -> str:
    return encoder.encode_prompt(messages, mode=mode, **options).render()


# --- the official description -----------------------------------------------------------------------------------------


def test_one_question_in_each_mode() -> None:
    conversation = (SystemMessage("Sys"), UserMessage("Hi"))
    assert render(*conversation, mode="off") == f"{B}Sys{U}Hi{A}{R}"
    assert render(*conversation, mode="high") == f"{B}Sys{U}Hi{A}{T}"
    assert render(*conversation) == render(*conversation, mode="high")
    longest = render(*conversation, mode="max")
    assert longest.startswith(f"{B}Reasoning Effort: Absolute maximum with no shortcuts permitted.\nYou MUST be")
    assert longest.endswith(f"is left unchecked.\n\nSys{U}Hi{A}{T}")


def test_efforts_of_the_second_generation_lie_one_step_higher() -> None:
    low, high, longest = (render(UserMessage("Hi"), encoder=V4_0731, mode=mode) for mode in ("low", "high", "max"))
    assert low == render(UserMessage("Hi"), encoder=V4_0731) == f"{B}{U}Hi{A}{T}"
    assert high == render(UserMessage("Hi"), encoder=V4, mode="max")
    assert longest.startswith(f"{B}Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.\n")
    assert longest.endswith(f"no error remains undiscovered.\n\n{U}Hi{A}{T}")


def test_mode_names() -> None:
    assert V4.modes == ("off", "high", "max")
    assert V4_0731.modes == ("off", "low", "high", "max")
    assert V4.normal_mode("xhigh") == V4_0731.normal_mode("xhigh") == "max"
    assert render(UserMessage("Hi"), mode="xhigh") == render(UserMessage("Hi"), mode="max")
    with pytest.raises(UsageError, match="'low': this model supports off, high, max"):
        render(UserMessage("Hi"), mode="low")


def test_longest_thinking_asks_for_a_long_context() -> None:
    assert "393,216" in str(V4.max_context_advice("max", 393_215))
    assert V4.max_context_advice("max", 393_216) is None
    assert V4.max_context_advice("high", 4096) is None
    assert V4.max_context_advice("off", 4096) is None
    assert V4_0731.max_context_advice("high", 4096) is not None
    assert V4_0731.max_context_advice("low", 4096) is None


def test_reasoning_before_the_last_question_is_dropped() -> None:
    conversation = (
        UserMessage("1"),
        AssistantMessage("one", "r1"),
        UserMessage("2"),
        AssistantMessage("two", "r2"),
    )
    assert render(*conversation) == f"{B}{U}1{A}{R}one{E}{U}2{A}{T}r2{R}two{E}"
    assert render(*conversation, drop_thinking=False) == f"{B}{U}1{A}{T}r1{R}one{E}{U}2{A}{T}r2{R}two{E}"
    assert render(*conversation, mode="off") == f"{B}{U}1{A}{R}one{E}{U}2{A}{R}two{E}"


@pytest.mark.parametrize("where", ["system", "developer", "argument"])
def test_nothing_is_dropped_if_any_message_offers_tools(where: str) -> None:
    head = [SystemMessage("S", (TOOL,) if where == "system" else ())]
    question = DeveloperMessage("2", (TOOL,)) if where == "developer" else UserMessage("2")
    prompt = V4.encode_prompt(
        [*head, DeveloperMessage("old"), AssistantMessage("one", "r1"), question],
        tools=(TOOL,) if where == "argument" else (),
    )
    assert f"{U}old{A}{T}r1{R}one{E}{U}2" in prompt.render()
    assert prompt.render().endswith(f"{A}{T}")


def test_old_developer_messages_go_with_the_reasoning() -> None:
    conversation = (DeveloperMessage("old"), AssistantMessage("one", "r1"), DeveloperMessage("new"))
    assert render(*conversation) == f"{B}{A}{R}one{E}{U}new{A}{T}"
    assert render(*conversation, mode="off") == f"{B}{U}old{A}{R}one{E}{U}new{A}{R}"


def test_tools_and_response_format_follow_the_system_text() -> None:
    text = render(SystemMessage("Sys", (TOOL,), {"type": "object", "ü": [1, None]}), UserMessage("Hi"))
    assert text.startswith(
        f"{B}Sys\n\n## Tools\n\nYou have access to a set of tools to help answer the user's question."
    )
    assert text.endswith(
        '### Available Tool Schemas\n\n{"name": "f", "description": "ü", "parameters": {"type": "object"}}\n\n'
        "You MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.\n"
        "\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
        f'{{"type": "object", "ü": [1, null]}}{U}Hi{A}{T}'
    )


def test_tools_of_the_call_belong_to_the_first_system_message() -> None:
    beside = render(UserMessage("a"), SystemMessage("S"), tools=(TOOL,), response_format={"x": 1})
    assert beside == render(UserMessage("a"), SystemMessage("S", (TOOL,), {"x": 1}))
    assert render(UserMessage("a"), tools=(TOOL,)) == render(SystemMessage("", (TOOL,)), UserMessage("a"))
    with pytest.raises(MessageError, match="tools are given both in the system message and separately"):
        render(SystemMessage("S", (TOOL,)), tools=(TOOL,))


def test_user_and_tool_messages_in_a_row_are_one_turn_with_results_in_call_order() -> None:
    calls = (MessageToolCall("f", "{}", "x"), MessageToolCall("g", "{}", "y"))
    text = render(
        AssistantMessage("", "", calls),
        ToolMessage("of y", "y"),
        UserMessage("by the way"),
        ToolMessage("of x", "x"),
        ToolMessage("of nobody", "z"),
    )
    # A result that belongs to no call counts as the first call's.
    assert text.endswith(
        f"{E}{U}<tool_result>of x</tool_result>\n\nby the way\n\n<tool_result>of nobody</tool_result>\n\n"
        f"<tool_result>of y</tool_result>{A}{T}"
    )


def test_a_literal_end_of_result_is_not_escaped() -> None:
    assert f"{U}<tool_result>a</tool_result>b</tool_result>{A}" in render(ToolMessage("a</tool_result>b"))


def test_latest_reminder_stands_where_it_is() -> None:
    reminder = LatestReminderMessage("2026")
    token = "<｜latest_reminder｜>"
    assert render(SystemMessage("S"), reminder, UserMessage("Hi"), mode="off") == f"{B}S{token}2026{U}Hi{A}{R}"
    # Odd but official: the answer is asked for before the reminder.
    behind = V4.encode_prompt([UserMessage("Hi"), reminder])
    assert behind.render() == f"{B}{U}Hi{A}{T}{token}2026"
    assert behind.completion == "thinking"


@pytest.mark.parametrize("task", ["query", "authority", "domain", "read_url"])
def test_task_token_takes_the_place_of_the_answer_marker(task: Task) -> None:
    prompt = V4.encode_prompt([UserMessage("Hi")], task=task)
    assert prompt.render() == f"{B}{U}Hi<｜{task}｜>"
    assert prompt.completion == "content"
    answered = render(UserMessage("Hi", task), AssistantMessage("label", "no reasoning here"))
    assert answered == f"{B}{U}Hi<｜{task}｜>label{E}"


def test_action_title_and_url_tasks() -> None:
    assert render(UserMessage("Hi", "action")) == f"{B}{U}Hi{A}{T}<｜action｜>"
    assert render(UserMessage("Hi", "action"), AssistantMessage("Search"), mode="off") == (
        f"{B}{U}Hi{A}{R}<｜action｜>Search{E}"
    )
    title = V4.encode_prompt([UserMessage("Hi"), AssistantMessage("Hello")], mode="off", task="title")
    assert title.render() == f"{B}{U}Hi{A}{R}Hello{E}<｜title｜>"
    assert title.completion == "content"
    url = render(UserMessage("Hi", "read_url", "http://x/<think>"))
    assert url == f"{B}{U}Hi<｜extracted_url｜>http://x/<think><｜read_url｜>"
    with pytest.raises(MessageError, match="task title: there is no"):
        render(SystemMessage("S"), task="title")
    with pytest.raises(MessageError, match="task query on a user message that continues a user turn"):
        render(UserMessage("a"), UserMessage("b", "query"))


def test_wo_eos_leaves_out_the_end_token() -> None:
    conversation = (UserMessage("Hi"), AssistantMessage("partial", "r", wo_eos=True))
    assert render(*conversation) == f"{B}{U}Hi{A}{T}r{R}partial"
    assert V4.encode_prompt(conversation).completion == "content"


def test_a_cut_off_answer_is_continued_where_it_broke_off() -> None:
    in_text: list[Message] = [UserMessage("Hi"), AssistantMessage("par", "why")]
    prompt = V4.encode_prompt(in_text, resume=True)
    assert (prompt.render(), prompt.completion) == (f"{B}{U}Hi{A}{T}why{R}par", "content")
    in_thoughts: list[Message] = [UserMessage("Hi"), AssistantMessage("", "wh", thinking_open=True)]
    prompt = V4.encode_prompt(in_thoughts, resume=True)
    assert (prompt.render(), prompt.completion) == (f"{B}{U}Hi{A}{T}wh", "thinking")
    prompt = V4.encode_prompt(in_thoughts, mode="off", resume=True)
    assert (prompt.render(), prompt.completion) == (f"{B}{U}Hi{A}{R}", "content")
    # Once something follows, it is an answer like any other.
    assert render(*in_thoughts, UserMessage("go on"), drop_thinking=False) == (f"{B}{U}Hi{A}{T}wh{R}{E}{U}go on{A}{T}")
    calling: list[Message] = [UserMessage("Hi"), AssistantMessage("", "", (MessageToolCall("f", "{}"),))]
    for wrong in (in_text[:1], calling):
        with pytest.raises(MessageError, match="can be continued"):
            V4.encode_prompt(wrong, resume=True)


def test_it_is_the_models_turn_only_after_a_question() -> None:
    question, answer = UserMessage("Hi"), AssistantMessage("Hello")
    assert V4.encode_prompt([question]).completion == "thinking"
    assert V4.encode_prompt([question], mode="off").completion == "content"
    over: list[list[Message]] = [[], [SystemMessage("S")], [question, answer], [question, answer, SystemMessage("S")]]
    for conversation in over:
        assert V4.encode_prompt(conversation).completion is None
    assert V4.encode_prompt([]).parts == (Special(BOS),)


def test_an_answer_always_has_its_marker() -> None:
    """Departures from the official encoder, which leaves `<｜Assistant｜>` out of these; the templates do not."""
    greeting, more, question = AssistantMessage("Hello", "g"), AssistantMessage("More", "m"), UserMessage("Hi")
    opened: list[list[Message]] = [[SystemMessage("S"), greeting, question], [question, greeting, more]]
    for conversation in opened:
        for mode in ("off", "high"):
            assert render(*conversation, mode=mode) == oracle(conversation, mode=mode)
    assert render(SystemMessage("S"), greeting, question) == f"{B}S{A}{R}Hello{E}{U}Hi{A}{T}"
    assert render(question, greeting, more, mode="off") == f"{B}{U}Hi{A}{R}Hello{E}{A}{R}More{E}"
    assert render(question, greeting, more) == f"{B}{U}Hi{A}{T}g{R}Hello{E}{A}{T}m{R}More{E}"
    assert render(question, SystemMessage("S")) == f"{B}{U}HiS{A}{T}"
    assert render(question, SystemMessage("S"), greeting) == f"{B}{U}HiS{A}{T}g{R}Hello{E}"
    assert render(UserMessage("Hi", "query"), SystemMessage("S"), greeting) == f"{B}{U}HiS<｜query｜>Hello{E}"


# --- text stays text --------------------------------------------------------------------------------------------------


@any_speed
@given(conversations(), st.sampled_from(["off", "high", "max"]), st.booleans())
def test_what_people_write_never_becomes_a_special_token(messages: list[Message], mode: str, drop: bool) -> None:
    """The same conversation with every mark of a token replaced in all strings has the same special tokens."""

    def defuse(value: Any) -> Any:
        text = json.dumps(value, ensure_ascii=False)
        return json.loads(text.replace("｜", "|").replace("think>", "thunk>"))

    harmless = messages_from_json(defuse([message_to_json(message) for message in messages]))
    specials, expected = (
        [
            part
            for part in V4.encode_prompt(conversation, mode=mode, drop_thinking=drop).parts
            if isinstance(part, Special)
        ]
        for conversation in (messages, harmless)
    )
    assert specials == expected


@any_speed
@given(conversations())
def test_no_two_texts_are_neighbours_and_none_is_empty(messages: list[Message]) -> None:
    parts = V4.encode_prompt(messages).parts
    assert list(parts) == merge_texts(parts)


# --- prefixes and boundaries ------------------------------------------------------------------------------------------


def is_prefix(head: Sequence[PromptPart], whole: Sequence[PromptPart]) -> bool:
    return tuple(whole[: len(head)]) == tuple(head)


def test_boundaries_lie_where_messages_end() -> None:
    conversation: list[Message] = [
        SystemMessage("S"),
        UserMessage("a"),
        UserMessage("b"),
        AssistantMessage("c", "r"),
        UserMessage("d"),
    ]
    prompt = V4.encode_prompt(conversation)
    # BOS S | <User> a\n\nb | <Assistant> </think> c EOS | <User> d | <Assistant> <think>
    assert prompt.boundaries == (
        Boundary(0, 2, True),
        Boundary(2, 4, True),
        Boundary(3, 8, True),
        Boundary(4, 10, True),
    )
    assert prompt.parts[10:] == (Special(ASSISTANT), Special(THINK_START))


def test_boundary_behind_reasoning_that_will_be_dropped_is_not_stable() -> None:
    prompt = V4.encode_prompt([UserMessage("a"), AssistantMessage("b", "r")])
    assert prompt.boundaries == (Boundary(0, 3, True), Boundary(1, 9, False))
    assert all(
        boundary.stable
        for boundary in V4.encode_prompt([UserMessage("a"), AssistantMessage("b", "r")], mode="off").boundaries
    )


def test_text_that_will_join_the_next_is_not_stable() -> None:
    """The developer message goes with the next question, and the system text then stands behind the user's."""
    prompt = V4.encode_prompt([UserMessage("a"), DeveloperMessage("d"), SystemMessage("S")])
    assert not any(boundary.stable for boundary in prompt.boundaries)
    prompt = V4.encode_prompt([UserMessage("a"), DeveloperMessage("d")])
    assert [boundary.stable for boundary in prompt.boundaries] == [True, False]
    # An answer without a marker of its own: its text will follow the reminder's, once its reasoning is gone.
    prompt = V4.encode_prompt([UserMessage("a", "query"), LatestReminderMessage("b"), AssistantMessage("c")])
    assert [boundary.stable for boundary in prompt.boundaries] == [True, False, False]


def test_boundary_of_an_inserted_system_part_is_numbered_minus_one() -> None:
    prompt = V4.encode_prompt([UserMessage("a")], tools=(TOOL,))
    assert [boundary.message for boundary in prompt.boundaries] == [-1, 0]
    assert prompt.parts[prompt.boundaries[0].part] == Special(USER)


@any_speed
@given(conversations(), st.sampled_from(["off", "high", "max"]), st.booleans(), texts, texts)
def test_stable_boundaries_are_prefixes_after_the_next_question(
    messages: list[Message], mode: str, drop: bool, answer: str, question: str
) -> None:
    def encode(conversation: list[Message]) -> Prompt:
        return V4.encode_prompt(conversation, mode=mode, drop_thinking=drop)

    now, later = encode(messages), encode([*messages, AssistantMessage(answer, "r"), UserMessage(question)])
    for boundary in now.boundaries:
        if boundary.stable:
            assert is_prefix(now.parts[: boundary.part], later.parts)


@any_speed
@given(conversations(), st.sampled_from(["off", "high"]))
def test_each_boundary_ends_the_encoding_of_the_messages_before_it(messages: list[Message], mode: str) -> None:
    whole = V4.encode_prompt(messages, mode=mode, drop_thinking=False)
    for boundary in whole.boundaries:
        head = V4.encode_prompt(messages[: boundary.message + 1], mode=mode, drop_thinking=False)
        assert is_prefix(whole.parts[: boundary.part], head.parts)


@any_speed
@given(conversations(), texts, texts, texts)
def test_prompt_is_a_prefix_of_the_answered_conversation(
    messages: list[Message], question: str, reasoning: str, content: str
) -> None:
    prompt = V4.encode_prompt([*messages, UserMessage(question)])
    answered = V4.encode_prompt([*messages, UserMessage(question), AssistantMessage(content, reasoning)])
    assert is_prefix(prompt.parts, answered.parts)


# --- llama.cpp's templates --------------------------------------------------------------------------------------------

TEMPLATES = Path(__file__).parents[2] / "fixtures" / "templates"


def load_template(name: str) -> Template:
    environment = Environment()
    # As in llama.cpp: plain JSON. Jinja's own filter sorts keys and escapes for HTML.
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    environment.filters["from_json"] = json.loads
    return environment.from_string((TEMPLATES / name).read_text(encoding="utf-8"))


ORACLES = {
    "v4": load_template("deepseek-ai-DeepSeek-V4.jinja"),
    "v4-0731": load_template("deepseek-ai-DeepSeek-V4-Flash-0731.jinja"),
}


def oracle(
    messages: Sequence[Message],
    *,
    encoder: str = "v4",
    mode: str = "high",
    tools: Sequence[ToolSchema] = (),
    response_format: Any = None,
    drop_thinking: bool = True,
) -> str:
    options: dict[str, Any] = {"reasoning_effort": mode} if mode != "off" else {}
    if response_format:
        options["response_format"] = response_format
    return ORACLES[encoder].render(
        bos_token=BOS,
        messages=[message_to_json(message) for message in messages],
        tools=[tool_to_json(tool) for tool in tools],
        thinking=mode != "off",
        drop_thinking=drop_thinking,
        add_generation_prompt=not messages or not isinstance(messages[-1], AssistantMessage),
        **options,
    )


@st.composite
def ordinary_conversations(draw: st.DrawFn) -> tuple[list[Message], dict[str, Any]]:
    """Conversations on which official encoder and template agree: a system text in front, then turns of user or tool
    messages and answers. What is left out stands below, case by case."""
    options: dict[str, Any] = {
        "tools": draw(tool_schemas()),
        "response_format": draw(st.one_of(st.none(), st.dictionaries(plain_text, json_values, min_size=1, max_size=2))),
        "drop_thinking": draw(st.booleans()),
    }
    messages: list[Message] = []
    if options["tools"] or options["response_format"] or draw(st.booleans()):
        messages.append(SystemMessage(draw(texts.filter(bool))))
    calls: tuple[MessageToolCall, ...] = ()
    for _ in range(draw(st.integers(1, 4))):
        if options["tools"]:
            messages += [ToolMessage(draw(texts), call.id) for call in calls]
        messages += draw(st.lists(st.builds(UserMessage, texts), min_size=0 if calls else 1, max_size=2))
        calls = draw(tool_calls()) if options["tools"] else ()
        messages.append(AssistantMessage(draw(texts), draw(texts), calls))
    if draw(st.booleans()):
        messages.append(UserMessage(draw(texts)))
    return messages, options


@any_speed
@given(
    ordinary_conversations(), st.sampled_from([("v4", m) for m in V4.modes] + [("v4-0731", m) for m in V4_0731.modes])
)
def test_prompt_equals_llama_cpps_template(
    case: tuple[list[Message], dict[str, Any]], generation: tuple[str, str]
) -> None:
    messages, options = case
    name, mode = generation
    ours = ENCODERS[name].encode_prompt(messages, mode=mode, **options).render()
    assert ours == oracle(messages, encoder=name, mode=mode, **options)


CALL = AssistantMessage("", "r", (MessageToolCall("f", "{}", "a"), MessageToolCall("f", "{}", "b")))
DIFFERENCES: dict[str, tuple[list[Message], dict[str, Any], str, str]] = {
    # Official: tools and format are appended to a system text with a blank line, even to an empty one.
    "tools without system text": (
        [UserMessage("Hi")],
        {"tools": (TOOL,)},
        f"{B}\n\n## Tools",
        f"{B}## Tools",
    ),
    "response format without system text": (
        [UserMessage("Hi")],
        {"response_format": {"a": 1}},
        f"{B}\n\n## Response Format",
        f"{B}## Response Format",
    ),
    # Official: a system message stands where it is; the template moves all to the front, with blank lines.
    "second system message": (
        [SystemMessage("S"), SystemMessage("T"), UserMessage("Hi")],
        {},
        f"{B}ST{U}Hi{A}{T}",
        f"{B}S\n\nT{U}Hi{A}{T}",
    ),
    "late system message": (
        [UserMessage("Hi"), AssistantMessage("a"), SystemMessage("S"), UserMessage("b")],
        {"mode": "off"},
        f"{B}{U}Hi{A}{R}a{E}S{U}b{A}{R}",
        f"{B}S{U}Hi{A}{R}a{E}{U}b{A}{R}",
    ),
    # Official: old developer messages are dropped with the reasoning; the template keeps them.
    "old developer message": (
        [DeveloperMessage("d"), AssistantMessage("a", "r"), UserMessage("b")],
        {},
        f"{B}{A}{R}a{E}{U}b{A}{T}",
        f"{B}{U}d{A}{R}a{E}{U}b{A}{T}",
    ),
    # Official: only user and tool messages merge; the template merges developer messages too.
    "developer message next to a user message": (
        [UserMessage("a"), DeveloperMessage("d")],
        {},
        f"{B}{U}a{U}d{A}{T}",
        f"{B}{U}a\n\nd{A}{T}",
    ),
    # The template does not know this role.
    "latest reminder": (
        [LatestReminderMessage("2026"), UserMessage("Hi")],
        {},
        f"{B}<｜latest_reminder｜>2026{U}Hi{A}{T}",
        f"{B}{U}Hi{A}{T}",
    ),
    # Official: results are put into the order of the calls; the template leaves them as they come.
    "tool results out of order": (
        [SystemMessage("S"), CALL, ToolMessage("of b", "b"), ToolMessage("of a", "a")],
        {"tools": (TOOL,)},
        f"{U}<tool_result>of a</tool_result>\n\n<tool_result>of b</tool_result>{A}{T}",
        f"{U}<tool_result>of b</tool_result>\n\n<tool_result>of a</tool_result>{A}{T}",
    ),
    # Official: reasoning is kept if tools are on offer; the template keeps it also if only results are there.
    "tool results without tools": (
        [UserMessage("q"), AssistantMessage("a", "r"), ToolMessage("x")],
        {},
        f"{U}q{A}{R}a{E}",
        f"{U}q{A}{T}r{R}a{E}",
    ),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_where_the_template_differs_the_official_encoder_is_followed(name: str) -> None:
    messages, options, official, template = DIFFERENCES[name]
    ours, theirs = V4.encode_prompt(messages, **options).render(), oracle(messages, **options)
    assert official in ours
    assert official not in theirs
    assert template in theirs
    assert template not in ours


def test_arguments_that_are_no_json_are_encoded_where_the_template_fails() -> None:
    messages: list[Message] = [UserMessage("q"), AssistantMessage("", "", (MessageToolCall("f", "not json"),))]
    assert 'name="arguments" string="true">not json</' in V4.encode_prompt(messages).render()
    with pytest.raises(json.JSONDecodeError):
        oracle(messages)


# --- choosing the encoder ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metadata", "name"),
    [
        ({}, "v4"),
        ({"general.name": "DeepSeek-V4-Flash"}, "v4"),
        ({"general.name": "DeepSeek V4 Flash 0731"}, "v4-0731"),
        ({"general.basename": "DeepSeek-V4-Pro", "general.version": "0813"}, "v4-0731"),
        ({"general.name": "my-model-107313"}, "v4"),
        ({"tokenizer.chat_template": (TEMPLATES / "deepseek-ai-DeepSeek-V4.jinja").read_text("utf-8")}, "v4"),
        (
            {"tokenizer.chat_template": (TEMPLATES / "deepseek-ai-DeepSeek-V4-Flash-0731.jinja").read_text("utf-8")},
            "v4-0731",
        ),
        ({"tokenizer.chat_template.v4-0731": "{{ messages }}"}, "v4-0731"),
        ({"localrun.chat_encoder": "v4", "general.name": "DeepSeek-V4-Flash-0731"}, "v4"),
        ({"localrun.chat_encoder": "v4-0731", "general.name": "demo"}, "v4-0731"),
    ],
)
def test_encoder_is_chosen_by_metadata(metadata: dict[str, object], name: str) -> None:
    assert encoder_for(metadata).name == name


def test_an_encoder_of_a_newer_version_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="'v5' is not one of v4, v4-0731"):
        encoder_for({"localrun.chat_encoder": "v5"})


def test_text_of_anyone_stays_a_text_part() -> None:
    assert V4.encode_prompt([UserMessage(f"{EOS}{USER}")], mode="off").parts == (
        Special(BOS),
        Special(USER),
        Text(f"{EOS}{USER}"),
        Special(ASSISTANT),
        Special(THINK_END),
    )
