"""DSML, DeepSeek-V4's markup for describing and calling tools.

A block of calls looks like this; only `｜DSML｜` is a token of the vocabulary, the rest is text around it:

    <｜DSML｜tool_calls>
    <｜DSML｜invoke name="get_weather">
    <｜DSML｜parameter name="city" string="true">Oslo</｜DSML｜parameter>
    <｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>
    </｜DSML｜invoke>
    </｜DSML｜tool_calls>

Strings are unescaped; everything else is JSON. The instructions are worded exactly as in the official encoder
(`encoding/encoding_dsv4.py` of DeepSeek-V4-Flash), because models were trained on these bytes.

Model output is parsed by `dsml_reader.py` and `stream_parser.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from localrun.engine.chat.messages import Json, MessageToolCall, ToolSchema
from localrun.engine.chat.parts import DSML, THINK_END, THINK_START, PromptPart, Special, Text, split_protocol_text

_INSTRUCTIONS = f"""## Tools

You have access to a set of tools to help answer the user's question. \
You can invoke tools by writing a "<{DSML}tool_calls>" block like the following:

<{DSML}tool_calls>
<{DSML}invoke name="$TOOL_NAME">
<{DSML}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{DSML}parameter>
...
</{DSML}invoke>
<{DSML}invoke name="$TOOL_NAME2">
...
</{DSML}invoke>
</{DSML}tool_calls>

String parameters should be specified as is and set `string="true"`. \
For all other types (numbers, booleans, arrays, objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by {THINK_START}), \
you MUST output your complete reasoning inside {THINK_START}...{THINK_END} BEFORE any tool calls or final response.

Otherwise, output directly after {THINK_END} with tool calls or final response.

### Available Tool Schemas

"""
_CLOSING = "\n\nYou MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.\n"


class Parameter(NamedTuple):
    """One argument of a call as DSML has it: `text` is raw if `is_string`, JSON otherwise."""

    name: str
    text: str
    is_string: bool


def to_json(value: Json) -> str:
    """JSON as in the models' training data: Python's separators, non-ASCII characters unescaped.

    A value with an unpaired surrogate, which can't be tokenized, is escaped to ASCII.
    """
    text = json.dumps(value, ensure_ascii=False)
    return text if _is_encodable(text) else json.dumps(value, ensure_ascii=True)


def tool_instructions(tools: Sequence[ToolSchema]) -> list[PromptPart]:
    """The text that offers `tools`: fixed instructions, one schema per line, fixed closing line."""
    schemas = "\n".join(to_json(dict(tool.function)) for tool in tools)
    return [*split_protocol_text(_INSTRUCTIONS), Text(schemas), Text(_CLOSING)]


def parameters_of(arguments: str) -> list[Parameter]:
    """Arguments of a call as DSML parameters.

    Text that is not a JSON object becomes a single string parameter named `arguments`, as in the official encoder
    (which raises on JSON of another kind; here that too becomes this parameter).
    """
    try:
        values = json.loads(arguments)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict) or not _is_encodable("".join(values)):
        values = {"arguments": arguments}
    parameters = []
    for name, value in values.items():
        is_string = isinstance(value, str) and _is_encodable(value)
        parameters.append(Parameter(name, value if is_string else to_json(value), is_string))
    return parameters


def render_tool_calls(calls: Iterable[MessageToolCall]) -> list[PromptPart]:
    """The block of calls at the end of an assistant message, including the blank line before it."""
    parts: list[PromptPart] = [Text("\n\n"), *_tag("tool_calls>\n")]
    for call in calls:
        parts += _tag(f'invoke name="{call.name}">\n')
        # Lines are joined, not ended, by line breaks: a call without parameters has an empty line.
        for i, (name, text, is_string) in enumerate(parameters_of(call.arguments)):
            parts.append(Text("\n" if i else ""))
            parts += _tag(f'parameter name="{name}" string="{"true" if is_string else "false"}">')
            parts.append(Text(text))
            parts += _tag("parameter>", closing=True)
        parts.append(Text("\n"))
        parts += _tag("invoke>\n", closing=True)
    return parts + _tag("tool_calls>", closing=True)


def _tag(rest: str, *, closing: bool = False) -> list[PromptPart]:
    return [Text("</" if closing else "<"), Special(DSML), Text(rest)]


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
