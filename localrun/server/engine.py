"""The engine interface that the server needs; implemented by `EngineProcess`, and by a scripted engine in tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from localrun.engine.facts import ModelFacts
from localrun.engine.process.process import GenerateEvent
from localrun.engine.process.protocol import CountTokens, Generate, Stats


class ServerEngine(Protocol):
    """One model, one answer at a time. All methods block; any thread."""

    @property
    def facts(self) -> ModelFacts | None:
        """Facts about the loaded model; None if none is loaded, e.g. after its process died."""

    def generate(self, command: Generate) -> Iterator[GenerateEvent]:
        """One answer, the last event is Finished; loads the model again first if need be. Raises LocalrunError."""

    def stop(self) -> None:
        """Ends the running answer within one token."""

    def stats(self, *, expert_map: bool = False, timeout_s: float = 5.0) -> Stats:
        """Counters, also in the middle of an answer. Raises LocalrunError, TimeoutError."""

    def tokenize(self, text: str, *, timeout_s: float = 30.0) -> tuple[int, ...]:
        """Ids of a text, also in the middle of an answer. Raises as `stats`."""

    def count(self, command: CountTokens, *, timeout_s: float = 30.0) -> int:
        """Tokens of a text or a conversation, also in the middle of an answer. Raises as `stats`."""
