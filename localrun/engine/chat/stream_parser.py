"""What a model writes, piece by piece, becomes typed events: thinking, text, tool calls, end.

The tokenizer hands over decoded text and, for tokens of the protocol, their strings; only those are markup. A model that
spells out `</think>` in ordinary characters has written text, and shows as text. For completions that are one string,
`markup_in_text=True` looks for the tokens in it.

How the text is cut into pieces makes no difference to the events, except that one run of text may come as several
deltas. Nothing that may still turn out to be markup is let through before that is decided.

Well-formed output is read as the official `parse_message_from_completion_text` reads it. Everything else is read
leniently and flagged (`Problem`): tool calls before `</think>`, thinking that never ends, blocks that break off, tags
that never close, arguments that are not JSON. Only a parameter's closing tag ends its value for certain; where it is
missing, the next tag ends it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal

from localrun.engine.chat.dsml_reader import DSML_MARK, CallReader, bracket_before, next_tag
from localrun.engine.chat.parts import (
    ASSISTANT,
    BOS,
    DSML,
    EOS,
    LATEST_REMINDER,
    THINK_END,
    THINK_START,
    USER,
    Part,
    Special,
    TokenFinder,
)
from localrun.engine.chat.stream_events import (
    Answer,
    End,
    Problem,
    StreamEvent,
    TextDelta,
    ThinkingDelta,
    ToolCallDelta,
    ToolCallEnd,
    ToolCallStart,
)

__all__ = [
    "Answer",
    "End",
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

# Half a surrogate pair can't come out of a decoder; in the buffer one stands for the DSML token.
_HALF_SURROGATE = re.compile("[\ud800-\udfff]")
_TURN_TOKENS = (BOS, USER, ASSISTANT, LATEST_REMINDER)

# What may precede DSML in a tag, at the end of the buffer: line breaks that belong to the markup, and the bracket.
_HELD = re.compile(r"\n{0,2}(?:</?)?\Z")
_UNFINISHED_BRACKET = re.compile(r"</?\Z")
_HELD_IN_VALUE = re.compile(r"\n?(?:</?)?\Z")


class StreamParser:
    """Parses one answer. Feed it, then `finish` it unless it has `ended` by itself. Not thread-safe.

    Args:
        start: where the prompt left off (`Prompt.completion`).
        markup_in_text: find protocol tokens in the fed text, for text that was decoded with them in it.
        id_prefix: ids of tool calls are `<prefix>_<index>`; results refer to them, so choose one per answer.
    """

    def __init__(
        self,
        start: Literal["thinking", "content"] = "content",
        *,
        markup_in_text: bool = False,
        id_prefix: str = "call",
    ) -> None:
        self.ended = False
        self._id_prefix = id_prefix
        self._lexer = TokenFinder() if markup_in_text else None
        self._state: Literal["thinking", "content", "block", "call", "value"] = start
        self._around_block: Literal["thinking", "content"] = start
        self._buffer = ""
        self._out: list[StreamEvent] = []
        self._problems: list[Problem] = []
        self._blank_after_block: str | None = None
        self._n_calls = 0
        self._call = CallReader(-1, "")

    # --- input --------------------------------------------------------------------------------------------------

    def feed(self, part: Part) -> list[StreamEvent]:
        """Text or a special token."""
        return self.feed_special(part.token) if isinstance(part, Special) else self.feed_text(part.text)

    def feed_text(self, text: str) -> list[StreamEvent]:
        """A piece of decoded text: whole characters."""
        if self._lexer is None:
            self._take_text(text)
        else:
            for part in self._lexer.feed(text):
                self._take(part)
        return self._give()

    def feed_special(self, token: str) -> list[StreamEvent]:
        """A token of the protocol, by its string; any other special token counts as text."""
        if self._lexer is not None:
            for part in self._lexer.flush():
                self._take(part)
        self._take(Special(token))
        return self._give()

    def finish(self, reason: str = "eos") -> list[StreamEvent]:
        """The output is over: the end token was sampled (`eos`), or generation stopped for another reason."""
        if self._lexer is not None:
            for part in self._lexer.flush():
                self._take(part)
        self._end(reason)
        return self._give()

    def _give(self) -> list[StreamEvent]:
        events, self._out = self._out, []
        return events

    def _take(self, part: Part) -> None:
        if not isinstance(part, Special):
            self._take_text(part.text)
        elif not self.ended:
            self._take_special(part.token)

    def _take_text(self, text: str) -> None:
        if self.ended:
            return
        self._buffer += _HALF_SURROGATE.sub("\ufffd", text)
        self._run(final=False)

    def _take_special(self, token: str) -> None:
        if token == DSML:
            self._buffer += DSML_MARK
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
                self._buffer += token
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
        self._run(final=True)
        if self._state == "value":
            self._leave_value()
            self._close_call("truncated")
        elif self._state == "call":
            # If the model itself ended here, between two parameters, then it has given all of them.
            whole = reason == "eos" and self._call.between_parameters
            self._close_call("missing_close" if whole else "truncated")
        elif self._state == "block":
            self._problems.append("missing_close")
        if self._state == "block":
            self._state = self._around_block
        if self._state == "thinking":
            self._problems.append("unclosed_think")
        self.ended = True
        self._out.append(End(reason, tuple(dict.fromkeys(self._problems))))

    # --- the machine ----------------------------------------------------------------------------------------------

    def _run(self, *, final: bool) -> None:
        """Takes from the buffer all that is decided. `final`: no text follows that could belong to a tag in it."""
        steps = {
            "thinking": self._step_text,
            "content": self._step_text,
            "block": self._step_block,
            "call": self._step_call,
            "value": self._step_value,
        }
        while self._buffer and steps[self._state](final):
            pass

    def _step_text(self, final: bool) -> bool:
        tag = next_tag(self._buffer, final=final)
        if tag is None:
            return self._pass_text(_HELD, final, self._emit_text)
        if tag.kind == "cut":
            self._emit_text(re.sub(r"\n{1,2}\Z", "", self._buffer[: tag.start]))
            self._problems.append("truncated")
            self._cut(tag.end)
            return False
        if tag.kind in ("calls", "invoke"):
            self._emit_text(re.sub(r"\n{1,2}\Z", "", self._buffer[: tag.start]))
            self._blank_after_block = None
            self._around_block = "thinking" if self._state == "thinking" else "content"
            self._state = "block"
            if tag.kind == "calls":
                self._cut(tag.end)
            else:
                self._problems.append("stray_tag")  # a call without a block around it
                self._cut(tag.start)
        elif tag.kind == "?":
            self._emit_text(self._literal(tag.end))
            self._cut(tag.end)
        else:
            self._emit_text(self._buffer[: tag.start])
            self._problems.append("stray_tag")
            self._cut(tag.end)
        return True

    def _step_block(self, final: bool) -> bool:
        tag = next_tag(self._buffer, final=final)
        if tag is None:
            if final:
                self._stray_text(_UNFINISHED_BRACKET.sub("", self._buffer))
                self._buffer = ""
            return False
        self._stray_text(self._buffer[: tag.start])
        if tag.kind == "invoke":
            self._call = CallReader(self._n_calls, tag.name)
            self._n_calls += 1
            self._out.append(ToolCallStart(self._call.index, self._call.name))
            self._state = "call"
        elif tag.kind == "/calls":
            self._state = self._around_block
            self._blank_after_block = ""
        elif tag.kind == "?":
            self._stray_text(self._literal(tag.end)[tag.start :])
        else:
            self._problems.append("truncated" if tag.kind == "cut" else "stray_tag")
        self._cut(tag.end)
        return True

    def _step_call(self, final: bool) -> bool:
        tag = next_tag(self._buffer, final=final)
        if tag is None:
            if final:
                self._call.body += _UNFINISHED_BRACKET.sub("", self._buffer)
                self._buffer = ""
            return False
        self._call.body += self._buffer[: tag.start]
        if tag.kind == "parameter":
            self._cut(tag.end)
            self._emit_arguments(self._call.open_value(tag))
            self._state = "value"
        elif tag.kind == "/invoke":
            self._cut(tag.end)
            self._close_call()
        elif tag.kind in ("invoke", "/calls"):
            self._cut(tag.start)
            self._close_call("missing_close")
        elif tag.kind == "?":
            self._call.body += self._literal(tag.end)[tag.start :]
            self._cut(tag.end)
        else:
            self._call.problems.append("truncated" if tag.kind == "cut" else "stray_tag")
            self._cut(tag.end)
        return True

    def _step_value(self, final: bool) -> bool:
        tag = next_tag(self._buffer, final=final)
        if tag is None:
            return self._pass_text(_HELD_IN_VALUE, final, self._emit_value)
        if tag.kind == "/parameter":
            self._emit_value(self._buffer[: tag.start])
            self._cut(tag.end)
            self._leave_value()
        elif tag.kind == "cut":
            self._emit_value(self._buffer[: tag.start])
            self._cut(tag.end)
        elif tag.kind in ("calls", "?"):
            self._emit_value(self._literal(tag.end))
            self._cut(tag.end)
        else:
            self._emit_value(self._buffer[: tag.start].removesuffix("\n"))
            self._cut(tag.start)
            self._call.problems.append("missing_close")
            self._leave_value()
        return True

    def _pass_text(self, held: re.Pattern[str], final: bool, emit: Callable[[str], None]) -> bool:
        """Emits the text up to the next DSML token, except for an end that may belong to a tag."""
        if (d := self._buffer.find(DSML_MARK)) >= 0:
            end = bracket_before(self._buffer, d)  # the tag itself is incomplete
            end -= len(self._buffer[:end]) - len(self._buffer[:end].rstrip("\n"))
        elif final:
            end = len(self._buffer)
        else:
            match = held.search(self._buffer, max(0, len(self._buffer) - 4))
            end = match.start() if match else len(self._buffer)
        emit(self._buffer[:end])
        self._cut(end)
        return False

    def _literal(self, end: int) -> str:
        return self._buffer[:end].replace(DSML_MARK, DSML)

    def _cut(self, n: int) -> None:
        self._buffer = self._buffer[n:]

    # --- output ---------------------------------------------------------------------------------------------------

    def _emit(self, event: StreamEvent) -> None:
        last = self._out[-1] if self._out else None
        match last, event:
            case (ThinkingDelta(head), ThinkingDelta(text)):
                self._out[-1] = ThinkingDelta(head + text)
            case (TextDelta(head), TextDelta(text)):
                self._out[-1] = TextDelta(head + text)
            case (ToolCallDelta(i, head), ToolCallDelta(j, text)) if i == j:
                self._out[-1] = ToolCallDelta(i, head + text)
            case _:
                self._out.append(event)

    def _emit_text(self, text: str) -> None:
        if self._blank_after_block is not None:
            # Line breaks between a block and the end are markup, before more text they separate.
            self._blank_after_block += text
            if not self._blank_after_block.strip():
                return
            text, self._blank_after_block = self._blank_after_block, None
        if text:
            thinks = (self._around_block if self._state == "block" else self._state) == "thinking"
            self._emit(ThinkingDelta(text) if thinks else TextDelta(text))

    def _stray_text(self, text: str) -> None:
        if text := text.strip():
            self._problems.append("stray_text")
            self._emit_text(text)

    def _emit_value(self, text: str) -> None:
        self._emit_arguments(self._call.add_value(text))

    def _emit_arguments(self, text: str) -> None:
        if text:
            self._emit(ToolCallDelta(self._call.index, text))

    def _leave_value(self) -> None:
        self._emit_arguments(self._call.close_value())
        self._state = "call"

    def _close_call(self, problem: Problem | None = None) -> None:
        call = self._call
        if problem is not None:
            call.problems.append(problem)
        self._emit_arguments(call.close())
        problems = tuple(dict.fromkeys(call.problems))
        self._out.append(
            ToolCallEnd(call.index, call.name, call.arguments, f"{self._id_prefix}_{call.index}", problems)
        )
        self._state = "block"


def parse_completion(text: str, start: Literal["thinking", "content"] = "content") -> Answer:
    """A whole completion as one string with its special tokens in it."""
    parser, answer = StreamParser(start, markup_in_text=True), Answer()
    answer.add(parser.feed_text(text))
    answer.add(parser.finish())
    return answer
