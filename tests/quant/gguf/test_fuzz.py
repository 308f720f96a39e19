"""Damaged GGUFs: whatever is changed, opening ends in a clear error or in a source that is safe to use.

Two kinds of damage: bytes (flips, runs, inserted, removed, cut off), and whole fields with strange values in a file that is
otherwise consistent, which get past the parser and must be met by the checks behind it.
"""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType, GGUFValueType

from localrun.errors import FormatError, UnsupportedModelError
from localrun.quant.gguf.file import GgufValue, build_header, read_gguf
from localrun.quant.gguf.source import GgufSource
from localrun.quant.model.source import TensorInfo
from tests.gguf_models import SMALLEST, write_deepseek4
from tests.stock_llama import gguf_context

MODEL = SMALLEST
N_BYTE_DAMAGES = 200
N_FIELD_DAMAGES = 120


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    (path,) = write_deepseek4(tmp_path_factory.mktemp("fuzz") / "m.gguf", MODEL)
    return path


def damaged_bytes(data: bytes, header: int, rng: random.Random) -> bytes:
    """One to three random damages; three of four lie in the header."""
    result = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        limit = min(len(result), header) if rng.random() < 0.75 else len(result)
        at = rng.randrange(max(1, limit - 8))
        kind = rng.randrange(6)
        if kind == 0:
            result[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            result[at : at + 8] = rng.choice([b"\xff" * 8, bytes(8), struct.pack("<Q", 1 << rng.randrange(64))])
        elif kind == 2:
            result[at : at + 4] = struct.pack("<I", rng.choice([0, 1, 2, 8, 9, 13, 39, 255, 0x7FFFFFFF, 0xFFFFFFFF]))
        elif kind == 3:
            del result[at : at + rng.randint(1, 40)]
        elif kind == 4:
            result[at:at] = rng.randbytes(rng.randint(1, 40))
        else:
            del result[max(1, at) :]
    return bytes(result)


STRANGE = (
    0,
    1,
    2,
    3,
    4,
    5,
    7,
    63,
    64,
    127,
    128,
    129,
    255,
    256,
    512,
    513,
    1024,
    1025,
    65536,
    1 << 24,
    1 << 31,
    (1 << 32) - 1,
)


def strange_value(old: GgufValue, rng: random.Random) -> GgufValue | None:
    """A value of the same or another type, or None to remove the key."""
    integer, real = rng.choice(STRANGE), rng.choice([0.0, -1.0, 1e-30, 1e30, float("inf"), float("nan")])
    choice = rng.randrange(10)
    if choice == 0:
        return None
    if choice == 1:
        return GgufValue.string(rng.choice(["", "x", "gpt2", "llama", "yarn", "qwen3moe", "\0", "a" * 1000]))
    if choice == 2:
        return GgufValue.scalar(
            rng.choice([GGUFValueType.UINT64, GGUFValueType.INT32, GGUFValueType.UINT16]), integer & 0x7FFF
        )
    if old.item_type is not None and old.item_type != GGUFValueType.STRING:
        items = list(old.value)
        items[rng.randrange(len(items))] = real if old.item_type == GGUFValueType.FLOAT32 else integer & 0x7FFFFFFF
        return GgufValue.array(old.item_type, items[: rng.randint(0, len(items))] if choice == 3 else items)
    if old.type == GGUFValueType.FLOAT32:
        return GgufValue.float32(real)
    return GgufValue.uint32(integer)


def damaged_fields(path: Path, rng: random.Random) -> bytes:
    """Keys and tensor descriptions with strange values, in a well-formed header before the same data."""
    file = read_gguf(path)
    metadata: dict[str, GgufValue | None] = dict(file.metadata)
    infos = [tensor.info for tensor in file.tensors.values()]
    for _ in range(rng.randint(1, 2)):
        if rng.random() < 0.6:
            key = rng.choice(list(file.metadata))
            metadata[key] = strange_value(file.metadata[key], rng)
        else:
            at = rng.randrange(len(infos))
            info = infos[at]
            shape = list(info.shape)
            shape[rng.randrange(len(shape))] = rng.choice([1, 31, 32, 33, 64, 96, 256, 1 << 20])
            kind = rng.choice([info.type, *GGMLQuantizationType])
            name = rng.choice([info.name] * 3 + ["blk.7.x.weight", info.name.replace("blk.1", "blk.2")])
            infos[at] = rng.choice(
                [
                    TensorInfo(info.name, tuple(shape), info.type, info.n_bytes),
                    TensorInfo(info.name, info.shape, kind, info.n_bytes),
                    TensorInfo(name, info.shape, info.type, info.n_bytes),
                ]
            )
    present = {key: value for key, value in metadata.items() if value is not None}
    return build_header(present, infos, 32) + path.read_bytes()[file.data_offset :]


def open_and_use(path: Path) -> bool:
    """True if the file opened; then everything that it offers must be usable."""
    try:
        source = GgufSource.open(path)
    except (FormatError, UnsupportedModelError):
        return False
    size = path.stat().st_size
    for layer, shape in source.moe_layers.items():
        for projection in source.expert(layer, shape.n_experts - 1):
            (extent,) = projection.extents
            assert 0 < extent.offset < extent.offset + extent.n_bytes <= size
    for name, info in source.tensors.items():
        if "_exps." not in name:
            assert source.read_tensor(name).nbytes == info.n_bytes
    for value in source.metadata.values():
        assert value is not None
    with gguf_context(source.gguf_header()) as (lib, context):
        assert lib.gguf_get_n_tensors(context) == len(source.tensors)
    return True


def test_damaged_bytes_end_in_a_clear_error_or_a_sound_source(original: Path, tmp_path: Path) -> None:
    data, header = original.read_bytes(), read_gguf(original).data_offset
    path = tmp_path / "m.gguf"
    opened = 0
    for seed in range(N_BYTE_DAMAGES):
        path.write_bytes(damaged_bytes(data, header, random.Random(seed)))
        opened += open_and_use(path)
    # Some damage hits weights or harmless values; most must be noticed.
    assert 0 < opened < N_BYTE_DAMAGES / 2


def test_strange_fields_end_in_a_clear_error_or_a_sound_source(original: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    opened = 0
    for seed in range(N_FIELD_DAMAGES):
        path.write_bytes(damaged_fields(original, random.Random(seed)))
        opened += open_and_use(path)
    assert 0 < opened < N_FIELD_DAMAGES / 2
