"""`localrun verify`: damage is found, named, and repaired to the same bytes; the exit code says how it ended."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from localrun import cli
from localrun.commands import verify
from localrun.quant.convert.converter import MODEL_NAME, convert
from tests.checkpoints import write_small
from tests.gguf_models import TinyDeepseek4, write_deepseek4

DAMAGE_KEYS = {"file", "tensor", "expert", "offset", "bytes", "expected", "found", "problem"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("source") / "small")


@pytest.fixture(scope="module")
def whole(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("whole") / "out"
    convert(checkpoint, target)
    return target


@pytest.fixture
def model(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOCALRUN_CACHE_DIR", str(tmp_path / "cache"))
    return Path(shutil.copytree(whole, tmp_path / "out"))


def damage(model: Path) -> None:
    with (model / MODEL_NAME).open("r+b") as file:
        file.seek(-5000, 2)
        byte = file.read(1)
        file.seek(-5000, 2)
        file.write(bytes([byte[0] ^ 1]))


def verified(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any], str]:
    code = cli.main(["verify", *map(str, arguments), "--json"])
    captured = capsys.readouterr()
    return code, json.loads(captured.out), captured.err


def test_a_sound_model(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, result, told = verified(capsys, model)
    assert (code, result["ok"], result["damaged"]) == (0, True, [])
    assert result["checked"] > 10
    assert result["bytes_read"] == result["bytes"] > 0
    assert f"all {result['checked']} checksums are correct" in told


def test_one_bit_is_found_and_named_and_repaired(
    model: Path, whole: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(model)
    code, result, told = verified(capsys, model)
    assert (code, result["ok"], len(result["damaged"])) == (1, False, 1)
    (found,) = result["damaged"]
    assert set(found) == DAMAGE_KEYS
    assert found["file"] == MODEL_NAME
    assert found["expected"] != found["found"]
    assert "damaged: " in told
    assert found["tensor"] in told
    assert "--repair SOURCE" in told
    code, result, told = verified(capsys, model, "--repair", checkpoint)
    assert (code, result["ok"], result["repaired"]) == (0, True, 1)
    assert (model / MODEL_NAME).read_bytes() == (whole / MODEL_NAME).read_bytes()


def test_a_model_without_checksums_says_so(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_deepseek4(tmp_path / "m.gguf", TinyDeepseek4())[0]
    code, result, told = verified(capsys, path)
    assert (code, result["ok"], result["checksums"]) == (0, True, False)
    assert "weights not verified" in told
    assert cli.main(["verify", str(path), "--repair", str(checkpoint)]) == 2
    assert "is not a converted model" in capsys.readouterr().err
    assert verify.EXAMPLES.count("localrun verify") >= 2
