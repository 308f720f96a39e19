"""An official checkpoint directory as a `ModelSource`: the converter's plan, served on demand.

Dense tensors are decoded when read; experts stay in place, with recipes that turn their bytes into ggml rows. So downloaded
weights run immediately, at the cost of a shuffle on every expert read, and without checksums.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash
from gguf import GGMLQuantizationType

from localrun.errors import CheckpointError
from localrun.quant.checkpoint.directory import Checkpoint
from localrun.quant.checkpoint.mapping import ConversionOptions, ConversionPlan, TensorPart, make_plan
from localrun.quant.model.source import (
    PROJECTIONS,
    Bytes,
    DenseReading,
    DenseSlice,
    Encoding,
    Extent,
    MoeLayer,
    Projection,
    TensorInfo,
    slice_rows,
)

_SLICE_BYTES = 16 << 20
"""Source bytes that one thread decodes at a time, to keep copies small compared with the result."""

_ENCODINGS = {"I8": Encoding.FP4, "F8_E4M3": Encoding.FP8}


def _fp8_experts(dense: GGMLQuantizationType) -> GGMLQuantizationType:
    """Types that experts in FP8 can be read as by the store."""
    exact = dense in (GGMLQuantizationType.BF16, GGMLQuantizationType.F32)
    return GGMLQuantizationType.BF16 if exact else GGMLQuantizationType.Q8_0


class _PartReading:
    """Implements `DenseReading`: decodes rows of a tensor of the checkpoint."""

    def __init__(self, files: Sequence[Path], part: TensorPart, slice_bytes: int) -> None:
        self.files = files
        self._part = part
        row_bytes = part.output_bytes(1)
        step = slice_rows(row_bytes, slice_bytes)
        self.slices = []
        for first in range(0, part.n_out, step):
            n_rows = min(step, part.n_out - first)
            weight, scale = part.extents(first, n_rows)
            extents = (weight,) if scale is None else (weight, scale)
            is_last = first + n_rows == part.n_out
            self.slices.append(DenseSlice(extents, first * row_bytes, n_rows * row_bytes, n_rows, is_last))

    def rows(self, slice_: DenseSlice, raw: Sequence[Bytes], room: Callable[[int], Bytes]) -> Bytes:
        where = f"{self.files[slice_.extents[0].file]}: {self._part.source.spec.name}"
        out = room(slice_.n_bytes)[: slice_.n_bytes]
        scale = raw[1] if len(raw) > 1 else np.empty(0, np.uint8)
        self._part.convert(slice_.n_rows, raw[0], scale, out, where)
        return out

    def check(self, digest: Callable[[], str]) -> None:
        """A checkpoint has no checksums."""


class CheckpointSource:
    """Implements `ModelSource`. Immutable, holds no descriptors, safe to read from several threads."""

    def __init__(self, plan: ConversionPlan) -> None:
        self._plan = plan
        self._checkpoint = plan.checkpoint

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        dense: GGMLQuantizationType = GGMLQuantizationType.Q8_0,
        dense_types: Mapping[str, GGMLQuantizationType] | None = None,
    ) -> CheckpointSource:
        """Opens and checks a checkpoint directory.

        Args:
            path: the directory.
            dense: type that FP8 dense matrices are presented in; experts stored in FP8 are Q8_0, or BF16 where `dense` is exact.
            dense_types: of single matrices, see `ConversionOptions`.

        Raises:
            FormatError: damaged or inconsistent files.
            UnsupportedModelError: a valid checkpoint of another model.
        """
        checkpoint = Checkpoint.open(path)
        fp8_experts = any(tensor.spec.expert == 0 and tensor.dtype == "F8_E4M3" for tensor in checkpoint.tensors)
        base = _fp8_experts(dense) if fp8_experts else None
        return cls(make_plan(checkpoint, ConversionOptions(dense, base, dense_types=dense_types or {})))

    @property
    def dense(self) -> GGMLQuantizationType:
        """Type that FP8 dense matrices are presented in."""
        return self._plan.options.dense

    @property
    def plan(self) -> ConversionPlan:
        """The plan that this source serves."""
        return self._plan

    @property
    def path(self) -> Path:
        return self._checkpoint.path

    @property
    def files(self) -> Sequence[Path]:
        return self._checkpoint.files

    @cached_property
    def metadata(self) -> Mapping[str, object]:
        return {key: value.value for key, value in self._plan.metadata.items()}

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {name: tensor.info for name, tensor in self._plan.tensors.items()}

    @cached_property
    def moe_layers(self) -> Mapping[int, MoeLayer]:
        config, layers = self._checkpoint.config, {}
        for number in range(config.num_hidden_layers):
            gate, up, down = (self._experts(number, name) for name in PROJECTIONS)
            layers[number] = MoeLayer(
                layer=number,
                n_experts=config.n_routed_experts,
                n_embd=config.hidden_size,
                n_ff=config.moe_intermediate_size,
                types=(gate[0].target, up[0].target, down[0].target),
                expert_bytes=gate[0].n_bytes + up[0].n_bytes + down[0].n_bytes,
            )
        return layers

    @cached_property
    def identity(self) -> str:
        # Not the plan's digest: that changes with the folder's name, which is in the metadata.
        types = "".join(f"{name} {tensor.info.type.name}\n" for name, tensor in self._plan.tensors.items())
        return xxhash.xxh3_128_hexdigest(f"{self._checkpoint.identity}\n{types}".encode())

    def gguf_header(self) -> bytes:
        return self._plan.header

    def read_tensor(self, name: str) -> npt.NDArray[np.uint8]:
        """All bytes of a dense tensor in its ggml type, flat.

        Raises:
            StoreError: the shard can't be read or has changed.
            FormatError: a NaN, or a value that the type can't hold.
        """
        tensor = self._plan.tensors[name]
        (part,) = tensor.parts
        out = np.empty(part.n_bytes, np.uint8)
        # FP8's scale blocks span 128 rows
        step = max(1, _SLICE_BYTES * part.n_out // max(1, part.source.weight.n_bytes) // 128) * 128
        starts = range(0, part.n_out, step)
        if len(starts) == 1:
            self._decode(part, 0, part.n_out, out)
            return out
        with ThreadPoolExecutor(min(len(starts), os.cpu_count() or 1)) as pool:
            for _ in pool.map(lambda first: self._decode(part, first, min(step, part.n_out - first), out), starts):
                pass
        return out

    def dense_reading(self, name: str, slice_bytes: int) -> DenseReading:
        """How to read the same bytes in slices."""
        (part,) = self._plan.tensors[name].parts
        return _PartReading(self.files, part, slice_bytes)

    def _decode(self, part: TensorPart, first: int, count: int, out: npt.NDArray[np.uint8]) -> None:
        weight, scale = part.extents(first, count)
        where = f"{self.files[weight.file]}: {part.source.spec.name}"
        begin = part.output_bytes(first)
        target = out[begin : begin + part.output_bytes(count)]
        scale_bytes = np.empty(0, np.uint8) if scale is None else self._checkpoint.read(scale)
        part.convert(count, self._checkpoint.read(weight), scale_bytes, target, where)

    def expert(self, layer: int, expert: int) -> tuple[Projection, Projection, Projection]:
        gate, up, down = (self._projection(self._experts(layer, name)[expert]) for name in PROJECTIONS)
        return gate, up, down

    def base_expert(self, layer: int, expert: int) -> tuple[Projection, Projection, Projection]:
        """The same: a checkpoint has one copy of each expert."""
        return self.expert(layer, expert)

    def _experts(self, layer: int, projection: str) -> tuple[TensorPart, ...]:
        return self._plan.tensors[f"blk.{layer}.ffn_{projection}_exps.weight"].parts

    def _projection(self, part: TensorPart) -> Projection:
        source = part.source
        encoding = _ENCODINGS.get(source.dtype, Encoding.GGML)
        if encoding is Encoding.GGML and part.n_bytes != source.weight.n_bytes:
            raise CheckpointError(
                f"{self.path}: {source.spec.name}: {source.dtype} can't be served as {part.target.name}"
            )
        extents: tuple[Extent, ...] = (source.weight,) if source.scale is None else (source.weight, source.scale)
        return Projection(part.target, part.n_out, part.n_in, encoding, extents, part.n_bytes)
