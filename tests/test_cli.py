"""The command line as its users meet it: exit codes, what is on which stream, errors of one line."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from localrun import cli, paths
from localrun.commands import doctor
from localrun.commands.doctor import Check
from localrun.errors import FormatError, LocalrunError, UsageError
from tests.engine.models import CHAT_TOKENS, write_chat_model

LONG_ANSWER = [
    sys.executable,
    "-m",
    "localrun.cli",
    "run",
    "-p",
    "Hello",
    "--temp",
    "0",
    "--context",
    "8192",
    "--ram",
    "64MiB",
]
FAST = ["--threads", "1", "--context", "512", "--ram", "64MiB"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_chat_model(tmp_path_factory.mktemp("model") / "chat.gguf"))


@pytest.fixture(autouse=True)
def own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings of whoever runs the tests. The cache stays: it has compiled kernels."""
    monkeypatch.setenv("LOCALRUN_CONFIG_DIR", str(tmp_path / "config"))


def localrun(*arguments: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "localrun.cli", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )


# --- errors and exit codes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (
            FormatError("a.gguf: row 3 is short", hint="copy it again"),
            1,
            ["error: a.gguf: row 3 is short", "hint: copy it again"],
        ),
        (UsageError("no such type"), 2, ["error: no such type"]),
        (LocalrunError("bad\x1b[31m name\nx"), 1, ["error: bad␛[31m name⏎x"]),
        (
            FileNotFoundError(2, "No such file or directory", "x.txt"),
            1,
            ["error: x.txt: No such file or directory"],
        ),
        (KeyError("k"), 1, ["error: KeyError: 'k'", "hint: this is a bug in localrun; --debug shows where"]),
        (KeyboardInterrupt(), 130, [""]),
    ],
)
def test_errors_are_a_line_a_hint_and_an_exit_code(
    error: BaseException,
    code: int,
    lines: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(args: Any) -> int:
        raise error

    monkeypatch.setattr(doctor, "run", fail)
    assert cli.main(["doctor"]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.rstrip("\n").split("\n") == lines


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(args: Any) -> int:
        raise FormatError("broken")

    monkeypatch.setattr(doctor, "run", fail)
    assert cli.main(["doctor", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["dance"],
        ["run", "--ram", "lots", "-p", "x"],
        ["run", "--no-such-option"],
        ["eval"],
        ["eval", "model"],
        ["eval", "model", "--tokens", "a.json", "--text", "b.txt"],
        ["run"],  # nothing to answer
        ["run", "-p", "x", "--threads", "100000"],
        ["run", "-p", "x", "--max-tokens", "0"],
        ["run", "-p", "x", "--max-tokens", "-1"],
        ["run", "-p", "x", "--ram", "24"],
        ["run", "-p", "x", "--batch", "0"],
    ],
)
def test_wrong_usage_is_2_and_says_why_on_stderr(arguments: list[str]) -> None:
    done = localrun(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr
    assert "Traceback" not in done.stderr


def test_every_command_has_two_examples_in_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    for command in cli.COMMANDS:
        assert cli.main([command, "--help"]) == 0
        text = capsys.readouterr().out
        assert text.count(f"  localrun {command}") + text.count(f"| localrun {command}") >= 2, command


def test_missing_model_is_one_line_and_a_hint() -> None:
    done = localrun("run", "/no/such/model", "-p", "x")
    assert done.returncode == 1
    assert done.stdout == ""
    error, hint = done.stderr.splitlines()
    assert error.startswith("error: /no/such/model")
    assert hint.startswith("hint: ")


# --- run -----------------------------------------------------------------------------------------------------------


def test_run_prints_the_answer_and_nothing_else(model: str) -> None:
    options = [model, "-p", "Hello", "--temp", "0", "--max-tokens", "5", *FAST]
    text = localrun("run", *options)
    assert text.returncode == 0
    assert text.stderr == "", "quiet off a terminal"
    data = json.loads(localrun("run", *options, "--json").stdout)
    assert text.stdout == data["text"] + "\n"
    assert data["finish_reason"] == "length"
    assert data["timings"]["new_tokens"] == 5
    assert data["model"] == "chat"


def test_run_joins_prompt_and_standard_input(model: str) -> None:
    def prompt_tokens(*arguments: str, stdin: str = "") -> int:
        done = localrun("run", model, *arguments, "--max-tokens", "1", "--json", *FAST, stdin=stdin)
        assert done.returncode == 0, done.stderr
        return int(json.loads(done.stdout)["timings"]["prompt_tokens"])

    joined = prompt_tokens("-p", "Sum up:", stdin="one two three")
    assert joined == prompt_tokens("-p", "Sum up:\n\none two three")
    assert joined > prompt_tokens(stdin="one two three")
    assert prompt_tokens("--system", "Be brief.", "-p", "one") > prompt_tokens("-p", "one")


def test_run_repeats_an_answer_by_its_seed(model: str) -> None:
    options = ["run", model, "-p", "Hello", "--max-tokens", "5", "--json", *FAST]
    first = json.loads(localrun(*options).stdout)
    again = json.loads(localrun(*options, "--seed", str(first["seed"])).stdout)
    assert again["text"] == first["text"]


def test_run_puts_reasoning_apart(model: str) -> None:
    data = json.loads(
        localrun("run", model, "-p", "Hi", "--think", "high", "--max-tokens", "4", "--json", *FAST).stdout
    )
    assert data["text"] == ""
    assert data["thinking"]
    assert data["problems"] == ["unclosed_think"]


def test_interrupt_ends_with_130_and_a_whole_line(model: str) -> None:
    process = subprocess.Popen(
        [*LONG_ANSWER, model],
        bufsize=0,  # what a buffer has read ahead would be lost to `communicate`
        # Tests that were started in the background of a shell inherit that interrupts are ignored.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    first = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (first + out).endswith(b"\n")
    assert b"Traceback" not in err


def test_reader_that_leaves_early_is_no_crash(model: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "localrun.cli", "run", model, "-p", "Hello", "--temp", "0", *FAST],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=60) == 1
    assert err == b""


# --- chat, eval, doctor ---------------------------------------------------------------------------------------------


def test_chat_without_a_terminal_prints_one_answer(model: str) -> None:
    done = localrun("chat", model, "--max-tokens", "4", *FAST)
    assert done.returncode == 0
    assert len(done.stdout) > 1
    assert "is asked" in done.stderr


def test_eval_writes_logits_of_all_positions(model: str, tmp_path: Path) -> None:
    (tmp_path / "ids.json").write_text("[5, 6, 7, 8]")
    out = tmp_path / "logits.npy"
    done = localrun("eval", model, "--tokens", str(tmp_path / "ids.json"), "--logits", str(out), "--json", *FAST)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"n_tokens": 4, "logits": str(out)}
    logits = np.load(out)
    assert logits.shape == (4, len(CHAT_TOKENS))
    assert logits.dtype == np.float32


def test_eval_compares_with_a_reference(model: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("Once upon a time there was a small model. " * 5)
    options = ["--text", str(tmp_path / "text.txt"), "--window", "16", "--max-tokens", "30", "--json", *FAST]
    done = localrun("eval", model, *options, "--reference", model)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["n_tokens"] == 30
    assert result["kl_mean"] == 0
    assert result["top1_agreement"] == 1
    assert not list(paths.cache_dir().glob("eval-*")), "the reference's logits are gone"


@pytest.mark.parametrize("text", ["{}", "[]", "[1.5]", '["a"]', "[true]", "nonsense"])
def test_eval_refuses_what_is_no_list_of_ids(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ids.json").write_text(text)
    arguments = ["eval", str(tmp_path), "--tokens", str(tmp_path / "ids.json"), "--logits", str(tmp_path / "out.npy")]
    assert cli.main(arguments) == 2
    assert "ids.json" in capsys.readouterr().err


def test_doctor_finds_nothing_wrong_here() -> None:
    done = localrun("doctor", "--json")
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert done.returncode == 0, checks
    assert checks["llama.cpp"]["verdict"] == "ok"
    assert checks["RPC backend"]["verdict"] == "ok"
    assert "CPU" in checks["devices"]["detail"]


def test_doctor_fails_only_for_failures(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    results = [Check("a", "ok", "fine"), Check("b", "warn", "hm", "mend it")]
    monkeypatch.setattr(doctor, "checks", lambda **options: iter(results))
    assert cli.main(["doctor"]) == 0
    assert "mend it" in capsys.readouterr().out
    results.append(Check("c", "FAIL", "bad", "do this"))
    assert cli.main(["doctor"]) == 1
    assert "FAIL  c: bad" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("vendors", "backends", "verdict", "words"),
    [
        ([], ["CPU"], "ok", "none found; localrun"),
        ([], ["CPU", "Vulkan"], "ok", "none found that Vulkan can use"),
        (["0x10de"], ["CPU", "RPC"], "warn", "make cuda"),
        (["0x10de", "0x8086"], ["CUDA", "CPU"], "warn", "nvidia-smi"),
        (["0x1002"], ["CUDA", "CPU"], "warn", "make rocm"),
    ],
)
def test_doctor_says_why_a_card_is_not_used(vendors: list[str], backends: list[str], verdict: str, words: str) -> None:
    check = doctor.check_unused_gpus(vendors, backends)
    assert check.verdict == verdict
    assert words in f"{check.detail} {check.fix}"


def test_doctor_names_a_broken_settings_file(tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.toml").write_text("[engine]\nrom = '8GiB'\n")
    check = doctor.check_settings()
    assert check.verdict == "FAIL"
    assert "'rom'" in check.detail
    assert "config.toml" in check.detail
