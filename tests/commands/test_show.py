"""What a model is, in lines and as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from localrun import cli
from localrun.api import demo
from localrun.commands import doctor, show
from localrun.units import format_size
from tests.engine.models import CHAT_TOKENS, write_chat_model
from tests.gguf_models import TinyDeepseek4, write_deepseek4


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["show", *arguments]) == 0
    return capsys.readouterr().out


def test_lines_and_json_say_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_chat_model(tmp_path / "chat.gguf")
    facts = json.loads(shown(capsys, str(path), "--json"))
    lines = shown(capsys, str(path)).splitlines()
    assert facts["path"] == str(path)
    assert facts["files"] == [{"name": "chat.gguf", "size_bytes": path.stat().st_size}]
    assert (facts["architecture"], facts["has_tokenizer"], facts["experts_in"]) == ("deepseek4", True, None)
    assert facts["n_moe_layers"] == facts["n_layers"] == 3
    assert sum(group["count"] for group in facts["experts"]) == facts["n_moe_layers"] * facts["n_experts"]
    assert sum(group["size_bytes"] for group in facts["experts"]) + facts["dense_bytes"] < path.stat().st_size
    assert [line.split(maxsplit=1)[0] for line in lines] == [
        "model",
        "path",
        "kind",
        "files",
        "dense",
        "experts",
        "context",
    ]
    assert f"{facts['n_experts']} in each of 3 layers, {facts['n_experts_used']} per token" in lines[5]
    assert lines[2] == f"kind     {facts['kind']}" == "kind     GGUF"
    parts = sorted(facts["dense"].items(), key=lambda part: part[1], reverse=True)
    shown_parts = lines[4].partition(": ")[2].split(", ")
    assert [part.rsplit(maxsplit=2)[0] for part in shown_parts] == [name for name, _ in parts], "largest first"
    assert len(CHAT_TOKENS) > 0


def test_a_model_without_a_tokenizer_says_what_does_not_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_deepseek4(tmp_path / "m.gguf", TinyDeepseek4())[0]
    assert shown(capsys, str(path)).splitlines()[-1] == "note     no tokenizer: bench works, but chat doesn't"


def test_the_demo_is_one_size_in_a_list_and_in_doctor_and_show_says_that_it_means_the_converted_copy(
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = demo.checkpoint()
    assert cli.main(["list", str(folder)]) == 0
    size = format_size(sum(file.stat().st_size for file in folder.glob("*.safetensors")))
    assert f" {size}  checkpoint " in capsys.readouterr().out
    check = doctor.check_demo(warm=False, status=lambda text: None)
    assert check.detail == f"{folder}, checkpoint of {size}"
    assert "kind     converted\n" in shown(capsys, "demo")


def test_an_unknown_model_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", "/no/such/model"]) == 2
    assert capsys.readouterr().out == ""
    assert "localrun show demo" in show.EXAMPLES
