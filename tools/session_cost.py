"""Measures a conversation's overhead besides the model: resuming a long prompt, and the live map of experts.

    python tools/session_cost.py resume MODEL [--tokens 10000]     restart the engine, continue a conversation of that length
    python tools/session_cost.py map MODEL [--pairs 8]             decode with the engine panel open and closed, in pairs

Saved states go into a temporary folder, compiled kernels come from the usual one. Prints medians and all single values as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from localrun.engine.options import EngineOptions, SamplingOptions
from localrun.engine.process.process import EngineProcess, GenerateEvent
from localrun.engine.process.protocol import Delta, Finished, Generate
from localrun.paths import cache_dir, kernel_dir

GREEDY = SamplingOptions(temperature=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("resume", "map"))
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=10_000, help="resume: length of the conversation")
    parser.add_argument("--repeat", type=int, default=5, help="resume: restarts")
    parser.add_argument("--pairs", type=int, default=8, help="map: pairs of answers")
    parser.add_argument("--new-tokens", type=int, default=400, help="map: tokens of each answer")
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    os.environ.setdefault("LOCALRUN_KERNEL_DIR", str(kernel_dir()))
    with tempfile.TemporaryDirectory(prefix="session-cost-", dir=cache_dir()) as folder:
        os.environ["LOCALRUN_CACHE_DIR"] = folder
        os.environ["LOCALRUN_DATA_DIR"] = folder
        result = resume(args, Path(folder)) if args.what == "resume" else asyncio.run(live_map(args, Path(folder)))
    print(json.dumps(result, indent=1))


# --- resume ---------------------------------------------------------------------------------------------------------


def resume(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """A conversation of `--tokens` tokens is computed once; then, `--repeat` times, a new process goes on with it."""
    options = EngineOptions(n_ctx=args.tokens + 512, n_threads=args.threads)
    rng = random.Random(0)
    with EngineProcess() as engine:
        for _ in engine.load(args.model, options):
            pass
        assert engine.facts is not None
        n_vocab = engine.facts.n_vocab
        prompt = [rng.randrange(10, n_vocab // 2) for _ in range(args.tokens)]
        first, answer = _answer(engine, prompt, n_new=8)
    history, runs = [*prompt, *answer[:-1]], []
    files = [*folder.glob("snapshots/*/*.snapshot")]
    for _ in range(args.repeat):
        for path in files:
            _forget_cached(path)
        start = time.perf_counter()
        with EngineProcess() as engine:
            for _ in engine.load(args.model, options):
                pass
            loaded = time.perf_counter()
            finished, _ = _answer(engine, [*history, *rng.choices(range(10, n_vocab // 2), k=16)], n_new=1)
            answered = time.perf_counter()
        runs.append(
            {
                "start_and_load_s": loaded - start,
                "until_first_token_s": answered - loaded,
                "reused": finished.timings.reused_tokens,
            }
        )
    return {
        "tokens": len(history),
        "computing_it_s": first.timings.prompt_s,
        "state_bytes": max((path.stat().st_size for path in files), default=0),
        "reused_tokens": min(run["reused"] for run in runs),
        "until_first_token_s_median": statistics.median(run["until_first_token_s"] for run in runs),
        "start_and_load_s_median": statistics.median(run["start_and_load_s"] for run in runs),
        "runs": runs,
    }


def _answer(engine: EngineProcess, prompt: list[int], *, n_new: int) -> tuple[Finished, list[int]]:
    tokens: list[int] = []
    command = Generate(tokens=tuple(prompt), sampling=GREEDY, max_tokens=n_new, ignore_eos=True)
    for event in engine.generate(command):
        if isinstance(event, Delta | Finished):
            tokens += event.tokens
    assert isinstance(event, Finished)
    return event, tokens


def _forget_cached(path: Path) -> None:
    """The file is read from the drive next time."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# --- the map --------------------------------------------------------------------------------------------------------


class _LongAnswers(EngineProcess):
    """Answers of a fixed length, so that two can be compared."""

    n_new = 400

    def generate(self, command: Generate) -> Iterator[GenerateEvent]:
        return super().generate(replace(command, ignore_eos=True, max_tokens=self.n_new, sampling=GREEDY))


async def live_map(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The whole interface at 160x50, drawing into memory, with the engine panel and its map open or closed."""
    from localrun.tui.app import Launch, LocalrunApp

    _LongAnswers.n_new = args.new_tokens
    launch = Launch(model=args.model, options=EngineOptions(n_threads=args.threads))
    app = LocalrunApp(
        launch, engine_factory=lambda died: _LongAnswers(on_death=died), store_path=folder / "conversations.sqlite3"
    )
    rates: dict[str, list[float]] = {"off": [], "side": []}
    async with app.run_test(size=(160, 50)):
        while app.chat is None or not app.chat.is_mounted or app.chat.model.facts is None:
            await asyncio.sleep(0.05)
        screen = app.chat
        for number in range(-1, args.pairs):  # the first pair only warms up
            for panel in ("off", "side") if number % 2 else ("side", "off"):
                screen.run_command("new")
                screen.panels.set(engine=panel)
                screen.composer.submit("Tell me everything you know.")
                while screen.asking.busy or not screen.queue.idle:
                    await asyncio.sleep(0.1)
                answer = screen.asking.answering.answer
                assert answer is not None
                rate = answer.decode_tokens_per_s
                assert rate is not None, answer.error
                if number >= 0:
                    rates[panel].append(rate)
        n_cells = screen.model.facts.n_moe_layers * screen.model.facts.n_experts if screen.model.facts else 0
    costs = [1 - with_map / without for with_map, without in zip(rates["side"], rates["off"], strict=True)]
    return {
        "experts": n_cells,
        "tokens_per_s_without": statistics.median(rates["off"]),
        "tokens_per_s_with": statistics.median(rates["side"]),
        "cost_of_decode_time_median": statistics.median(costs),
        "rates": rates,
    }


if __name__ == "__main__":
    main()
