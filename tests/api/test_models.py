"""What a user writes for MODEL: paths, names, the demo; and what else it may have been meant to be."""

from __future__ import annotations

from pathlib import Path

import pytest

from localrun import cli, config, paths
from localrun.api import models
from localrun.errors import LocalrunError


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CONFIG", "DATA"):
        monkeypatch.setenv(f"LOCALRUN_{name}_DIR", str(tmp_path / name.lower()))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)


def settings(**names: str) -> config.Settings:
    return config.Settings(models=names)


def test_paths_come_before_names_and_names_before_the_demo(tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    (tmp_path / "elsewhere").mkdir()
    assert models.resolve("big", settings(big=str(tmp_path / "elsewhere"))) == Path("big")
    assert models.resolve("mine", settings(mine=str(tmp_path / "elsewhere"))) == tmp_path / "elsewhere"
    assert models.resolve("demo", settings()) is None
    assert models.resolve("demo", settings(demo=str(tmp_path / "big"))) == tmp_path / "big"


def test_a_name_whose_path_is_gone_says_where_it_is_written(tmp_path: Path) -> None:
    with pytest.raises(LocalrunError, match=r"config\.toml: \[models\] old: /gone"):
        models.resolve("old", settings(old="/gone"))


def test_a_downloaded_repository_is_found_in_the_cache_of_hugging_face(tmp_path: Path) -> None:
    folder = tmp_path / "hub/models--deepseek-ai--DeepSeek-V4-Flash"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text("abc")
    with pytest.raises(LocalrunError, match="is not on this machine"):
        models.resolve("deepseek-ai/DeepSeek-V4-Flash", settings())
    (folder / "snapshots/abc").mkdir(parents=True)
    assert models.resolve("deepseek-ai/DeepSeek-V4-Flash", settings()) == folder / "snapshots/abc"


@pytest.mark.parametrize(
    ("text", "command", "hint"),
    [
        ("What is a fox?", "chat", "to ask it as a question: localrun run -p 'What is a fox?'"),
        ("deepseek-v4-flash", "plan", "did you mean: localrun plan flash"),
        ("DeepSeek-V4-Pro", "plan", "did you mean: localrun plan pro"),
        ("flsh", "plan", "did you mean: localrun plan flash"),
        ("deepseek-ai/DeepSeek-V4-Pro", "plan", "nothing has to be downloaded for: localrun plan pro"),
        ("v4flash", "chat", "localrun plan flash shows what it needs"),
        ("deepseek-ai/DeepSeek-V4-Flash", "chat", "hf download deepseek-ai/DeepSeek-V4-Flash --local-dir ~/models/"),
        ("someone/other-model", "plan", "then: localrun plan ~/models/other-model"),
        ("fast-mdoel", "run", "did you mean: localrun run fast-model"),
        ("demmo", "chat", "did you mean: localrun chat demo"),
        ("v4-smal.gguf", "chat", "did you mean: localrun chat v4-small.gguf"),
        ("/no/such/model", "chat", "localrun list shows the models on this machine"),
        ("~nobody-of-this-name/x", "chat", "localrun list shows"),
        ("x" * 5000, "chat", "localrun list shows"),
    ],
)
def test_what_is_no_model_is_answered_with_the_command_that_was_meant(
    text: str, command: str, hint: str, tmp_path: Path
) -> None:
    (tmp_path / "v4-small.gguf").touch()
    with pytest.raises(LocalrunError) as refused:
        models.resolve(text, settings(**{"fast-model": str(tmp_path)}), command=command)
    assert hint in str(refused.value.hint)


@pytest.mark.parametrize(
    ("text", "question"),
    [
        ("What is a fox?", True),
        ("hello", True),
        ("Summarise a/b", True),
        ("/no/such model", False),
        ("models/v4", False),
        ("v4.gguf", False),
        ("~/v4", False),
        ("flash", False),
        ("demo", False),
        ("mine", False),
        ("mien", False),
    ],
)
def test_a_text_is_a_question_unless_it_looks_like_a_model(text: str, question: bool) -> None:
    assert models.is_text(text, settings(mine="/m")) is question


def test_the_last_model_is_remembered_while_it_is_there(tmp_path: Path) -> None:
    assert models.last() is None
    (tmp_path / "v4").mkdir()
    models.remember(Path("v4"))
    assert models.last() == tmp_path / "v4"
    (tmp_path / "v4").rmdir()
    assert models.last() is None
    (paths.data_dir() / "last-model").write_bytes(b"\0\xff")
    assert models.last() is None


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["runn", "-p", "x"], "hint: did you mean: localrun run"),
        (["What is a fox?"], "hint: to ask a question: localrun run -p 'What is a fox?'"),
        (["run", "--promt", "x"], "hint: did you mean --prompt?"),
        (["run", "--temprature", "1"], "hint: did you mean --temp?"),
        (["run", "-p", "What", "is", "a", "fox?"], "hint: a prompt goes after -p, in quotes: localrun run MODEL -p "),
        (["run", "-p", "x", "--ram", "24"], "did you mean 24GiB?"),
        (["run", "-p", "x", "--kv", "q9"], "expected f16, bf16, q8_0, q4_0, f32"),
        (["run", "-p", "x", "--context", "32k"], "a number has no unit (did you mean 32768?)"),
        (["run", "-p", "x", "--machine-ram", "5GiB"], "hint: --machine-ram is an option of localrun plan"),
        (["pln", "flash"], "error: there is no command 'pln'\nhint: did you mean: localrun plan"),
        (["plan", "deepseek-v4-flash"], "hint: did you mean: localrun plan flash"),
    ],
)
def test_misspelt_words_are_answered_with_the_right_ones(
    arguments: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert hint in captured.err
    assert captured.out == ""


def test_models_are_listed_with_their_names_and_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.engine.models import write_chat_model

    model = write_chat_model(tmp_path / "chat.gguf")
    (tmp_path / "config").mkdir()
    (tmp_path / "config/config.toml").write_text(f"[models]\nsmall = '{model}'\ngone = '/gone'\n")
    assert cli.main(["list", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[0].startswith("small ")
    assert str(model) in captured.out
    assert "[models] gone: /gone: no such file" in captured.err
    assert cli.main(["show", "small"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["model", "path", "kind", "files", "dense", "experts", "context"]
    assert str(model) in lines[1]
