"""Parses streamed model output into typed events: thinking, text, tool calls, end.

The tokenizer provides decoded text and, for protocol tokens, their strings; only those are markup. If a model spells out
`</think>` in ordinary characters, that is text. For completions given as one string, `markup_in_text=True` finds the tokens in
it.

Chunking makes no difference to the events, except that one run of text may come as several deltas. Potential markup is held
back until it is decided.

Well-formed output is parsed like the official `parse_message_from_completion_text`. Everything else is parsed leniently and
flagged (`Problem`): tool calls before `</think>`, unterminated thinking, truncated blocks, unclosed tags, arguments that are
not JSON, misspelled tags (`dsml_tags.py`), and, where the tools on offer leave no doubt, calls without the format's token
(`other_markup.py`). Only a parameter's closing tag reliably ends its value; if that is missing, the next tag does. A whole
block inside a value is part of the value.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Literal

from localrun.engine.chat.dsml_reader import CallReader
from localrun.engine.chat.dsml_tags import (
    DSML_MARK,
    HELD,
    HELD_CHARACTERS,
    HELD_IN_VALUE,
    Tag,
)
from localrun.engine.chat.messages import ToolSchema, is_tool_name
from localrun.engine.chat.other_markup import (
    LONGEST_CLOSERS,
    PLAIN_BLOCK_ENDS,
    PLAIN_CALL_END,
    PLAIN_CALL_END_BEGUN,
    PLAIN_CLOSERS,
    PLAIN_CLOSERS_BEGUN,
    OtherMarkup,
    ends_with_call,
    official,
)
from localrun.engine.chat.parts import (
    ASSISTANT,
    BOS,
    DSML,
    EOS,
    LATEST_REMINDER,
    THINK_END,
    THINK_START,
    USER,
    PromptPart,
    Special,
    TokenFinder,
)
from localrun.engine.chat.pending_text import PendingText
from localrun.engine.chat.stream_events import (
    End,
    EventQueue,
    MessageBuilder,
    Problem,
    StreamEvent,
    TextDelta,
    ThinkingDelta,
    ToolCallDelta,
    ToolCallEnd,
    ToolCallStart,
)
from localrun.engine.chat.tool_types import ToolTypes

__all__ = [
    "End",
    "MessageBuilder",
    "Problem",
    "StreamEvent",
    "StreamParser",
    "TextDelta",
    "ThinkingDelta",
    "ToolCallDelta",
    "ToolCallEnd",
    "ToolCallStart",
    "parse_completion",
]

# A decoder never produces an unpaired surrogate; in the buffer one represents the DSML token.
_HALF_SURROGATE = re.compile("[\ud800-\udfff]")
_TURN_TOKENS = (BOS, USER, ASSISTANT, LATEST_REMINDER)
_LINE_BREAKS = re.compile(r"\n{1,2}\Z")
_FORGIVEN = frozenset({"odd_tag", "guessed_type", "retyped", "unwrapped"})
"""Problems that still leave no doubt about a call in other markup."""


class StreamParser:
    """Parses one answer. Feed it, then call `finish` unless it has `ended` by itself. Not thread-safe.

    Args:
        start: where the prompt left off (`Prompt.completion`).
        markup_in_text: find protocol tokens in the text, for text decoded together with them.
        id_prefix: ids of tool calls are `<prefix>_<index>`; results refer to them, so choose one per answer.
        tools: the tools on offer. Their schemas determine types, and whether markup without the format's token is accepted.
    """

    def __init__(
        self,
        start: Literal["thinking", "content"] = "content",
        *,
        markup_in_text: bool = False,
        id_prefix: str = "call",
        tools: Sequence[ToolSchema] = (),
    ) -> None:
        self.ended = False
        self._id_prefix = id_prefix
        self._lexer = TokenFinder() if markup_in_text else None
        self._tools = {tool.name: ToolTypes.of(tool) for tool in tools}
        self._other = OtherMarkup(self._tools) if tools else None
        self._state: Literal["thinking", "content", "block", "call", "value", "other"] = start
        self._around_block: Literal["thinking", "content"] = start
        self._pending = PendingText()
        self._events = EventQueue()
        self._problems: list[Problem] = []
        self._blank_after_block: str | None = None
        self._strays: list[str] = []  # text between two calls
        self._n_calls = 0
        self._call = CallReader(-1, "")
        self._misnamed = False  # the call was begun by a parameter's tag
        self._quote: Literal["no", "begun", "yes"] = "no"  # a whole block inside a value

    @property
    def n_scanned(self) -> int:
        """Characters scanned so far, a measure of work: linear in the answer's length."""
        return self._pending.n_scanned

    # --- input --------------------------------------------------------------------------------------------------

    def feed(self, part: PromptPart) -> list[StreamEvent]:
        """Text or a special token."""
        return self.feed_special(part.token) if isinstance(part, Special) else self.feed_text(part.text)

    def feed_text(self, text: str) -> list[StreamEvent]:
        """A piece of decoded text: whole characters."""
        if self._lexer is None:
            self._take_text(text)
        else:
            for part in self._lexer.feed(text):
                self._take(part)
        return self._events.take()

    def feed_special(self, token: str) -> list[StreamEvent]:
        """A token of the protocol, by its string; any other special token counts as text."""
        if self._lexer is not None:
            for part in self._lexer.flush():
                self._take(part)
        self._take(Special(token))
        return self._events.take()

    def finish(self, reason: str = "eos") -> list[StreamEvent]:
        """The output is over: the end token was sampled (`eos`), or generation stopped for another reason."""
        if self._lexer is not None:
            for part in self._lexer.flush():
                self._take(part)
        self._end(reason)
        return self._events.take()

    def _take(self, part: PromptPart) -> None:
        if not isinstance(part, Special):
            self._take_text(part.text)
        elif not self.ended:
            self._take_special(part.token)

    def _take_text(self, text: str) -> None:
        if self.ended:
            return
        self._pending.text += _HALF_SURROGATE.sub("\ufffd", text)
        self._run(final=False)

    def _take_special(self, token: str) -> None:
        if token == DSML:
            self._pending.text += DSML_MARK
            self._run(final=False)
        elif token == EOS:
            self._end("eos")
        elif token in _TURN_TOKENS:
            self._problems.append("role_token")
            self._end("eos")
        elif token in (THINK_START, THINK_END):
            if self._state != "value":
                self._run(final=True)
            if self._state == "value":
                self._pending.text += token
                self._run(final=False)
            else:
                self._think_marker(token)
        else:
            self._take_text(token)

    def _think_marker(self, token: str) -> None:
        self._blank_after_block = None
        if token == THINK_START:
            if self._state == "content":
                self._state = "thinking"
            else:
                self._problems.append("stray_think")
            return
        if self._state == "call":
            self._close_call("missing_close")
        if self._state == "block":
            self._problems.append("missing_close")
            self._state = self._around_block
        if self._state == "content":
            self._problems.append("stray_think")
        self._state = "content"

    def _end(self, reason: str) -> None:
        if self.ended:
            return
        closed = reason == "eos" and self._state == "value" and PLAIN_CLOSERS.fullmatch(self._pending.text) is not None
        if closed:
            # Only closing tags in ordinary text, then the model ended the answer.
            self._pending.text = ""
            self._leave_value()
            self._close_call("misspelt_close")
        self._run(final=True)
        if self._state == "value":
            self._leave_value()
            self._close_call("truncated")
        elif self._state == "call":
            # If the model ended the answer here, between two parameters, then it has given all of them.
            whole = reason == "eos" and self._call.between_parameters
            self._close_call("missing_close" if whole else "truncated")
        elif self._state == "block":
            self._problems.append("missing_close")
        if self._state == "block":
            self._state = self._around_block
        if self._state == "thinking":
            self._problems.append("unclosed_think")
        self.ended = True
        self._events.add(End(reason, tuple(dict.fromkeys(self._problems))))

    # --- the machine ----------------------------------------------------------------------------------------------

    def _run(self, *, final: bool) -> None:
        """Takes from the buffer all that is decided. `final`: no text follows that could belong to a tag in it."""
        steps = {
            "thinking": self._step_text,
            "content": self._step_text,
            "block": self._step_block,
            "call": self._step_call,
            "value": self._step_value,
            "other": self._step_other,
        }
        while True:
            while self._pending.at < len(self._pending.text) and steps[self._state](final):
                pass
            if not final or self._state != "other":
                break
            self._end_other()
        self._pending.drop_done()

    def _step_text(self, final: bool) -> bool:
        if self._other is not None and self._state == "content" and self._find_other():
            return True
        tag = self._pending.tag(final)
        if tag is None:
            self._emit_answer(self._decided(HELD, final))
            return False
        if tag.kind == "?":
            self._emit_answer(self._pending.literal(tag.end))
            self._pending.at = tag.end
        elif tag.kind == "cut":
            self._emit_answer(_LINE_BREAKS.sub("", self._pending.before(tag)))
            self._problems.append("truncated")
            self._pending.at = tag.end
            return False
        elif tag.kind in ("calls", "invoke") or self._is_misnamed(tag):
            self._emit_answer(_LINE_BREAKS.sub("", self._pending.before(tag)))
            self._blank_after_block = None
            self._around_block = "thinking" if self._state == "thinking" else "content"
            self._state = "block"
            if tag.kind == "calls":
                self._pending.at = tag.end
                if tag.odd:
                    self._problems.append("odd_tag")
            else:
                self._problems.append("stray_tag")  # a call without a block around it
                self._pending.at = tag.start
        else:
            self._emit_answer(self._pending.before(tag))
            self._problems.append("stray_tag")
            self._pending.at = tag.end
        return True

    def _find_other(self) -> bool:
        """Whether markup without the token begins before the next token; if so, it is collected from here on."""
        assert self._other is not None
        mark = self._pending.text.find(DSML_MARK, self._pending.at)
        end = len(self._pending.text) if mark < 0 else mark
        self._pending.n_scanned += end - self._pending.at
        while (opener := self._other.find(self._pending.text, self._pending.at, end)) is not None:
            self._emit_answer(self._pending.text[self._pending.at : opener.start()])
            self._pending.at = opener.end()
            if self._other.opens(opener):
                self._other.begin(opener)
                self._state = "other"
                return True
            self._emit_answer(opener[0])
        return False

    def _step_other(self, final: bool) -> bool:
        other = self._other
        assert other is not None
        text = self._pending.text[self._pending.at :]
        self._pending.n_scanned += len(text)
        n_taken = other.add(text)
        if n_taken is None:
            self._pending.at = len(self._pending.text)
            return False
        self._pending.at += len(text) if n_taken < 0 else n_taken
        if n_taken < 0 or not self._read_other(*other.collected()):
            self._refuse_other()
        return True

    def _end_other(self) -> None:
        """The output is over. A block of whole calls lacks nothing but its own end."""
        assert self._other is not None
        opener, rest = self._other.collected()
        if ends_with_call(rest) and self._read_other(opener, rest + "</tool_calls>"):
            self._problems.append("missing_close")
        else:
            self._refuse_other()

    def _refuse_other(self) -> None:
        """It was text. Only its opener is certain to hold nothing else."""
        assert self._other is not None
        opener, rest = self._other.collected()
        self._other.refuse()
        self._state = "content"
        self._emit_answer(opener)
        self._pending.put_back(rest)

    def _read_other(self, opener: str, rest: str) -> bool:
        """Whether this is a block of calls, or one call, that the tools' schemas agree with; if so, it is given out."""
        markup = official(opener.lstrip("\n") + rest)
        if not markup.startswith(f"<{DSML_MARK}invoke"):
            whole = markup
        else:
            whole = f"<{DSML_MARK}tool_calls>{markup}</{DSML_MARK}tool_calls>"
        inner, answer = StreamParser(), MessageBuilder()
        inner._tools = self._tools
        inner._pending.text = whole
        inner._run(final=True)
        answer.add(inner.finish())
        self._pending.n_scanned += inner.n_scanned
        problems = {*answer.problems} - _FORGIVEN
        if problems or answer.content.strip() or not answer.calls:
            return False
        for call in answer.calls:
            known = self._tools.get(call.name)
            if known is None or not known.accepts(json.loads(call.arguments)):
                return False
        self._state = "content"
        self._blank_after_block = ""
        for call in answer.calls:
            self._events.add(ToolCallStart(self._n_calls, call.name))
            self._events.add(ToolCallDelta(self._n_calls, call.arguments))
            self._events.add(
                ToolCallEnd(
                    self._n_calls, call.name, call.arguments, self._id(self._n_calls), (*call.problems, "other_markup")
                )
            )
            self._n_calls += 1
        return True

    def _step_block(self, final: bool) -> bool:
        tag = self._pending.tag(final)
        if tag is None:
            self._strays.append(self._decided(HELD, final))
            if final:
                self._flush_strays()
            return False
        self._strays.append(self._pending.before(tag))
        if tag.kind == "?":
            self._strays.append(self._pending.text[tag.start : tag.end].replace(DSML_MARK, DSML))
            self._pending.at = tag.end
            return True
        self._flush_strays()
        self._pending.at = tag.end
        if tag.kind == "invoke" or self._is_misnamed(tag):
            self._open_call(tag)
        elif tag.kind == "/calls":
            if tag.odd:
                self._problems.append("misspelt_close")
            self._state = self._around_block
            self._blank_after_block = ""
        else:
            self._problems.append("truncated" if tag.kind == "cut" else "stray_tag")
        return True

    def _open_call(self, tag: Tag) -> None:
        name, problems = tag.name, list[Problem]()
        if not name and (meant := next((hint for hint in tag.hints if hint in self._tools), None)) is not None:
            name = meant
            problems.append("guessed_name")
        self._call = CallReader(self._n_calls, name, self._tools.get(name))
        self._call.problems += problems
        self._misnamed = tag.kind == "parameter"
        if self._misnamed:
            self._call.problems.append("misnamed_tag")
        elif tag.odd:
            self._call.problems.append("odd_tag")
        if name and (tag.broken or not is_tool_name(name)):
            self._call.problems.append("bad_name")
        self._n_calls += 1
        self._events.add(ToolCallStart(self._call.index, name))
        self._state = "call"
        if tag.closed:
            self._close_call()

    def _is_misnamed(self, tag: Tag) -> bool:
        """A call in a parameter's tag: a tool's name in a place where only a call is valid."""
        return tag.kind == "parameter" and not tag.mode and tag.name in self._tools

    def _step_call(self, final: bool) -> bool:
        tag = self._pending.tag(final)
        text = self._decided(HELD, final, PLAIN_CALL_END_BEGUN) if tag is None else self._pending.before(tag)
        if self._call.has_parameters and (end := PLAIN_CALL_END.search(text)) is not None:
            self._call.body.append(text[: end.start()])
            self._pending.at += end.end() - (len(text) if tag is None else 0)
            self._close_call("misspelt_close")
            return True
        self._call.body.append(text)
        if tag is None:
            return False
        self._pending.at = tag.end
        if tag.kind == "parameter":
            self._open_value(tag)
        elif tag.kind == "/invoke" or (tag.kind == "/parameter" and self._misnamed):
            self._close_call("misspelt_close" if tag.odd else None)
        elif tag.kind in ("invoke", "/calls"):
            self._pending.at = tag.start
            self._close_call("missing_close")
        elif tag.kind == "?":
            self._call.body.append(self._pending.text[tag.start : tag.end].replace(DSML_MARK, DSML))
        else:
            self._call.problems.append("truncated" if tag.kind == "cut" else "stray_tag")
        return True

    def _open_value(self, tag: Tag) -> None:
        self._emit_arguments(self._call.open_value(tag))
        self._state = "value"
        self._quote = "no"
        if tag.closed:
            self._leave_value()

    def _step_value(self, final: bool) -> bool:
        tag = self._pending.tag(final)
        if tag is None:
            self._emit_value(self._decided(HELD_IN_VALUE, final))
            return False
        if self._quote == "begun" and (tag.kind != "invoke" or self._pending.before(tag).strip()):
            self._quote = "no"
        if tag.kind in ("calls", "?") or (self._quote != "no" and tag.kind != "cut"):
            quote = self._quote
            self._emit_value(self._pending.literal(tag.end))
            self._pending.at = tag.end
            if quote == "no":
                self._quote = "begun" if tag.kind == "calls" else "no"
            else:
                self._quote = "no" if tag.kind == "/calls" else "yes"  # a call follows the beginning of the block
        elif tag.kind == "/parameter":
            self._emit_value(self._pending.before(tag))
            self._pending.at = tag.end
            if tag.odd:
                self._call.problems.append("misspelt_close")
            self._leave_value()
        elif tag.kind == "cut":
            self._emit_value(self._pending.before(tag))
            self._pending.at = tag.end
        else:
            self._emit_value(self._pending.before(tag).removesuffix("\n"))
            self._pending.at = tag.start
            self._call.problems.append("missing_close")
            self._leave_value()
        return True

    def _decided(self, held: re.Pattern[str], final: bool, also: re.Pattern[str] | None = None) -> str:
        """Takes the text up to the next DSML token, except for an end that may belong to a tag."""
        ends = [(held, HELD_CHARACTERS)]
        if also is not None:
            ends.append((also, 16))
        if self._state == "value":
            ends += [(PLAIN_CLOSERS, LONGEST_CLOSERS), (PLAIN_CLOSERS_BEGUN, LONGEST_CLOSERS)]
        return self._pending.decided(
            ends,
            final=final,
            in_markup=self._state in ("block", "call"),
            other=self._other if self._state == "content" else None,
        )

    # --- output ---------------------------------------------------------------------------------------------------

    def _emit_answer(self, text: str) -> None:
        """Text of the answer or of the reasoning, unchanged."""
        if self._other is not None and self._state == "content":
            self._other.passed(text)
        self._emit_text(text)

    def _emit_text(self, text: str) -> None:
        if self._blank_after_block is not None:
            # Line breaks between a block and the end are markup, before more text they separate.
            self._blank_after_block += text
            if not self._blank_after_block.strip():
                return
            text, self._blank_after_block = self._blank_after_block, None
        if text:
            thinks = (self._around_block if self._state == "block" else self._state) == "thinking"
            self._events.add(ThinkingDelta(text) if thinks else TextDelta(text))

    def _flush_strays(self) -> None:
        """Text between two calls is text of the answer, closing tags without the token aside."""
        text, self._strays = "".join(self._strays), []
        kept = PLAIN_BLOCK_ENDS.sub("", text) if self._n_calls else text
        if kept != text:
            self._problems.append("misspelt_close")
        if kept := kept.strip():
            self._problems.append("stray_text")
            self._emit_text(kept)

    def _emit_value(self, text: str) -> None:
        if self._quote == "begun" and text.strip():
            self._quote = "no"
        self._emit_arguments(self._call.add_value(text))

    def _emit_arguments(self, text: str) -> None:
        if text:
            self._events.add(ToolCallDelta(self._call.index, text))

    def _leave_value(self) -> None:
        self._emit_arguments(self._call.close_value())
        self._state = "call"

    def _close_call(self, problem: Problem | None = None) -> None:
        call = self._call
        if problem is not None:
            call.problems.append(problem)
        self._emit_arguments(call.close())
        problems = tuple(dict.fromkeys(call.problems))
        self._events.add(ToolCallEnd(call.index, call.name, call.arguments, self._id(call.index), problems))
        self._state = "block"

    def _id(self, index: int) -> str:
        return f"{self._id_prefix}_{index}"


def parse_completion(
    text: str, start: Literal["thinking", "content"] = "content", *, tools: Sequence[ToolSchema] = ()
) -> MessageBuilder:
    """A whole completion as one string with its special tokens in it."""
    parser, answer = StreamParser(start, markup_in_text=True, tools=tools), MessageBuilder()
    answer.add(parser.feed_text(text))
    answer.add(parser.finish())
    return answer
