"""`localrun completion`: scripts that teach a shell the commands and options, made by shtab from the command line's own parser.

What may follow an option is told from its declaration: choices; a metavar of lower-case words such as `off|high|max`; FILE,
MODEL, SRC, DST and DIR are paths. The scripts are complete in themselves: completing starts no Python.
"""

from __future__ import annotations

import argparse
from typing import Any

from localrun.commands.output import Output

EXAMPLES = """\
examples:
  eval "$(localrun completion bash)"                                        this shell only; put it in ~/.bashrc for all
  localrun completion zsh > ~/.zfunc/_localrun                              with fpath+=~/.zfunc before compinit
  localrun completion fish > ~/.config/fish/completions/localrun.fish
"""

SHELLS = ("bash", "fish", "tcsh", "zsh")

PATH_METAVARS = frozenset({"FILE", "MODEL", "SRC", "DST", "DIR", "PATH", "SOURCE", "OUT.npy"})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `localrun completion`."""
    parser.epilog = EXAMPLES
    parser.add_argument("shell", choices=SHELLS, help="shell to generate the script for")


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    Output().line(script(args.whole_parser(), args.shell).rstrip("\n"))
    return 0


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The completion script of a command line."""
    import shtab

    _say_what_follows(parser, shtab.FILE)
    text: str = shtab.complete(parser, shell)
    return text


def _say_what_follows(parser: argparse.ArgumentParser, a_file: Any) -> None:
    """Tells shtab, by argparse's own lists, which have no public names, what values there are."""
    for action in parser._actions:
        metavar = action.metavar if isinstance(action.metavar, str) else ""
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _say_what_follows(command, a_file)
        elif action.choices is None and "|" in metavar:
            action.choices = tuple(word for word in metavar.split("|") if word.islower())
        elif metavar in PATH_METAVARS:
            action.complete = a_file  # type: ignore[attr-defined]  # shtab's own
