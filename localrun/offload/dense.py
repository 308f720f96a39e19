"""The large dense matrices on our device: without a GPU, they are most of the bytes read per token.

When loading through user callbacks, llama.cpp never repacks weights for the CPU, and its plain Q8_0 product stays well below
memory bandwidth. So 2-D (and grouped) matrices in BF16, or in types that our kernels have a layout for, are placed in our
weights buffer, packed once at load, and multiplied by the expert kernels. llama.cpp computes the rest of the graph.
"""

from __future__ import annotations

import math
import mmap
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from localrun.alignment import LINE_BYTES, align_up
from localrun.offload.device.device import expert_device
from localrun.offload.device.layouts import KIND_DENSE, WEIGHT
from localrun.offload.device.view import View, matrices_at
from localrun.offload.device.weight_records import dense_record
from localrun.offload.kernels.exact import BF16_UNIT
from localrun.offload.kernels.kernel import PackedMatrix
from localrun.offload.kernels.tasks import KernelCall
from localrun.pages import HUGE_PAGE_BYTES, anonymous
from localrun.quant.model.source import SLICE_GRAIN_ROWS, ModelSource, TensorInfo

_ELIGIBLE = re.compile(
    r"blk\.\d+\.(attn_q_a|attn_q_b|attn_kv|attn_output_a|attn_output_b|ffn_gate_shexp|ffn_up_shexp|ffn_down_shexp"
    r"|indexer\.attn_q_b|attn_compressor_kv|attn_compressor_gate|indexer_compressor_kv|indexer_compressor_gate)\.weight"
    r"|output\.weight"
)
"""deepseek4's matrices that only ever meet MUL_MAT with F32 rows (llama.cpp, src/models/deepseek4.cpp)."""

ARCHITECTURE = "deepseek4"

_MAP_BYTES: Final = 256 << 20
"""Of a mapping that matrices share. What is not used of the last one is not touched, and so takes no memory."""

_NO_KIND = 0
"""What compiled code doesn't know, it leaves to Python."""

MatrixListener = Callable[[str, npt.NDArray[np.float32]], None]
"""Gets a matrix's name and the rows that it is multiplied with, (groups, T, n_in) f32, valid during the call."""


def dense_tensors(source: ModelSource) -> dict[str, TensorInfo]:
    """Matrices of `source` that our device takes when no GPU does."""
    if source.metadata.get("general.architecture") != ARCHITECTURE:
        return {}
    return {
        name: info
        for name, info in source.tensors.items()
        if len(info.shape) == 2 and _ELIGIBLE.fullmatch(name) and _is_fast(info.type, info.shape[1], info.shape[0])
    }


def _is_fast(kind: GGMLQuantizationType, n_out: int, n_in: int) -> bool:
    """True if our kernels multiply this type without dequantizing it first."""
    if kind == GGMLQuantizationType.BF16:
        return n_in % BF16_UNIT == 0
    return PackedMatrix.choose(kind, n_out, n_in, math="int8").interleaved


def dense_pattern(tensors: Mapping[str, TensorInfo]) -> str | None:
    """C++ regex (searched, so anchored) that matches exactly these names, for llama.cpp's buffer type overrides."""
    if not tensors:
        return None
    kinds = sorted({re.sub(r"^blk\.\d+\.", "", name) for name in tensors if name.startswith("blk.")})
    layers: dict[str, list[str]] = {}
    for name in tensors:
        if name.startswith("blk."):
            _, layer, kind = name.split(".", 2)
            layers.setdefault(kind, []).append(layer)
    parts = [rf"^blk\.({'|'.join(layers[kind])})\.{re.escape(kind)}$" for kind in kinds]
    parts += [rf"^{re.escape(name)}$" for name in tensors if not name.startswith("blk.")]
    return "|".join(parts)


@dataclass(frozen=True, slots=True)
class _Placed:
    """A matrix in memory, or one per group."""

    name: str
    call: KernelCall
    packed: npt.NDArray[np.uint64]
    record: npt.NDArray[np.int64]

    def multiply(self, x: View, out: View) -> None:
        """As the compiled code does."""
        inputs, outputs = matrices_at(x), matrices_at(out)
        repeat = len(inputs) // self.packed.size
        starts = np.array([0, inputs.shape[1]], np.int32)
        rows = np.arange(inputs.shape[1], dtype=np.int32)
        for i, (source, target) in enumerate(zip(inputs, outputs, strict=True)):
            slot = i // repeat
            self.call(self.packed[slot : slot + 1], starts, rows, rows, source, target)


@dataclass(frozen=True, slots=True)
class PlacedMatrix:
    """Where a matrix's rows go, or those of one per group.

    Attributes:
        record: for `tensor.extra`.
    """

    matrix: PackedMatrix
    packed: npt.NDArray[np.uint64]
    record: npt.NDArray[np.int64]

    @property
    def takes_slices(self) -> bool:
        """Rows may come in slices that begin at multiples of `SLICE_GRAIN_ROWS`; otherwise all at once."""
        return self.packed.size == 1 or self.matrix.n_out % SLICE_GRAIN_ROWS == 0

    def put(self, begin: int, rows: npt.NDArray[np.uint8]) -> None:
        """Packs ggml rows of which the first is at byte `begin`; any thread, releases the interpreter lock."""
        row_bytes = self.matrix.raw_bytes // self.matrix.n_out
        address, first, left = int(rows.ctypes.data), begin // row_bytes, rows.size // row_bytes
        while left:
            group, row = divmod(first, self.matrix.n_out)
            count = min(left, self.matrix.n_out - row)
            self.matrix.pack_rows(address, row, count, int(self.packed[group]))
            address, first, left = address + count * row_bytes, first + count, left - count


class DenseMatrices:
    """A model's packed matrices. Owns their memory until `close`; filled at load, read by compiled code.

    Attributes:
        scratch_bytes: scratch memory of the largest call.
        n_bytes: memory of all packed matrices.
    """

    def __init__(self, *, n_threads: int) -> None:
        self._n_threads = n_threads
        self._maps: list[mmap.mmap] = []
        self._next = self._end = 0
        self._placed: list[_Placed] = []
        self.scratch_bytes = 0
        self.n_bytes = 0

    def place(self, kind: GGMLQuantizationType, shape: tuple[int, ...], name: str = "") -> PlacedMatrix:
        """Room for a matrix, whose rows follow.

        Args:
            kind: ggml type of its rows.
            shape: ggml order (n_in, n_out) or (n_in, n_out, n_groups), as llama.cpp created the tensor.
            name: for `show`.
        """
        n_in, n_out, n_groups = shape[0], shape[1], math.prod(shape[2:])
        matrix = PackedMatrix.choose(kind, n_out, n_in, math="int8")
        stride = align_up(matrix.packed_bytes, LINE_BYTES)
        base = self._room(stride * n_groups)
        packed = np.array([base + group * stride for group in range(n_groups)], np.uint64)
        call = KernelCall([matrix.at(0)], n_threads=self._n_threads)
        record = dense_record(call, packed)
        self._placed.append(_Placed(name, call, packed, record))
        self.scratch_bytes = max(self.scratch_bytes, call.scratch_bytes)
        self.n_bytes += stride * n_groups
        return PlacedMatrix(matrix, packed, record)

    def add(
        self, kind: GGMLQuantizationType, shape: tuple[int, ...], data: npt.NDArray[np.uint8], name: str = ""
    ) -> npt.NDArray[np.int64]:
        """Places and packs a matrix; returns its record for `tensor.extra`.

        Args:
            kind, shape, name: see `place`.
            data: ggml rows, flat.
        """
        placed = self.place(kind, shape, name)
        placed.put(0, np.ascontiguousarray(data))
        return placed.record

    def _room(self, n_bytes: int) -> int:
        """Address of memory for a matrix. Matrices share mappings that begin with a huge page: with one mapping each, the ends of
        all of them are in small pages, which is a third of the bytes of DeepSeek-V4-Flash."""
        if self._end - self._next < n_bytes:
            size = max(n_bytes, _MAP_BYTES)
            memory = anonymous(size + HUGE_PAGE_BYTES)
            self._maps.append(memory)
            self._next = align_up(np.frombuffer(memory, np.uint8).ctypes.data, HUGE_PAGE_BYTES)
            self._end = self._next + size
        address, self._next = self._next, self._next + n_bytes
        return address

    def show(self, look: MatrixListener | None) -> None:
        """Shows every call's inputs to `look` from now on, through Python (None: no more); between two decodes."""
        device = expert_device()
        for placed in self._placed:
            record = placed.record
            WEIGHT.fill(record, kind=KIND_DENSE if look is None else _NO_KIND)
            device.show(record.ctypes.data, None if look is None else _shown(placed, look))

    def close(self) -> None:
        """Frees the matrices; the model must be gone."""
        self.show(None)
        self._placed.clear()
        self._next = self._end = 0
        self._maps.clear()  # unmapped when the last array over them goes
        self.n_bytes = 0


def _shown(placed: _Placed, look: MatrixListener) -> Callable[[View, View], None]:
    def multiply(x: View, out: View) -> None:
        look(placed.name, matrices_at(x))
        placed.multiply(x, out)

    return multiply
