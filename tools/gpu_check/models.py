"""Whole models of real dimensions without their size: the dense part is written, experts are those of a few layers again and again.

An official checkpoint of Flash has 145 GB, nearly all of it experts. Written here are its dense part (8 GB), the experts of
`own_layers` layers, and holes for the others; `PooledSource` leads whoever asks for an expert of another layer to one that was
written. Every expert still has its own slot in RAM and on GPUs, is read, unpacked and computed like any other. Routing is as skewed
as Flash's (`tools.synthetic_router`). Best in `/dev/shm`: reads then cost what memory costs, and no drive is measured by accident.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import xxhash

from localrun.quant.checkpoint import safetensors
from localrun.quant.checkpoint.source import CheckpointSource
from localrun.quant.model.source import DenseReading, MoeLayer, Projection, TensorInfo
from tools.make_checkpoint import write_checkpoint
from tools.synthetic_config import CheckpointSpec, scaled_config


def write_model(folder: Path, preset: str, *, layers: int | None = None, own_layers: int | None = None) -> int:
    """Writes a preset's checkpoint, with holes in the place of experts of all but `own_layers` layers; its bytes on paper."""
    return write_checkpoint(
        folder,
        CheckpointSpec(scaled_config(preset, layers=layers)),
        own_layers=own_layers,
        holes=own_layers is not None,
    )


class PooledSource:
    """A checkpoint whose layers share the experts of the first few (`localrun.quant.model.source.ModelSource`).

    Args:
        path: what `write_model` wrote.
        own_layers: layers that have experts of their own.
    """

    def __init__(self, path: Path, own_layers: int) -> None:
        with patch.object(safetensors, "refuse_holes", lambda *_: None):  # a download with holes would be unfinished
            self._inner = CheckpointSource.open(path)
        layers = list(self._inner.moe_layers)
        self._donor = {layer: layers[i % own_layers] for i, layer in enumerate(layers)}

    @property
    def path(self) -> Path:
        return self._inner.path

    @property
    def files(self) -> Sequence[Path]:
        return self._inner.files

    @property
    def metadata(self) -> Mapping[str, object]:
        return self._inner.metadata

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._inner.tensors

    @property
    def moe_layers(self) -> Mapping[int, MoeLayer]:
        return self._inner.moe_layers

    @property
    def identity(self) -> str:
        return xxhash.xxh3_128_hexdigest(f"pooled {self._inner.identity} {sorted(self._donor.items())}".encode())

    def gguf_header(self) -> bytes:
        return self._inner.gguf_header()

    def read_tensor(self, name: str) -> npt.NDArray[np.uint8]:
        return self._inner.read_tensor(name)

    def dense_reading(self, name: str, slice_bytes: int) -> DenseReading:
        return self._inner.dense_reading(name, slice_bytes)

    def expert(self, layer: int, expert: int) -> tuple[Projection, Projection, Projection]:
        return self._inner.expert(self._donor[layer], expert)

    def base_expert(self, layer: int, expert: int) -> tuple[Projection, Projection, Projection]:
        return self._inner.base_expert(self._donor[layer], expert)
