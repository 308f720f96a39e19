"""The campaign: tasks in order of importance, until the time is over; what was left out is part of the result."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from localrun.api.conversion import convert
from localrun.engine import memory
from localrun.engine.measure.benchmark import machine
from localrun.errors import LocalrunError
from localrun.ggml.devices import choose_gpus
from tools.gpu_check.fit import Fit, check_slice, whole_that_fits
from tools.gpu_check.models import write_model
from tools.gpu_check.task import Task

LIMIT_S = 480.0
LEAST_S = 20.0
"""No task of a large model is worth starting with less."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Campaign:
    """What is to be done.

    Attributes:
        folder: scratch for the models, best in memory.
        preset: dimensions of the whole model, as `tools.synthetic_config.PRESETS` has them; `second` of another one, at the end.
        own_layers: layers whose experts are written; the others share them.
        slice_layers: layers of the model on which llama.cpp is compared: all its experts are there, as it needs them.
        gpu, rpc: the card, or its stand-in.
        shares: of the card's free memory, each a measurement of its own.
        limit_s: seconds in all.
        least_s: seconds that must be left to begin a task.
        prompt_tokens, new_tokens, n_threads: see `Task`.
        memory_bytes: most memory to use, models' files included; None: what is free.
    """

    folder: Path
    preset: str = "flash"
    second: str | None = "pro"
    own_layers: int = 2
    slice_layers: int = 3
    gpu: str = "auto"
    rpc: str | None = None
    shares: tuple[float, ...] = (1.0, 0.25, 0.5)
    limit_s: float = LIMIT_S
    least_s: float = LEAST_S
    prompt_tokens: int = 512
    new_tokens: int = 24
    n_threads: int = 0
    memory_bytes: int | None = None

    @property
    def room(self) -> int | None:
        """Memory that models may take now, their files included."""
        return memory.available_memory() if self.memory_bytes is None else self.memory_bytes


def run(campaign: Campaign, out: Path, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Runs it; `out` holds what is known so far after every task."""
    deadline = time.monotonic() + campaign.limit_s
    cards = choose_gpus(campaign.gpu, [campaign.rpc] if campaign.rpc else [])
    result: dict[str, Any] = {
        "preset": campaign.preset,
        "card": cards[0].description if cards else None,
        "card_bytes": cards[0].free_bytes if cards else 0,
        "machine": asdict(machine(probe=False)),
        "tasks": [],
        "left_out": [],
    }

    def save() -> None:
        out.write_text(json.dumps(result, indent=1, default=str) + "\n")

    for name, prepare in _steps(campaign, cards[0].free_bytes if cards else 0, result["left_out"]):
        left = deadline - time.monotonic()
        if left < campaign.least_s:
            result["left_out"].append(f"{name}: {max(0, left):.0f} s were left")
            say(result["left_out"][-1])
            save()
            continue
        say(f"{name} ({left:.0f} s left)")
        started = time.monotonic()
        try:
            task = replace(prepare(), name=name)
            task = replace(task, limit_s=max(1.0, 0.6 * (deadline - time.monotonic())))
            found = _in_a_process(task, deadline - time.monotonic())
        except LocalrunError as error:
            result["left_out"].append(f"{name}: {error}")
            say(result["left_out"][-1])
            save()
            continue
        found["wall_s"] = time.monotonic() - started
        result["tasks"].append(found)
        save()
    save()
    return result


def _steps(campaign: Campaign, free_bytes: int, left_out: list[str]) -> list[tuple[str, Callable[[], Task]]]:
    """(name, what makes its model and says what to measure), the most important first.

    Args:
        left_out: gets what a model lacks because memory is short.
    """
    fits: dict[str, Fit] = {}

    def whole(preset: str, **options: Any) -> Callable[[], Task]:
        def prepare() -> Task:
            folder = campaign.folder / preset
            if preset not in fits:
                fits[preset] = fit = whole_that_fits(preset, campaign.own_layers, campaign.room)
                left_out.extend(filter(None, [fit.left_out]))
                if folder.exists():
                    shutil.rmtree(folder)  # of another campaign, and perhaps of another size
                write_model(folder, preset, layers=fit.layers, own_layers=fit.own_layers)
            return _task(campaign, folder, own_layers=fits[preset].own_layers, **options)

        return prepare

    def part(**options: Any) -> Callable[[], Task]:
        def prepare() -> Task:
            checkpoint, converted = campaign.folder / "slice", campaign.folder / "slice-gguf"
            if not (checkpoint / "config.json").exists():
                check_slice(campaign.preset, campaign.slice_layers, campaign.room)
                write_model(checkpoint, campaign.preset, layers=campaign.slice_layers)
            if not (found := list(converted.glob("*.gguf"))):
                convert(checkpoint, converted)
                found = list(converted.glob("*.gguf"))
            (model,) = found
            return _task(campaign, model, **options)

        return prepare

    steps: list[tuple[str, Callable[[], Task]]] = []
    if free_bytes:
        steps = [
            (
                f"whole {campaign.preset}, {share:.0%} of the card",
                whole(campaign.preset, vram_bytes=None if share == 1 else int(share * free_bytes)),
            )
            for share in campaign.shares
        ]
    steps.insert(1, (f"whole {campaign.preset}, no card", whole(campaign.preset, gpu="none", rpc=None)))
    steps.append((f"{campaign.slice_layers} layers, localrun", part()))
    steps.append((f"{campaign.slice_layers} layers, llama.cpp with experts on the CPU", part(stock=True)))
    if campaign.second:
        steps.append((f"whole {campaign.second}", whole(campaign.second)))
    return steps


def _task(campaign: Campaign, model: Path, **options: Any) -> Task:
    """Experts get what RAM is left beside the models' files, which lie in memory too. Without a card, where the dense model takes
    RAM as well, the engine chooses how much that is."""
    ram = min(filter(None, (campaign.room, memory.available_memory())), default=None)
    chosen = options.get("stock") or options.get("gpu", campaign.gpu) == "none"
    given: dict[str, Any] = {
        "gpu": campaign.gpu,
        "rpc": campaign.rpc,
        "ram_bytes": int(0.7 * ram) if ram and not chosen else None,
        "n_threads": campaign.n_threads,
        "prompt_tokens": campaign.prompt_tokens,
        "new_tokens": campaign.new_tokens,
        **options,
    }
    return Task(name="", model=str(model), **given)


def _in_a_process(task: Task, limit_s: float) -> dict[str, Any]:
    command: Sequence[str] = [sys.executable, "-m", "tools.gpu_check.task", json.dumps(asdict(task))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(1.0, limit_s), check=False)
    except subprocess.TimeoutExpired:
        return {**asdict(task), "error": f"ended after {limit_s:.0f} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {**asdict(task), "error": f"exit {done.returncode}: {done.stderr.strip()[-500:]}"}
    found: dict[str, Any] = json.loads(lines[-1])
    return found
