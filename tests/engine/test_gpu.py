"""The engine with a GPU, which is llama.cpp's RPC device on loopback: placed, reported, lost in the middle of an answer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from localrun.engine.process import EngineProcess
from localrun.engine.protocol import Delta, Finished, Generate, Ready, SamplingOptions
from localrun.errors import BudgetError, EngineDiedError, LocalrunError, UsageError
from tests.engine.conftest import OPTIONS
from tests.rpc_server import rpc_server

QUESTION: dict[str, Any] = {
    "messages": ({"role": "user", "content": "Hello"},),
    "sampling": SamplingOptions(temperature=0),
}


def test_answer_goes_on_without_a_gpu_that_vanished(chat_model_path: Path) -> None:
    with rpc_server() as (endpoint, server), EngineProcess() as engine:
        *_, ready = engine.load(chat_model_path, replace(OPTIONS, rpc=endpoint, vram_bytes=2 << 30))
        assert isinstance(ready, Ready)
        assert ready.facts.gpus
        assert ready.facts.dense_on_gpu
        *_, done = engine.generate(Generate(**QUESTION, max_tokens=8))
        assert isinstance(done, Finished)
        stats = engine.stats().telemetry
        assert stats["gpu_hits"] > 0  # type: ignore[operator]
        assert 0 < stats["gpu_bytes"] < 1 << 30  # type: ignore[operator]

        def lose_it() -> None:
            for event in engine.generate(Generate(**QUESTION, ignore_eos=True)):
                if isinstance(event, Delta):
                    server.kill()

        with pytest.raises(EngineDiedError, match="RPC") as caught:
            lose_it()
        assert caught.value.hint is not None
        events = list(engine.generate(Generate(**QUESTION, max_tokens=8)))
        (again,) = (event for event in events if isinstance(event, Ready))
        assert again.facts.gpus == ()
        assert isinstance(events[-1], Finished)


def test_what_no_gpu_can_do_is_refused_with_the_way_out(chat_model_path: Path) -> None:
    with rpc_server() as (endpoint, _), EngineProcess() as engine:
        for options, error, message in (
            ({"vram_bytes": 1 << 30}, LocalrunError, "no GPU"),
            ({"gpu": "CUDA9"}, UsageError, "CUDA9"),
            ({"rpc": "127.0.0.1:9"}, LocalrunError, "127.0.0.1:9"),
            ({"rpc": endpoint, "vram_bytes": 1 << 50}, BudgetError, "free"),
            ({"rpc": endpoint, "vram_bytes": 1 << 12}, BudgetError, "too little"),
        ):
            with pytest.raises(error, match=message) as caught:
                list(engine.load(chat_model_path, replace(OPTIONS, **options)))
            assert caught.value.hint is not None
