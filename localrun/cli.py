"""The command line: parses arguments, runs one command, turns errors into a line, a hint and an exit code.

Exit codes are listed in docs/run.md. Only the chosen command's module is imported, and heavy imports happen when it runs, to
keep `--help` fast.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import os
import re
import shlex
import signal
import sys
from collections.abc import Collection, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from localrun import __version__, interrupts, paths
from localrun.errors import LocalrunError, UsageError, host_error
from localrun.textsafe import visible_line

COMMANDS = {
    "chat": "chat with a model in the terminal",
    "run": "answer one prompt and exit",
    "list": "list the models on this machine",
    "show": "show what a model is and where it is stored",
    "plan": "predict what fits where, and how fast it will run",
    "serve": "serve the OpenAI and Anthropic APIs over HTTP",
    "convert": "convert an official checkpoint",
    "verify": "check a model's files for damage",
    "eval": "measure perplexity, or compare with a reference model",
    "bench": "measure speed, and where the time goes",
    "doctor": "check this machine and this installation",
    "completion": "print a shell completion script",
}
"""Name -> what it does; each is a module of `localrun.commands` with `add_arguments(parser)` and `run(args) -> int`."""

_MODULES = {"list": "list_models"}
"""Where a module has another name than its command."""

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = LocalrunError.exit_code, UsageError.exit_code, interrupts.EXIT_INTERRUPTED

DESCRIPTION = "Runs DeepSeek-V4-Flash and V4-Pro on one workstation, offline."

EXAMPLES = """\
start here:
  localrun chat            the last model, or the demo
  localrun plan flash      will DeepSeek-V4-Flash run here, and how fast?
  localrun COMMAND --help  options and examples of a command

exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted, 128+N signal N
"""


def main(given: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    arguments = sys.argv[1:] if given is None else list(given)
    # As in the engine's own process, for commands that compute in this one; libgomp reads it when it is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the parent process (`>&-`)
            setattr(sys, name, _Closed() if name == "stdout" else open(os.devnull, "w"))  # noqa: SIM115  # for the process's life
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without UTF-8 shows ?, and nothing fails
    with _signals(ending=given is None), interrupts.raised_again() if given is None else contextlib.nullcontext():
        code = _guarded(arguments)
        _leave_stdout()
    return code


def _guarded(arguments: list[str]) -> int:
    """Runs the command; whatever happens becomes an exit code."""
    try:
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return EXIT_INTERRUPTED
    except SystemExit as leave:
        return int(leave.code or 0)
    except BrokenPipeError:
        return EXIT_FAILED  # the reader of our output is gone
    except Exception as error:
        return _report(error, debug="--debug" in arguments)


def _run(arguments: list[str]) -> int:
    _refuse_option_before_command(arguments)
    command = [a for a in arguments if not a.startswith("-")][:1]
    parser = _parser(command)
    parser.command = command[0] if command and command[0] in COMMANDS else "COMMAND"
    try:
        args = parser.parse_args(arguments)
    except SystemExit as leave:  # --help: 0, wrong usage: 2
        return int(leave.code or 0)
    if args.command is None:
        parser.print_help(sys.stderr)
        return EXIT_USAGE
    _prepare_cache(args)
    return int(_module(args.command).run(args))


def _refuse_option_before_command(arguments: list[str]) -> None:
    """Raises UsageError for `localrun --ram 4GiB chat`, whose 4GiB would be taken for the command."""
    flag = arguments[0].split("=")[0] if arguments else ""
    if not flag.startswith("-") or flag in ("-h", "--help", "--version"):
        return
    with_it = _commands_with(flag)
    if not with_it:
        return  # misspelt
    command = next((argument for argument in arguments if argument in COMMANDS), None)
    rest = [argument for argument in arguments if argument != command]
    told = "before the command" if command else "without a command"
    example = f"localrun {command or with_it[0]} {shlex.join(rest)}"
    raise UsageError(f"{flag} {told}", hint=f"options come after the command: {example}")


def _module(command: str) -> Any:
    return import_module(f"localrun.commands.{_MODULES.get(command, command)}")


class _Closed(io.StringIO):
    """Stands in for a standard output closed by the parent process: writing nothing is fine, but an answer must not vanish."""

    refuses = True

    def write(self, text: str) -> int:
        if text:
            raise LocalrunError("standard output is closed", hint="redirect it to a file, or to /dev/null")
        return 0


@contextlib.contextmanager
def _signals(*, ending: bool) -> Iterator[None]:
    """Installs signal handlers for a command. SIGTERM and SIGHUP act like an error: resources are closed, the engine ends, the
    last event is written.

    Args:
        ending: the process exits after the block; later signals must not interrupt that.
    """

    def end(number: int, frame: FrameType | None) -> NoReturn:
        signal.signal(number, signal.SIG_IGN)
        raise SystemExit(128 + number)

    handlers: dict[str, Any] = {"SIGINT": interrupts.Once(), "SIGTERM": end, "SIGHUP": end}
    installed = {}
    for name, ours in handlers.items():
        number = getattr(signal, name, None)
        with contextlib.suppress(ValueError):  # not the main thread
            # If SIGHUP (nohup) or SIGINT (background jobs) is ignored, keep it so.
            if number is not None and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                installed[number] = signal.signal(number, ours)
    try:
        yield
    finally:
        for number, usual in installed.items():
            signal.signal(number, signal.SIG_IGN if ending else usual)


class _Parser(argparse.ArgumentParser):
    """An argument parser that suggests the flag or command that was probably meant.

    Attributes:
        command: whose options are parsed, for hints of the whole command line's parser.
    """

    command = "COMMAND"

    def error(self, message: str) -> NoReturn:
        hint = self._hint(message)
        message = re.sub(
            r"^argument COMMAND: invalid choice: ('.*') \(choose from .*\)", r"there is no command \1", message
        )
        print(f"error: {visible_line(message)}", file=sys.stderr)
        if hint:
            print(f"hint: {visible_line(hint)}", file=sys.stderr)
        raise SystemExit(EXIT_USAGE)

    def _hint(self, message: str) -> str | None:
        if match := re.fullmatch(r"unrecognized arguments: (.*)", message):
            return self._for_unknown(match[1].split(" ")[0])
        if match := re.fullmatch(r"argument COMMAND: invalid choice: '(.*)' \(choose from .*\)", message, re.S):
            near = difflib.get_close_matches(match[1], COMMANDS, 1)
            if near:
                return f"did you mean: localrun {near[0]}"
            if re.search(r"\s", match[1]):
                return f"to ask a question: localrun run -p {shlex.quote(match[1])}"
            if Path(match[1]).exists():
                return f"to chat with that model: localrun chat {match[1]}"
        return f"{self.prog} --help has examples and all options"

    def _for_unknown(self, flag: str) -> str:
        flag = flag.split("=")[0]
        all_options = f"localrun {self.command} --help lists all options"
        if flag.startswith("--") and (others := _commands_with(flag)):
            names = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
            return f"{flag} is an option of localrun {names}; {all_options}"
        known = [name for parser in self._all() for action in parser._actions for name in action.option_strings]
        near = difflib.get_close_matches(flag, known, 1)
        if near:
            return f"did you mean {near[0]}?"
        if not flag.startswith("-") and self.command in ("chat", "run"):
            return 'a prompt goes after -p, in quotes: localrun run MODEL -p "…"'
        return all_options

    def _all(self) -> list[argparse.ArgumentParser]:
        """This parser and those of its commands."""
        return [self, *_commands(self).values()]


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    subs = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return {name: command for action in subs for name, command in action.choices.items()}


def _commands_with(flag: str) -> list[str]:
    """Names of the commands that have an option."""
    return [name for name, parser in _commands(_parser(COMMANDS)).items() if flag in parser._option_string_actions]


class _Overview(_Parser):
    """The parser of the whole command line. Its help fits a terminal of 24 lines, with the shell's next prompt below it."""

    def format_help(self) -> str:
        wide = max(map(len, COMMANDS))
        listed = [f"  {name:<{wide}}  {summary}" for name, summary in COMMANDS.items()]
        return "\n".join([f"usage: {self.prog} COMMAND ...", DESCRIPTION, "", *listed, "", EXAMPLES])


def _parser(with_options: Collection[str]) -> _Parser:
    """A parser of all commands; only those named in `with_options` get theirs."""
    parser = _Overview(prog="localrun", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"localrun {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands", parser_class=_Parser)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(
            name, help=summary, description=summary, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        if name in with_options:
            _module(name).add_arguments(command)
            command.set_defaults(open_ui=_open_ui, whole_parser=lambda: _parser(COMMANDS))
            command.add_argument(
                "--cache-dir",
                type=Path,
                metavar="DIR",
                help="cache folder; everything in it can be rebuilt (~/.cache/localrun)",
            )
            command.add_argument("--debug", action="store_true", help="show tracebacks and library logs")
    return parser


def _prepare_cache(args: argparse.Namespace) -> None:
    """Obeys `--cache-dir`. A cache that keeps nothing costs time, so it is said and nothing fails."""
    if args.cache_dir is not None:
        paths.use_cache_dir(args.cache_dir)
    if args.command not in ("doctor", "completion") and (problem := paths.cache_problem()):
        print(f"warning: can't use the cache: {visible_line(problem)}", file=sys.stderr)
        print(
            "hint: point --cache-dir at a writable folder; without one, kernels are recompiled every time",
            file=sys.stderr,
        )


def _open_ui(*arguments: Any, **options: Any) -> int:
    """Runs the terminal UI: `localrun.tui.app.run_app`, imported when it is needed. Returns the exit code."""
    from localrun.tui.app import run_app

    return run_app(*arguments, **options)


def _report(error: Exception, *, debug: bool) -> int:
    """Prints what went wrong; returns the exit code."""
    if debug:
        import traceback

        traceback.print_exception(error)
    hint = None
    error = host_error(error) or error
    if isinstance(error, LocalrunError):
        message, hint = str(error), error.hint
    else:
        message = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        hint = None if debug else "this is a bug in localrun; --debug shows where"
    print(f"error: {visible_line(message)}", file=sys.stderr)
    if hint:
        print(f"hint: {visible_line(hint)}", file=sys.stderr)
    return error.exit_code if isinstance(error, LocalrunError) else EXIT_FAILED


def _leave_stdout() -> None:
    """Python flushes at exit and would complain once more about an output that failed before."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
