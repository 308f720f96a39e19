"""Headers of safetensors files: what is read, and every way in which a header can lie."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from localrun.errors import FormatError, StoreError
from localrun.quant.checkpoint.safetensors import SafetensorsFile


def write(path: Path, header: object, data: bytes = b"", *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_reads_what_the_reference_library_wrote(tmp_path: Path) -> None:
    arrays: dict[str, np.ndarray[Any, Any]] = {
        "b": np.arange(12, dtype=np.float32).reshape(3, 4),
        "a": np.arange(5, dtype=np.int64),
    }
    save_file(arrays, tmp_path / "m.safetensors", metadata={"format": "np"})
    file = SafetensorsFile.open(tmp_path / "m.safetensors")
    assert {name: (e.dtype, e.shape) for name, e in file.tensors.items()} == {"b": ("F32", (3, 4)), "a": ("I64", (5,))}
    for name, array in arrays.items():
        assert file.read(name).tobytes() == array.tobytes()


def test_accepts_the_dtypes_of_official_files_and_empty_tensors(tmp_path: Path) -> None:
    dtypes = ("F8_E4M3", "F8_E8M0", "I8", "BF16", "F32", "I64")
    header = {name: entry(name, [0, 4], [0, 0]) for name in dtypes} | {"x": entry("I8", [3], [0, 3])}
    file = SafetensorsFile.open(write(tmp_path / "m", header, b"abc"))
    assert file.read("x").tobytes() == b"abc"
    assert file.tensors["BF16"].n_bytes == 0


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"t": entry(dtype="F12")}, 8, "unknown dtype"),
        ({"t": entry(dtype=3)}, 8, "unknown dtype"),  # type: ignore[arg-type]
        ({"t": entry(shape=[-2])}, 8, "shape"),
        ({"t": entry(shape=[True, 2])}, 8, "shape"),
        ({"t": entry(shape=[2.0])}, 8, "shape"),
        ({"t": entry(shape=[1] * 9)}, 8, "shape"),
        ({"t": entry(shape="2")}, 8, "shape"),
        ({"t": entry(offsets=[8, 0])}, 8, "data_offsets"),
        ({"t": entry(offsets=[0])}, 8, "data_offsets"),
        ({"t": entry(shape=[3])}, 8, "takes 12 bytes"),
        ({"t": entry(shape=[2**62, 2**62])}, 8, "takes"),
        ({"t": entry(), "u": entry(offsets=[4, 12])}, 12, "overlaps"),
        ({"t": entry(), "u": entry(offsets=[12, 20])}, 20, "hole"),
        ({"t": entry(offsets=[4, 12])}, 12, "hole"),
        ({"t": entry()}, 7, "truncated"),
        ({"t": entry()}, 9, "after its last tensor"),
        ({"t": 3}, 8, "not an object"),
        ([1], 0, "not a JSON object"),
        (b'{"t": NaN}', 0, "NaN"),
        (b"\xff{}", 0, "not JSON"),
        (b'{"a":' * 3000, 0, "not JSON"),
        (b'{"a":' + b"9" * 5000 + b"}", 0, "not JSON"),
    ],
)
def test_refuses_headers_that_contradict_themselves(tmp_path: Path, header: object, data: int, message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        SafetensorsFile.open(write(tmp_path / "m", header, bytes(data)))
    assert str(tmp_path / "m") in str(caught.value)


def test_refuses_duplicate_names(tmp_path: Path) -> None:
    text = json.dumps({"t": entry()})
    twice = (text[:-1] + ", " + text[1:]).encode()
    with pytest.raises(FormatError, match="'t' twice"):
        SafetensorsFile.open(write(tmp_path / "m", twice, bytes(8)))


@pytest.mark.parametrize("length", [2**63, 200_000_000, 1000])
def test_refuses_a_header_longer_than_the_file_without_reading_it(tmp_path: Path, length: int) -> None:
    with pytest.raises(FormatError, match="header of"):
        SafetensorsFile.open(write(tmp_path / "m", {}, length=length))


@pytest.mark.parametrize("size", [0, 7])
def test_refuses_a_file_without_room_for_a_length(tmp_path: Path, size: int) -> None:
    (tmp_path / "m").write_bytes(bytes(size))
    with pytest.raises(FormatError, match="too few"):
        SafetensorsFile.open(tmp_path / "m")


def test_missing_file_is_a_format_error_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="absent"):
        SafetensorsFile.open(tmp_path / "absent")


def test_read_notices_that_the_file_has_changed(tmp_path: Path) -> None:
    path = write(tmp_path / "m", {"t": entry()}, bytes(8))
    file = SafetensorsFile.open(path)
    with path.open("ab") as handle:
        handle.write(b"more")
    with pytest.raises(StoreError, match="changed"):
        file.read("t")
    path.unlink()
    with pytest.raises(StoreError, match="can't be opened"):
        file.read("t")
