"""Experts of every kind of model that there is, on files, and their rows by another way than the store's.

Matrices are larger than a page, so that each read touches the middle of one matrix only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as QT

from localrun.quant.checkpoint.directory import Checkpoint
from localrun.quant.checkpoint.mapping import ConversionOptions
from localrun.quant.convert.converter import MODEL_NAME, convert
from localrun.quant.convert.overlay import write_overlay
from localrun.quant.model.source import PROJECTIONS, ModelSource
from localrun.quant.open import open_model
from localrun.quant.precision.copies import BetterCopies
from tests.checkpoints import write_small
from tests.gguf_models import TinyDeepseek4, deepseek4_tensors, write_deepseek4
from tests.offload.stores import Bytes
from tests.reference import dequantize, read_safetensors

N_EXPERTS = 6
_SHAPE = {"hidden_size": 256, "moe_intermediate_size": 256, "n_routed_experts": N_EXPERTS}
_GGUF = TinyDeepseek4(n_embd=256, n_ff=256, n_experts=N_EXPERTS)
COPIES = {0: {3: QT.MXFP4, 1: QT.MXFP4}, 2: {0: QT.MXFP4, 2: QT.MXFP4, 5: QT.MXFP4}}
"""Layer -> expert -> type of the better copy."""

MODEL_KINDS = (
    "official checkpoint",
    "official checkpoint, FP8",
    "converted",
    "dense part beside the checkpoint",
    "split GGUF",
    "base and better copies",
)
_OFFICIAL_NAMES = {"gate": "w1", "up": "w3", "down": "w2"}

Tensor = tuple[str, list[int], bytes]
"""dtype, shape, bytes."""


def mxfp4_of(weight: bytes, scale: bytes) -> Bytes:
    """ggml's blocks of FP4: the scale, then elements j and j + 16 in byte j; the checkpoint has 2i and 2i + 1 in byte i."""
    pairs = np.frombuffer(weight, np.uint8).reshape(-1, 16)
    codes = np.stack([pairs & 15, pairs >> 4], -1).reshape(-1, 32)
    blocks = np.concatenate(
        [np.frombuffer(scale, np.uint8).reshape(-1, 1), codes[:, :16] | codes[:, 16:] << np.uint8(4)], 1
    )
    return blocks.reshape(-1)


def bf16_of(stored: Tensor, scale: bytes) -> Bytes:
    """FP8 with its scales fits into BF16."""
    values: npt.NDArray[np.float32] = dequantize(*stored, scale)
    bits: npt.NDArray[np.uint16] = (values.view(np.uint32) >> 16).astype(np.uint16)
    return bits.reshape(-1).view(np.uint8)


class Official:
    """An official checkpoint's experts as plain numpy reads them."""

    def __init__(self, folder: Path) -> None:
        self._tensors: Mapping[str, Tensor] = {
            name: value
            for path in sorted(folder.glob("*.safetensors"))
            for name, value in read_safetensors(path).items()
            if ".ffn.experts." in name
        }

    def parts(self, layer: int, expert: int) -> list[tuple[Tensor, Tensor]]:
        """Weight and scale of gate, up and down."""
        names = [f"layers.{layer}.ffn.experts.{expert}.{_OFFICIAL_NAMES[name]}" for name in PROJECTIONS]
        return [(self._tensors[f"{name}.weight"], self._tensors[f"{name}.scale"]) for name in names]

    def rows(self, layer: int, expert: int) -> Bytes:
        """In ggml's format that holds all of it."""
        return np.concatenate(
            [
                mxfp4_of(weight[2], scale[2]) if weight[0] == "I8" else bf16_of(weight, scale[2])
                for weight, scale in self.parts(layer, expert)
            ]
        )

    def file_bytes(self, layer: int, expert: int) -> int:
        return sum(len(weight[2]) + len(scale[2]) for weight, scale in self.parts(layer, expert))


def stacks_of(path: Path) -> Callable[[int, int], Bytes]:
    """Experts of a GGUF as gguf-py reads it."""
    tensors = {
        tensor.name: (np.array(tensor.data), tensor.tensor_type)
        for tensor in gguf.GGUFReader(path).tensors
        if "_exps" in tensor.name
    }
    return lambda layer, expert: _stacked(tensors, layer, expert)


@dataclass(frozen=True)
class Stored:
    """A model on files. `rows` and `file_bytes` of one copy, given layer, expert, variant."""

    source: ModelSource
    rows: Callable[[int, int, int], Bytes]
    file_bytes: Callable[[int, int, int], int]


def write_model(kind: str, folder: Path) -> Stored:
    """A model of one of `MODEL_KINDS`."""
    if kind == "split GGUF":
        tensors = deepseek4_tensors(_GGUF)
        first, *_ = write_deepseek4(folder / "model.gguf", _GGUF, split_max_tensors=10)
        return _stored(open_model(first), lambda layer, expert: _stacked(tensors, layer, expert))
    fp8 = kind == "official checkpoint, FP8"
    path, target = write_small(folder / "official", fp8_experts=fp8, **_SHAPE), folder / "converted"
    official = Official(path)
    if kind.startswith("official"):
        return _stored(open_model(path, dense=QT.BF16 if fp8 else None), official.rows, official.file_bytes)
    if kind == "base and better copies":
        convert(path, target, ConversionOptions(base=QT.Q2_K))
        write_overlay(Checkpoint.open(path), BetterCopies(COPIES), target)
        base = stacks_of(target / MODEL_NAME)
        return _stored(open_model(target), base, better=official.rows)
    convert(path, target, ConversionOptions(keep_experts=kind == "dense part beside the checkpoint"))
    return _stored(open_model(target), official.rows)


def _stored(
    source: ModelSource,
    rows: Callable[[int, int], Bytes],
    file_bytes: Callable[[int, int], int] | None = None,
    *,
    better: Callable[[int, int], Bytes] | None = None,
) -> Stored:
    @cache
    def either(layer: int, expert: int, variant: int) -> Bytes:
        return better(layer, expert) if variant and better else rows(layer, expert)

    def size(layer: int, expert: int, variant: int) -> int:
        return file_bytes(layer, expert) if file_bytes else int(either(layer, expert, variant).size)

    return Stored(source, either, size)


def _stacked(tensors: Mapping[str, tuple[npt.NDArray[np.generic], QT]], layer: int, expert: int) -> Bytes:
    parts = [tensors[f"blk.{layer}.ffn_{name}_exps.weight"][0][expert] for name in PROJECTIONS]
    return np.concatenate([np.ascontiguousarray(part).reshape(-1).view(np.uint8) for part in parts])
