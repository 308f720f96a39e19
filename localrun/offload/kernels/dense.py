"""Dense matrices on the CPU with the expert kernels' row kernels, in place of llama.cpp's MUL_MAT."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from localrun.alignment import LINE_BYTES, align_up
from localrun.offload.kernels.kernel import PackedMatrix
from localrun.offload.kernels.spec import Math
from localrun.offload.kernels.tasks import KernelCall


class DenseKernel:
    """Products with one matrix of shape (n_out, n_in), for any number of tokens.

    The caller owns packed bytes: matrices of the same type and shape share a kernel. `pack` may run in several threads at once,
    `run` in only one.
    """

    def __init__(
        self, type_: GGMLQuantizationType, n_out: int, n_in: int, *, math: Math = "int8", n_threads: int
    ) -> None:
        self._matrix = PackedMatrix.choose(type_, n_out, n_in, math=math)
        self.name = f"{type_.name.lower()}-{self._matrix.arithmetic}"
        self.n_out, self.n_in = n_out, n_in
        self.raw_bytes = self._matrix.raw_bytes
        self.packed_bytes = align_up(self._matrix.packed_bytes, LINE_BYTES)
        self.raw_is_packed = not self._matrix.interleaved
        self._call = KernelCall([self._matrix.at(0)], n_threads=n_threads)
        self._rows = np.arange(0, dtype=np.int32)

    def pack(self, raw: npt.NDArray[np.uint8], target: int) -> None:
        """Fills `packed_bytes` at address `target` (64-byte aligned) from ggml rows; releases the interpreter lock."""
        assert raw.dtype == np.uint8
        assert raw.flags.c_contiguous
        assert raw.size == self.raw_bytes
        self._matrix.pack(raw.ctypes.data, target)

    def run(self, packed: int, x: npt.NDArray[np.float32], out: npt.NDArray[np.float32]) -> None:
        """out (T, n_out) = x (T, n_in) times the transposed matrix packed at this address; rows contiguous, any row stride."""
        n_tokens = len(x)
        if self._rows.size < n_tokens:
            self._rows = np.arange(n_tokens, dtype=np.int32)
        slots, starts = np.array([packed], np.uint64), np.array([0, n_tokens], np.int32)
        self._call(slots, starts, self._rows, self._rows, x, out)
