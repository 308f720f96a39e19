"""`python -m tools.reliability PART`: runs one part and prints its counts as JSON."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

from localrun.errors import LocalrunError
from tools.reliability.tally import Tally

PARTS = {
    "mutate": "damaged files of every kind",
    "faults": "reads that fail while a model answers",
    "kills": "processes that are killed while they write",
    "full": "writers on full drives and in read-only places",
    "chat": "a long chat under changing memory limits",
}


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 1 with problems, 2 where a part can't run."""
    parser = argparse.ArgumentParser(prog="python -m tools.reliability", description=__doc__)
    parts = parser.add_subparsers(dest="part", required=True)
    for name, text in PARTS.items():
        module = importlib.import_module(f"tools.reliability.{name}")
        own = parts.add_parser(
            name, help=text, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        own.add_argument("--seed", type=int, default=1, help="of all random numbers (default: 1)")
        own.add_argument(
            "--state", type=Path, metavar="FILE", help="counts so far: an interrupted run goes on from here"
        )
        module.add_arguments(own)
    args = parser.parse_args(argv)
    try:
        tally = Tally.resume(args.state, args.part, args.seed)
        print(f"{args.part}: seed {args.seed}, from case {tally.done} on", file=sys.stderr)
        try:
            importlib.import_module(f"tools.reliability.{args.part}").run(args, tally)
        finally:
            tally.save()
    except LocalrunError as error:
        print(f"error: {error}" + (f"\nhint: {error.hint}" if error.hint else ""), file=sys.stderr)
        return 2
    print(json.dumps(tally.to_json(), indent=1))
    return 1 if tally.n_problems else 0


if __name__ == "__main__":
    sys.exit(main())
