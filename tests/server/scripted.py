"""An engine that plays scripts: the model's text is given, everything behind it (parsing, events, timings) is as in the real one.

`play` gets a command and yields what the model writes, a piece a token, special tokens in it by their names; an exception among the
pieces is raised there. Prompts are rendered as the real encoder renders them, and a token is four characters, so that what two
prompts have in common can be counted.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from localrun.engine.chat.format import ENCODERS
from localrun.engine.chat.messages import messages_from_json, tools_from_json
from localrun.engine.chat.stop_strings import StopFinder
from localrun.engine.chat.stream_parser import (
    StreamParser,
    TextDelta,
    ThinkingDelta,
    ToolCallDelta,
    ToolCallEnd,
    ToolCallStart,
)
from localrun.engine.facts import FinishReason, ModelFacts, Timings
from localrun.engine.process.process import GenerateEvent
from localrun.engine.process.protocol import (
    CountTokens,
    Delta,
    Finished,
    Generate,
    Loading,
    PromptCommand,
    PromptProgress,
    Ready,
    Stats,
    TokenLogprob,
    ToolCall,
    ToolCallBegun,
)
from localrun.errors import EngineDiedError, LocalrunError, UsageError

Play = Callable[[Generate], Iterable["str | Exception"]]

FACTS = ModelFacts(
    path="/models/scripted",
    name="Scripted V4",
    architecture="deepseek4",
    identity="5c",
    file_bytes=1 << 30,
    n_layers=4,
    n_embd=64,
    n_vocab=1000,
    n_ctx=200_000,
    n_ctx_train=1 << 20,
    n_batch=512,
    n_threads=1,
    n_moe_layers=3,
    n_experts=16,
    n_experts_used=2,
    expert_bytes=1 << 20,
    ram_bytes=1 << 24,
    has_tokenizer=True,
    think_modes=("off", "high", "max"),
)

CHARS_PER_TOKEN = 4
MOST_KEPT = 100
"""Commands and prompts that are looked back at: under load there are thousands."""


def words(text: str) -> list[str]:
    """A text as pieces: words with the blank before them."""
    pieces = text.split(" ")
    return [pieces[0], *(f" {piece}" for piece in pieces[1:])]


def hello(command: Generate) -> Iterable[str]:
    """Thinks if it may, then greets."""
    thoughts = [*words("The user greets. I greet back."), "</think>"] if command.think != "off" else []
    return [*thoughts, *words("Hello! How can I help you?")]


def call_text(name: str, **arguments: Any) -> str:
    """A tool call as a model writes it."""
    import json

    lines = []
    for key, value in arguments.items():
        kind = "true" if isinstance(value, str) else "false"
        text = value if isinstance(value, str) else json.dumps(value)
        lines.append(f'<｜DSML｜parameter name="{key}" string="{kind}">{text}</｜DSML｜parameter>\n')
    return f'<｜DSML｜invoke name="{name}">\n{"".join(lines)}</｜DSML｜invoke>\n'


def calls_text(*calls: str) -> list[str]:
    """A block of calls, in small pieces."""
    text = f"\n\n<｜DSML｜tool_calls>\n{''.join(calls)}</｜DSML｜tool_calls>"
    return [text[i : i + 7] for i in range(0, len(text), 7)]


class ScriptedEngine:
    """See the module. `kill` is what the death of the process is to the server."""

    def __init__(
        self, play: Play = hello, *, delay_s: float = 0.0, prompt_s: float = 0.0, n_ctx: int = FACTS.n_ctx
    ) -> None:
        self.play, self.delay_s, self.prompt_s = play, delay_s, prompt_s
        self._facts = _with_context(n_ctx)
        self.facts: ModelFacts | None = self._facts
        self.commands: list[Generate] = []
        self.n_tokens = 0
        self.running = threading.Event()
        self._stopping = threading.Event()
        self._known: list[str] = []  # prompts and answers so far, as one text each
        self._dead = False

    # --- ServerEngine

    def generate(self, command: Generate) -> Iterator[GenerateEvent]:
        if self.facts is None:
            yield Loading(request=1, progress=0.5, text="reading dense tensors")
            self._dead, self.facts = False, self._facts
            yield Ready(request=1, facts=self._facts, load_s=0.0)
        self._stopping.clear()
        self.running.set()
        self.commands.append(command)
        del self.commands[:-MOST_KEPT]
        try:
            yield from self._answer(command)
        finally:
            self.running.clear()

    def stop(self) -> None:
        self._stopping.set()

    def stats(self, *, expert_map: bool = False, timeout_s: float = 5.0) -> Stats:
        if self.facts is None:
            raise EngineDiedError("the engine process is not running")
        telemetry = {"hit_rate": 0.5, "bytes_read": 1000, "hits": 1, "misses": 1}
        return Stats(request=1, busy=False, context_used=0, n_ctx=self.facts.n_ctx, rss_bytes=1, telemetry=telemetry)

    def tokenize(self, text: str, *, timeout_s: float = 30.0) -> tuple[int, ...]:
        return tuple(range(len(text) // CHARS_PER_TOKEN + 1))

    def count(self, command: CountTokens, *, timeout_s: float = 30.0) -> int:
        text = command.text if command.text is not None else rendered(command)[0]
        return len(text) // CHARS_PER_TOKEN + 1

    # --- what tests do to it

    def kill(self) -> None:
        """The process dies: the running answer ends with an error."""
        self._dead, self.facts = True, None

    # --- inside

    def _answer(self, command: Generate) -> Iterator[GenerateEvent]:
        text, start = _prompt(command)
        n_prompt = len(text) // CHARS_PER_TOKEN + 1
        reused = min(n_prompt - 1, max((_common(text, known) for known in self._known), default=0) // CHARS_PER_TOKEN)
        yield PromptProgress(request=1, done=reused, total=n_prompt, reused=reused, elapsed_s=0.0)
        if self._pause(self.prompt_s):
            yield self._finished("stopped", n_prompt, reused, 0)
            return
        yield PromptProgress(request=1, done=n_prompt, total=n_prompt, reused=reused, elapsed_s=self.prompt_s)
        writer = _Writer(command, start)
        reason: FinishReason = "eos"
        n_new, raw = 0, ""
        for piece in self.play(command):
            if self._dead:
                raise EngineDiedError("the engine process was killed by SIGKILL", hint="it starts again")
            if isinstance(piece, Exception):
                raise piece
            if self._pause(self.delay_s):
                reason = "stopped"
                break
            n_new += 1
            self.n_tokens += 1
            raw += piece
            yield from writer.feed(piece, n_new)
            if writer.stopped or writer.full:
                reason = "stop" if writer.stopped else "eos"
                break
            if n_new == command.max_tokens:
                reason = "length"
                break
        if reason not in ("stop",):
            yield from writer.end(reason)
        self._known.append(text + raw)
        del self._known[:-MOST_KEPT]
        yield self._finished(reason, n_prompt, reused, n_new, writer.stops.found)

    def _pause(self, seconds: float) -> bool:
        """Waits; whether the answer was stopped."""
        return self._stopping.wait(seconds) if seconds > 0 else self._stopping.is_set()

    def _finished(
        self, reason: FinishReason, n_prompt: int, reused: int, n_new: int, stop_string: str | None = None
    ) -> Finished:
        timings = Timings(prompt_tokens=n_prompt, reused_tokens=reused, new_tokens=n_new, decode_s=0.1)
        return Finished(request=1, reason=reason, timings=timings, seed=7, stop_string=stop_string)


class _Writer:
    """Pieces of raw text as the events that the engine's host sends."""

    def __init__(self, command: Generate, start: str) -> None:
        self.stops = StopFinder(command.stop)
        self._prefix = f"call_{uuid.uuid4().hex[:16]}"
        self._parser = StreamParser(start, markup_in_text=True, id_prefix=self._prefix)  # type: ignore[arg-type]
        self._wants_logprobs = command.logprobs is not None
        self._most_calls = command.max_tool_calls
        self.stopped = self.full = False

    def feed(self, piece: str, token: int) -> Iterator[GenerateEvent]:
        yield from self._events(self._parser.feed_text(piece), token)

    def end(self, reason: str) -> Iterator[GenerateEvent]:
        yield from self._events(self._parser.finish(reason), None)
        if rest := self.stops.flush():
            yield Delta(request=1, kind="text", text=rest)

    def _events(self, events: Iterable[Any], token: int | None) -> Iterator[GenerateEvent]:
        tokens = () if token is None else (token,)
        for event in events:
            match event:
                case ThinkingDelta(text):
                    yield Delta(request=1, kind="thinking", text=text, tokens=tokens)
                case TextDelta(text):
                    shown = self.stops.feed(text)
                    self.stopped = self.stops.found is not None
                    yield Delta(request=1, kind="text", text=shown, tokens=tokens, logprobs=self._logprobs(shown))
                case ToolCallStart(index, name) if name:
                    yield ToolCallBegun(request=1, index=index, name=name, id=f"{self._prefix}_{index}")
                case ToolCallDelta(_, text):
                    yield Delta(request=1, kind="tool", text=text, tokens=tokens)
                case ToolCallEnd():
                    problems = tuple(event.problems)
                    yield ToolCall(
                        request=1,
                        index=event.index,
                        name=event.name,
                        arguments=event.arguments,
                        id=event.id,
                        usable=event.usable,
                        problems=problems,
                    )
                    self.full = self._most_calls is not None and event.index + 1 >= self._most_calls
            if self.stopped or self.full:
                return
            tokens = ()

    def _logprobs(self, text: str) -> tuple[TokenLogprob, ...]:
        if not self._wants_logprobs or not text:
            return ()
        data = tuple(text.encode())
        other = TokenLogprob(token=2, data=(120,), logprob=-2.0)
        return (TokenLogprob(token=1, data=data, logprob=-0.1, top=(other,)),)


def _prompt(command: Generate) -> tuple[str, str]:
    """(the prompt as one text, how the answer begins); ids stand for themselves."""
    if command.tokens is not None:
        if not all(0 <= token < FACTS.n_vocab for token in command.tokens):
            raise UsageError("a prompt of ids that the vocabulary does not have")
        return "".join(f"{token:<{CHARS_PER_TOKEN}}" for token in command.tokens), "content"
    return (command.text, "content") if command.text is not None else rendered(command)


def rendered(command: PromptCommand) -> tuple[str, str]:
    """(the prompt as one text, how the answer begins). Raises LocalrunError as the real engine does."""
    prompt = ENCODERS["v4"].encode_prompt(
        messages_from_json(command.messages),
        mode=command.think,
        tools=tools_from_json(command.tools) if command.tools else (),
        response_format=command.response_format,
        resume=command.resume,
    )
    if prompt.completion is None and isinstance(command, Generate):
        raise LocalrunError("it is not the model's turn")
    return prompt.render(), prompt.completion or "content"


def _common(a: str, b: str) -> int:
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[:middle] == b[:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _with_context(n_ctx: int) -> ModelFacts:
    import dataclasses

    return dataclasses.replace(FACTS, n_ctx=n_ctx)
