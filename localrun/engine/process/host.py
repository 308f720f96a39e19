"""Implements the engine process's long commands: one model, one session, answers as typed events.

Runs on the worker's main thread; `stop`, `stats` and `count_tokens` may be called from other threads. Knows nothing about pipes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from localrun.atomic import replacing
from localrun.engine import memory
from localrun.engine.engine import Engine
from localrun.engine.measure.evaluate import evaluate_text
from localrun.engine.planner.plan import Plan
from localrun.engine.process.answering import AnswerWriter, KeptAnswers, Prompts, known_tools, steering_for
from localrun.engine.process.protocol import (
    CountTokens,
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
)
from localrun.engine.process.shared import Shared
from localrun.engine.session import Progress, Session
from localrun.engine.snapshots import SnapshotStore
from localrun.errors import ContextFullError, LocalrunError, StoppedError, UsageError
from localrun.paths import cache_dir

Send = Callable[[Event], None]


@dataclass(frozen=True, slots=True)
class _Loaded:
    """What a load makes and `close` frees."""

    engine: Engine
    session: Session
    snapshots: SnapshotStore
    answers: KeptAnswers
    prompts: Prompts


class Host:
    """The loaded model of an engine process, if there is one. Every method sends its events, the closing one last.

    Only the main thread loads, computes and frees. Other threads access the model only inside `Shared.use`, which freeing waits
    for. Lock: that of `Shared`, and `Session.stop`'s inside it.
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

    def count_tokens(self, command: CountTokens) -> list[int]:
        """The ids that `protocol.CountTokens` asks about. Raises LocalrunError: no tokenizer, or nothing that can be a prompt."""
        with self._model.use() as model:
            if model is None:
                raise LocalrunError("no model is loaded")
            if command.text is not None:
                return model.engine.tokenizer.encode(command.text)
            return model.prompts.of_conversation(command).ids

    # --- commands

    def load(self, command: Load) -> None:
        """See `protocol.Load`.

        Raises:
            StoppedError: `stop` was called meanwhile.
            LocalrunError: the model can't be loaded. As after a stop, no model is loaded then.
        """
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
            if plan.decode is not None:  # a small model's plan is not interesting
                lines = tuple(plan.lines())
                self._send(Loading(request=command.request, progress=0.0, text="reading the model", plan=lines))

        def note(text: str) -> None:
            self._send(Loading(request=command.request, progress=0.0, text="reading the model", plan=(text,)))

        engine = Engine.open(command.path, command.options, progress, announce=announce, note=note)
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
        memory_file = cache_dir() / "answers" / f"{engine.state_key}.jsonl"
        answers = KeptAnswers(memory_file if engine.facts.has_tokenizer else None)
        self._model.put(_Loaded(engine, session, snapshots, answers, Prompts(engine, answers)))
        facts = replace(engine.facts, n_ctx=session.n_ctx)
        plan = engine.plan.to_json() if engine.plan is not None else {}
        self._send(Ready(request=command.request, facts=facts, load_s=time.perf_counter() - start, plan=plan))

    def generate(self, command: Generate) -> None:
        """See `protocol.Generate`. A stop is not an error: the answer finishes with that reason.

        Raises:
            MessageError, UsageError: the prompt or a constraint is invalid.
            ContextFullError: the prompt leaves no room in the context.
            DecodeError, StoreError: computing or reading failed.
            LocalrunError: no model is loaded, or the prompt can't be tokenized.
        """
        model = self._loaded()
        engine, session = model.engine, model.session
        prompt = model.prompts.of_question(command)
        if len(prompt.ids) >= session.n_ctx:
            raise ContextFullError(
                f"the conversation has {len(prompt.ids)} tokens, but the context only {session.n_ctx}",
                hint="shorten it, start a new one, or raise --context",
            )
        answer = session.generate(
            prompt.ids,
            command.sampling,
            boundaries=prompt.boundaries,
            max_tokens=command.max_tokens,
            ignore_eos=command.ignore_eos,
            progress=self._progress(command.request),
            steering=steering_for(engine, command, prompt.start),
            top_logprobs=command.logprobs,
        )
        out = AnswerWriter(engine, command, prompt.start, self._send, known_tools(command, prompt.messages))
        for token in answer:
            out.push(token, answer.logprobs)
            if out.ended:
                break
        reason = out.reason or answer.reason or "eos"  # the model began somebody else's turn
        problems = out.finish(reason)
        if out.ended and answer.reason is None:
            session.save()  # the iterator, which saves at its own end, was left before it
        model.answers.keep(engine, command, prompt, out, reason)
        self._send(
            Finished(
                request=command.request,
                reason=reason,
                timings=answer.timings,
                seed=answer.seed,
                problems=problems,
                warning=prompt.warning,
                tokens=out.take_tokens(),
                stop_string=out.stop_string,
            )
        )

    def snapshot(self, command: Snapshot) -> None:
        """See `protocol.Snapshot`."""
        session = self._loaded().session
        with replacing(Path(command.path)) as file:
            session.write(Path(file.name))
            n_bytes = Path(file.name).stat().st_size
        self._send(Saved(request=command.request, n_tokens=session.position, n_bytes=n_bytes))

    def restore(self, command: Restore) -> None:
        """See `protocol.Restore`."""
        session = self._loaded().session
        session.restore(Path(command.path))
        self._send(Restored(request=command.request, n_tokens=session.position))

    def eval_logits(self, command: EvalLogits) -> None:
        """See `protocol.EvalLogits`. Uses a session of its own, the conversation's stays."""
        engine = self._loaded().engine
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
        engine = self._loaded().engine
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
        """Frees the model once no thread uses it; waits until its files are written."""
        model = self._model.take()
        if model is not None:
            try:
                model.engine.close()
            finally:
                model.snapshots.close()
        self.has_model = False

    # --- inside

    def _loaded(self) -> _Loaded:
        """For the main thread."""
        model = self._model.value
        if model is None:
            raise LocalrunError("no model is loaded")
        return model

    def _progress(self, request: int) -> Progress:
        """Sends PromptProgress; the first call reports reused tokens and starts the clock."""
        reused: int | None = None
        start = 0.0

        def report(done: int, total: int) -> None:
            nonlocal reused, start
            now = time.perf_counter()
            if reused is None:
                reused, start = done, now
            self._send(PromptProgress(request=request, done=done, total=total, reused=reused, elapsed_s=now - start))

        return report
