"""One measurement in a process of its own: a crash or a card without memory costs this figure only. Prints JSON."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from localrun.engine import engine as engine_module
from localrun.engine.engine import Engine
from localrun.engine.measure.benchmark import BenchOptions, measure, random_tokens
from localrun.engine.measure.stock import open_stock
from localrun.engine.options import EngineOptions
from localrun.errors import LocalrunError
from localrun.ggml.devices import choose_gpus
from localrun.quant.model.source import ModelSource
from tools.gpu_check.models import PooledSource


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is measured.

    Attributes:
        name: for the table.
        model: folder of a checkpoint, or a GGUF.
        own_layers: of a checkpoint that `models` wrote; 0: a model as any other.
        stock: by llama.cpp alone, experts on the CPU, everything else on the card.
        gpu: `auto`, `none` or a device's name.
        rpc: `HOST:PORT` of a stand-in for a card.
        ram_bytes, vram_bytes: budgets; None: chosen.
        n_threads: threads; 0: one per core.
        prompt_tokens, new_tokens: of one prompt, and decoded before it and after it.
        limit_s: seconds for all phases.
    """

    name: str
    model: str
    own_layers: int = 0
    stock: bool = False
    gpu: str = "auto"
    rpc: str | None = None
    ram_bytes: int | None = None
    vram_bytes: int | None = None
    n_threads: int = 0
    prompt_tokens: int = 512
    new_tokens: int = 24
    limit_s: float = 120.0


def run(task: Task) -> dict[str, Any]:
    """The task with its results: rates by phase, what the plan said, and where the time went."""
    bench = BenchOptions(
        frontiers=(0, task.prompt_tokens),
        new_tokens=task.new_tokens,
        warm_up_tokens=min(32, task.prompt_tokens),
        time_limit_s=task.limit_s,
    )
    options = EngineOptions(
        ram_bytes=task.ram_bytes,
        vram_bytes=task.vram_bytes,
        gpu=task.gpu,
        rpc=task.rpc,
        n_ctx=bench.n_tokens + 64,
        n_threads=task.n_threads,
    )
    started = time.monotonic()
    with _open(task, options) as engine:
        load_s = time.monotonic() - started
        tokens = random_tokens(bench.n_stream, engine.vocab.n_tokens, seed=1)
        result = measure(engine, tokens, bench)
        stats = engine.stats()
        plan = engine.plan
    return {
        **asdict(task),
        "load_s": load_s,
        "phases": [phase.to_json() for phase in result.phases],
        "skipped": list(result.skipped),
        "gpu_experts": stats.get("gpu_experts", 0),
        "plan": plan.to_json() if plan is not None else None,
    }


def _open(task: Task, options: EngineOptions) -> Engine:
    path = Path(task.model)
    if task.stock:
        chosen = choose_gpus(task.gpu, [task.rpc] if task.rpc else [])
        return open_stock(path, options, gpu=chosen[0].address if chosen else None)
    if not task.own_layers:
        return Engine.open(path, options, learn=False)

    def pooled(path: Path, **_: object) -> ModelSource:
        return PooledSource(path, task.own_layers)

    with patch.object(engine_module, "open_model", pooled):
        return Engine.open(path, options, learn=False)


def main(arguments: Sequence[str]) -> int:
    task = Task(**json.loads(arguments[0]))
    try:
        result = run(task)
    except LocalrunError as error:
        result = {**asdict(task), "error": str(error)}
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
