"""`localrun completion`: scripts that teach a shell the commands and options, made from the command line's own parser.

What may follow an option is told from its declaration: `choices`; a metavar of lower-case words such as `off|high|max`; FILE,
MODEL, SRC, DST and DIR are paths. All three scripts are complete in themselves: completing starts no Python.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field

from localrun.commands.output import Output

EXAMPLES = """\
examples:
  eval "$(localrun completion bash)"                                        for this shell; in ~/.bashrc for all
  localrun completion zsh > ~/.zfunc/_localrun                              with fpath+=~/.zfunc before compinit
  localrun completion fish > ~/.config/fish/completions/localrun.fish
"""

PATH_METAVARS = frozenset({"FILE", "MODEL", "SRC", "DST", "DIR", "PATH", "OUT.npy"})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `localrun completion`."""
    parser.epilog = EXAMPLES
    parser.add_argument("shell", choices=sorted(SCRIPTS), help="the shell that the script is for")


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    Output().line(SCRIPTS[args.shell](describe(args.whole_parser())).rstrip("\n"))
    return 0


@dataclass(frozen=True, slots=True)
class Option:
    """An option or, without flags, a positional argument.

    Attributes:
        value: a value follows.
        words: what the value may be, as far as it is known.
        is_path: the value is a path.
        repeats: it may be given more than once.
    """

    flags: tuple[str, ...]
    help: str
    value: bool = False
    words: tuple[str, ...] = ()
    is_path: bool = False
    repeats: bool = False


@dataclass(frozen=True, slots=True)
class CommandLine:
    """One command: name, what it does, what it takes. The program itself has the name ''."""

    name: str
    help: str
    options: tuple[Option, ...] = ()
    positionals: tuple[Option, ...] = ()
    commands: tuple[CommandLine, ...] = field(default=())


def describe(parser: argparse.ArgumentParser, name: str = "", summary: str = "") -> CommandLine:
    """What a parser takes. Reads argparse's own lists, which have no public names but are the same in all supported versions."""
    options: list[Option] = []
    positionals: list[Option] = []
    commands: list[CommandLine] = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
            commands = [describe(sub, sub_name, helps.get(sub_name, "")) for sub_name, sub in action.choices.items()]
        elif action.help != argparse.SUPPRESS:
            (options if action.option_strings else positionals).append(_option(action))
    return CommandLine(name, summary, tuple(options), tuple(positionals), tuple(commands))


def _option(action: argparse.Action) -> Option:
    metavar = action.metavar if isinstance(action.metavar, str) else ""
    words = tuple(str(choice) for choice in action.choices or ())
    if not words and "|" in metavar:
        words = tuple(word for word in metavar.split("|") if word.islower())
    return Option(
        tuple(action.option_strings),
        " ".join((action.help or "").replace("%%", "%").split()),
        value=action.nargs != 0,
        words=words,
        is_path=metavar in PATH_METAVARS,
        repeats=isinstance(action, argparse._AppendAction),
    )


# --- bash -----------------------------------------------------------------------------------------------------------

_BASH = """\
# bash completion of localrun; made by `localrun completion bash`
_localrun() {
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} command= words= paths= i
    for ((i = 1; i < COMP_CWORD; i++)); do
        if [[ ${COMP_WORDS[i]} != -* ]]; then command=${COMP_WORDS[i]}; break; fi
    done
    COMPREPLY=()
    case $command in
%s
    esac
    if [[ -n $words ]]; then COMPREPLY=($(compgen -W "$words" -- "$cur")); fi
    if [[ -n $paths ]]; then
        local IFS=$'\\n'
        compopt -o filenames 2>/dev/null
        COMPREPLY+=($(compgen -f -- "$cur"))
    fi
}
complete -F _localrun localrun
"""


def bash(program: CommandLine) -> str:
    """The script for bash."""
    names = " ".join(command.name for command in program.commands)
    flags = " ".join(flag for option in program.options for flag in option.flags)
    cases = [f"    '')\n        if [[ $cur == -* ]]; then words='{flags}'; else words='{names}'; fi ;;"]
    for command in program.commands:
        values = "".join(
            f"        {'|'.join(option.flags)}) {_bash_value(option)} ;;\n"
            for option in command.options
            if option.value
        )
        flags = " ".join(flag for option in command.options for flag in option.flags)
        free = " ".join(filter(None, (_bash_value(option) for option in command.positionals))) or ":"
        cases.append(
            f"    {command.name})\n        case $prev in\n{values}"
            f"        *) if [[ $cur == -* ]]; then words='{flags}'; else {free}; fi ;;\n        esac ;;"
        )
    return _BASH % "\n".join(cases)


def _bash_value(option: Option) -> str:
    if option.is_path:
        return "paths=1"
    return f"words='{' '.join(option.words)}'" if option.words else ":"


# --- zsh ------------------------------------------------------------------------------------------------------------

_ZSH = """\
#compdef localrun
# zsh completion of localrun; made by `localrun completion zsh`
_localrun() {
    local -a commands
    commands=(
%s
    )
    if (( CURRENT == 2 )); then
        _describe -t commands 'localrun command' commands
        _arguments %s
        return
    fi
    local command=$words[2]
    shift words
    (( CURRENT-- ))
    case $command in
%s
    esac
}
if [[ $funcstack[1] == _localrun ]]; then _localrun "$@"; else compdef _localrun localrun; fi
"""


def zsh(program: CommandLine) -> str:
    """The script for zsh, to be sourced or put into `fpath`."""
    names = [f"        {shlex.quote(_colons(command.name) + ':' + command.help)}" for command in program.commands]
    cases = []
    for command in program.commands:
        specs = [spec for option in command.options for spec in _zsh_option(option)]
        specs += [
            f"*:{'path' if option.is_path else 'value'}:{_zsh_value(option)}" for option in command.positionals[:1]
        ]
        lines = " \\\n".join(f"            {shlex.quote(spec)}" for spec in specs)
        cases.append(f"    {command.name})\n        _arguments -s \\\n{lines} ;;")
    flags = " ".join(shlex.quote(spec) for option in program.options for spec in _zsh_option(option))
    return _ZSH % ("\n".join(names), flags, "\n".join(cases))


def _zsh_option(option: Option) -> Iterator[str]:
    text = option.help.replace("\\", "").replace("[", "(").replace("]", ")").replace(":", "\\:")
    for flag in option.flags:
        many = "*" if option.repeats else ""
        value = f":value:{_zsh_value(option)}" if option.value else ""
        yield f"{many}{flag}[{text}]{value}"


def _zsh_value(option: Option) -> str:
    if option.is_path:
        return "_files"
    return f"({' '.join(option.words)})" if option.words else ""


def _colons(text: str) -> str:
    return text.replace(":", "\\:")


# --- fish -----------------------------------------------------------------------------------------------------------


def fish(program: CommandLine) -> str:
    """The script for fish."""
    lines = ["# fish completion of localrun; made by `localrun completion fish`", "complete -c localrun -f"]
    for option in program.options:
        lines.append(_fish("__fish_use_subcommand", _fish_option(option)))
    for command in program.commands:
        lines.append(_fish("__fish_use_subcommand", ["-a", _fish_quote(command.name), "-d", _fish_quote(command.help)]))
    for command in program.commands:
        here = f"__fish_seen_subcommand_from {command.name}"
        lines += [_fish(here, _fish_option(option)) for option in command.options]
        for option in command.positionals:
            if option.is_path:
                lines.append(_fish(here, ["-F"]))
            elif option.words:
                lines.append(_fish(here, ["-a", _fish_quote(" ".join(option.words))]))
    return "\n".join(dict.fromkeys(lines)) + "\n"


def _fish(condition: str, parts: list[str]) -> str:
    return " ".join(["complete -c localrun -n", _fish_quote(condition), *parts])


def _fish_option(option: Option) -> list[str]:
    parts = []
    for flag in option.flags:
        parts += ["-l", flag[2:]] if flag.startswith("--") else ["-s", flag[1:]]
    if option.value:
        parts.append("-r -F" if option.is_path else "-x")
    if option.words:
        parts += ["-a", _fish_quote(" ".join(option.words))]
    return [*parts, "-d", _fish_quote(option.help)]


def _fish_quote(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


SCRIPTS = {"bash": bash, "zsh": zsh, "fish": fish}
