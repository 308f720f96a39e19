"""`localrun plan`: what fits where on this machine or another, how fast it will be, and what would make it faster."""

from __future__ import annotations

import argparse
import shlex
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from localrun import config
from localrun.api import models
from localrun.api.planning import Machine, plan_with
from localrun.atomic import replacing
from localrun.commands import common, compiling
from localrun.commands.output import Output, folded
from localrun.options import BY_NAME, add_flags
from localrun.units import format_duration, format_rate, format_size

if TYPE_CHECKING:
    from localrun.engine.planner.plan import Plan
    from localrun.engine.planner.speed import Range

EXAMPLES = """\
examples:
  localrun plan flash                                        Flash on this machine, nothing downloaded yet
  localrun plan flash --ram 12GiB --context 131072           the same, with limits
  localrun plan pro --machine-ram 192GiB --machine-gpu 'RTX 4090' --machine-drive-rate 7GB/s --machine-threads 16
  localrun plan flash --box gpu-24-ram-64 --base q2_k --json
  localrun plan flash --box ram-128 --svg plan.svg           the same as a picture
"""

LIMITS = ("ram", "vram", "context", "batch", "kv", "dense", "threads", "adaptive")
"""Options of a load that a plan follows, with their meaning there."""


BOX_NAMES = (
    *(
        "ram-32",
        "ram-64",
        "ram-128",
        "gpu-12-ram-32",
        "gpu-16-ram-64",
        "gpu-24-ram-64",
        "gpu-32-ram-64",
        "gpu-24-ram-128",
    ),
    "gpu-2x24-ram-256",
)
"""Repeated from `engine.planner.boxes`, so that `--help` need not load it; a test compares them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `localrun plan`."""
    parser.epilog = EXAMPLES
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="flash, pro, a config.json, a converted directory, a GGUF, an official checkpoint, or a model name "
        "(default: the model that is set or was used last, else flash)",
    )
    add_flags(parser, "limits, as for loading", [BY_NAME[name] for name in LIMITS])
    machine = parser.add_argument_group("another machine (default: this one)")
    machine.add_argument("--box", metavar="NAME", help=f"one of {', '.join(BOX_NAMES)}")
    machine.add_argument(
        "--machine-ram", type=common.size, metavar="SIZE", help="its RAM, of which 2 GiB are assumed to be in use"
    )
    machine.add_argument(
        "--machine-vram",
        type=common.size,
        metavar="SIZE",
        action="append",
        help="memory of a GPU; repeat for several GPUs",
    )
    machine.add_argument(
        "--machine-gpu",
        metavar="NAME",
        action="append",
        help="a GPU by its name, such as 'RTX 4090'; repeat for several GPUs",
    )
    machine.add_argument("--machine-threads", type=common.count(1, 4096), metavar="N", help="number of cores")
    machine.add_argument(
        "--machine-memory-rate", type=common.rate, metavar="RATE", help="RAM bandwidth, such as 80GB/s"
    )
    machine.add_argument(
        "--machine-drive-rate", type=common.rate, metavar="RATE", help="read speed of the model's drive, such as 7GB/s"
    )
    machine.add_argument("--machine-drives", type=int, choices=(1, 2), help="2: a mirror on a second drive")
    machine.add_argument(
        "--machine-gpu-rate",
        type=common.rate,
        metavar="RATE",
        help="GPU memory bandwidth (known cards: as named, others: 500GB/s)",
    )
    machine.add_argument("--no-probe", action="store_true", help="don't measure this machine's drive and memory")
    how = parser.add_argument_group("prediction")
    how.add_argument("--base", metavar="TYPE", help="type of all experts, for a model not converted yet")
    how.add_argument(
        "--position", type=common.count(0), metavar="N", help="tokens already in the context when an answer begins"
    )
    how.add_argument(
        "--prompt-tokens", type=common.count(1), default=2048, metavar="N", help="length of the prompt (2048)"
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="also draw memory and time as bars to FILE")


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    from localrun.engine.planner.bars import bar_lines, bars, bars_svg

    out = Output()
    machine = _machine(args)
    user = common.settings_of(args)
    if args.model is None:
        args.model = str(user["model"] or models.last() or "flash")
        out.note(f"no MODEL given: this is the plan of {args.model}")
    if machine is not None:  # settings for this machine don't apply to another one
        user = config.Settings(models=user.models).overridden(args, args.option_names)
    out.status("probing the machine")
    with compiling.Notice(out):
        plan = plan_with(
            args.model,
            user,
            machine,
            base=args.base,
            position=args.position,
            prompt_tokens=args.prompt_tokens,
            probe=not args.no_probe,
        )
    out.clear_status()
    if args.svg is not None:
        with replacing(args.svg) as file:
            file.write(bars_svg(bars(plan), f"{plan.sizes.name}: {args.box or 'the machine'} as planned").encode())
        out.note(f"wrote {args.svg}")
    if args.json:
        out.json(plan.to_json())
        return 0
    width = shutil.get_terminal_size().columns
    drawn = ["", *bar_lines(bars(plan), width)] if out.out_is_terminal else []
    lines = plan.lines(faster=not plan.suggestions)  # those are below, as commands
    if out.out_is_terminal:
        lines = [part for line in lines for part in folded(line, width)]
    advice = faster(plan, args, width if out.out_is_terminal else None)
    for line in [*lines, *drawn, "", *table(plan), *advice, *download(args.model)]:
        out.line(line)
    return 0


def _machine(args: argparse.Namespace) -> Machine | None:
    """The machine that was described; None: this one."""
    described = {
        name.removeprefix("machine_"): value for name, value in vars(args).items() if name.startswith("machine_")
    }
    given = {name: value for name, value in described.items() if value is not None}
    return Machine(box=args.box, **given) if args.box is not None or given else None


def table(plan: Plan) -> list[str]:
    """The details behind the six lines."""
    at, sizes = plan.placement, plan.sizes
    lines = ["where memory goes"]
    lines += [f"  {part:<16}{format_size(size):>12}" for part, size in sizes.dense.items()]
    cache = sizes.kv(plan.n_ctx, plan.options.kv_type, plan.options.n_batch)
    lines += [f"  {f'cache: {part}':<24}{format_size(size):>12}" for part, size in cache.items()]
    lines.append(f"  {f'buffers, batches of {plan.options.n_batch}':<24}{format_size(at.compute_bytes):>12}")
    if plan.decode is None or plan.prefill is None:
        return lines
    for name, span in (("answers", plan.decode), ("prompts", plan.prefill)):
        lines += ["", *_phase(name, span)]
    return lines


def faster(plan: Plan, args: argparse.Namespace, width: int | None = None) -> list[str]:
    """Each suggestion, as a command if it is one, and below it, in lines of `width` columns, what it gives and costs."""
    if not plan.suggestions:
        return []
    lines = ["", "what would be faster"]
    for s in plan.suggestions:
        gives = f"{s.phase} {format_rate(s.tokens_per_s)} tokens/s, {s.gain:.2f}x; {s.cost}"
        lines.append(f"  {command_of(s.text, args, convertible=plan.sizes.convertible)}")
        lines += folded(f"      {gives}", width, 6) if width else [f"      {gives}"]
    return lines


def command_of(change: str, args: argparse.Namespace, *, convertible: bool = True) -> str:
    """A suggestion as a command line: `--kv q8_0` -> `localrun chat MODEL --kv q8_0`.

    Another machine has no command: `with 96 GiB of RAM:`. A model that was named by its kind only is where `download` puts it.

    Args:
        convertible: the model is a checkpoint; else its checkpoint has to be named.
    """
    path = _folder(args.model) if _is_to_come(args.model) else shlex.quote(args.model)
    if change.startswith("convert "):
        source = path if convertible else "CHECKPOINT"
        return f"localrun convert {source} DIR {change.removeprefix('convert ')}"
    return f"localrun chat {path} {change}" if change.startswith("--") else f"{change}:"


def download(model: str) -> list[str]:
    """How to get a model that was named by its kind only: the command, its size and its time, and what to do then."""
    from localrun.quant.checkpoint.official import DOWNLOAD_BYTES, REPOSITORIES

    if not _is_to_come(model):
        return []
    n_bytes, folder = DOWNLOAD_BYTES[model], _folder(model)
    times = ", ".join(f"{format_duration(8 * n_bytes / rate)} at {name}" for name, rate in LINES.items())
    return [
        "",
        f"to get it ({n_bytes / 1e9:.0f} GB: {times})",
        f"  hf download {REPOSITORIES[model]} --local-dir {folder}",
        f"  localrun chat {folder}",
    ]


LINES = {"100 Mbit/s": 100e6, "1 Gbit/s": 1e9}
"""Connections, as their sellers name them, in bits per second."""


def _is_to_come(model: str) -> bool:
    from localrun.quant.checkpoint.official import BUILT_IN

    return model in BUILT_IN and not Path(model).exists()


def _folder(model: str) -> str:
    from localrun.quant.checkpoint.official import NAMES

    return f"~/models/{NAMES[model]}"


def _phase(name: str, span: Range) -> list[str]:
    estimates = (span.low, span.likely, span.high)
    lines = [f"{name:<28}{'low':>10}{'likely':>10}{'high':>10}"]
    lines.append(f"  {'tokens/s':<26}" + "".join(f"{rate.tokens_per_s:>10.2f}" for rate in estimates))
    lines.append(f"  {'hit rate':<26}" + "".join(f"{rate.hit_rate:>10.0%}" for rate in estimates))
    lines.append(f"  {'GB read from disk':<26}" + "".join(f"{rate.disk_bytes / 1e9:>10.3f}" for rate in estimates))
    for resource in span.likely.seconds:
        lines.append(
            f"  {f'ms: {resource}':<26}" + "".join(f"{1e3 * rate.seconds[resource]:>10.2f}" for rate in estimates)
        )
    return lines
