"""Shell completion: the scripts offer what the parser takes, asked in the shells themselves."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from localrun import cli
from localrun.commands.completion import SHELLS, script

# Completes each line of standard input, its last word being the one under the cursor, as readline would.
_ASK_BASH = """
source "$1"
while IFS= read -r line; do
    IFS=$'\\x1f' read -ra COMP_WORDS <<< "$line"
    [[ $line == *$'\\x1f' ]] && COMP_WORDS+=("")
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
    _shtab_localrun
    echo "${COMPREPLY[*]}"
done
"""


def in_bash(path: Path, *lines: list[str]) -> list[list[str]]:
    asked = "".join("\x1f".join(["localrun", *words]) + "\n" for words in lines)
    done = subprocess.run(
        ["bash", "--norc", "-c", _ASK_BASH, "bash", str(path)],
        input=asked,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stderr == ""
    return [answer.split() for answer in done.stdout.splitlines()]


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_commands_options_values_and_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["completion", "bash"]) == 0
    path = tmp_path / "script"
    path.write_text(capsys.readouterr().out)
    (tmp_path / "v4-flash").mkdir()
    monkeypatch.chdir(tmp_path)
    names = list(cli.COMMANDS)
    answers = in_bash(
        path,
        [""],
        ["comp"],
        ["run", "--to"],
        ["run", "--think", ""],
        ["run", "-p", "text", "--think", "h"],
        ["run", "-p", ""],
        ["chat", "v4"],
        ["run", "--file", "scr"],
        ["completion", ""],
        *([name, "-"] for name in names),
    )
    assert answers[0] == names
    assert answers[1:9] == [
        ["completion"],
        ["--tools", "--top-p", "--top-k"],
        ["off", "high", "max"],
        ["high"],
        [],
        ["v4-flash"],
        ["script"],
        list(SHELLS),
    ]
    for name, offered in zip(names, answers[9:], strict=True):
        cli.main([name, "--help"])
        assert offered
        assert set(offered) == {
            word.strip(",[]") for word in capsys.readouterr().out.split("examples:")[0].split() if word[0] in "-["
        } & set(offered)


@pytest.mark.parametrize("shell", SHELLS)
def test_scripts_are_sound_shell_and_know_every_option(shell: str) -> None:
    parser = cli._parser(cli.COMMANDS)
    text = script(parser, shell)
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    for name, command in commands.choices.items():
        assert name in text
        for action in command._actions:
            for flag in action.option_strings:
                # fish and tcsh have them without dashes.
                word = flag.lstrip("-") if shell in ("fish", "tcsh") else flag
                assert re.search(rf"(?<!\w){word}(?!\w)", text), (name, flag)
    if shutil.which(shell):
        done = subprocess.run([shell, "-n"], input=text, capture_output=True, text=True, timeout=300)
        assert (done.returncode, done.stderr) == (0, "")
