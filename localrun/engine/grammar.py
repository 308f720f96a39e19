"""Grammars over token ids: constrain answers to a JSON schema, and tool calls to their tools' schemas.

llguidance compiles them and computes, in well under a millisecond per token, which ids may come next. It gets the vocabulary's
bytes, so masks are exact for every tokenization of a text. Grammars refer to special tokens by id (`<[7]>`); text, including
parameter values, can't contain any.

Schema keywords that llguidance does not support (`propertyNames`, ...) are not enforced but logged. The text of a custom tool
follows its own grammar (`tool_inputs.py`). For tools, the order of parameters, required parameters and value types are
enforced; for strings, which are raw in DSML, only `enum` and `const`.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from localrun.engine.chat.parts import DSML, Special
from localrun.engine.facts import Json
from localrun.engine.tokenizer import Tokenizer
from localrun.engine.tool_inputs import InputMatcher, InputWords
from localrun.errors import UsageError

log = logging.getLogger(__name__)

_BLANKS = r"(\n[ ]{0,40})?|[ ]?"
"""Whitespace in JSON: without a limit a small model may write spaces forever."""


class Grammars:
    """Compiles grammars for one vocabulary. Thread-safe; llguidance gets the vocabulary on first use (0.3 s for 129,280
    tokens)."""

    def __init__(self, tokenizer: Tokenizer, n_vocab: int, ends: Sequence[int]) -> None:
        self._tokenizer, self._n_vocab, self._ends = tokenizer, n_vocab, list(ends)
        self._lock = threading.Lock()
        self._vocabulary: Any = None
        self._words: InputWords | None = None

    def of_schema(self, schema: Mapping[str, Json]) -> Any:
        """A matcher for JSON that follows `schema`. Raises UsageError: it can't be enforced."""
        return self._compile(f"%llguidance {{}}\nstart: {_json(schema)}\n")

    def of_calls(
        self,
        tools: Sequence[Mapping[str, Json]],
        *,
        required: bool,
        most: int | None = None,
        schema: Mapping[str, Json] | None = None,
    ) -> Any:
        """A matcher for tool calls.

        Args:
            tools: OpenAI `function` objects of the tools that may be called.
            required: the answer consists of calls only; otherwise of text, optionally followed by calls.
            most: maximum number of calls.
            schema: for answers without calls.

        Raises:
            UsageError: a schema that can't be enforced.
        """
        mark = f"<[{self._tokenizer.special(Special(DSML))}]>"
        matcher = self._compile(_calls_grammar(tools, mark, required=required, most=most, schema=schema))
        inputs = {str(tool["name"]): self._of_input(tool) for tool in tools if tool.get("grammar") is not None}
        return self._with_inputs(matcher, inputs) if inputs else matcher

    def _of_input(self, tool: Mapping[str, Json]) -> Any:
        """A matcher for a custom tool's text. Raises UsageError: llguidance does not understand the grammar."""
        from llguidance import LLMatcher, LLParserLimits

        grammar, where = tool["grammar"], f"tool {tool['name']!r:.60}"
        syntax, definition = grammar["syntax"], grammar["definition"]
        if syntax == "regex":
            definition = LLMatcher.grammar_from_regex(definition)
        limits = LLParserLimits(initial_lexer_fuel=5_000_000, max_grammar_size=1_000_000)
        matcher = LLMatcher(self._of_vocabulary(), definition, log_level=0, limits=limits)
        if matcher.is_error():
            reason = str(matcher.get_error()).splitlines()[0]
            raise UsageError(f"{where}: its {syntax} grammar can't be enforced: {reason[:300]}", hint="simplify it")
        return matcher

    def _with_inputs(self, matcher: Any, inputs: Mapping[str, Any]) -> Any:
        closing = self._tokenizer.encode("</")
        if len(closing) != 1:
            raise UsageError("custom tools with a grammar need a vocabulary that has the token `</`")
        with self._lock:
            if self._words is None:
                self._words = InputWords.of([self._tokenizer.piece(token) for token in range(self._n_vocab)])
        mark = self._tokenizer.special(Special(DSML))
        return InputMatcher(matcher, inputs, self._words, mark, closing[0], self._ends)

    def _compile(self, grammar: str) -> Any:
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(initial_lexer_fuel=5_000_000, max_grammar_size=1_000_000)
        matcher = LLMatcher(self._of_vocabulary(), grammar, log_level=0, limits=limits)
        if matcher.is_error() and "Unimplemented keys" in (reason := str(matcher.get_error()).splitlines()[0]):
            log.warning("not enforced: %s", reason[:300])
            lenient = grammar.replace('{"whitespace_pattern"', '{"lenient": true, "whitespace_pattern"')
            matcher = LLMatcher(self._of_vocabulary(), lenient, log_level=0, limits=limits)
        if matcher.is_error():
            reason = str(matcher.get_error()).splitlines()[0]
            raise UsageError(f"the schema can't be enforced: {reason[:300]}", hint="simplify it, or leave `strict` out")
        return matcher

    def _of_vocabulary(self) -> Any:
        from llguidance import LLTokenizer
        from llguidance._tokenizer import TokenizerWrapper

        with self._lock:
            if self._vocabulary is None:
                wrapped = TokenizerWrapper(_Vocabulary(self._tokenizer, self._n_vocab, self._ends))
                self._vocabulary = LLTokenizer(wrapped, eos_token=self._ends or None)
            return self._vocabulary


class _Vocabulary:
    """A vocabulary as llguidance asks for one."""

    def __init__(self, tokenizer: Tokenizer, n_vocab: int, ends: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = ends[0] if ends else 0
        self.bos_token_id = None
        self.tokens = [tokenizer.piece(token) for token in range(n_vocab)]
        self.special_token_ids = sorted(tokenizer.specials.values())

    def __call__(self, text: bytes | str) -> list[int]:
        return self._tokenizer.encode(text.decode("utf-8", "replace") if isinstance(text, bytes) else text)


def _json(schema: Mapping[str, Json]) -> str:
    return "%json " + json.dumps({**schema, "x-guidance": {"whitespace_pattern": _BLANKS}})


def _text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _calls_grammar(
    tools: Sequence[Mapping[str, Json]],
    mark: str,
    *,
    required: bool,
    most: int | None = None,
    schema: Mapping[str, Json] | None = None,
) -> str:
    """In llguidance's dialect of Lark. A value that is text ends with the `</` before the next special token."""
    count = "+" if most is None else f"{{1,{most}}}"
    opening = f"{_text(chr(10) * 2 + '<')} {mark} {_text('tool_calls>' + chr(10))}"
    calls = f'call{count} "</" {mark} "tool_calls>"'
    rules = ["%llguidance {}"]
    if required:
        rules.append(f"start: {opening} {calls}")
    elif schema is not None:
        rules += [f"start: answer | {opening} {calls}", f"answer: {_json(schema)}"]
    else:
        rules += [
            f"start: FREE | FREE_TO_CALL {mark} {_text('tool_calls>' + chr(10))} {calls}",
            r"FREE: /(.|\n)*/",
            r"FREE_TO_CALL: /(.|\n)*\n\n</",
        ]
    rules.append("call: " + " | ".join(f"call_{i}" for i in range(len(tools))))
    rules.append(r"VALUE: /(.|\n)*<\//")
    for i, tool in enumerate(tools):
        rules += _call_rules(i, tool, mark)
    return "\n".join(rules) + "\n"


def _call_rules(i: int, tool: Mapping[str, Json], mark: str) -> list[str]:
    schema = tool.get("parameters")
    schema = schema if isinstance(schema, Mapping) else {}
    properties = schema.get("properties")
    properties = properties if isinstance(properties, Mapping) else {}
    required = schema.get("required")
    required = required if isinstance(required, list) else []
    definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    rules, body = [], []
    for k, (name, value) in enumerate(properties.items()):
        value = value if isinstance(value, Mapping) else {}
        rules.append(f"p_{i}_{k}: {_parameter(str(name), {**definitions, **value}, mark)}")
        body.append(f"p_{i}_{k}" if name in required else f"[p_{i}_{k}]")
    head = _text(f'invoke name="{tool.get("name")}">\n')
    inner = " ".join(body) if body else _text(chr(10))
    if body and not any(name in required for name in properties):
        inner = f"({inner} | {_text(chr(10))})"  # without parameters there is an empty line
    rules.append(f'call_{i}: "<" {mark} {head} {inner} "</" {mark} {_text("invoke>" + chr(10))}')
    return rules


def _parameter(name: str, schema: Mapping[str, Json], mark: str) -> str:
    """One parameter and the following line break: any value that the schema allows, strings raw, everything else as JSON."""
    head = f'parameter name="{name}" string='
    tail = f"{mark} {_text('parameter>' + chr(10))}"
    ways = []
    strings, others = _split(schema)
    if strings is not None:
        value = "VALUE" if not strings else "(" + " | ".join(_text(text + "</") for text in strings) + ")"
        ways.append(f'"<" {mark} {_text(head + chr(34) + "true" + chr(34) + ">")} {value} {tail}')
    if others is not None:
        ways.append(f'"<" {mark} {_text(head + chr(34) + "false" + chr(34) + ">")} {_json(others)} "</" {tail}')
    return " | ".join(ways)


def _split(schema: Mapping[str, Json]) -> tuple[list[str] | None, Mapping[str, Json] | None]:
    """(the strings that are allowed, none named: any; None: no strings), (schema of everything else; None: only strings)."""
    if isinstance(values := schema.get("enum"), list) or "const" in schema:
        values = values if isinstance(values, list) else [schema["const"]]
        strings = [value for value in values if isinstance(value, str)]
        others = [value for value in values if not isinstance(value, str)]
        return strings or None, {"enum": others} if others else None
    kinds = schema.get("type")
    if kinds == "string":
        return [], None
    if isinstance(kinds, str):
        return None, schema
    if isinstance(kinds, list):
        rest = [kind for kind in kinds if kind != "string"]
        return ([] if "string" in kinds else None), ({**schema, "type": rest} if rest else None)
    for key in ("anyOf", "oneOf"):
        if isinstance(ways := schema.get(key), list):
            parts = [_split(way) for way in ways if isinstance(way, Mapping)]
            texts = [strings for strings, _ in parts if strings is not None]
            others = [other for _, other in parts if other is not None]
            anything = any(not strings for strings in texts)
            strings = [] if anything else [text for strings in texts for text in strings]
            definitions = {name: schema[name] for name in ("$defs", "definitions") if name in schema}
            return (strings if texts else None), ({**definitions, "anyOf": others} if others else None)
    if not kinds and "$ref" not in schema and "properties" not in schema:
        return [], schema  # anything: a string, or any JSON
    return None, schema
