"""Messages from threads and widgets to the chat screen. Plain data; the receiver decides what to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from textual.message import Message

from localrun.engine.facts import ModelFacts
from localrun.engine.process.protocol import Stats
from localrun.errors import LocalrunError

if TYPE_CHECKING:
    from localrun.tui.converter_process import ConversionNews
    from localrun.tui.engine_link import AnswerFeed


@dataclass
class EngineLoading(Message):
    """Progress of a load, 0 to 1; once, if available, with the lines of its plan."""

    progress: float
    text: str
    plan: tuple[str, ...] = ()


@dataclass
class LongAnswerEnded(Message):
    """An answer that took long is ready."""


@dataclass
class EngineReady(Message):
    """The model is loaded; `plan` as in `protocol.Ready`."""

    facts: ModelFacts
    load_s: float
    plan: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class EngineFailed(Message):
    """A load failed; there is no model now."""

    error: LocalrunError


@dataclass
class EngineDied(Message):
    """The engine process has died."""

    error: LocalrunError


@dataclass
class ModelChecked(Message):
    """The headers of a model were checked; `error` is the problem, if any."""

    path: Path
    error: LocalrunError | None


@dataclass
class AnswerEvents(Message):
    """There are events to take from `feed`."""

    feed: AnswerFeed


@dataclass
class StatsArrived(Message):
    """The engine's counters, and how long the round trip took."""

    stats: Stats
    seconds: float


@dataclass
class ConversionTold(Message):
    """The converter said something."""

    news: ConversionNews


@dataclass
class MessageAction(Message):
    """The user asked for a command of scope `message` on one message."""

    message_id: int
    command: str


@dataclass
class ConversationChosen(Message):
    """The user picked a conversation, or a place in one."""

    conversation_id: int
    message_id: int | None = None


@dataclass
class ConversationAction(Message):
    """The user asked to `rename` or `delete` a conversation in the list."""

    conversation_id: int
    command: str


@dataclass
class PromptSubmitted(Message):
    """The user pressed Enter in the input."""

    text: str


@dataclass
class ErrorAction(Message):
    """A button of an error panel."""

    command: str
