"""Random conversations for the tests of the chat format. Strings may look like anything, role tokens included."""

from __future__ import annotations

import json
import re

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from localrun.engine.chat.messages import (
    AssistantMessage,
    DeveloperMessage,
    LatestReminderMessage,
    Message,
    MessageToolCall,
    SystemMessage,
    ToolMessage,
    ToolSchema,
    UserMessage,
)
from localrun.engine.chat.parts import DSML, EOS, PROTOCOL_TOKENS

any_speed = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""For all tests with these strategies: a busy machine is no reason to fail."""

look_alikes = st.sampled_from(
    [
        *PROTOCOL_TOKENS,
        f"\n\n<{DSML}tool_calls>\n",
        f"</{DSML}parameter>",
        "</tool_result>",
        "\n\n<",
        "</",
        "\n",
        "｜",
        EOS[:5],
    ]
)
# A short alphabet of everything that matters here: quoting in JSON, markup, bytes of UTF-8, odd white space.
plain_text = st.text("ab 5{}[]\"'\\/<>=｜▁\n\r\t\x00\x7f\u2028üß漢é🙂\uffff", max_size=12)
texts = st.lists(st.one_of(plain_text, look_alikes), max_size=4).map("".join)
names = st.from_regex(r"[a-z_][a-z0-9_.-]{0,8}", fullmatch=True)
json_values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(10**20), 10**20),
        st.floats(allow_nan=False, allow_infinity=False),
        texts,
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=4,
)
# A quote ends a name where the tag or an attribute follows; the format can't carry names that look so.
_ENDS_A_NAME = re.compile(r'"(?:\s*/?>|\s+[A-Za-z_]|[A-Za-z_])')
argument_objects = st.dictionaries(
    texts.filter(lambda name: not _ENDS_A_NAME.search(name + '"')), json_values, max_size=4
)


@st.composite
def tool_schemas(draw: st.DrawFn, max_size: int = 3) -> tuple[ToolSchema, ...]:
    unique = draw(st.lists(names, max_size=max_size, unique=True))
    return tuple(
        ToolSchema({"name": name, "description": draw(texts), "parameters": {"type": "object", "x": draw(json_values)}})
        for name in unique
    )


@st.composite
def tool_calls(draw: st.DrawFn) -> tuple[MessageToolCall, ...]:
    n_calls = draw(st.integers(0, 3))
    return tuple(
        MessageToolCall(draw(names), json.dumps(draw(argument_objects), ensure_ascii=False), f"call_{i}")
        for i in range(n_calls)
    )


assistant_messages = st.builds(AssistantMessage, texts, texts, tool_calls())
user_messages = st.builds(UserMessage, texts)
tool_messages = st.builds(ToolMessage, texts, st.sampled_from(["call_0", "call_1", "call_2", "other", ""]))
response_formats = st.one_of(st.none(), st.dictionaries(plain_text, json_values, max_size=2))


@st.composite
def conversations(draw: st.DrawFn) -> list[Message]:
    """Any roles in any order."""
    return draw(
        st.lists(
            st.one_of(
                user_messages,
                user_messages,
                assistant_messages,
                assistant_messages,
                tool_messages,
                st.builds(SystemMessage, texts, tool_schemas(max_size=1), response_formats),
                st.builds(
                    DeveloperMessage, texts.map(lambda text: text + "."), tool_schemas(max_size=1), response_formats
                ),
                st.builds(LatestReminderMessage, texts),
            ),
            max_size=7,
        )
    )
