"""What the engine process does for each long command: one model, one session, answers as typed events.

Runs on the worker's main thread; `stop`, `stats` and `count_tokens` may be called from others. Knows nothing about pipes.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from localrun.atomic import replacing
from localrun.engine import memory
from localrun.engine.chat.messages import messages_from_json, tools_from_json
from localrun.engine.chat.parts import Special
from localrun.engine.chat.stream_parser import (
    End,
    StreamEvent,
    StreamParser,
    TextDelta,
    ThinkingDelta,
    ToolCallDelta,
    ToolCallEnd,
)
from localrun.engine.chat.writer import Prompt
from localrun.engine.engine import Engine
from localrun.engine.facts import FinishReason
from localrun.engine.measure.evaluate import evaluate_text
from localrun.engine.planner.plan import Plan
from localrun.engine.process.protocol import (
    Conversation,
    CountTokens,
    Delta,
    EvalLogits,
    EvalResult,
    EvalText,
    EvalTextResult,
    Event,
    Finished,
    Generate,
    GetStats,
    Load,
    Loading,
    PromptProgress,
    Ready,
    Restore,
    Restored,
    Saved,
    Snapshot,
    Stats,
    ToolCall,
)
from localrun.engine.process.shared import Shared
from localrun.engine.session import Progress, Session
from localrun.engine.snapshots import SnapshotStore
from localrun.engine.tokenizer import Piece, StreamDecoder
from localrun.errors import ContextFullError, LocalrunError, StoppedError, UsageError
from localrun.paths import cache_dir

Send = Callable[[Event], None]


@dataclass(frozen=True, slots=True)
class _Loaded:
    """What a load makes and `close` frees."""

    engine: Engine
    session: Session
    snapshots: SnapshotStore


class Host:
    """The loaded model of an engine process, if there is one. Every method sends its events, the closing one last.

    The main thread alone loads, computes and frees. Other threads look at the model inside `Shared.use` only, for which freeing it
    waits. Lock: that of `Shared`, and `Session.stop`'s inside it.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._model: Shared[_Loaded] = Shared()
        self._stopping = False
        self.has_model = False
        """A model is loaded or being freed: there may be something to save. Any thread."""

    # --- from any thread

    def stop(self) -> None:
        """Ends the running command; remembered until `clear_stop` should it just be about to start."""
        self._stopping = True
        with self._model.use() as model:
            if model is not None:
                model.session.stop()

    def clear_stop(self) -> None:
        """Forgets `stop`; before the next command."""
        self._stopping = False
        with self._model.use() as model:
            if model is not None:
                model.session.clear_stop()

    def stats(self, command: GetStats, busy: bool) -> Stats:
        """The event that answers `command`; takes no lock that is held while something is computed or read."""
        with self._model.use() as model:
            return Stats(
                request=command.request,
                busy=busy,
                context_used=model.session.position if model else 0,
                n_ctx=model.session.n_ctx if model else 0,
                rss_bytes=memory.resident_bytes(),
                telemetry=model.engine.stats() if model else {},
                experts=model.engine.expert_map() if model and command.expert_map else None,
            )

    def count_tokens(self, command: CountTokens) -> int:
        """See `protocol.CountTokens`. Raises LocalrunError without a model or a tokenizer, or for what can't be a prompt."""
        with self._model.use() as model:
            if model is None:
                raise LocalrunError("no model is loaded")
            engine = model.engine
            if command.text is not None:
                return len(engine.tokenizer.encode(command.text))
            return len(engine.tokenizer.encode_parts(_prompt(engine, command).parts))

    # --- commands

    def load(self, command: Load) -> None:
        """See `protocol.Load`."""
        self.close()
        start = last = time.perf_counter()

        def progress(fraction: float, text: str) -> None:
            nonlocal last
            if self._stopping:
                raise StoppedError("loading was stopped")
            if (now := time.perf_counter()) - last > 0.05 or fraction == 0:
                last = now
                self._send(Loading(request=command.request, progress=fraction, text=text))

        def announce(plan: Plan) -> None:
            if plan.decode is not None:  # a small model's plan interests nobody
                lines = tuple(plan.lines())
                self._send(Loading(request=command.request, progress=0.0, text="reading the model", plan=lines))

        engine = Engine.open(command.path, command.options, progress, announce=announce)
        try:
            self._send(Loading(request=command.request, progress=0.97, text="preparing the context"))
            snapshots = SnapshotStore(cache_dir() / "snapshots", engine.state_key)
            session = engine.session(snapshots=snapshots)
            if engine.facts.has_tokenizer:
                engine.tokenizer.encode("warm")  # also makes it before several threads ask for it
        except BaseException:
            engine.close()
            raise
        self.has_model = True
        self._model.put(_Loaded(engine, session, snapshots))
        facts = replace(engine.facts, n_ctx=session.n_ctx)
        plan = engine.plan.to_json() if engine.plan is not None else {}
        self._send(Ready(request=command.request, facts=facts, load_s=time.perf_counter() - start, plan=plan))

    def generate(self, command: Generate) -> None:
        """See `protocol.Generate`."""
        engine, session = self._loaded()
        warning = None
        boundaries: list[int] = []
        if command.tokens is not None:
            prompt, start = list(command.tokens), "content"
        else:
            encoded = _prompt(engine, command)
            if encoded.completion is None:
                raise UsageError("it is not the model's turn", hint="the last message must be one to answer")
            start = encoded.completion
            prompt, boundaries = _encode(engine, encoded)
            warning = engine.chat_encoder.max_context_advice(command.think, session.n_ctx)
        if len(prompt) >= session.n_ctx:
            raise ContextFullError(
                f"the conversation takes {len(prompt)} tokens, the context has {session.n_ctx}",
                hint="shorten it, start a new one, or give a larger --context",
            )
        answer = session.generate(
            prompt,
            command.sampling,
            boundaries=boundaries,
            max_tokens=command.max_tokens,
            ignore_eos=command.ignore_eos,
            progress=self._progress(command.request),
        )
        out = _AnswerWriter(engine, command.request, start, self._send)
        for token in answer:
            out.push(token)
            if out.ended:
                break
        reason: FinishReason = answer.reason or "eos"  # the model began somebody else's turn
        problems = out.finish(reason)
        self._send(
            Finished(
                request=command.request,
                reason=reason,
                timings=answer.timings,
                seed=answer.seed,
                problems=problems,
                warning=warning,
                tokens=out.take_tokens(),
            )
        )

    def snapshot(self, command: Snapshot) -> None:
        """See `protocol.Snapshot`."""
        _, session = self._loaded()
        data = session.snapshot()
        with replacing(Path(command.path)) as file:
            file.write(data)
        self._send(Saved(request=command.request, n_tokens=session.position, n_bytes=len(data)))

    def restore(self, command: Restore) -> None:
        """See `protocol.Restore`."""
        _, session = self._loaded()
        session.restore(Path(command.path).read_bytes())
        self._send(Restored(request=command.request, n_tokens=session.position))

    def eval_logits(self, command: EvalLogits) -> None:
        """See `protocol.EvalLogits`. Uses a session of its own, the conversation's stays."""
        engine, _ = self._loaded()
        tokens, n_vocab = list(command.tokens), engine.facts.n_vocab
        if not tokens:
            raise UsageError("no tokens to evaluate")
        progress = self._progress(command.request)
        progress(0, len(tokens))
        start = time.perf_counter()
        with engine.session(all_logits=True) as session, replacing(Path(command.logits_path)) as file:
            out = np.lib.format.open_memmap(file.name, mode="w+", dtype=np.float32, shape=(len(tokens), n_vocab))
            done = 0
            for rows in session.feed_all_logits(tokens):
                if self._stopping:
                    raise StoppedError("the evaluation was stopped")
                out[done : done + len(rows)] = rows
                done += len(rows)
                progress(done, len(tokens))
            out.flush()
        elapsed_s = time.perf_counter() - start
        self._send(EvalResult(request=command.request, n_tokens=done, n_vocab=n_vocab, elapsed_s=elapsed_s))

    def eval_text(self, command: EvalText) -> None:
        """See `protocol.EvalText`. Uses a session of its own, the conversation's stays."""
        engine, _ = self._loaded()
        start = time.perf_counter()

        def report(done: int, total: int) -> None:
            if self._stopping:
                raise StoppedError("the evaluation was stopped")
            elapsed_s = time.perf_counter() - start
            self._send(PromptProgress(request=command.request, done=done, total=total, reused=0, elapsed_s=elapsed_s))

        scores = evaluate_text(
            engine,
            command.text,
            window=command.window,
            max_tokens=command.max_tokens,
            save_folder=Path(command.save_folder) if command.save_folder else None,
            reference_folder=Path(command.reference_folder) if command.reference_folder else None,
            progress=report,
        )
        compared = scores.comparison
        self._send(
            EvalTextResult(
                request=command.request,
                n_tokens=scores.n_tokens,
                n_windows=scores.n_windows,
                perplexity=scores.perplexity,
                elapsed_s=time.perf_counter() - start,
                **(asdict(compared) if compared is not None else {}),
            )
        )

    def close(self) -> None:
        """Frees the model, after those who look at it; waits until what it leaves behind is written."""
        model = self._model.take()
        if model is not None:
            try:
                model.engine.close()
            finally:
                model.snapshots.close()
        self.has_model = False

    # --- inside

    def _loaded(self) -> tuple[Engine, Session]:
        """For the main thread."""
        model = self._model.value
        if model is None:
            raise LocalrunError("no model is loaded")
        return model.engine, model.session

    def _progress(self, request: int) -> Progress:
        """Sends PromptProgress; its first call says what need not be computed, and starts the clock."""
        reused: int | None = None
        start = 0.0

        def report(done: int, total: int) -> None:
            nonlocal reused, start
            now = time.perf_counter()
            if reused is None:
                reused, start = done, now
            self._send(PromptProgress(request=request, done=done, total=total, reused=reused, elapsed_s=now - start))

        return report


def _prompt(engine: Engine, command: Conversation) -> Prompt:
    """Raises LocalrunError for messages that can't be a prompt."""
    return engine.chat_encoder.encode_prompt(
        messages_from_json(command.messages),
        mode=command.think,
        tools=tools_from_json(command.tools) if command.tools else (),
        response_format=command.response_format,
        task=command.task,  # type: ignore[arg-type]  # checked by the encoder
        resume=command.resume,
    )


def _encode(engine: Engine, prompt: Prompt) -> tuple[list[int], list[int]]:
    """A prompt's ids, and how many of them lie before each place where a message ends for good."""
    stable = {boundary.part for boundary in prompt.boundaries if boundary.stable}
    ids: list[int] = []
    places = []
    for i, part in enumerate(prompt.parts):
        if i in stable and ids:
            places.append(len(ids))
        ids += engine.tokenizer.encode_parts([part])
    return ids, places


class _AnswerWriter:
    """Turns sampled ids into Delta and ToolCall events."""

    def __init__(self, engine: Engine, request: int, start: str, send: Send) -> None:
        self._send, self._request = send, request
        self._decoder = StreamDecoder(engine.tokenizer) if engine.facts.has_tokenizer else None
        # Tool results name their call by id, so ids of different answers must differ.
        prefix = f"call_{uuid.uuid4().hex[:8]}"
        self._parser = StreamParser("thinking" if start == "thinking" else "content", id_prefix=prefix)
        self._tokens: list[int] = []
        self._problems: tuple[str, ...] = ()

    @property
    def ended(self) -> bool:
        return self._parser.ended

    def push(self, token: int) -> None:
        self._tokens.append(token)
        if self._decoder is None:
            self._send(Delta(request=self._request, kind="text", text="", tokens=self.take_tokens()))
        else:
            self._write(self._decoder.push(token))

    def finish(self, reason: str) -> tuple[str, ...]:
        """Gives out what was held back; returns what was wrong with the form of the answer."""
        if self._decoder is not None:
            self._write(self._decoder.flush())
        self._emit(self._parser.finish(reason))
        return self._problems

    def take_tokens(self) -> tuple[int, ...]:
        tokens, self._tokens = tuple(self._tokens), []
        return tokens

    def _write(self, pieces: list[Piece]) -> None:
        for piece in pieces:
            if piece.special:
                self._emit(self._parser.feed(Special(piece.text)))
            else:
                self._emit(self._parser.feed_text(piece.text))

    def _emit(self, events: list[StreamEvent]) -> None:
        for event in events:
            if isinstance(event, ThinkingDelta):
                self._delta("thinking", event.text)
            elif isinstance(event, TextDelta):
                self._delta("text", event.text)
            elif isinstance(event, ToolCallDelta):
                self._delta("tool", event.text)
            elif isinstance(event, ToolCallEnd):
                self._tool_call(event)
            elif isinstance(event, End):
                self._problems = event.problems

    def _delta(self, kind: str, text: str) -> None:
        self._send(Delta(request=self._request, kind=kind, text=text, tokens=self.take_tokens()))  # type: ignore[arg-type]

    def _tool_call(self, call: ToolCallEnd) -> None:
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
