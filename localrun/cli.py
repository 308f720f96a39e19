"""The command line: parses arguments, runs one command, turns errors into a line, a hint and an exit code.

Exit codes: 0 fine, 1 failed, 2 wrong usage, 130 interrupted. Only the module of the chosen command is imported, and each of
those imports what is heavy when it runs, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import traceback
from collections.abc import Collection, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from localrun import __version__, paths
from localrun.errors import LocalrunError, UsageError
from localrun.textsafe import visible_line

COMMANDS = {
    "chat": "talk to a model in the terminal",
    "run": "print one answer",
    "convert": "convert an official checkpoint",
    "verify": "check every checksum of a converted model",
    "eval": "logits, perplexity, comparison with a reference",
    "plan": "what fits where on a machine, and how fast it will be",
    "bench": "measure speed, and where the time goes",
    "doctor": "check this machine and this installation",
    "completion": "print a script that completes commands and options in a shell",
}
"""Name -> what it does; each is a module of `localrun.commands` with `add_arguments(parser)` and `run(args) -> int`."""

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130

EXAMPLES = """\
examples:
  localrun chat                                    the demo model
  localrun chat ~/models/DeepSeek-V4-Flash         an official checkpoint as it lies
  localrun run -p "What is a mixture of experts?"
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us (`>&-`)
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  # for the life of the process
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without UTF-8 shows ?, and nothing fails
    try:
        parser = _parser([a for a in arguments if not a.startswith("-")][:1])
        try:
            args = parser.parse_args(arguments)
        except SystemExit as leave:  # --help: 0, wrong usage: 2
            return int(leave.code or 0)
        if args.command is None:
            parser.print_help(sys.stderr)
            return EXIT_USAGE
        _prepare_cache(args)
        return int(import_module(f"localrun.commands.{args.command}").run(args))
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone; Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except Exception as error:
        return _report(error, debug="--debug" in arguments)


def _parser(with_options: Collection[str]) -> argparse.ArgumentParser:
    """A parser of all commands; only those named in `with_options` get theirs."""
    parser = argparse.ArgumentParser(
        prog="localrun",
        description="Runs DeepSeek-V4-Flash and V4-Pro on one workstation, offline.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"localrun {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, summary in COMMANDS.items():
        command = commands.add_parser(
            name, help=summary, description=summary, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if name in with_options:
            import_module(f"localrun.commands.{name}").add_arguments(command)
            command.set_defaults(open_ui=_open_ui, whole_parser=lambda: _parser(COMMANDS))
            command.add_argument(
                "--cache-dir", type=Path, metavar="DIR", help="where rebuildable things are kept (~/.cache/localrun)"
            )
            command.add_argument("--debug", action="store_true", help="show tracebacks and the libraries' log")
    return parser


def _prepare_cache(args: argparse.Namespace) -> None:
    """Obeys `--cache-dir`. A cache that keeps nothing costs time, so it is said and nothing fails."""
    if args.cache_dir is not None:
        paths.use_cache_dir(args.cache_dir)
    if args.command != "doctor" and (problem := paths.cache_problem()):
        print(f"warning: the cache can't be used: {visible_line(problem)}", file=sys.stderr)
        print(
            "hint: --cache-dir DIR names a writable folder; without one, kernels are compiled each time",
            file=sys.stderr,
        )


def _open_ui(*arguments: Any, **options: Any) -> int:
    """Runs the terminal UI: `localrun.tui.app.run_app`, imported when it is needed. Returns the exit code."""
    from localrun.tui.app import run_app

    return run_app(*arguments, **options)


def _report(error: Exception, *, debug: bool) -> int:
    """Prints what went wrong; returns the exit code."""
    if debug:
        traceback.print_exception(error)
    hint = None
    if isinstance(error, LocalrunError):
        message, hint = str(error), error.hint
    elif isinstance(error, OSError) and error.strerror:
        message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    else:
        message = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        hint = None if debug else "this is a bug in localrun; --debug shows where"
    print(f"error: {visible_line(message)}", file=sys.stderr)
    if hint:
        print(f"hint: {visible_line(hint)}", file=sys.stderr)
    return EXIT_USAGE if isinstance(error, UsageError) else EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
