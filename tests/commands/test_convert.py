"""`localrun convert`: what people and programs see."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from localrun.commands import convert as command
from localrun.errors import BudgetError, UsageError
from localrun.options import DENSE_CHOICES
from localrun.quant.checkpoint.mapping import BASE_TYPES, DENSE_TYPES
from localrun.quant.open import open_model
from tests.checkpoints import write_small


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("source") / "small", mtp=True)


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(argument) for argument in arguments]))


def events(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The last event of each name, in the order of their last lines."""
    found: dict[str, Any] = {}
    for line in capsys.readouterr().out.splitlines():
        event = json.loads(line)
        name = event.pop("event")
        found.pop(name, None)
        found[name] = event
    return found


def test_choices_are_those_of_the_plan() -> None:
    assert set(DENSE_CHOICES) == set(DENSE_TYPES)
    assert set(command.BASE_CHOICES) == set(BASE_TYPES)


def test_the_source_may_be_a_name(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCALRUN_CONFIG_DIR", str(tmp_path / "config"))
    (tmp_path / "config").mkdir()
    (tmp_path / "config/config.toml").write_text(f"[models]\nofficial = '{small}'\n")
    assert run("official", tmp_path / "out", "--dry-run") == 0
    assert "I8 -> MXFP4  exact" in capsys.readouterr().err
    with pytest.raises(UsageError) as caught:
        run("oficial", tmp_path / "out", "--dry-run")
    assert caught.value.hint == "did you mean: localrun convert official"
    with pytest.raises(UsageError) as caught:
        run("deepseek-ai/DeepSeek-V4-Flash", tmp_path / "out", "--dry-run")
    assert "localrun convert ~/models/DeepSeek-V4-Flash DIR" in (caught.value.hint or "")


def test_memory_that_the_machine_does_not_have_is_refused_at_once(small: Path, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"--ram 500.00 TiB: this machine has"):
        run(small, tmp_path / "out", "--ram", "500TiB")
    assert not (tmp_path / "out").exists()


def test_dry_run_writes_nothing_and_shows_the_plan(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(small, tmp_path / "out", "--dry-run") == 0
    assert not (tmp_path / "out").exists()
    out, err = capsys.readouterr()
    assert out == ""
    assert "warning: " in err
    assert "no tokenizer.json" in err
    assert "I8 -> MXFP4  exact" in err
    assert "F8_E4M3 -> Q8_0   rounded" in err
    assert "MTP (mtp.*): 63 tensors" in err
    assert ": skipped;" in err


def test_dry_run_as_json_agrees_with_what_is_written(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(small, tmp_path / "out", "--dry-run", "--json") == 0
    plan = events(capsys)["plan"]
    assert plan["left_out"]["kind"] == "MTP"
    assert run(small, tmp_path / "out", "--json", "--jobs", 2) == 0
    result = events(capsys)["finished"]
    assert result["output_bytes"] == plan["output_bytes"] == (tmp_path / "out" / "model.gguf").stat().st_size
    assert len(open_model(tmp_path / "out").tensors) == plan["output_tensors"]
    assert sum(step["output_bytes"] for step in plan["steps"]) == result["written_bytes"]
    assert 0 < result["relative_rms_error"]["F8_E4M3 -> Q8_0"] < 0.02


def test_a_program_can_follow_a_conversion_and_the_last_line_says_how_it_ended(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(small, tmp_path / "out", "--json") == 0
    told = events(capsys)
    assert list(told)[-1] == "finished"
    assert told["finished"]["path"] == str(tmp_path / "out")
    progress = told["progress"]
    assert progress["step"] == "base"
    assert progress["done_bytes"] == progress["total_bytes"] > 0
    step, error = max(told["finished"]["relative_rms_error"].items())
    assert told["note"]["text"] == f"  {step}: relative RMS error {error:.4%}"
    with pytest.raises(UsageError):
        run(small, tmp_path / "out", "--json", "--base", "q8_0", "--hot", "mxfp4:1GiB")
    told = events(capsys)
    assert list(told)[-1] == "failed"
    assert told["failed"]["message"]
    assert told["failed"]["hint"]


def test_an_interrupted_conversion_says_so_last(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object, **more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("localrun.quant.convert.converter.write_plan", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(small, tmp_path / "out", "--json")
    assert list(events(capsys))[-1] == "interrupted"


def test_exact_types_are_shown_as_exact(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(small, tmp_path / "out", "--dry-run", "--dense", "bf16") == 0
    assert "rounded" not in capsys.readouterr().err


def test_human_output_goes_to_stderr_without_bars(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(small, tmp_path / "out") == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "wrote " in err
    assert "relative RMS error" in err
    assert "\r" not in err
    assert "[#" not in err


@pytest.mark.parametrize(
    ("arguments", "message"), [(["--jobs", "0"], "--jobs 0"), (["--base", "q2_k"], "not a multiple of Q2_K")]
)
def test_impossible_options_are_refused_before_any_work(
    small: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        run(small, tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()
