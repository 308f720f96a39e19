"""Damaged checkpoints: whatever is changed in any file, the answer is a clear error or a sound model, never a crash."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from localrun.errors import LocalrunError
from localrun.quant.checkpoint.directory import CONFIG_NAME, INDEX_NAME, SINGLE_NAME
from localrun.quant.convert.converter import convert
from localrun.quant.formats.transcode import decode_projection
from localrun.quant.model.source import ModelSource
from localrun.quant.open import open_model
from tests.checkpoints import write_small
from tests.quant.checkpoint.test_tokenizer_json import small_tokenizer, v4_pre_tokenizer

N_SEEDS = 40

STRANGE: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    3,
    2**31,
    2**63,
    10**400,
    -(2**63),
    0.5,
    1e308,
    "",
    "x",
    "../x",
    "\ud800",
    [],
    {},
    [0],
    [-1],
    [2**62, 2**62],
    [[]],
    ["a"],
    {"a": 1},
]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """By single file or not: a sound checkpoint with a tokenizer."""
    tokenizer = json.dumps(small_tokenizer(v4_pre_tokenizer(), vocab_size=400))
    folders = {}
    for single in (True, False):
        folders[single] = write_small(
            tmp_path_factory.mktemp("m") / "m", single_file=single, vocab_size=500, n_routed_experts=2, mtp=True
        )
        (folders[single] / "tokenizer.json").write_text(tokenizer)
    return folders


def flip_bits(rng: random.Random, data: bytes, low: int = 0, high: int | None = None) -> bytes:
    result = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        result[rng.randrange(low, len(data) if high is None else high)] ^= 1 << rng.randrange(8)
    return bytes(result)


def cut_or_extend(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data))
    return rng.choice((data[:at], data[at:], data + b"\0", data[:at] + data[at:] + data[at : at + 9], b""))


def change_value(rng: random.Random, document: Any) -> Any:
    """Replaces, removes or moves something somewhere in a JSON document."""
    holder: Any = None
    key: Any = None
    value = document
    while isinstance(value, (dict, list)) and value and (holder is None or rng.random() < 0.7):
        holder, key = value, rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        value = holder[key]
    assert holder is not None
    action = rng.randrange(4)
    if action == 0 and isinstance(holder, dict):
        del holder[key]
    elif action == 1 and isinstance(value, int) and not isinstance(value, bool):
        holder[key] = rng.choice((value + 1, value - 1, value * 2, -value, float(value), str(value), value << 40))
    elif action == 2 and isinstance(holder, dict):
        holder[str(key) + "x"] = holder.pop(key)
    else:
        holder[key] = rng.choice(STRANGE)
    return document


def damage_json(rng: random.Random, path: Path) -> None:
    data = path.read_bytes()
    how = rng.randrange(4)
    if how == 0:
        path.write_bytes(flip_bits(rng, data))
    elif how == 1:
        path.write_bytes(cut_or_extend(rng, data))
    else:
        path.write_text(json.dumps(change_value(rng, json.loads(data))))


def damage_safetensors(rng: random.Random, path: Path) -> None:
    data = path.read_bytes()
    (n,) = struct.unpack("<Q", data[:8])
    how = rng.randrange(6)
    if how == 0:
        path.write_bytes(flip_bits(rng, data, 0, 8 + n))
    elif how == 1:
        path.write_bytes(flip_bits(rng, data, 8 + n))
    elif how == 2:
        path.write_bytes(cut_or_extend(rng, data))
    elif how == 3:
        path.write_bytes(struct.pack("<Q", rng.choice((0, n - 1, n + 1, 2**32, 2**63, len(data)))) + data[8:])
    elif how == 4:
        value = rng.choice((b"\xff", b"\0", b"\x7f", b"\x80"))
        at, size = rng.randrange(8 + n, len(data)), rng.choice((1, 2, 64, 4096))
        path.write_bytes(data[:at] + value * len(data[at : at + size]) + data[at + size :])
    else:
        header = json.dumps(change_value(rng, json.loads(data[8 : 8 + n]))).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + n :])


def read_everything(source: ModelSource) -> dict[str, bytes]:
    result = {name: source.read_tensor(name).tobytes() for name in source.tensors if "_exps" not in name}
    for layer, shape in source.moe_layers.items():
        for expert in range(shape.n_experts):
            for number, projection in enumerate(source.expert(layer, expert)):
                raw = []
                for extent in projection.extents:
                    with source.files[extent.file].open("rb") as file:
                        file.seek(extent.offset)
                        raw.append(np.frombuffer(file.read(extent.n_bytes), np.uint8))
                result[f"{layer}.{expert}.{number}"] = decode_projection(projection, raw[0], raw[-1]).tobytes()
    return result


def outcome(action: Callable[[], Any]) -> Any:
    """The result, or the expected error as its text; any other exception fails the test."""
    try:
        return action()
    except LocalrunError as error:
        return str(error)


@pytest.mark.parametrize("seed", range(N_SEEDS))
@pytest.mark.parametrize("kind", [CONFIG_NAME, INDEX_NAME, SINGLE_NAME, "shard", "tokenizer.json"])
def test_damage_ends_in_a_clear_error_or_a_sound_model(
    kind: str, seed: int, originals: dict[bool, Path], tmp_path: Path
) -> None:
    rng = random.Random(f"{kind} {seed}")
    single = kind == SINGLE_NAME or (kind != INDEX_NAME and kind != "shard" and seed % 2 == 0)
    folder = Path(shutil.copytree(originals[single], tmp_path / "m"))
    if kind in (SINGLE_NAME, "shard"):
        damage_safetensors(rng, rng.choice(sorted(folder.glob("*.safetensors"))))
    else:
        damage_json(rng, folder / kind)
    served = outcome(lambda: read_everything(open_model(folder)))
    written = outcome(
        lambda: convert(folder, tmp_path / "out", jobs=2) and read_everything(open_model(tmp_path / "out"))
    )
    # Serving and converting see the same checkpoint: both refuse it, or both give the same bytes.
    assert isinstance(served, str) == isinstance(written, str)
    if not isinstance(served, str):
        assert served == written
