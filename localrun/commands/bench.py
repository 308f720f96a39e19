"""`localrun bench`: how fast a model runs here, where the time goes, and what is read.

The model runs in this process rather than in an engine process: nothing competes with it, and its counters are accessible.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from localrun.api.options import engine_options
from localrun.api.texts import read_text
from localrun.commands import common
from localrun.commands.output import Output
from localrun.errors import UsageError

if TYPE_CHECKING:
    from localrun.engine.engine import Engine
    from localrun.engine.facts import ModelFacts
    from localrun.engine.measure.benchmark import Benchmark, BenchOptions
    from localrun.engine.options import EngineOptions

EXAMPLES = """\
examples:
  localrun bench ~/models/v4-flash --ram 48GiB
  localrun bench ~/models/v4-flash --against llama.cpp
  localrun bench ~/models/v4-flash --text book.txt --prompt-tokens 8192 --json --svg bench.svg > bench.json
"""

DEFAULT_PROMPT_TOKENS, DEFAULT_NEW_TOKENS = 2048, 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `localrun bench`."""
    parser.epilog = EXAMPLES
    common.add_model_argument(parser)
    what = parser.add_argument_group("measurement")
    what.add_argument(
        "--prompt-tokens",
        type=common.count(0),
        default=DEFAULT_PROMPT_TOKENS,
        metavar="N",
        help=f"longest context; decode is measured at 0, N/4 and N ({DEFAULT_PROMPT_TOKENS})",
    )
    what.add_argument(
        "--new-tokens",
        type=common.count(1),
        default=DEFAULT_NEW_TOKENS,
        metavar="N",
        help=f"tokens decoded at each context length ({DEFAULT_NEW_TOKENS})",
    )
    what.add_argument("--frontiers", metavar="N,N,...", help="measure at these context lengths instead")
    what.add_argument("--text", type=Path, metavar="FILE", help="take the tokens from this text (default: random ids)")
    what.add_argument("--seed", type=common.count(0), default=0, metavar="N", help="seed for the random ids (0)")
    what.add_argument(
        "--warm-up", type=common.count(0), default=32, metavar="N", help="tokens to feed first, not counted (32)"
    )
    what.add_argument(
        "--time-limit",
        type=common.seconds,
        default=600,
        metavar="S",
        help="skip measurements that would take longer (600 s)",
    )
    what.add_argument(
        "--record", type=Path, metavar="FILE", help="append the routing to this trace file; slows the run down"
    )
    what.add_argument(
        "--against",
        choices=["llama.cpp"],
        help="afterwards measure stock llama.cpp on the same GGUF and tokens, with the experts on the CPU",
    )
    what.add_argument("--no-probe", action="store_true", help="don't measure drive and memory")
    shown = parser.add_argument_group("output")
    shown.add_argument("--layers", action="store_true", help="also print a per-layer table for every phase")
    shown.add_argument("--json", action="store_true", help="print everything as JSON")
    shown.add_argument("--svg", type=Path, metavar="FILE", help="draw the time per token to FILE")
    common.add_load_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    options = bench_options(args)
    out = Output()
    settings = common.settings_of(args)
    path = common.model_path(args, settings, out)
    load_options = engine_options(settings)
    # Without --context the context is as long as the measurement needs.
    load_options = replace(load_options, n_ctx=load_options.n_ctx or options.n_tokens)
    logging.getLogger("llama.cpp").setLevel(logging.ERROR)

    from localrun.commands import bench_report
    from localrun.engine.engine import Engine
    from localrun.engine.measure import benchmark
    from localrun.engine.planner.planner import with_routing

    gguf = _gguf_of(path) if args.against else None
    out.status("probing the machine")
    machine = benchmark.machine(path, probe=not args.no_probe)
    started = time.perf_counter()
    with Engine.open(
        path, load_options, lambda part, text: out.status(f"loading {part:4.0%}  {text}"), learn=False
    ) as engine:
        load_s = time.perf_counter() - started
        tokens = _tokens(args, engine, options)
        with engine.recording(args.record) if args.record is not None else contextlib.nullcontext():
            result = benchmark.measure(engine, tokens, options, out.status)
        facts, plan = engine.facts, engine.plan
    plain = None if gguf is None else _measure_plain(gguf, facts, load_options, tokens, options, out)
    out.clear_status()
    if args.record is not None:
        out.note(f"{args.record}: routing recorded; these times include the recording")
    if args.svg is not None:
        args.svg.write_text(bench_report.svg(result, facts, machine), "utf-8")
    if args.json:
        known = plan and with_routing(plan, result.routing)
        out.json(bench_report.to_json(result, facts, machine, load_s, plan, plain, known))
        return 0
    for line in bench_report.headline(facts, machine):
        out.note(line)
    for line in bench_report.table(result):
        out.line(line)
    for line in bench_report.bound_lines(result, machine):
        out.line(line)
    for line in bench_report.prediction_lines(result, plan and with_routing(plan, result.routing)):
        out.line(line)
    for line in bench_report.comparison_lines(result, plain, plan) if plain is not None else ():
        out.line(line)
    for phase in result.phases if args.layers else ():
        out.line("")
        for line in bench_report.layer_table(phase):
            out.line(line)
    return 0


def _gguf_of(path: Path) -> Path:
    """The file that llama.cpp opens.

    Raises:
        UsageError: llama.cpp can't read the model, or would read a different one.
    """
    from localrun.quant.open import open_model

    source = open_model(path)
    if source.files[0].suffix != ".gguf":
        raise UsageError(
            f"--against llama.cpp: {path} is not a GGUF", hint="`localrun convert` makes one from a checkpoint"
        )
    if any(moe.better for moe in source.moe_layers.values()):
        raise UsageError(
            f"--against llama.cpp: {path} has better copies of some experts, which llama.cpp does not read",
            hint="compare the base: a directory without the overlay",
        )
    return source.files[0]


def _measure_plain(
    gguf: Path, facts: ModelFacts, load_options: EngineOptions, tokens: list[int], options: BenchOptions, out: Output
) -> Benchmark:
    """llama.cpp on the same tokens; the dense model, or the layers of it, where ours were."""
    from localrun.engine import memory
    from localrun.engine.measure import benchmark, stock
    from localrun.ggml.devices import choose_gpus

    gpu = choose_gpus(facts.dense_gpu)[0].address if facts.dense_gpu else None
    repacking = stock.best_repacking(facts.file_bytes, memory.available_memory())
    out.status("loading stock llama.cpp")
    plain_options = replace(load_options, n_ctx=facts.n_ctx, n_batch=facts.n_batch, n_threads=facts.n_threads)
    with stock.open_stock(gguf, plain_options, repacking, gpu=gpu, n_gpu_layers=facts.n_gpu_layers) as engine:
        return benchmark.measure(engine, tokens, options, lambda text: out.status(f"llama.cpp: {text}"))


def bench_options(args: argparse.Namespace) -> BenchOptions:
    """Benchmark options from the command line.

    Raises:
        UsageError: invalid values.
    """
    from localrun.engine.measure.benchmark import BenchOptions, default_frontiers

    if args.frontiers is None:
        frontiers = default_frontiers(max(0, args.prompt_tokens))
    else:
        try:
            frontiers = tuple(int(part) for part in args.frontiers.split(","))
        except ValueError:
            raise UsageError(
                f"--frontiers {args.frontiers}: not a list of numbers", hint="for example 0,512,4096"
            ) from None
    if args.prompt_tokens < 0 or args.warm_up < 0 or args.seed < 0:
        raise UsageError("--prompt-tokens, --warm-up and --seed can't be negative")
    return BenchOptions(
        frontiers=frontiers,
        new_tokens=args.new_tokens,
        warm_up_tokens=args.warm_up,
        time_limit_s=args.time_limit,
    )


def _tokens(args: argparse.Namespace, engine: Engine, options: BenchOptions) -> list[int]:
    from localrun.engine.measure.benchmark import random_tokens

    if args.text is None:
        return random_tokens(options.n_stream, engine.facts.n_vocab, args.seed)
    return list(engine.tokenizer.encode(read_text(args.text)))
