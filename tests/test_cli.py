"""The command line as its users meet it: exit codes, what is on which stream, errors of one line."""

from __future__ import annotations

import functools
import io
import json
import os
import pty
import pwd
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from localrun import cli, interrupts, kernel_cache, paths
from localrun.commands import doctor
from localrun.commands.doctor import CheckResult
from localrun.commands.output import Output
from localrun.engine.conversations.attachments import AttachmentError, read_attachment
from localrun.errors import FormatError, HostError, LocalrunError, UsageError
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


@pytest.fixture
def nothing_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard input is empty, and no terminal."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))


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
        ["run", "-p", "x", "--batch", "-1"],
    ],
)
def test_wrong_usage_is_2_and_says_why_on_stderr(
    arguments: list[str], nothing_typed: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err
    assert "Traceback" not in told.err


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        (
            "list --context 3",
            "unrecognized arguments: --context",
            "of localrun chat, run, plan, ...; localrun list --help",
        ),
        ("run --machine-ram 5GiB", "unrecognized arguments: --machine-ram", "of localrun plan; localrun run --help"),
        ("run --no-such", "unrecognized arguments: --no-such", "localrun run --help lists all options"),
        ("plan flash pro", "unrecognized arguments: pro", "localrun plan --help lists all options"),
        ("run a b", "unrecognized arguments: b", "a prompt goes after -p"),
        ("--versoin", "unrecognized arguments: --versoin", "did you mean --version?"),
        ("--ram 4GiB chat", "--ram before the command", "after the command: localrun chat --ram 4GiB"),
        ("--ram=4GiB chat", "--ram before the command", "after the command: localrun chat --ram=4GiB"),
        ("--json list x", "--json before the command", "after the command: localrun list --json x"),
        ("-p hello", "-p without a command", "after the command: localrun run -p hello"),
    ],
)
def test_an_option_in_the_wrong_place_is_answered_with_the_right_one(
    arguments: str, error: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments.split()) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first == f"error: {error}"
    assert second.startswith("hint: ")
    assert hint in second


STEPS = (["--batch", "4096"], "steps of 4096 tokens are longer than a context of 1024")
ANSWER = (["--max-tokens", "1025"], "an answer of 1025 tokens does not fit a context of 1024")


@pytest.mark.parametrize(
    ("command", "refused"),
    [
        *((command, STEPS) for command in (["run", "-p", "x"], ["chat"], ["plan", "flash", "--no-probe"], ["serve"])),
        *((command, ANSWER) for command in (["run", "-p", "x"], ["chat"])),
    ],
)
def test_what_the_context_cannot_hold_is_refused(
    command: list[str], refused: tuple[list[str], str], nothing_typed: None, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, message = refused
    assert cli.main([*command, "--context", "1024", *flags]) == 2
    told = capsys.readouterr()
    assert f"error: {message}" in told.err
    assert told.out == ""


def test_the_overview_fits_a_small_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    bare = capsys.readouterr().err
    assert cli.main(["--help"]) == 0
    assert capsys.readouterr().out == bare
    lines = bare.splitlines()
    assert len(lines) <= 23  # one more for the shell's prompt
    assert max(map(len, lines)) <= 80
    assert all(any(line.startswith(f"  {command} ") for line in lines) for command in cli.COMMANDS)


def test_every_command_has_two_examples_in_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    for command in cli.COMMANDS:
        assert cli.main([command, "--help"]) == 0
        text = capsys.readouterr().out
        assert text.count(f"  localrun {command}") + text.count(f"| localrun {command}") >= 2, command


def test_missing_model_is_one_line_and_a_hint() -> None:
    done = localrun("run", "/no/such/model", "-p", "x")
    assert done.returncode == 2
    assert done.stdout == ""
    error, hint = done.stderr.splitlines()
    assert error.startswith("error: /no/such/model")
    assert hint.startswith("hint: ")


# --- run -----------------------------------------------------------------------------------------------------------


@pytest.mark.engine_process
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


@pytest.mark.engine_process
def test_run_joins_prompt_and_standard_input(model: str) -> None:
    def prompt_tokens(*arguments: str, stdin: str = "") -> int:
        done = localrun("run", model, *arguments, "--max-tokens", "1", "--json", *FAST, stdin=stdin)
        assert done.returncode == 0, done.stderr
        return int(json.loads(done.stdout)["timings"]["prompt_tokens"])

    joined = prompt_tokens("-p", "Sum up:", stdin="one two three")
    assert joined == prompt_tokens("-p", "Sum up:\n\none two three")  # the parts themselves: tests/commands/test_run.py


@pytest.mark.engine_process
def test_run_repeats_an_answer_by_its_seed(model: str) -> None:
    options = ["run", model, "-p", "Hello", "--max-tokens", "5", "--json", *FAST]
    first = json.loads(localrun(*options).stdout)
    again = json.loads(localrun(*options, "--seed", str(first["seed"])).stdout)
    assert again["text"] == first["text"]


@pytest.mark.engine_process
def test_run_puts_reasoning_apart(model: str) -> None:
    data = json.loads(
        localrun("run", model, "-p", "Hi", "--think", "high", "--max-tokens", "4", "--json", *FAST).stdout
    )
    assert data["text"] == ""
    assert data["thinking"]
    assert data["problems"] == ["unclosed_think"]


@pytest.mark.engine_process
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
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert (first + out).endswith(b"\n")
    assert b"Traceback" not in err


@pytest.mark.parametrize(
    ("signals", "code"),
    [([signal.SIGINT] * 5, 130), ([signal.SIGTERM], 143), ([signal.SIGTERM] * 3, 143), ([signal.SIGHUP], 129)],
)
@pytest.mark.engine_process
def test_however_it_is_ended_the_last_event_is_written(signals: list[signal.Signals], code: int, model: str) -> None:
    def usual_signals() -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)

    process = subprocess.Popen(
        [sys.executable, "-m", "localrun", *LONG_ANSWER[3:], model, "--jsonl"],
        bufsize=0,
        preexec_fn=usual_signals,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    seen = b""
    while b'"text"' not in seen:
        seen += process.stdout.read(4096)
    for number in signals:
        process.send_signal(number)
    out, err = process.communicate(timeout=300)
    assert process.returncode == code
    assert b"Traceback" not in err
    events = [json.loads(line) for line in (seen + out).splitlines()]
    assert events[-1] == {"event": "error", "type": "Interrupted", "message": "interrupted", "hint": None}


def test_an_interrupt_that_was_dealt_with_leaves_room_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    handler = interrupts.Once()
    with pytest.raises(KeyboardInterrupt):
        handler(2, None)
    handler(2, None)  # the second one does not break off what the first one set going
    handler.again()
    with pytest.raises(KeyboardInterrupt):
        handler(2, None)
    left: list[int] = []
    monkeypatch.setattr(os, "_exit", left.append)
    monkeypatch.setattr(interrupts, "PATIENCE_S", -1)
    handler(2, None)
    assert left == [130]


@pytest.mark.engine_process
def test_text_without_a_flag_is_a_question_and_it_is_said(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = localrun("run", "Hello you", "--max-tokens", "2", *FAST, LOCALRUN_MODEL=model)
    assert done.returncode == 0
    assert done.stdout
    assert done.stderr.splitlines() == [
        f"no model has that name, so it is the prompt for {model} (use -p TEXT to avoid this note)"
    ]


@pytest.mark.parametrize("encoding", ["iso-8859-1", "ascii", "utf-8"])
def test_json_loses_no_character_in_any_locale(encoding: str) -> None:
    value = {"text": "naïve “x” 你好 \ud800 € \u202e"}
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="replace")
    out = Output(stream)
    out.json_line(value)
    out.json(value)
    written = stream.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    line, _, rest = written.partition("\n")
    assert json.loads(line) == json.loads(rest) == value


@pytest.mark.engine_process
def test_a_pipe_is_read_to_its_end_and_one_without_a_writer_is_refused_at_once(tmp_path: Path, model: str) -> None:
    def prompt_tokens(*arguments: str, stdin: str = "") -> int:
        done = localrun("run", model, *arguments, "-p", "x", "--max-tokens", "1", "--json", *FAST, stdin=stdin)
        assert done.returncode == 0, done.stderr
        return int(json.loads(done.stdout)["timings"]["prompt_tokens"])

    read, write = os.pipe()
    os.write(write, b"one two three four")
    os.close(write)
    piped = read_attachment(Path(f"/dev/fd/{read}"), pipes=True)
    os.close(read)
    assert piped.text == "one two three four"
    assert prompt_tokens("--file", "-", stdin="one two three four") > prompt_tokens()
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(AttachmentError, match="nothing was written"):
        read_attachment(tmp_path / "fifo", pipes=True)
    with pytest.raises(AttachmentError, match="not a regular file"):
        read_attachment(tmp_path / "fifo")
    with pytest.raises(AttachmentError, match="not a regular file"):
        read_attachment(Path("/dev/zero"), pipes=True)


PLAIN_CHAT = """
import sys
from localrun.commands import chat
class Chat:
    def ask(self, text): print("asked", repr(text), flush=True)
    def restart(self): print("new", flush=True)
class Out:
    def note(self, text): print("note", text, flush=True)
print("ready", flush=True)
chat._loop(Chat(), Out())
"""


def test_a_pasted_message_is_one_question() -> None:
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", PLAIN_CHAT],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env={**os.environ, "TERM": "dumb"},
    )
    os.close(follower)
    seen = b""

    def until(words: bytes) -> None:
        nonlocal seen
        while words not in seen:
            seen += os.read(leader, 4096)

    until(b"> ")
    os.write(leader, b"first line\nsecond /exit\n\nlast line\n")
    until(b"asked 'first line\\nsecond /exit\\n\\nlast line'")
    os.write(leader, b"/new\n")
    until(b"note new conversation")
    os.write(leader, b"/exit\n")
    assert process.wait(timeout=300) == 0
    os.close(leader)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (MemoryError(), "out of memory"),
        (RuntimeError("can't start new thread"), "thread limit"),
        (BlockingIOError(11, "Resource temporarily unavailable"), "process limit"),
        (OSError(24, "Too many open files", "x"), "too many open files"),
        (RuntimeError("Could not determine home directory."), "no home folder"),
        (PermissionError(13, "Permission denied", "/root/x"), "/root/x: Permission denied"),
    ],
)
def test_what_the_system_refuses_is_no_bug_of_localrun(
    error: Exception, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(args: Any) -> int:
        raise error

    monkeypatch.setattr(doctor, "run", fail)
    assert cli.main(["doctor"]) == 1
    captured = capsys.readouterr()
    assert says in captured.err
    assert "bug" not in captured.err


def test_a_home_folder_is_needed_only_where_no_folder_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_entry(number: int) -> Any:
        raise KeyError(number)

    monkeypatch.setattr(pwd, "getpwuid", no_entry)
    monkeypatch.setenv("HOME", "")
    for name in ("XDG_DATA_HOME", "LOCALRUN_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(HostError, match="HOME is empty"):
        paths.data_dir()
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert paths.data_dir() == tmp_path / "localrun"
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert paths.data_dir() == tmp_path / "home/.local/share/localrun"
    monkeypatch.setenv("LOCALRUN_DATA_DIR", str(tmp_path / "own"))
    assert paths.data_dir() == tmp_path / "own"


@pytest.mark.engine_process
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
    assert process.wait(timeout=300) == 1
    assert err == b""


# --- chat, eval, doctor ---------------------------------------------------------------------------------------------


@pytest.mark.engine_process
def test_chat_without_a_terminal_prints_one_answer(model: str) -> None:
    done = localrun("chat", model, "--max-tokens", "4", *FAST)
    assert done.returncode == 0
    assert len(done.stdout) > 1
    assert "asking " in done.stderr


@pytest.mark.engine_process
def test_eval_writes_logits_of_all_positions(model: str, tmp_path: Path) -> None:
    (tmp_path / "ids.json").write_text("[5, 6, 7, 8]")
    out = tmp_path / "logits.npy"
    done = localrun("eval", model, "--tokens", str(tmp_path / "ids.json"), "--logits", str(out), "--json", *FAST)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"n_tokens": 4, "logits": str(out)}
    logits = np.load(out)
    assert logits.shape == (4, len(CHAT_TOKENS))
    assert logits.dtype == np.float32


@pytest.mark.engine_process
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
    results = [CheckResult("a", "ok", "fine"), CheckResult("b", "warn", "hm", "mend it")]
    monkeypatch.setattr(doctor, "checks", lambda **options: iter(results))
    assert cli.main(["doctor"]) == 0
    assert "mend it" in capsys.readouterr().out
    results.append(CheckResult("c", "FAIL", "bad", "do this"))
    assert cli.main(["doctor"]) == 1
    assert "FAIL  c: bad" in capsys.readouterr().out


def test_doctor_has_a_hint_where_all_is_well_and_a_fix_where_it_is_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = [CheckResult("a", "ok", "fine", "try this"), CheckResult("b", "warn", "hm", "mend it")]
    monkeypatch.setattr(doctor, "checks", lambda **options: iter(results))
    assert cli.main(["doctor"]) == 0
    assert capsys.readouterr().out.splitlines()[1::2] == ["      hint: try this", "      fix: mend it"]


def test_doctor_knows_whether_kernels_are_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCALRUN_KERNEL_DIR", str(tmp_path))
    check = doctor.check_compiled()
    assert (check.verdict, check.detail, check.fix is None) == ("ok", "compiled on first use", False)
    (versions,) = (path for path in tmp_path.iterdir() if path.is_dir())
    (versions / f"kernel-1{kernel_cache._SUFFIX}").write_bytes(b"code")
    check = doctor.check_compiled()
    assert (check.verdict, check.fix) == ("ok", None)
    assert check.detail.startswith("1 compiled")


@pytest.mark.parametrize(
    ("vendors", "backends", "verdict", "words"),
    [
        ([], ["CPU"], "ok", "none found; localrun"),
        ([], ["CPU", "Vulkan"], "ok", "none found; llama.cpp's build for Vulkan is fine, but there is no card"),
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


def test_threads_of_commands_sleep_while_they_wait() -> None:
    """Threads that spin starve everybody else on a busy machine. libgomp reads the variable when it is loaded, so before that."""
    code = (
        "import os; from localrun.cli import main\n"
        "before = 'libgomp' in open('/proc/self/maps').read()\n"
        "main(['completion', 'bash']); print(before, os.environ['OMP_WAIT_POLICY'])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.splitlines()[-1] == "False passive", done.stderr
