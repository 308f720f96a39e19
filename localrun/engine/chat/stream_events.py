"""The events of an answer in progress (`stream_parser.py`), and their sum.

Knows nothing about tokens and markup.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from localrun.engine.chat.messages import AssistantMessage, MessageError, MessageToolCall

Problem = Literal[
    "unclosed_think",  # the output ended inside the thinking
    "stray_think",  # a thinking marker where there is nothing to open or close
    "role_token",  # the model began a turn that is not its own; taken as the end
    "stray_tag",  # a DSML tag out of place, left out
    "stray_text",  # text between tool calls; shown as text if it is not inside a call
    "missing_close",  # a closing tag is missing, the meaning is clear
    "truncated",  # the output ended inside a call: do not run it
    "no_name",  # a call that names no tool: do not run it
    "bad_name",  # a tool or a parameter under a name that can't be one: do not run it
    "odd_tag",  # a tag is spelled otherwise than the format has it, the meaning is clear
    "misspelt_close",  # a misspelled closing tag; it closes the element it follows
    "misnamed_tag",  # a call in a parameter's tag, by the name of a known tool
    "guessed_name",  # the tool's name is in another attribute
    "other_markup",  # a call without the format's token that matches the tool's schema
    "unwrapped",  # all parameters inside one that is not in the schema
    "guessed_type",  # neither tag nor schema tells whether a value is a string
    "retyped",  # the schema requires a type other than the declared one
    "bad_json",  # a parameter that should be JSON is not; kept as a string
    "not_parameters",  # the call's body does not consist of parameters
    "duplicate_parameter",  # the first one counts
]


@dataclass(frozen=True, slots=True)
class ThinkingDelta:
    """More of the reasoning."""

    text: str


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """A call begins. `index` counts the calls of the answer from 0."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """More of a call's arguments, as JSON: all deltas of a call, joined, are its `arguments`."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class ToolCallEnd:
    """A call has ended.

    Attributes:
        arguments: always a JSON object as text.
        problems: what had to be guessed.
    """

    index: int
    name: str
    arguments: str
    id: str
    problems: tuple[Problem, ...] = ()

    @property
    def usable(self) -> bool:
        """The call is whole and may be run."""
        return not set(self.problems) & {"truncated", "no_name", "bad_name"}

    def call(self) -> MessageToolCall:
        """The call as part of a message. Raises MessageError if its name can't be one."""
        return MessageToolCall(self.name, self.arguments, self.id)


@dataclass(frozen=True, slots=True)
class End:
    """The output has ended; nothing follows.

    Attributes:
        reason: `eos`, or the argument of `finish`.
        problems: outside of calls.
    """

    reason: str
    problems: tuple[Problem, ...] = ()


StreamEvent: TypeAlias = ThinkingDelta | TextDelta | ToolCallStart | ToolCallDelta | ToolCallEnd | End


class EventQueue:
    """Events in their order; neighbouring pieces of one text become one event."""

    def __init__(self) -> None:
        self._events: list[StreamEvent] = []
        self._text: list[str] = []  # pieces that belong to the last event, too

    def add(self, event: StreamEvent) -> None:
        """The next event."""
        last = self._events[-1] if self._events else None
        match last, event:
            case (ThinkingDelta(), ThinkingDelta(text)) | (TextDelta(), TextDelta(text)):
                self._text.append(text)
            case (ToolCallDelta(i, _), ToolCallDelta(j, text)) if i == j:
                self._text.append(text)
            case _:
                self._join()
                self._events.append(event)

    def take(self) -> list[StreamEvent]:
        """All of them; the queue is then empty."""
        self._join()
        events, self._events = self._events, []
        return events

    def _join(self) -> None:
        if self._text:
            last = self._events[-1]
            assert isinstance(last, ThinkingDelta | TextDelta | ToolCallDelta)
            self._events[-1] = dataclasses.replace(last, text="".join([last.text, *self._text]))
            self._text.clear()


class MessageBuilder:
    """Collects the events of one answer into a message."""

    def __init__(self) -> None:
        self._reasoning: list[str] = []
        self._content: list[str] = []
        self.calls: list[ToolCallEnd] = []
        self.end: End | None = None

    def add(self, events: Iterable[StreamEvent]) -> None:
        """Takes the next events of the answer."""
        for event in events:
            match event:
                case ThinkingDelta(text):
                    self._reasoning.append(text)
                case TextDelta(text):
                    self._content.append(text)
                case ToolCallEnd():
                    self.calls.append(event)
                case End():
                    self.end = event
                case ToolCallStart() | ToolCallDelta():
                    pass

    @property
    def reasoning(self) -> str:
        return "".join(self._reasoning)

    @property
    def content(self) -> str:
        return "".join(self._content)

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Everything that was flagged, calls included."""
        flags = [problem for call in self.calls for problem in call.problems]
        return tuple(dict.fromkeys([*(self.end.problems if self.end else ()), *flags]))

    def message(self) -> AssistantMessage:
        """The answer as a message of the conversation; calls that must not be run are left out."""
        calls = []
        for call in self.calls:
            if call.usable:
                try:
                    calls.append(call.call())
                except MessageError:
                    continue  # a name that no tool can have
        thinks = self.end is not None and "unclosed_think" in self.end.problems
        return AssistantMessage(
            self.content,
            self.reasoning,
            tuple(calls),
            thinking_open=thinks and not self.content and not calls,
        )
