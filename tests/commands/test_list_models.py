"""The models on this machine: names, sizes, what doesn't fit or isn't whole, and names that lead nowhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from localrun import cli
from localrun.commands import list_models
from tests.engine.models import write_chat_model


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOCALRUN_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setattr(list_models, "default_folders", list)
    (tmp_path / "models").mkdir()
    write_chat_model(tmp_path / "models" / "chat.gguf")
    (tmp_path / "models" / "broken.gguf").write_bytes(b"GGUF" + bytes(50))
    return tmp_path / "models"


def test_whole_models_come_first_and_each_has_its_path_below(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1::2] == [f"    {folder / 'chat.gguf'}", f"    {folder / 'broken.gguf'}"]
    assert lines[0].split() == ["chat.gguf", "1.38", "MiB", "GGUF", "all", "in", "RAM"]


def test_json_has_the_user_s_own_name(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.toml").write_text(
        f'[models]\nmine = "{folder / "chat.gguf"}"\ngone = "{tmp_path / "gone.gguf"}"\n'
    )
    assert cli.main(["list", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [model["alias"] for model in found] == ["mine", None]
    assert found[0]["path"] == str(folder / "chat.gguf")
    assert found[0]["n_bytes"] == (folder / "chat.gguf").stat().st_size
    assert found[1]["problem"]
    assert cli.main(["list", str(folder)]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("mine ")
    assert f"[models] gone: {tmp_path / 'gone.gguf'}: no such file or directory" in captured.err


def test_an_empty_folder_says_what_else_to_do(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert cli.main(["list", str(tmp_path / "empty")]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "no models found" in captured.err
    assert cli.main(["list", str(tmp_path / "absent")]) == 2
