"""Settings: defaults < file < environment, and every mistake is named."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from localrun import config
from localrun.config import Settings
from localrun.errors import UsageError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "config.toml"


def test_nothing_given_means_defaults(path: Path) -> None:
    assert config.load(path, {}) == Settings()


def test_file_overrides_defaults_and_environment_overrides_the_file(path: Path) -> None:
    path.write_text('[engine]\nram = "8GiB"\ncontext = 4096\n[sampling]\ntemperature = 0.5\n')
    settings = config.load(path, {"LOCALRUN_CONTEXT": "100", "LOCALRUN_MODEL": "/m"})
    assert settings == Settings().changed(ram=8 * 2**30, context=100, model="/m", temperature=0.5)


def test_empty_variables_count_as_unset(path: Path) -> None:
    assert config.load(path, {"LOCALRUN_RAM": ""}) == Settings()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[engine]\nrom = 1", r"\[engine\] has no setting 'rom'"),
        ("[motor]\nram = 1", "'motor'"),
        ("ram = 1", "'ram'"),
        ("[engine]\nram = 'much'", r"\[engine\] ram: 'much'"),
        ("[engine]\ncontext = -1", "context"),
        ("[engine]\ngpu = 3", "gpu"),
        ("[engine", "not a settings file"),
    ],
)
def test_mistakes_name_file_and_key(path: Path, text: str, says: str) -> None:
    path.write_text(text)
    with pytest.raises(UsageError, match=says) as caught:
        config.load(path, {})
    assert str(path) in str(caught.value)


def test_wrong_variable_is_named(path: Path) -> None:
    with pytest.raises(UsageError, match="LOCALRUN_THREADS"):
        config.load(path, {"LOCALRUN_THREADS": "two"})


@pytest.mark.parametrize(
    "text", ["[models]\nbig = 3", '[models]\n"a/b" = "/m"', '[models]\n" a" = "/m"', '[models]\n"" = "/m"']
)
def test_names_of_models_are_checked(path: Path, text: str) -> None:
    path.write_text(text)
    with pytest.raises(UsageError, match=r"\[models\]"):
        config.load(path, {})


def test_only_what_was_typed_overrides(path: Path) -> None:
    path.write_text("[engine]\ncontext = 4096\n[models]\nbig = '/m'\n")
    settings = config.load(path, {})
    typed = SimpleNamespace(context=None, threads=3, max_tokens=0, option_names=())
    changed = settings.overridden(typed, ("context", "threads"))
    assert (changed["context"], changed["threads"], changed["max_tokens"]) == (4096, 3, None)
    assert changed.models == {"big": "/m"}


def test_what_the_user_set_is_known_even_if_it_is_the_default(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('[engine]\nkv = "f16"\n')
    settings = config.load(file, {"LOCALRUN_BATCH": "512"})
    assert settings.given == {"kv", "batch"}
    assert settings.changed(context=4096).given == {"kv", "batch", "context"}
    assert config.load(tmp_path / "absent.toml", {}).given == frozenset()
