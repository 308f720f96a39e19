"""Reference logits and what to compare them with: transformers' (stored) and stock llama.cpp's (computed here).

The fixtures come from tools/make_oracle_fixtures.py. `write_f32` is an independent dequantiser in plain numpy: the same weights
without quantisation, whose logits are the stored ones too.
"""

from __future__ import annotations

import json
import struct
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.stock_llama import decode_whole, stock_model

FIXTURES = Path(__file__).parent / "fixtures" / "oracle"
NAMES = tuple(sorted(path.name.removesuffix(".tar.xz") for path in FIXTURES.glob("*.tar.xz")))

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Oracle:
    """An unpacked fixture: `path` is a checkpoint directory in the official format."""

    name: str
    path: Path
    tokens: list[int]
    logits: Logits


def unpack(name: str, folder: Path) -> Oracle:
    """Unpacks a fixture to `folder/name`."""
    path = folder / name
    path.mkdir()
    with tarfile.open(FIXTURES / f"{name}.tar.xz") as archive:
        archive.extractall(path, filter="data")
    tokens = json.loads((path / "tokens.json").read_text())
    logits = np.load(path / "logits.npy")
    # A checkpoint directory holds only a checkpoint.
    (path / "tokens.json").unlink()
    (path / "logits.npy").unlink()
    return Oracle(name, path, tokens, logits)


def read_safetensors(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Name -> (dtype, shape, bytes), trusting the file."""
    data = path.read_bytes()
    (n,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + n])
    header.pop("__metadata__", None)
    return {
        name: (
            entry["dtype"],
            entry["shape"],
            data[8 + n + entry["data_offsets"][0] : 8 + n + entry["data_offsets"][1]],
        )
        for name, entry in header.items()
    }


def write_safetensors(path: Path, tensors: dict[str, tuple[str, list[int], bytes]]) -> None:
    """The reverse of `read_safetensors`."""
    header, offset = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in tensors.values()))


def dequantize(dtype: str, shape: list[int], data: bytes, scale: bytes | None) -> npt.NDArray[np.float32]:
    """A stored matrix or vector in F32, by the formats' definitions (slow and plain)."""
    raw = np.frombuffer(data, np.uint8)
    if dtype == "F32":
        return raw.view(np.float32).reshape(shape)
    if dtype == "BF16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(shape)
    assert scale is not None
    exponents = np.frombuffer(scale, np.uint8).astype(np.float64) - 127
    n_out = shape[0]
    if dtype == "I8":
        table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        codes = np.stack([raw & 15, raw >> 4], -1).reshape(n_out, -1)
        values = table[codes & 7] * np.where(codes & 8, -1.0, 1.0)
        spread = np.repeat(exponents.reshape(n_out, -1), 32, axis=1)
    else:
        assert dtype == "F8_E4M3"
        codes = raw.reshape(shape)
        exponent, mantissa = (codes >> 3 & 15).astype(np.float64), (codes & 7).astype(np.float64)
        magnitude = np.where(exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * 2.0 ** (exponent - 7))
        values = magnitude * np.where(codes & 128, -1.0, 1.0)
        blocks = exponents.reshape(-(-n_out // 128), -1)
        spread = np.repeat(np.repeat(blocks, 128, 0), 128, 1)[:n_out, : shape[1]]
    return (values * 2.0**spread).astype(np.float32)


def write_f32(source: Path, target: Path) -> None:
    """Writes the checkpoint `source` with every weight in F32 (tables stay I64)."""
    target.mkdir()
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    stored = read_safetensors(source / "model.safetensors")
    result: dict[str, tuple[str, list[int], bytes]] = {}
    for name, (dtype, shape, data) in stored.items():
        if dtype == "F8_E8M0":
            continue
        if dtype == "I64":
            result[name] = (dtype, shape, data)
            continue
        scale = stored.get(name.removesuffix(".weight") + ".scale")
        values = dequantize(dtype, shape, data, scale[2] if scale and scale[0] == "F8_E8M0" else None)
        result[name] = ("F32", list(values.shape), values.tobytes())
    write_safetensors(target / "model.safetensors", result)


def stock_logits(path: Path, tokens: Sequence[int], *, kv_type: str = "f32") -> Logits:
    """Logits (T, n_vocab) that llama.cpp itself computes for a GGUF, all tokens in one batch.

    Args:
        path: the GGUF.
        kv_type: number format of the KV cache; llama.cpp's default is f16, f32 shows the weights' error alone.
    """
    with stock_model(path) as model:
        return decode_whole(model, tokens, kv_type=kv_type)


def log_softmax(logits: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def kl(reference: Logits, logits: Logits) -> npt.NDArray[np.float64]:
    """Kullback-Leibler divergence of each position's distribution from the reference's, in nats."""
    p, q = log_softmax(reference), log_softmax(logits)
    result: npt.NDArray[np.float64] = (np.exp(p) * (p - q)).sum(-1)
    return result


def agreement(reference: Logits, logits: Logits) -> float:
    """Share of positions with the same most likely token."""
    return float((reference.argmax(-1) == logits.argmax(-1)).mean())
