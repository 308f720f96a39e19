"""Which GGUF of a folder is the model."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest

from localrun.errors import FormatError
from localrun.quant.gguf.folder import GgufModel, ggufs_in, is_companion, models_in, only_model, several, split_files


def write(path: Path, architecture: str = "deepseek4") -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_parts_are_one_model_with_all_their_bytes(tmp_path: Path) -> None:
    for name, size in (("b-00001-of-00002.gguf", 3), ("b-00002-of-00002.gguf", 4), ("a.gguf", 5), ("x.txt", 9)):
        (tmp_path / name).write_bytes(bytes(size))
    assert ggufs_in(tmp_path) == [
        GgufModel(tmp_path / "a.gguf", "a", 5),
        GgufModel(tmp_path / "b-00001-of-00002.gguf", "b", 7),
    ]


def test_companions_are_passed_over_where_there_is_a_choice(tmp_path: Path) -> None:
    encoder = write(tmp_path / "mmproj.gguf", "clip")
    assert [model.path for model in models_in(tmp_path)] == [encoder], "alone it is told what it is"
    model = write(tmp_path / "model.gguf")
    assert only_model(tmp_path) == model
    assert (is_companion(encoder), is_companion(model)) == (True, False)
    assert not is_companion(write(tmp_path / "bert.gguf", "bert")), "no companion, a model that can't be run"


def test_a_damaged_file_is_taken_for_a_model(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGU")
    assert not is_companion(tmp_path / "m.gguf")


def test_no_model_and_several_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError) as caught:
        only_model(tmp_path)
    assert str(caught.value) == f"{tmp_path}: contains no GGUF model"
    for name in ("a", "b"):
        write(tmp_path / f"{name}.gguf")
    with pytest.raises(FormatError, match=r": 2 GGUF models: a\.gguf \(.*\), b\.gguf \("):
        only_model(tmp_path)
    error = several(tmp_path, "models", [(str(n), 1 << 30) for n in range(14)])
    assert str(error).startswith(f"{tmp_path}: 14 models: 0 (1.00 GiB), 1 (1.00 GiB)")
    assert str(error).endswith("11 (1.00 GiB) and 2 more")


def test_leftovers_of_a_download_are_told(tmp_path: Path) -> None:
    cache = tmp_path / ".cache" / "huggingface" / "download"
    cache.mkdir(parents=True)
    (cache / "abc.incomplete").touch()
    with pytest.raises(FormatError, match=r"an unfinished download \(abc\.incomplete\)"):
        only_model(tmp_path)
    (tmp_path / "m.gguf.part1of2").touch()
    with pytest.raises(FormatError, match=r"one piece of m\.gguf"):
        only_model(tmp_path)


def test_all_parts_of_a_split_file_are_found_or_missed(tmp_path: Path) -> None:
    parts = [tmp_path / f"m-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    for part in parts:
        part.touch()
    assert split_files(parts[1]) == parts
    assert split_files(tmp_path / "m.gguf") == [tmp_path / "m.gguf"]
    parts[2].unlink()
    with pytest.raises(FormatError, match=r"1 of 3 parts are missing, first m-00003-of-00003\.gguf"):
        split_files(parts[0])
    for impossible in ("m-00004-of-00003.gguf", "m-00000-of-00003.gguf", "m-00001-of-10000.gguf"):
        with pytest.raises(FormatError, match="invalid part number"):
            split_files(tmp_path / impossible)
