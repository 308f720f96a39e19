"""Splitting a model where the drive refuses: an error that names what it is, and the model as it was."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import NoReturn

import pytest

from localrun.errors import StoreError
from localrun.quant.convert.converter import convert
from localrun.quant.convert.split import split_model
from localrun.quant.open import open_model
from tests.checkpoints import write_small


@pytest.fixture
def model(tmp_path: Path) -> Path:
    convert(write_small(tmp_path / "source"), tmp_path / "model", jobs=1)
    return tmp_path / "model"


def refuse(*_arguments: object, **_options: object) -> NoReturn:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS), "somewhere")


def test_a_drive_that_becomes_read_only_is_named_and_the_model_stays(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse)
        patch.setattr(Path, "unlink", refuse)
        with pytest.raises(StoreError, match=r"the parts can't be written: Read-only file system") as caught:
            split_model(model, 200_000)
    assert str(model) in str(caught.value)
    open_model(model)
    assert len(split_model(model, 200_000)) > 1
    assert not list(model.glob("*.partial"))


def test_an_old_file_that_cannot_be_deleted_is_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = model / "model.gguf"
    unlink = Path.unlink

    def refuse_whole(path: Path, missing_ok: bool = False) -> None:
        if path == whole:
            refuse()
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse_whole)
    with pytest.raises(StoreError, match=r"model\.gguf: can't be deleted: Read-only file system"):
        split_model(model, 200_000)
    assert len(open_model(model).files) > 1
