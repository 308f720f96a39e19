"""`localrun run`: files and tools in the prompt, events as lines of JSON, tool calls as text. The rest is in test_cli."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from localrun import cli
from localrun.commands import run
from localrun.commands.output import Output
from localrun.engine.facts import Timings
from localrun.engine.process.protocol import Delta, Finished, ToolCall
from tests.engine.models import write_chat_model

FAST = ["--threads", "1", "--context", "2048", "--ram", "64MiB", "--temp", "0", "--max-tokens", "3"]
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Today's weather", "parameters": {}}}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_chat_model(tmp_path_factory.mktemp("model") / "chat.gguf"))


def events(model: str, *arguments: str, stdin: str = "") -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "localrun.cli", "run", model, "--jsonl", *arguments, *FAST],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.engine_process
def test_everything_that_happens_is_a_line_of_json(model: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("one two three\n")
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    got = events(model, "--file", str(tmp_path / "notes.txt"), "-p", "Sum up", "--tools", str(tmp_path / "tools.json"))
    kinds = [event["event"] for event in got]
    assert kinds[0] == "loading"
    assert kinds[-1] == "end"
    assert list(dict.fromkeys(kinds)) == ["loading", "ready", "prompt", "text", "end"]
    end = got[-1]
    assert end["finish_reason"] == "length"
    assert end["timings"]["new_tokens"] == 3
    prompt = next(event for event in got if event["event"] == "prompt")
    assert prompt["total"] == end["timings"]["prompt_tokens"]
    assert prompt["total"] > len(json.dumps(TOOLS)), "a token is at most two bytes in this model: the tools are in"


def test_files_come_before_prompt_and_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(f"this is {name}")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"piped")))
    parser = cli._parser(["run"])
    files = [option for name in ("a.txt", "b.txt") for option in ("--file", str(tmp_path / name))]
    (message,) = run._messages(parser.parse_args(["run", "-p", "Compare", *files]))
    assert message["content"] == (
        "File `a.txt`:\n\n```\nthis is a.txt\n```\n\nFile `b.txt`:\n\n```\nthis is b.txt\n```\n\nCompare\n\npiped"
    )


@pytest.mark.parametrize(
    ("arguments", "piped", "contents"),
    [
        (["-p", "Sum up:"], "one two", ["Sum up:\n\none two"]),
        ([], "one two", ["one two"]),
        (["-p", "one"], "", ["one"]),
        (["--system", "Be brief.", "-p", "one"], "", ["Be brief.", "one"]),
    ],
)
def test_system_message_prompt_and_standard_input(
    arguments: list[str], piped: str, contents: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(piped.encode())))
    messages = run._messages(cli._parser(["run"]).parse_args(["run", *arguments]))
    assert [message["content"] for message in messages] == contents
    assert [message["role"] for message in messages] == ["system", "user"][-len(contents) :]


@pytest.mark.parametrize(
    ("option", "content", "code", "message"),
    [
        ("--tools", "[", 2, "tools.json"),
        ("--tools", '[{"type": "browser"}]', 2, "unsupported tool type 'browser'"),
        ("--tools", None, 2, "No such file"),
        ("--file", "\0", 2, "not a text file"),
        ("--file", None, 2, "no such file"),
    ],
)
def test_bad_files_are_refused_before_a_model_is_loaded(
    option: str,
    content: str | None,
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    path = tmp_path / "tools.json"
    if content is not None:
        path.write_text(content)
    assert cli.main(["run", "/no/model", "-p", "x", option, str(path)]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert "/no/model" not in captured.err


def test_an_error_is_an_event_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert cli.main(["run", "/no/such/model", "-p", "x", "--jsonl"]) == 2
    captured = capsys.readouterr()
    *_, last = map(json.loads, captured.out.splitlines())
    assert last["event"] == "error"
    assert f"error: {last['message']}\n" in captured.err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_tool_calls_are_lines_harmless_on_a_terminal(stream: type[io.StringIO]) -> None:
    out, err = stream(), io.StringIO()
    shown = run._Text(Output(out, err))
    shown.event(Delta(request=1, kind="text", text="Let me see"))
    shown.event(Delta(request=1, kind="tool", text='{"city"'))
    call = ToolCall(
        request=1,
        index=0,
        name="weather",
        arguments='{"city": "\x1b[2J"}',
        id="c",
        usable=False,
        problems=("truncated",),
    )
    shown.event(call)
    shown.end(Finished(request=1, reason="eos", timings=Timings(), seed=1), facts=None)  # type: ignore[arg-type]
    escape = "␛" if stream is Terminal else "\x1b"
    assert out.getvalue() == f'Let me see\nweather({{"city": "{escape}[2J"}})\n'
    assert err.getvalue() == "note: this call of weather is incomplete: truncated\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.engine_process
def test_a_full_disk_and_a_closed_output_are_one_line_each(model: str) -> None:
    command = [sys.executable, "-m", "localrun.cli", "completion", "fish"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=300)
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["error: standard output: No space left on device"]
    done = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *command], stderr=subprocess.PIPE, text=True, timeout=300)
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == "error: standard output is closed"


def test_a_repository_that_is_not_here_is_told_before_a_missing_question(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", None)
    assert cli.main(["run", "someone/other-model"]) == 2
    assert "hf download someone/other-model" in capsys.readouterr().err
