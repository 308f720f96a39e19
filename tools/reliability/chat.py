"""A long chat with a model whose control group gets more and less memory, now and then too little.

    python -m tools.reliability chat --minutes 60 --seed 1

Conversations go on, go back, are stopped, and are kept in a file as the interface keeps them. The limit changes between and in the
middle of answers, from far above what the engine uses to hardly more than that, where the kernel ends the engine. Allowed: an
answer that ends with `EngineDiedError` while the kernel says that it killed, or a refusal that names memory. Everything else is a
problem: an answer without an end, a first answer that differs from the one without a limit, a message that is not in the file
afterwards, a step longer than `PATIENCE_S`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from localrun.api import demo
from localrun.engine.conversations import ConversationStore
from localrun.engine.options import EngineOptions, SamplingOptions
from localrun.engine.process.process import EngineProcess
from localrun.engine.process.protocol import Delta, Finished, Generate
from localrun.errors import BudgetError, EngineDiedError, HostError, LocalrunError, UsageError
from localrun.paths import kernel_dir
from tools.memory_limit import MemoryLimit
from tools.reliability.tally import Tally

PATIENCE_S = 180.0
PLENTY = 8 << 30
OPTIONS = EngineOptions(n_ctx=2048, n_batch=128, n_threads=1, ram_bytes=12 << 20)
"""12 MiB hold two thirds of the demo's experts: every answer reads some."""

QUESTIONS = (
    "Hello! Who are you?",
    "What is the capital of France?",
    "Tell me a short story.",
    "What is 7 plus 5?",
    "Why is the sky blue?",
    "Write one sentence about the sea.",
    "Who was Sherlock Holmes?",
    "How do I boil an egg?",
)


class Chat:
    """One run. `_guard` is a thread that changes the limit while answers are written."""

    def __init__(self, tally: Tally, group: MemoryLimit, store: ConversationStore, model: Path) -> None:
        self._tally, self._group, self._store, self._model = tally, group, store, model
        self._rng = random.Random(tally.seed)
        self._engine = EngineProcess()
        self._first: dict[str, str] = {}  # question -> first answer, as given with all the memory
        self._expected: dict[int, list[tuple[str, str]]] = {}  # conversation -> (role, text)
        self._kills = 0

    def run(self, seconds: float) -> None:
        """Chats for so long, then compares the file with what was said."""
        end = time.monotonic() + seconds
        try:
            self._load()
            for question in QUESTIONS:
                self._first[question] = self._ask([{"role": "user", "content": question}], sure=True)[0]
            stop = threading.Event()
            guard = threading.Thread(target=self._change_limits, args=(stop,), daemon=True)
            guard.start()
            while time.monotonic() < end:
                began = time.monotonic()
                self._turn()
                self._tally.done += 1
                self._tally.save()
                longest = self._tally.figures.get("longest_turn_s", 0.0)
                self._tally.figures["longest_turn_s"] = round(max(longest, time.monotonic() - began), 1)
                if time.monotonic() - began > PATIENCE_S:
                    self._tally.problem(f"turn {self._tally.done} took {time.monotonic() - began:.0f} s")
            stop.set()
            guard.join()
            self._group.change(PLENTY)
            for question in QUESTIONS:  # it still answers, and the same
                self._compare(question, self._ask([{"role": "user", "content": question}], sure=True)[0])
            self._check_file()
        finally:
            self._engine.close()
        self._tally.figures["out_of_memory_kills"] = self._group.out_of_memory_kills()
        self._tally.figures["conversations"] = len(self._expected)
        self._tally.figures["messages"] = sum(map(len, self._expected.values()))

    # --- the engine

    def _join(self) -> None:
        """Starts a process if there is none, and puts it into the group before it loads anything."""
        self._engine.start()
        if (pid := self._engine.pid) is not None:
            with contextlib.suppress(ProcessLookupError):
                self._group.add(pid)

    def _load(self) -> None:
        self._join()
        for _ in self._engine.load(self._model, OPTIONS):
            pass

    def _load_with_little(self) -> None:
        """Loads in a new process below a limit that may be too low for that, then again with plenty."""
        self._engine.close()
        self._engine.start()
        self._join()
        limit = self._rng.randrange(16 << 20, 256 << 20)
        self._group.change(limit)
        how = "loaded"
        try:
            for _ in self._engine.load(self._model, OPTIONS):
                pass
        except LocalrunError as error:
            how = self._failure(error)
        self._tally.outcomes[f"load with little: {how}"] += 1
        self._group.change(PLENTY)
        try:
            self._load()
        except LocalrunError as error:  # the limit may have changed meanwhile; the next question loads again
            self._tally.outcomes[f"load: {self._failure(error)}"] += 1

    def _ask(self, messages: list[dict[str, Any]], *, sure: bool = False, **sampling: Any) -> tuple[str, str]:
        """(text, how it ended). With `sure` a failure is a problem."""
        command = Generate(
            messages=tuple(messages),
            sampling=SamplingOptions(**{"temperature": 0.0, "seed": 1, **sampling}),
            max_tokens=60,
        )
        stop_after = None if sure or self._rng.random() < 0.85 else self._rng.randrange(1, 40)
        parts: list[str] = []
        how = "no end"
        try:
            self._join()
            for event in self._engine.generate(command):
                if isinstance(event, Delta):
                    parts.append(event.text)
                    if stop_after is not None and len(parts) == stop_after:
                        self._engine.stop()
                elif isinstance(event, Finished):
                    how = event.reason
        except LocalrunError as error:
            how = self._failure(error)
            if sure:
                self._tally.problem(f"with all the memory: {error!r}")
        self._tally.outcomes[f"answer: {how}"] += 1
        if how == "no end":
            self._tally.problem("an answer has no end")
        return "".join(parts), how

    def _failure(self, error: LocalrunError) -> str:
        if isinstance(error, EngineDiedError):
            kills = self._group.out_of_memory_kills()
            killed, self._kills = kills > self._kills, kills
            if not killed:
                self._tally.problem(f"the engine died: {error} | " + " | ".join(self._engine.log_tail()[-8:]))
            return "engine killed for memory" if killed else "engine died"
        if not isinstance(error, BudgetError | HostError) and "memory" not in str(error):
            self._tally.problem(f"{error!r} hint={error.hint}")
        return f"refused: {type(error).__name__}"

    def _change_limits(self, stop: threading.Event) -> None:
        rng = random.Random(self._tally.seed + 1)
        while not stop.wait(rng.uniform(0.5, 12.0)):
            used = self._group.anonymous_bytes()
            kind = rng.choices(("plenty", "some more", "hardly more", "less"), (4, 4, 2, 1))[0]
            wanted = {
                "plenty": PLENTY,
                "some more": used + rng.randrange(64 << 20, 512 << 20),
                "hardly more": used + rng.randrange(64 << 10, 8 << 20),
                "less": int(used * rng.uniform(0.6, 0.99)),
            }[kind]
            changed = self._group.change(wanted)
            self._tally.outcomes[f"limit: {kind}" + ("" if changed else ", refused by the kernel")] += 1
            if kind in ("hardly more", "less"):
                stop.wait(rng.uniform(1.0, 6.0))
                self._group.change(PLENTY)

    # --- conversations

    def _turn(self) -> None:
        rng = self._rng
        kind = rng.choices(("first", "on", "back", "long", "load"), (12, 20, 4, 4, 1))[0]
        if kind == "load":
            self._load_with_little()
            return
        if kind == "first" or not self._expected:
            question = rng.choice(QUESTIONS)
            text, how = self._ask([{"role": "user", "content": question}], sure=False)
            if how in ("eos", "length"):
                self._compare(question, text)
            self._keep(self._store.create(question).id, question, text, how)
            return
        number = rng.choice(list(self._expected)[-10:])
        if kind == "back" and len(self._expected[number]) > 2:
            parent = self._store.branch(number)[-3]
            self._store.rewind(number, parent.id)
            del self._expected[number][-2:]
        question = rng.choice(QUESTIONS) * (rng.randrange(10, 60) if kind == "long" else 1)
        history = [{"role": role, "content": text} for role, text in self._expected[number]]
        text, how = self._ask([*history, {"role": "user", "content": question}], temperature=rng.choice((0.0, 0.8)))
        if "ContextFull" in how or how == "context":
            self._tally.outcomes["context full"] += 1
        self._keep(number, question, text, how)

    def _keep(self, number: int, question: str, text: str, how: str) -> None:
        branch = self._store.branch(number)
        asked = self._store.add(number, branch[-1].id if branch else None, "user", question)
        state: Any = "complete" if how in ("eos", "length", "context") else "stopped" if how == "stopped" else "failed"
        self._store.add(number, asked.id, "assistant", text, state=state)
        self._expected.setdefault(number, []).extend([("user", question), ("assistant", text)])

    def _compare(self, question: str, text: str) -> None:
        same = text == self._first[question]
        self._tally.outcomes["first answer: " + ("same" if same else "other")] += 1
        if not same:
            self._tally.problem(f"{question!r}: {text!r} instead of {self._first[question]!r}")

    def _check_file(self) -> None:
        with ConversationStore.open(self._store.path) as store:
            for number, expected in self._expected.items():
                if [(message.role, message.content) for message in store.branch(number)] != expected:
                    self._tally.problem(f"conversation {number} is not in the file as it was said")


@contextlib.contextmanager
def _own_folders() -> Iterator[Path]:
    """Cache and data in a folder that goes away; compiled kernels are shared."""
    os.environ.setdefault("LOCALRUN_KERNEL_DIR", str(kernel_dir()))
    with tempfile.TemporaryDirectory(prefix="reliability-chat-") as name:
        for kind in ("CACHE", "DATA", "CONFIG"):
            os.environ[f"LOCALRUN_{kind}_DIR"] = str(Path(name, kind.lower()))
        yield Path(name)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--model", type=Path, help="default: the demo model")


def run(args: argparse.Namespace, tally: Tally) -> None:
    """Raises UsageError: fewer than no minutes; LocalrunError: this machine has no groups that limit memory."""
    if args.minutes <= 0:
        raise UsageError("--minutes: more than 0")
    with (
        _own_folders() as folder,
        MemoryLimit(PLENTY) as group,
        ConversationStore.open(folder / "conversations.sqlite3") as store,
    ):
        Chat(tally, group, store, args.model or demo.converted()).run(args.minutes * 60)
