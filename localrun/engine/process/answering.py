"""Turns a question into token ids, and sampled ids into events, without the model.

Prompts may also be built on a thread other than the computing one, to count their tokens during an answer.
"""

from __future__ import annotations

import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from localrun.engine.chat.messages import (
    AssistantMessage,
    DeveloperMessage,
    Message,
    MessageError,
    SampledAnswer,
    SystemMessage,
    ToolSchema,
    messages_from_json,
    tools_from_json,
)
from localrun.engine.chat.parts import BOS, DSML, THINK_END, PromptPart, Special, Text
from localrun.engine.chat.stop_strings import StopFinder
from localrun.engine.chat.stream_parser import (
    End,
    StreamEvent,
    StreamParser,
    TextDelta,
    ThinkingDelta,
    ToolCallDelta,
    ToolCallEnd,
    ToolCallStart,
)
from localrun.engine.chat.writer import Prompt
from localrun.engine.engine import Engine
from localrun.engine.facts import FinishReason, Json
from localrun.engine.process.protocol import (
    Delta,
    Event,
    Generate,
    PromptCommand,
    TokenLogprob,
    ToolCall,
    ToolCallBegun,
)
from localrun.engine.replay import AnswerMemory
from localrun.engine.steering import Steering, check_counts
from localrun.engine.tokenizer import Piece, StreamDecoder
from localrun.errors import UsageError

Send = Callable[[Event], None]

CACHED_CHARS = 8_000_000
"""Of texts whose ids are kept: an agent sends the same 60 kB with every request."""

SHORT_TEXT = 200
"""Characters below which looking up takes as long as tokenizing."""


@dataclass(frozen=True, slots=True)
class TokenizedPrompt:
    """A prompt as ids.

    Attributes:
        boundaries: number of ids before each stable end of a message.
        start: the start of the model's output; None if it is not its turn.
        messages: the messages it was built from, if any.
    """

    ids: list[int]
    boundaries: list[int] = field(default_factory=list)
    start: Literal["thinking", "content"] | None = "content"
    warning: str | None = None
    messages: Sequence[Message] | None = None


class KeptAnswers:
    """The answer memory, behind a lock because another thread counts prompts."""

    def __init__(self, path: Path | None) -> None:
        self._memory = AnswerMemory(path)
        self._lock = threading.Lock()

    def recall(self, messages: Sequence[Message]) -> list[Message]:
        with self._lock:
            return self._memory.recall(messages)

    def keep(
        self, engine: Engine, command: Generate, question: TokenizedPrompt, out: AnswerWriter, reason: str
    ) -> None:
        """Remembers an answer, unless a stop truncated it in the middle of what its client has seen."""
        if question.messages is None or command.resume or reason not in ("eos", "length", "context"):
            return
        answer = out.message()
        sampled = out.sampled(engine)
        if answer is not None and sampled is not None:
            with self._lock:
                self._memory.remember(question.messages, answer, sampled)


class Prompts:
    """Makes prompts for one engine. Any thread."""

    def __init__(self, engine: Engine, answers: KeptAnswers) -> None:
        self._engine, self._answers = engine, answers
        self._lock = threading.Lock()
        self._texts: OrderedDict[str, list[int]] = OrderedDict()
        self._n_chars = 0

    def of_question(self, command: Generate) -> TokenizedPrompt:
        """The prompt of a command. Raises LocalrunError for one that can't be answered."""
        if command.tokens is not None:
            return TokenizedPrompt(list(command.tokens))
        if command.text is not None:
            return TokenizedPrompt([*self._begin(), *self._engine.tokenizer.encode(command.text)])
        question = self.of_conversation(command)
        if question.start is None:
            raise UsageError("it is not the model's turn", hint="the last message must be one the model can answer")
        return question

    def of_conversation(self, command: PromptCommand) -> TokenizedPrompt:
        """The prompt of a conversation, be it the model's turn or not. Raises LocalrunError for messages that can't be one."""
        if isinstance(command, Generate) and (command.text is not None or command.tokens is not None):
            return self.of_question(command)
        encoder = self._engine.chat_encoder
        messages = self._answers.recall(messages_from_json(command.messages))
        encoded = encoder.encode_prompt(
            messages,
            mode=command.think,
            tools=tools_from_json(shown_tools(command.tools)) if command.tools else (),
            response_format=command.response_format,
            task=command.task,  # type: ignore[arg-type]  # checked by the encoder
            resume=command.resume,
        )
        ids, boundaries = self._encode(encoded)
        warning = encoder.max_context_advice(command.think, self._engine.facts.n_ctx)
        return TokenizedPrompt(ids, boundaries, encoded.completion, warning, messages)

    def _begin(self) -> list[int]:
        specials = self._engine.tokenizer.specials
        return [specials[BOS]] if BOS in specials else []

    def _encode(self, prompt: Prompt) -> tuple[list[int], list[int]]:
        stable = {boundary.part for boundary in prompt.boundaries if boundary.stable}
        ids: list[int] = []
        places = []
        for i, part in enumerate(prompt.parts):
            if i in stable and ids:
                places.append(len(ids))
            ids += self._part(part)
        return ids, places

    def _part(self, part: PromptPart) -> Sequence[int]:
        if not isinstance(part, Text) or len(part.text) < SHORT_TEXT:
            return self._engine.tokenizer.encode_parts([part])
        with self._lock:
            if part.text in self._texts:
                self._texts.move_to_end(part.text)
                return self._texts[part.text]
        ids = self._engine.tokenizer.encode(part.text)
        with self._lock:
            if part.text not in self._texts:
                self._texts[part.text] = ids
                self._n_chars += len(part.text)
                while self._n_chars > CACHED_CHARS:
                    gone, _ = self._texts.popitem(last=False)
                    self._n_chars -= len(gone)
        return ids


def shown_tools(tools: Sequence[Json]) -> list[Json]:
    """Tools as the model is shown them: `strict` and `grammar` are between the client and the sampler."""
    return [{key: value for key, value in tool.items() if key not in ("strict", "grammar")} for tool in tools]


def known_tools(command: Generate, messages: Sequence[Message] | None) -> tuple[ToolSchema, ...]:
    """The tools an answer may call: those given separately and those in messages."""
    if command.tool_choice == "none":
        return ()
    callable_tools = _callable(command)
    beside = tools_from_json(shown_tools(callable_tools)) if callable_tools else ()
    inside = (m.tools for m in messages or () if isinstance(m, SystemMessage | DeveloperMessage))
    return (*beside, *(tool for tools in inside for tool in tools))


def _callable(command: Generate) -> list[Json]:
    """Those of the tools beside the messages that may be called."""
    names = command.tool_names
    return [dict(tool) for tool in command.tools if names is None or tool.get("name") in names]


def steering_for(engine: Engine, command: Generate, start: str | None) -> Steering | None:
    """The constraints on an answer; None if there are none.

    Raises:
        UsageError: a schema that can't be enforced, or a tool that is not offered.
    """
    names = ("min_tokens", "think_budget", "max_tool_calls", "logprobs")
    check_counts(**{name: getattr(command, name) for name in names})
    some = command.tool_names is not None and bool(command.tools)
    strict = command.tool_choice == "auto" and (some or any(tool.get("strict") is True for tool in command.tools))
    forced = command.tool_choice == "required"
    silent = command.tool_choice == "none" and bool(command.tools)
    budget = command.think_budget is not None and start == "thinking"
    if not (strict or forced or silent or budget or command.min_tokens or command.json_schema is not None):
        return None
    specials = engine.tokenizer.specials
    matcher = None
    if forced or strict:
        offered = [tool.get("name") for tool in command.tools]
        if unknown := [name for name in command.tool_names or () if name not in offered]:
            raise UsageError(f"tool {unknown[0]!r} is not among the offered tools")
        if not (tools := _callable(command)):
            raise UsageError("a tool call is required, but no tool is offered")
        matcher = engine.grammars.of_calls(
            tools, required=forced, most=command.max_tool_calls, schema=command.json_schema
        )
    elif command.json_schema is not None and command.tools and not silent:
        matcher = engine.grammars.of_calls(command.tools, required=False, schema=command.json_schema)
    elif command.json_schema is not None:
        matcher = engine.grammars.of_schema(command.json_schema)
    call = [specials[DSML]] if DSML in specials else []
    return Steering(
        thinking=start == "thinking",
        think_end=specials.get(THINK_END),
        ends=engine.end_tokens,
        banned=call if silent else (),
        free_of=call if matcher is not None else (),
        min_tokens=command.min_tokens,
        think_budget=command.think_budget,
        matcher=matcher,
    )


class AnswerWriter:
    """Turns sampled ids into events.

    Attributes:
        reason: why the answer ends here, unless the session ended it.
    """

    def __init__(
        self,
        engine: Engine,
        command: Generate,
        start: str | None,
        send: Send,
        tools: Sequence[ToolSchema] = (),
    ) -> None:
        self._send, self._request = send, command.request
        self._tokenizer = engine.tokenizer if engine.facts.has_tokenizer else None
        self._decoder = StreamDecoder(self._tokenizer) if self._tokenizer is not None else None
        # Tool results name their call by id, so ids of different answers must differ.
        prefix = f"call_{uuid.uuid4().hex[:16]}"
        self._id_prefix = prefix
        self._started_thinking = start == "thinking"
        self._parser = StreamParser("thinking" if start == "thinking" else "content", id_prefix=prefix, tools=tools)
        self._stops = StopFinder(command.stop)
        self._max_calls = command.max_tool_calls
        self._all: list[int] = []
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._problems: tuple[str, ...] = ()
        self._texts: dict[str, list[str]] = {"thinking": [], "text": []}
        self._calls: list[ToolCallEnd] = []
        self.reason: FinishReason | None = None

    @property
    def ended(self) -> bool:
        return self._parser.ended or self.reason is not None

    @property
    def stop_string(self) -> str | None:
        return self._stops.found

    def push(self, token: int, logprobs: Sequence[tuple[int, float]] = ()) -> None:
        self._tokens.append(token)
        self._all.append(token)
        if logprobs and self._tokenizer is not None:
            self._logprobs.append(self._logprob(logprobs))
        if self._decoder is None:
            self._send(Delta(request=self._request, kind="text", text="", tokens=self.take_tokens()))
        else:
            self._write(self._decoder.push(token))

    def finish(self, reason: str) -> tuple[str, ...]:
        """Emits what was held back; returns formal defects of the answer."""
        if self._decoder is not None and self.reason is None:
            self._write(self._decoder.flush())
        if self.reason is None:
            self._emit(self._parser.finish(reason))
            if text := self._stops.flush():
                self._delta("text", text)
        return self._problems

    def take_tokens(self) -> tuple[int, ...]:
        tokens, self._tokens = tuple(self._tokens), []
        return tokens

    def message(self) -> AssistantMessage | None:
        """The answer as part of a conversation; None for one that can't be."""
        if not all(call.usable for call in self._calls):
            return None
        try:
            calls = tuple(call.call() for call in self._calls)
            return AssistantMessage("".join(self._texts["text"]), "".join(self._texts["thinking"]), calls)
        except MessageError:
            return None

    def sampled(self, engine: Engine) -> SampledAnswer | None:
        """The answer's ids for the next prompt; None if the reasoning never ended."""
        ids, thinking = self._all, None
        if self._started_thinking:
            end = engine.tokenizer.specials.get(THINK_END)
            if end not in ids:
                return None
            at = ids.index(end)
            thinking, ids = tuple(ids[:at]), ids[at + 1 :]
        rest = list(ids)
        if self._calls and self._max_calls is not None and len(self._calls) >= self._max_calls:
            rest += self._closing(engine, rest)
        return SampledAnswer(thinking, tuple(rest), engine.tokenizer.decode(rest))

    def _closing(self, engine: Engine, ids: Sequence[int]) -> list[int]:
        """The missing end of a block that was abandoned after a call."""
        written = engine.tokenizer.decode(ids)
        if written.rstrip("\n").endswith("tool_calls>"):
            return []
        blank = "" if written.endswith("\n") else "\n"
        return engine.tokenizer.encode_parts([Text(f"{blank}</"), Special(DSML), Text("tool_calls>")])

    # --- inside

    def _logprob(self, pairs: Sequence[tuple[int, float]]) -> TokenLogprob:
        assert self._tokenizer is not None
        data = [tuple(self._tokenizer.piece(token)) for token, _ in pairs]
        top = tuple(
            TokenLogprob(token=token, data=some, logprob=value)
            for (token, value), some in zip(pairs[1:], data[1:], strict=True)
        )
        (token, value), some = pairs[0], data[0]
        return TokenLogprob(token=token, data=some, logprob=value, top=top)

    def _write(self, pieces: list[Piece]) -> None:
        for piece in pieces:
            if self.ended:
                return
            if piece.special:
                self._emit(self._parser.feed(Special(piece.text)))
            else:
                self._emit(self._parser.feed_text(piece.text))

    def _emit(self, events: list[StreamEvent]) -> None:
        for event in events:
            if self.reason is not None:
                return
            match event:
                case ThinkingDelta():
                    self._delta("thinking", event.text)
                case TextDelta():
                    self._text(event.text)
                case ToolCallStart():
                    self._flush_text()
                    if event.name:
                        call_id = f"{self._id_prefix}_{event.index}"
                        begun = ToolCallBegun(request=self._request, index=event.index, name=event.name, id=call_id)
                        self._send(begun)
                case ToolCallDelta():
                    self._delta("tool", event.text)
                case ToolCallEnd():
                    self._tool_call(event)
                case End():
                    self._problems = event.problems

    def _text(self, text: str) -> None:
        certain = self._stops.feed(text)
        if certain or self._logprobs:
            self._delta("text", certain)
        if self._stops.found is not None:
            self.reason = "stop"

    def _flush_text(self) -> None:
        if text := self._stops.flush():
            self._delta("text", text)

    def _delta(self, kind: Literal["thinking", "text", "tool"], text: str) -> None:
        if kind != "tool":
            self._texts[kind].append(text)
        logprobs, self._logprobs = tuple(self._logprobs), []
        tokens = self.take_tokens()
        self._send(Delta(request=self._request, kind=kind, text=text, tokens=tokens, logprobs=logprobs))

    def _tool_call(self, call: ToolCallEnd) -> None:
        self._calls.append(call)
        self._logprobs = []
        self._send(
            ToolCall(
                request=self._request,
                index=call.index,
                name=call.name,
                arguments=call.arguments,
                id=call.id,
                usable=call.usable,
                problems=call.problems,
                tokens=self.take_tokens(),
            )
        )
        if self._max_calls is not None and len(self._calls) >= self._max_calls and not self._parser.ended:
            self.reason = "eos"
