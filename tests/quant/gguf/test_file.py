"""GGUF headers: read against gguf-py's writer, written for llama.cpp's reader, and every field doubted."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as QT
from gguf import GGUFValueType as VT

from localrun.errors import FormatError, StoreError, UnsupportedModelError
from localrun.quant.gguf.file import (
    GgufValue,
    align_up,
    build_header,
    read_gguf,
    tensor_bytes,
    tensor_offsets,
)
from localrun.quant.model.source import TensorInfo
from tests.stock_llama import gguf_context

SCALARS = {
    "u8": (VT.UINT8, 200),
    "i8": (VT.INT8, -100),
    "u16": (VT.UINT16, 60000),
    "i16": (VT.INT16, -30000),
    "u32": (VT.UINT32, 4_000_000_000),
    "i32": (VT.INT32, -2_000_000_000),
    "f32": (VT.FLOAT32, 0.5),
    "u64": (VT.UINT64, 1 << 63),
    "i64": (VT.INT64, -(1 << 62)),
    "f64": (VT.FLOAT64, 1e300),
    "yes": (VT.BOOL, True),
}


def write_sample(path: Path, alignment: int | None = None) -> None:
    writer = gguf.GGUFWriter(path, "sample")
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for key, (value_type, value) in SCALARS.items():
        writer.add_key_value(key, value, value_type)
    writer.add_string("text", "Grüße, 世界 \U0001f600")
    writer.add_array("words", ["", "a", "ünï", "x" * 300])
    writer.add_array("counts", [1, -2, 3])
    writer.add_array("reals", [0.25, -1.5])
    writer.add_array("flags", [True, False])
    rng = np.random.default_rng(0)
    writer.add_tensor("matrix", rng.standard_normal((6, 64), dtype=np.float32))
    writer.add_tensor("vector", rng.standard_normal(5, dtype=np.float32))
    quantized = gguf.quants.quantize(rng.standard_normal((2, 4, 32), dtype=np.float32), QT.Q8_0)
    writer.add_tensor("stack", quantized, raw_dtype=QT.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    path = tmp_path / "sample.gguf"
    write_sample(path)
    return path


def test_values_have_the_types_and_contents_that_were_written(sample: Path) -> None:
    metadata = read_gguf(sample).metadata
    assert {key: (metadata[key].type, metadata[key].value) for key in SCALARS} == SCALARS
    assert metadata["text"].value == "Grüße, 世界 \U0001f600"
    assert metadata["words"].value == ["", "a", "ünï", "x" * 300]
    assert (metadata["counts"].item_type, metadata["counts"].value) == (VT.INT32, [1, -2, 3])
    assert (metadata["reals"].item_type, metadata["reals"].value) == (VT.FLOAT32, [0.25, -1.5])
    assert (metadata["flags"].item_type, metadata["flags"].value) == (VT.BOOL, [True, False])


@pytest.mark.parametrize("alignment", [None, 64, 4096])
def test_tensors_lie_where_gguf_py_finds_them(tmp_path: Path, alignment: int | None) -> None:
    path = tmp_path / "aligned.gguf"
    write_sample(path, alignment)
    ours = read_gguf(path)
    assert ours.alignment == (alignment or 32)
    reader = gguf.GGUFReader(path)
    assert list(ours.tensors) == [tensor.name for tensor in reader.tensors]
    for theirs in reader.tensors:
        tensor = ours.tensors[theirs.name]
        assert tensor.info.shape == tuple(int(n) for n in theirs.shape)
        assert (tensor.info.type, tensor.info.n_bytes) == (theirs.tensor_type, theirs.n_bytes)
        assert tensor.offset == theirs.data_offset


def test_a_header_that_is_read_and_written_again_is_the_same_bytes(sample: Path) -> None:
    file = read_gguf(sample)
    header = build_header(file.metadata, [tensor.info for tensor in file.tensors.values()], file.alignment)
    assert header == sample.read_bytes()[: file.data_offset]


def test_llama_cpp_reads_our_header_with_every_type(sample: Path) -> None:
    file = read_gguf(sample)
    infos = [tensor.info for tensor in file.tensors.values()]
    with gguf_context(build_header(file.metadata, infos, 4096)) as (lib, context):
        seen = {}
        for index in range(lib.gguf_get_n_kv(context)):
            kind = lib.gguf_get_kv_type(context, index)
            items = lib.gguf_get_arr_type(context, index) if kind == VT.ARRAY else None
            seen[lib.gguf_get_key(context, index).decode()] = (kind, items)
        want = {key: (int(value.type), value.item_type) for key, value in file.metadata.items()}
        assert seen == want | {"general.alignment": (VT.UINT32, None)}
        assert lib.gguf_get_alignment(context) == 4096
        offsets = [lib.gguf_get_tensor_offset(context, i) for i in range(len(infos))]
        assert offsets == tensor_offsets(infos, 4096)
        assert [lib.gguf_get_tensor_type(context, i) for i in range(len(infos))] == [info.type for info in infos]


def test_made_values_equal_read_ones(sample: Path) -> None:
    metadata = read_gguf(sample).metadata
    assert metadata["u32"] == GgufValue.uint32(4_000_000_000)
    assert metadata["f32"] == GgufValue.float32(0.5)
    assert metadata["yes"] == GgufValue.boolean(True)
    assert metadata["text"] == GgufValue.string("Grüße, 世界 \U0001f600")
    assert metadata["words"] == GgufValue.strings(["", "a", "ünï", "x" * 300])
    assert metadata["counts"] == GgufValue.array(VT.INT32, [1, -2, 3])
    assert metadata["counts"] != GgufValue.array(VT.UINT32, [1, 2, 3])


def test_version_2_is_read_like_version_3(sample: Path) -> None:
    data = bytearray(sample.read_bytes())
    data[4:8] = struct.pack("<I", 2)
    sample.write_bytes(data)
    assert read_gguf(sample).version == 2


def test_strings_that_are_no_utf8_keep_their_bytes(tmp_path: Path) -> None:
    raw = struct.pack("<Q", 3) + b"a\xff\xfe"
    path = tmp_path / "raw.gguf"
    header = build_header({"token": GgufValue(VT.STRING, raw)}, [], 32)
    path.write_bytes(header)
    value = read_gguf(path).metadata["token"]
    assert (value.raw, value.value) == (raw, "a\ufffd\ufffd")


@pytest.mark.parametrize(
    ("ggml_type", "shape", "n_bytes"),
    [(QT.F32, (3,), 12), (QT.MXFP4, (64, 2, 3), 2 * 17 * 6), (QT.Q2_K, (512, 1), 2 * 84), (QT.BF16, (5, 7), 70)],
)
def test_tensor_bytes(ggml_type: QT, shape: tuple[int, ...], n_bytes: int) -> None:
    assert tensor_bytes(ggml_type, shape) == n_bytes


def test_tensor_bytes_refuses_rows_with_half_a_block() -> None:
    with pytest.raises(ValueError, match="row of 48 values is not a multiple of MXFP4's 32"):
        tensor_bytes(QT.MXFP4, (48, 2))


# From here on: files made byte by byte, each with one thing wrong.


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def scalar(key: bytes, value_type: int, payload: bytes) -> bytes:
    return string(key) + struct.pack("<I", value_type) + payload


def array(key: bytes, item_type: int, count: int, payload: bytes = b"") -> bytes:
    return string(key) + struct.pack("<IIQ", VT.ARRAY, item_type, count) + payload


def tensor(name: bytes, shape: tuple[int, ...] = (32,), ggml_type: int = 0, offset: int = 0) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, ggml_type, offset)


def make_file(
    keys: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_keys: int | None = None,
    n_tensors: int | None = None,
    data: int = 1024,
) -> bytes:
    keys, tensors = keys or [], tensors or []
    counts = (len(tensors) if n_tensors is None else n_tensors, len(keys) if n_keys is None else n_keys)
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + bytes(data)


ALIGNMENT = b"general.alignment"
WRONG: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "0 bytes are too few"),
    "another format": (make_file(magic=b"PK\3\4"), "not a GGUF file"),
    "huge key count": (make_file(n_keys=1 << 60), "claims 1152921504606846976 keys"),
    "huge tensor count": (make_file(n_tensors=1 << 60), "claims 1152921504606846976 tensors"),
    "more keys than there are": (make_file(n_keys=3, data=0) + bytes(64), "key 0: name of 0 bytes"),
    "key without name": (make_file([scalar(b"", VT.UINT8, b"\1")]), "key 0: name of 0 bytes"),
    "key with a huge name": (make_file([struct.pack("<Q", 1 << 62)]), "key 0: name of 4611686018427387904 bytes"),
    "key that is no text": (make_file([scalar(b"\xff\xfe", VT.UINT8, b"\1")]), "name is not UTF-8"),
    "key twice": (make_file([scalar(b"a", VT.UINT8, b"\1")] * 2), "key 'a' occurs twice"),
    "unknown value type": (make_file([scalar(b"a", 13, b"\1")]), "a: unknown value type 13"),
    "array of arrays": (make_file([array(b"a", VT.ARRAY, 1)]), "a: array of arrays"),
    "huge string": (make_file([scalar(b"a", VT.STRING, struct.pack("<Q", 1 << 62))]), "a: needs"),
    "huge number array": (make_file([array(b"a", VT.FLOAT64, 1 << 61)]), "a: needs"),
    "huge string array": (make_file([array(b"a", VT.STRING, 1 << 61)]), "a: claims 2305843009213693952 strings"),
    "string that leaves the file": (
        make_file([array(b"a", VT.STRING, 2, string(b"x") + struct.pack("<Q", (1 << 64) - 1))]),
        "a: needs",
    ),
    "bool of 7": (make_file([scalar(b"a", VT.BOOL, b"\7")]), "a: a bool that is neither 0 nor 1"),
    "alignment 0": (make_file([scalar(ALIGNMENT, VT.UINT32, bytes(4))]), "0 is not a power of two"),
    "alignment 48": (make_file([scalar(ALIGNMENT, VT.UINT32, struct.pack("<I", 48))]), "48 is not a power of two"),
    "alignment of 1 GiB": (make_file([scalar(ALIGNMENT, VT.UINT32, struct.pack("<I", 1 << 30))]), "power of two"),
    "alignment as text": (make_file([scalar(ALIGNMENT, VT.STRING, string(b"32"))]), "expected UINT32, got STRING"),
    "tensor twice": (make_file(tensors=[tensor(b"t"), tensor(b"t", offset=128)]), "tensor 't' occurs twice"),
    "tensor with a long name": (make_file(tensors=[tensor(b"t" * 64)]), "name of 64 bytes, expected 1 to 63"),
    "five dimensions": (make_file(tensors=[tensor(b"t", (1, 1, 1, 1, 1))]), "t: 5 dimensions"),
    "4 billion dimensions": (make_file(tensors=[string(b"t") + struct.pack("<I", 0xFFFFFFFF)]), "dimensions"),
    "empty dimension": (make_file(tensors=[tensor(b"t", (32, 0))]), "t: empty dimension"),
    "half a block": (make_file(tensors=[tensor(b"t", (33,), QT.Q8_0)]), "row of 33 values is not a multiple of Q8_0's 32"),
    "beyond the end": (make_file(tensors=[tensor(b"t", (257,))]), "t: ends at byte"),
    "overflowing product": (make_file(tensors=[tensor(b"t", (1 << 32, 1 << 32, 1 << 32))]), "t: ends at byte"),
    "huge offset": (make_file(tensors=[tensor(b"t", offset=1 << 63)]), "t: ends at byte"),
    "odd offset": (make_file(tensors=[tensor(b"t", offset=4)]), "t: offset 4 is not a multiple of the alignment 32"),
    "overlap": (make_file(tensors=[tensor(b"t", (64,)), tensor(b"u", offset=128)]), "u: overlaps t"),
    "gap": (make_file(tensors=[tensor(b"t"), tensor(b"u", offset=256)]), "u: starts 128 bytes after t"),
    "late start": (make_file(tensors=[tensor(b"t", offset=32)]), "t: starts 32 bytes after the header"),
    "order": (make_file(tensors=[tensor(b"t", offset=128), tensor(b"u")]), "t: starts 128 bytes after the header"),
    "no data": (make_file(tensors=[tensor(b"t")], data=0)[:-5], "truncated: tensor data should start at byte"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG, ids=WRONG.keys())
def test_damage_is_named(tmp_path: Path, case: str) -> None:
    data, problem = WRONG[case]
    path = tmp_path / "wrong.gguf"
    path.write_bytes(data)
    with pytest.raises(FormatError) as caught:
        read_gguf(path)
    assert problem in str(caught.value)
    assert str(path) in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (make_file(version=1), "GGUF version 1"),
        (make_file(version=4), "GGUF version 4"),
        (make_file(version=0x03000000), "big-endian"),
        (make_file(tensors=[tensor(b"t", ggml_type=4)]), "t: unknown ggml type 4"),
        (make_file(tensors=[tensor(b"t", ggml_type=0x7FFFFFFF)]), "t: unknown ggml type 2147483647"),
        (make_file(tensors=[tensor(b"t", ggml_type=137)]), "t: type IQ2_K of ik_llama.cpp, which is not one of"),
        (make_file(tensors=[tensor(b"t", ggml_type=146)]), "t: type IQ4_KSS of ik_llama.cpp"),
        (make_file(tensors=[tensor(b"t", ggml_type=153)]), "t: type IQ2_KT of ik_llama.cpp"),
        (make_file(tensors=[tensor(b"t", ggml_type=337)]), "t: type IQ2_K_R4 of ik_llama.cpp"),
        (make_file(tensors=[tensor(b"t", ggml_type=36)]), "t: type I2_S of ik_llama.cpp"),
        (make_file(tensors=[tensor(b"t", ggml_type=31)]), "t: type Q4_0_4_4, retired from llama.cpp"),
    ],
)
def test_what_other_versions_have_is_unsupported(tmp_path: Path, data: bytes, problem: str) -> None:
    path = tmp_path / "other.gguf"
    path.write_bytes(data)
    with pytest.raises(UnsupportedModelError, match=problem):
        read_gguf(path)


def test_every_truncation_of_the_header_is_refused(sample: Path, tmp_path: Path) -> None:
    data, end = sample.read_bytes(), read_gguf(sample).data_offset
    path = tmp_path / "cut.gguf"
    for length in range(0, end, 7):
        path.write_bytes(data[:length])
        with pytest.raises(FormatError):
            read_gguf(path)


def test_a_missing_file_is_a_store_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="can't be opened"):
        read_gguf(tmp_path / "nothing.gguf")


@pytest.mark.parametrize(
    "start",
    [make_file(n_keys=60000), make_file(n_tensors=500_000), make_file([array(b"a", VT.STRING, 1 << 22, b"\xff" * 8)])],
    ids=["keys", "tensors", "strings"],
)
def test_hostile_counts_cost_no_memory(tmp_path: Path, start: bytes) -> None:
    path = tmp_path / "hostile.gguf"
    with path.open("wb") as file:
        file.write(start)
        file.truncate(64 << 20)
    tracemalloc.start()
    try:
        with pytest.raises(FormatError):
            read_gguf(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20


def test_offsets_follow_one_another_aligned() -> None:
    infos = [TensorInfo("a", (3,), QT.F32, 12), TensorInfo("b", (16,), QT.F32, 64), TensorInfo("c", (1,), QT.F32, 4)]
    assert tensor_offsets(infos, 32) == [0, 32, 96]
    assert tensor_offsets(infos, 4096) == [0, 4096, 8192]
    assert [align_up(n, 32) for n in (0, 1, 32, 33)] == [0, 32, 32, 64]
