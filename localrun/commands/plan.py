"""`localrun plan`: what fits where on this machine or another, how fast it will be, and what would make it faster."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from localrun import config
from localrun.commands import common
from localrun.commands.output import Output
from localrun.errors import UsageError
from localrun.units import format_size

if TYPE_CHECKING:
    from localrun.engine.planner.hardware import Hardware
    from localrun.engine.planner.plan import Plan, Settings
    from localrun.engine.planner.sizes import ModelSizes
    from localrun.engine.planner.speed import Range

EXAMPLES = """\
examples:
  localrun plan flash                                        Flash on this machine, nothing downloaded
  localrun plan pro --ram 192GiB --vram 24GiB --disk-gbps 7 --threads 16
  localrun plan flash --base q2_k --context 131072 --kv q8_0 --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `localrun plan`."""
    parser.epilog = EXAMPLES
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="flash, pro, a config.json, a converted directory, a GGUF or an official checkpoint",
    )
    machine = parser.add_argument_group("the machine (default: this one)")
    machine.add_argument(
        "--ram", type=common.size, metavar="SIZE", help="memory of a machine that is described, 2 GiB of it in use"
    )
    machine.add_argument(
        "--vram", type=common.size, metavar="SIZE", action="append", help="memory of a GPU; again for another one"
    )
    machine.add_argument("--gpu-gbps", type=_rate, metavar="X", help="GB/s of the GPUs' memory (500)")
    machine.add_argument("--pcie-gbps", type=_rate, metavar="X", help="GB/s between RAM and GPU (12)")
    machine.add_argument("--disk-gbps", type=_rate, metavar="X", help="GB/s of the model's drive")
    machine.add_argument("--drives", type=int, choices=(1, 2), help="2: a mirror on a second drive")
    machine.add_argument("--memory-gbps", type=_rate, metavar="X", help="GB/s of RAM")
    machine.add_argument("--threads", type=int, metavar="N", help="CPU threads")
    machine.add_argument("--no-probe", action="store_true", help="don't measure drive and memory")
    how = parser.add_argument_group("how it is run")
    how.add_argument("--experts-ram", type=common.size, metavar="SIZE", help="as --ram of the commands that load")
    how.add_argument("--context", type=int, metavar="N", help="tokens of context (32768)")
    how.add_argument("--kv", metavar="f16|bf16|q8_0|q4_0|f32", help="number format of the KV cache (f16)")
    how.add_argument("--base", metavar="TYPE", help="format of all experts, for a model that is yet to be converted")
    how.add_argument("--position", type=int, metavar="N", help="tokens in the context whose answer is predicted")
    how.add_argument("--prompt-tokens", type=int, default=2048, metavar="N", help="length of the prompt (2048)")
    how.add_argument("--batch", type=int, metavar="N", help="tokens per step of a prompt (512)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    from localrun.engine.planner.planner import make_plan
    from localrun.engine.planner.sizes import format_of, sizes_of

    out = Output()
    settings = _settings(args)
    sizes = sizes_of(args.model, base=format_of(args.base) if args.base else None)
    out.status("looking at the machine")
    machine = _machine(args, sizes)
    out.clear_status()
    plan = make_plan(sizes, machine, settings)
    if args.json:
        out.json(plan.to_json())
        return 0
    for line in [*plan.lines(), "", *table(plan)]:
        out.line(line)
    return 0


def table(plan: Plan) -> list[str]:
    """What stands behind the six lines."""
    at, sizes = plan.placement, plan.sizes
    lines = ["where memory goes"]
    lines += [f"  {part:<16}{format_size(size):>12}" for part, size in sizes.dense.items()]
    cache = sizes.kv(plan.n_ctx, plan.settings.kv_type, plan.settings.n_batch)
    lines += [f"  {f'cache: {part}':<24}{format_size(size):>12}" for part, size in cache.items()]
    lines.append(f"  {'buffers':<24}{format_size(at.compute_bytes):>12}")
    if plan.decode is None or plan.prefill is None:
        return lines
    for name, span in (("answers", plan.decode), ("prompts", plan.prefill)):
        lines += ["", *_phase(name, span)]
    if plan.suggestions:
        lines += ["", f"{'what would be faster':<40}{'tokens/s':>10}{'gain':>8}"]
        lines += [f"  {s.text:<38}{s.tokens_per_s:>10.2f}{s.gain:>7.2f}x  {s.phase}" for s in plan.suggestions]
    return lines


def _phase(name: str, span: Range) -> list[str]:
    estimates = (span.low, span.likely, span.high)
    lines = [f"{name:<28}{'low':>10}{'likely':>10}{'high':>10}"]
    lines.append(f"  {'tokens/s':<26}" + "".join(f"{rate.tokens_per_s:>10.2f}" for rate in estimates))
    lines.append(f"  {'found in memory':<26}" + "".join(f"{rate.hit_rate:>10.0%}" for rate in estimates))
    lines.append(f"  {'GB from the drive':<26}" + "".join(f"{rate.disk_bytes / 1e9:>10.3f}" for rate in estimates))
    for part in span.likely.parts:
        lines.append(f"  {f'ms: {part}':<26}" + "".join(f"{1e3 * rate.parts[part]:>10.2f}" for rate in estimates))
    return lines


def _settings(args: argparse.Namespace) -> Settings:
    from localrun.engine.planner.plan import Settings
    from localrun.engine.planner.sizes import KV_BITS

    engine = config.load().engine
    kv_type = args.kv or engine.kv
    if kv_type not in KV_BITS:
        raise UsageError(f"unknown KV cache type {kv_type}", hint=f"one of {', '.join(KV_BITS)}")
    n_ctx = engine.context if args.context is None else args.context
    n_batch = engine.batch if args.batch is None else args.batch
    if n_ctx < 0 or n_batch < 1 or args.prompt_tokens < 1 or min(args.position or 0, args.threads or 0) < 0:
        raise UsageError("--context, --position, --prompt-tokens, --batch and --threads can't be negative")
    return Settings(
        ram_bytes=args.experts_ram,
        n_ctx=n_ctx,
        kv_type=kv_type,
        n_batch=n_batch,
        position=args.position,
        prompt_tokens=args.prompt_tokens,
    )


def _machine(args: argparse.Namespace, sizes: ModelSizes) -> Hardware:
    from localrun.engine.planner import hardware

    elsewhere = args.ram is not None or args.vram
    machine = hardware.detect(
        sizes.files, n_threads=args.threads or 0, probe=not args.no_probe, gpus=not elsewhere, specs=sizes.specs
    )
    gpus = None
    if args.vram:
        gpus = tuple(
            hardware.Gpu.described(
                size,
                name=f"GPU {number}",
                bytes_per_s=args.gpu_gbps or hardware.ASSUMED_GPU_MEMORY,
                pcie_bytes_per_s=args.pcie_gbps or hardware.ASSUMED_PCIE,
            )
            for number, size in enumerate(args.vram)
            if size
        )
    ram = args.ram
    return machine.given(
        ram_bytes=None if ram is None else max(0, ram - hardware.SYSTEM_BYTES),
        total_ram_bytes=ram,
        disk=args.disk_gbps,
        n_drives=args.drives,
        memory=args.memory_gbps,
        n_threads=args.threads or None,
        gpus=gpus,
    )


def _rate(text: str) -> float:
    """argparse type: GB/s -> bytes per second."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of GB/s") from None
    if not 0 < value < 1e5:
        raise argparse.ArgumentTypeError(f"{text} GB/s is no rate")
    return value * 1e9
