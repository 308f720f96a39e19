"""A scripted engine: the methods of `EngineProcess`, yielding the real events in an order that a test decides.

No model can be told to die, fail or fill its context at a chosen word; everything else about it is real.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from localrun.engine.facts import FinishReason, ModelFacts, Timings
from localrun.engine.options import EngineOptions
from localrun.engine.process.process import GenerateEvent, LoadEvent
from localrun.engine.process.protocol import (
    Delta,
    Finished,
    Generate,
    Loading,
    PromptProgress,
    Ready,
    Stats,
)
from localrun.errors import EngineDiedError, LocalrunError

Script = Callable[["FakeEngine", Generate], Iterator[GenerateEvent]]


def facts(path: str = "/models/fake", **changes: Any) -> ModelFacts:
    values: dict[str, Any] = {
        "path": path,
        "name": "Fake V4",
        "architecture": "deepseek4",
        "identity": "f00",
        "file_bytes": 10 << 30,
        "n_layers": 4,
        "n_embd": 64,
        "n_vocab": 100,
        "n_ctx": 4096,
        "n_ctx_train": 65536,
        "n_batch": 512,
        "n_threads": 2,
        "n_moe_layers": 3,
        "n_experts": 16,
        "n_experts_used": 2,
        "expert_bytes": 1 << 20,
        "ram_bytes": 24 << 20,
        "has_tokenizer": True,
        "think_modes": ("off", "high", "max"),
    }
    return ModelFacts(**(values | changes))


def finished(reason: FinishReason = "eos", n_tokens: int = 5, prompt: int = 10, used: int = 15) -> Finished:
    timings = Timings(prompt_tokens=prompt, prompt_s=0.5, new_tokens=n_tokens, decode_s=1.0, context_used=used)
    return Finished(request=1, reason=reason, timings=timings, seed=7)


def text(*pieces: str, thinking: str = "", reason: FinishReason = "eos") -> Script:
    """An answer in these pieces."""

    def script(engine: FakeEngine, command: Generate) -> Iterator[GenerateEvent]:
        yield PromptProgress(request=1, done=5, total=10, reused=0, elapsed_s=0.1)
        yield PromptProgress(request=1, done=10, total=10, reused=0, elapsed_s=0.2)
        if thinking:
            yield Delta(request=1, kind="thinking", text=thinking, tokens=(1, 2))
        for number, piece in enumerate(pieces):
            yield Delta(request=1, kind="text", text=piece, tokens=(number,))
        yield finished(reason, len(pieces))

    return script


def held(*pieces: str) -> Script:
    """These pieces, then nothing until the answer is stopped."""

    def script(engine: FakeEngine, command: Generate) -> Iterator[GenerateEvent]:
        n_deaths = len(engine.deaths)
        for number, piece in enumerate(pieces):
            yield Delta(request=1, kind="text", text=piece, tokens=(number,))
        engine.stopped.wait(300)
        if len(engine.deaths) > n_deaths:
            raise engine.deaths[-1]
        yield finished("stopped", len(pieces))

    return script


def failing(error: LocalrunError, *pieces: str) -> Script:
    """These pieces, then the error."""

    def script(engine: FakeEngine, command: Generate) -> Iterator[GenerateEvent]:
        for number, piece in enumerate(pieces):
            yield Delta(request=1, kind="text", text=piece, tokens=(number,))
        raise error

    return script


class FakeEngine:
    """One scripted engine.

    Attributes:
        scripts: what the next answers are; when they run out, the question's text comes back.
        commands: what was asked.
        loads: what was loaded.
        load_error: what the next load fails with.
        log: last lines of its standard error.
        plan, planned: lines of a load's plan, and the speed of answers that it expects.
        plan_json: the whole of that plan, if more of it matters than that speed.
    """

    def __init__(self, on_death: Callable[[EngineDiedError], None]) -> None:
        self.log = ["last words of the engine"]
        self._on_death = on_death
        self.facts: ModelFacts | None = None
        self.scripts: queue.SimpleQueue[Script] = queue.SimpleQueue()
        self.commands: list[Generate] = []
        self.loads: list[tuple[str, EngineOptions]] = []
        self.n_reloads = 0
        self.load_error: LocalrunError | None = None
        self.load_gate: threading.Event | None = None
        self.stopped = threading.Event()
        self.deaths: list[EngineDiedError] = []
        self.closed = False
        self.n_map_looks = 0
        self.telemetry: dict[str, Any] = {}
        self.experts: dict[str, Any] | None = None
        self.n_ctx = 4096
        self.plan: list[str] = []
        self.planned: dict[str, float] = {}
        self.plan_json: dict[str, Any] = {}

    @property
    def alive(self) -> bool:
        return self.facts is not None

    @property
    def pid(self) -> int | None:
        return 1 if self.alive else None

    def load(self, path: Path | str, options: EngineOptions | None = None) -> Iterator[LoadEvent]:
        options = options or EngineOptions()
        self.loads.append((str(path), options))
        self.facts = None
        return self._load(str(path), options)

    def _load(self, path: str, options: EngineOptions) -> Iterator[LoadEvent]:
        yield Loading(request=1, progress=0.0, text="reading the model", plan=tuple(self.plan))
        yield Loading(request=1, progress=0.3, text="reading dense tensors")
        if self.load_gate is not None:
            self.load_gate.wait(300)
        if self.load_error is not None:
            error, self.load_error = self.load_error, None
            raise error
        self.facts = facts(path, n_ctx=options.n_ctx or self.n_ctx)
        said = {"decode": {name: {"tokens_per_s": rate} for name, rate in self.planned.items()}} if self.planned else {}
        yield Ready(request=1, facts=self.facts, load_s=0.1, plan=self.plan_json or said)

    def reload(self) -> Iterator[LoadEvent]:
        self.n_reloads += 1
        return self._load(*self.loads[-1])

    def generate(self, command: Generate) -> Iterator[GenerateEvent]:
        self.commands.append(command)
        self.stopped.clear()
        script = text(f"You said: {command.messages[-1]['content']}") if self.scripts.empty() else self.scripts.get()
        yield from script(self, command)

    def stop(self) -> None:
        self.stopped.set()

    def die(self) -> None:
        """As if somebody had killed the process."""
        self.deaths.append(EngineDiedError("the engine process was killed by SIGKILL", hint="probably out of memory"))
        self.facts = None
        self.stopped.set()
        self._on_death(self.deaths[-1])

    def stats(self, *, expert_map: bool = False, timeout_s: float = 5.0) -> Stats:
        self.n_map_looks += expert_map
        return Stats(
            request=1,
            busy=False,
            context_used=100,
            n_ctx=4096,
            rss_bytes=1 << 30,
            telemetry=self.telemetry,
            experts=self.experts if expert_map else None,
        )

    def count_tokens(self, text: str, *, timeout_s: float = 30.0) -> int:
        return len(text.split())

    def log_tail(self) -> list[str]:
        return self.log

    def close(self) -> None:
        self.closed = True
        self.facts = None
        self.stopped.set()
