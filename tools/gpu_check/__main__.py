"""python -m tools.gpu_check run|table|pack: see the package."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from localrun.errors import LocalrunError
from localrun.units import parse_size
from tools.gpu_check.campaign import LEAST_S, LIMIT_S, Campaign, run
from tools.gpu_check.pack import pack
from tools.gpu_check.table import table
from tools.synthetic_config import PRESETS


def parser() -> argparse.ArgumentParser:
    """The command line."""
    main = argparse.ArgumentParser(
        prog="gpu_check", description="Measures localrun on a machine with one graphics card."
    )
    commands = main.add_subparsers(dest="command", required=True)
    measure = commands.add_parser("run", help="measure; ends by itself")
    measure.add_argument("out", type=Path, help="JSON")
    measure.add_argument("--folder", type=Path, default=Path("/dev/shm/localrun-gpu-check"), help="scratch, in memory")
    measure.add_argument("--preset", choices=sorted(PRESETS), default="flash")
    measure.add_argument("--second", choices=[*sorted(PRESETS), "none"], default="pro")
    measure.add_argument("--gpu", default="auto")
    measure.add_argument("--rpc", help="HOST:PORT of a stand-in for a card")
    measure.add_argument("--seconds", type=float, default=LIMIT_S, help="in all")
    measure.add_argument(
        "--least", type=float, default=LEAST_S, help="seconds that must be left to begin a measurement"
    )
    measure.add_argument("--prompt-tokens", type=int, default=512)
    measure.add_argument("--new-tokens", type=int, default=24)
    measure.add_argument("--threads", type=int, default=0)
    measure.add_argument(
        "--memory", type=parse_size, metavar="SIZE", help="most memory to use, files included (default: what is free)"
    )
    show = commands.add_parser("table", help="the table of docs/gpu.md")
    show.add_argument("result", type=Path)
    packing = commands.add_parser("pack", help="what a bare machine needs, in one folder")
    packing.add_argument("target", type=Path)
    packing.add_argument("--site", type=Path, help="site-packages of a build for the card; default: this one's")
    packing.add_argument(
        "--without-packages", action="store_true", help="the machine has numpy, numba, gguf and the like"
    )
    return main


def main(arguments: list[str] | None = None) -> int:
    """The command; the exit code."""
    args = parser().parse_args(arguments)
    try:
        if args.command == "table":
            print(table(json.loads(args.result.read_text())))
        elif args.command == "pack":
            print(pack(args.target, site=args.site, packages=not args.without_packages))
        else:
            campaign = Campaign(
                folder=args.folder,
                preset=args.preset,
                second=None if args.second == "none" else args.second,
                gpu=args.gpu,
                rpc=args.rpc,
                limit_s=args.seconds,
                least_s=args.least,
                prompt_tokens=args.prompt_tokens,
                new_tokens=args.new_tokens,
                n_threads=args.threads,
                memory_bytes=args.memory,
            )
            run(campaign, args.out, lambda text: print(text, file=sys.stderr, flush=True))
    except LocalrunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
