"""A checkpoint's dense matrices in F32, some rows at a time: exact, whatever they are stored as."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from localrun.quant.checkpoint.directory import Checkpoint
from localrun.quant.checkpoint.mapping import shape_tensor


class ExactMatrices:
    """Implements `precision.dense.Matrices`. Immutable, safe to read from several threads."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._tensors = {
            tensor.spec.gguf: tensor
            for tensor in checkpoint.tensors
            if tensor.spec.expert is None and tensor.spec.gguf is not None and len(tensor.spec.shape) == 2
        }

    @property
    def names(self) -> tuple[str, ...]:
        """All matrices, by GGUF name."""
        return tuple(name for name in self._tensors if name is not None)

    def shape(self, name: str) -> tuple[int, int]:
        """n_out, n_in."""
        n_out, n_in = self._tensors[name].spec.shape
        return n_out, n_in

    def rows(self, name: str, first: int, count: int) -> npt.NDArray[np.float32]:
        """(count, n_in); `first` is a multiple of 128.

        Raises:
            StoreError: a shard can't be read.
            FormatError: a NaN.
        """
        n_in = self.shape(name)[1]
        tensor = self._tensors[name]
        _, (part,) = shape_tensor(name, GGMLQuantizationType.F32, [tensor], self._checkpoint.config.n_routed_experts)
        weight, scale = part.extents(first, count)
        scales = np.empty(0, np.uint8) if scale is None else self._checkpoint.read(scale)
        out = np.empty(part.output_bytes(count), np.uint8)
        part.convert(count, self._checkpoint.read(weight), scales, out, f"{self._checkpoint.path}: {tensor.spec.name}")
        return out.view(np.float32).reshape(count, n_in)
