"""Lists of models show what opening finds: the same places, names and refusals."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as QT

from localrun.engine.model_finder import find_models
from localrun.errors import LocalrunError
from localrun.quant.convert.converter import convert
from localrun.quant.locate import locate
from localrun.quant.open import open_model
from tests.checkpoints import write_small
from tests.gguf_models import write_deepseek4, write_gguf

HUB = Path("models--owner--name")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A GGUF, a checkpoint and its conversion."""
    folder = tmp_path_factory.mktemp("parts")
    (gguf,) = write_deepseek4(folder / "m.gguf")
    checkpoint = write_small(folder / "checkpoint", n_routed_experts=4)
    convert(checkpoint, folder / "converted", jobs=1)
    return {"gguf": gguf, "checkpoint": checkpoint, "converted": folder / "converted"}


def companion(path: Path, architecture: str = "clip") -> None:
    write_gguf(path, architecture, {"a.weight": (np.ones((32, 32), np.float32), QT.F32)}, lambda writer: None)


def put(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    else:
        shutil.copy(source, target)


def snapshot(root: Path, file: Path, commit: str) -> None:
    put(file, root / HUB / "blobs" / "0123")
    link = root / HUB / "snapshots" / commit / "Q4" / "m.gguf"
    link.parent.mkdir(parents=True)
    link.symlink_to(os.path.relpath(root / HUB / "blobs" / "0123", link.parent))


def _file(root: Path, parts: dict[str, Path]) -> None:
    put(parts["gguf"], root / "m.gguf")


def _with_companions(root: Path, parts: dict[str, Path]) -> None:
    _file(root, parts)
    companion(root / "mmproj-F16.gguf")
    companion(root / "drafter.gguf", "dflash")


def _split(root: Path, parts: dict[str, Path]) -> None:
    write_deepseek4(root / "s.gguf", split_max_tensors=30)


def _part_missing(root: Path, parts: dict[str, Path]) -> None:
    write_deepseek4(root / "s.gguf", split_max_tensors=30)[0].unlink()


def _checkpoint(root: Path, parts: dict[str, Path]) -> None:
    put(parts["checkpoint"], root)


def _converted_with_imatrix(root: Path, parts: dict[str, Path]) -> None:
    put(parts["converted"], root)
    companion(root / "imatrix.gguf")


def _quantization_below(root: Path, parts: dict[str, Path]) -> None:
    put(parts["gguf"], root / "UD-Q2_K" / "M-UD-Q2_K.gguf")
    (root / "dspark").mkdir()
    companion(root / "dspark" / "d.gguf", "deepseek4-dspark")


def _hub(root: Path, parts: dict[str, Path]) -> None:
    for commit in ("aaa", "bbb"):
        snapshot(root, parts["gguf"], commit)
    (root / HUB / "refs").mkdir()
    (root / HUB / "refs" / "main").write_text("bbb")


def _hub_without_reference(root: Path, parts: dict[str, Path]) -> None:
    for commit in ("aaa", "bbb"):
        snapshot(root, parts["gguf"], commit)


def _cut(root: Path, parts: dict[str, Path]) -> None:
    data = parts["gguf"].read_bytes()
    (root / "m.gguf").write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    "lay",
    [
        _file,
        _with_companions,
        _split,
        _part_missing,
        _checkpoint,
        _converted_with_imatrix,
        _quantization_below,
        _hub,
        _hub_without_reference,
        _cut,
    ],
)
def test_a_list_shows_the_one_model_that_opening_a_folder_opens(
    lay: Callable[[Path, dict[str, Path]], None], parts: dict[str, Path], tmp_path: Path
) -> None:
    lay(tmp_path, parts)
    (found,) = find_models([tmp_path])
    if found.problem:
        with pytest.raises(LocalrunError) as refused:
            open_model(found.path)
        assert found.problem == str(refused.value)
        with pytest.raises(type(refused.value)):
            open_model(tmp_path)
        return
    place = locate(tmp_path)
    assert lay not in (_part_missing, _hub_without_reference, _cut)
    assert (found.path, found.kind) == (place.path, place.kind)
    assert found.n_experts == max(moe.n_experts for moe in open_model(tmp_path).moe_layers.values())
    if lay is _hub:
        assert found.name == "owner/name"


def test_several_models_are_listed_one_by_one(parts: dict[str, Path], tmp_path: Path) -> None:
    for name in ("UD-Q2_K", "UD-IQ1_S"):
        put(parts["gguf"], tmp_path / name / f"M-{name}.gguf")
    put(parts["gguf"], tmp_path / "more" / "a.gguf")
    put(parts["gguf"], tmp_path / "more" / "b.gguf")
    put(parts["converted"], tmp_path / "own")
    found = list(find_models([tmp_path]))
    names = {str(model.path.relative_to(tmp_path)) for model in found}
    assert names == {"UD-Q2_K/M-UD-Q2_K.gguf", "UD-IQ1_S/M-UD-IQ1_S.gguf", "more/a.gguf", "more/b.gguf", "own"}
    assert [model.problem for model in found] == [""] * 5
    assert all(locate(model.path).path == model.path for model in found)
