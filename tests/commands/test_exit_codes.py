"""The table of exit codes in docs/run.md holds for real commands. Signals: tests/test_cli.py."""

from __future__ import annotations

import io
import re
import shutil
import sys
from pathlib import Path

import pytest

from localrun import cli, errors
from localrun.engine.conversations.attachments import AttachmentError
from localrun.quant.convert.converter import MODEL_NAME, convert
from localrun.quant.open import open_model
from tests.checkpoints import write_small
from tests.engine.models import write_chat_model

ROOT = Path(__file__).parents[2]
MISSING = "nothing-here"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a checkpoint, what was converted from it, the same with a damaged byte, one that was cut, and texts."""
    folder = tmp_path_factory.mktemp("files")
    write_chat_model(folder / "model.gguf")
    source = write_small(folder / "checkpoint")
    convert(source, folder / "converted")
    shutil.copytree(folder / "converted", folder / "damaged")
    extent = open_model(folder / "damaged").expert(1, 2)[0].extents[0]
    with (folder / "damaged" / MODEL_NAME).open("r+b") as file:
        file.seek(extent.offset + 3)
        byte = file.read(1)[0] ^ 1
        file.seek(extent.offset + 3)
        file.write(bytes([byte]))
    (folder / "cut.gguf").write_bytes((folder / "model.gguf").read_bytes()[:1000])
    (folder / "empty").mkdir()
    (folder / "binary").write_bytes(b"\xff\0" * 500)
    (folder / "blank").write_text(" \n")
    (folder / "short.txt").write_text("Too short.")
    return folder


@pytest.mark.parametrize(
    ("command", "code", "words"),
    [
        ("--help", 0, ""),
        ("--version", 0, ""),
        ("completion bash", 0, ""),
        ("show model.gguf", 0, ""),
        ("list empty", 0, ""),
        ("verify converted", 0, "checksums are correct"),
        ("verify model.gguf", 0, "weights not verified"),
        ("plan flash --box gpu-24-ram-64", 0, ""),
        # 1: what is in the files, the machine, the other side
        ("verify damaged", 1, "blk.1.ffn_gate_exps.weight"),
        ("verify cut.gguf", 1, "cut.gguf"),
        ("show cut.gguf", 1, "cut.gguf"),
        ("run cut.gguf -p x", 1, "cut.gguf"),
        ("run model.gguf -p x --ram 1KB", 1, "--ram"),
        ("run model.gguf -p x --rpc 127.0.0.1:1", 1, "--rpc 127.0.0.1:1"),
        ("chat --server http://127.0.0.1:1 --plain", 1, "127.0.0.1:1"),
        ("convert checkpoint new --imatrix blank --base q8_0", 1, "blank"),
        # 2: what was typed, or written by hand
        ("", 2, "usage"),
        ("dance", 2, "dance"),
        ("run --no-such-option", 2, "--no-such-option"),
        ("run model.gguf", 2, "nothing to answer"),
        ("run model.gguf -p x --temp -1", 2, "--temp"),
        ("run model.gguf -p x --gpu nonesuch", 2, "nonesuch"),
        ("run model.gguf -p x --gpu none --vram 1GiB", 2, "--vram"),
        (f"run {MISSING} -p x", 2, MISSING),
        (f"run ./{MISSING} -p x", 2, MISSING),
        (f"run /{MISSING} -p x", 2, MISSING),
        (f"run model.gguf -p x --file {MISSING}", 2, "no such file"),
        ("run model.gguf -p x --file binary", 2, "not a text file"),
        (f"run model.gguf -p x --tools {MISSING}", 2, "No such file"),
        ("run model.gguf -p x --tools blank", 2, "blank"),
        ("chat empty", 2, "empty"),
        ("show empty", 2, "empty"),
        (f"verify {MISSING}", 2, MISSING),
        (f"verify converted --repair {MISSING}", 2, MISSING),
        ("verify model.gguf --repair checkpoint", 2, "model.gguf"),
        (f"eval model.gguf --text {MISSING}", 2, MISSING),
        ("eval model.gguf --text blank", 2, "the text is empty"),
        (f"eval model.gguf --text short.txt --reference {MISSING}", 2, MISSING),
        (f"eval model.gguf --tokens {MISSING} --logits out.npy", 2, MISSING),
        ("eval model.gguf --tokens blank", 2, "--logits"),
        (f"bench model.gguf --text {MISSING}", 2, MISSING),
        (f"plan {MISSING}", 2, MISSING),
        ("plan flash --box nonesuch", 2, "nonesuch"),
        ("plan converted --base q4_k", 2, "converted"),
        ("serve model.gguf --port 99999", 2, "expected 0 to 65535"),
        ("serve model.gguf --queue -1", 2, "--queue"),
        ("serve model.gguf --stop-after nan", 2, "expected a number of seconds"),
        ("bench model.gguf --time-limit -1", 2, "expected a number of seconds"),
        (f"serve model.gguf --api-key-file {MISSING}", 2, MISSING),
        ("serve model.gguf --api-key-file blank", 2, "contains no key"),
        (f"convert {MISSING} new", 2, MISSING),
        ("convert empty new", 2, "empty"),
        ("convert model.gguf new", 2, "model.gguf"),
        ("convert checkpoint converted --base q4_k", 2, "converted"),
        ("convert checkpoint checkpoint/inside", 2, "inside the source"),
        ("convert checkpoint new --target 8GiB", 2, "'8GiB' is not a target"),
        (f"convert checkpoint new --base q8_0 --calibrate {MISSING}", 2, MISSING),
        ("convert checkpoint new --base q8_0 --calibrate binary", 2, "not UTF-8"),
        ("convert checkpoint new --base q8_0 --calibrate short.txt", 2, "too few to calibrate"),
        (f"convert checkpoint new --base q8_0 --imatrix {MISSING}", 2, MISSING),
        (f"list {MISSING}", 2, MISSING),
    ],
)
def test_commands_end_with_the_code_of_the_table(
    command: str,
    code: int,
    words: str,
    files: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(files)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    assert cli.main(command.split()) == code, capsys.readouterr().err
    captured = capsys.readouterr()
    assert words in captured.err
    assert "bug in localrun" not in captured.err
    assert not (files / "new").exists()
    if code == 2:
        assert captured.out == ""


def test_a_settings_file_that_cannot_be_is_wrong_usage(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCALRUN_CONFIG_DIR", str(tmp_path))
    for text in ("[engine]\nrom = 1\n", "[engine\n", "[models]\nmine = '/nothing-here'\n"):
        (tmp_path / "config.toml").write_text(text)
        assert cli.main(["show", "mine"]) == 2
        assert "config.toml" in capsys.readouterr().err


def test_the_table_names_every_code_and_errors_have_no_other() -> None:
    table = (ROOT / "docs/run.md").read_text("utf-8").split("## Exit codes")[1].split("\n## ")[0]
    documented = re.findall(r"^\| (\S[^|]*?) \|", table, re.M)
    assert documented == ["code", "0", "1", "2", "130", "128 + N"]
    assert (cli.EXIT_FAILED, cli.EXIT_USAGE, cli.EXIT_INTERRUPTED) == (1, 2, 130)
    kinds: list[type[errors.LocalrunError]] = [AttachmentError, errors.LocalrunError]
    kinds += [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, kinds[1])]
    assert {kind for kind in kinds if kind.exit_code != 1} == {errors.UsageError, AttachmentError}
