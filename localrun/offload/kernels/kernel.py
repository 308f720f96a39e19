"""Kernel objects: one row kernel per projection, combined for one expert shape."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from localrun.alignment import ceil_div
from localrun.offload.kernels import generic
from localrun.offload.kernels.cpu import level
from localrun.offload.kernels.exact import exact_rows
from localrun.offload.kernels.interleaved.formats import FORMATS
from localrun.offload.kernels.interleaved.packing import pack_function, pack_matrix
from localrun.offload.kernels.interleaved.rows import rows_function
from localrun.offload.kernels.interleaved.unpacking import unpack_function, unpack_matrix
from localrun.offload.kernels.layout import expert_layout, is_interleaved, packed_matrix_bytes, raw_matrix_bytes
from localrun.offload.kernels.panels import FLOAT32, Panel
from localrun.offload.kernels.reading import reading
from localrun.offload.kernels.spec import FfnKernel, FfnSpec, Math
from localrun.offload.kernels.tasks import KernelCall, Matrix, runner


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """One matrix of a ggml type and shape, in the layout of its row kernel.

    Attributes:
        raw_bytes, packed_bytes: size as ggml rows and in the slot (a multiple of 64 if interleaved).
        arithmetic: for the kernel's name.
        interleaved: rearranged for vector code; otherwise plain ggml rows.
    """

    type: GGMLQuantizationType
    n_out: int
    n_in: int
    interleaved: bool
    arithmetic: str
    raw_bytes: int
    packed_bytes: int
    panel: Panel
    rows_address: int
    extra: int

    @classmethod
    def choose(cls, type_: GGMLQuantizationType, n_out: int, n_in: int, *, math: Math) -> PackedMatrix:
        """How a matrix of `n_out` rows of `n_in` elements is packed and multiplied on this CPU.

        Raises:
            UnsupportedModelError: see `make_kernel`.
        """
        raw_bytes = raw_matrix_bytes(type_, n_out, n_in)
        if is_interleaved(type_, math):
            format_ = FORMATS[type_]
            address = int(rows_function(type_, level(), reading()).address)
            pack_function()  # compiled now, not while the first expert waits for it
            return cls(
                type_,
                n_out,
                n_in,
                True,
                level().value,
                raw_bytes,
                packed_matrix_bytes(type_, n_out, n_in, math),
                format_.panel,
                address,
                0,
            )
        if math == "int8" and generic.supports(type_):
            address, extra = generic.generic_rows(type_)
            return cls(
                type_, n_out, n_in, False, "generic", raw_bytes, raw_bytes, generic.generic_panel(type_), address, extra
            )
        address, extra = exact_rows(type_, n_in)
        return cls(type_, n_out, n_in, False, "f32", raw_bytes, raw_bytes, Panel(FLOAT32), address, extra)

    def pack(self, raw: int, target: int) -> None:
        """ggml rows at address `raw` -> packed form at `target`."""
        if self.interleaved:
            pack_matrix(self.type, raw, self.raw_bytes // self.n_out, self.n_out, target)
        else:
            ctypes.memmove(target, raw, self.raw_bytes)

    def pack_rows(self, raw: int, first: int, count: int, target: int) -> None:
        """Packs rows `first..first + count`, at address `raw`, of the matrix at `target`; `first` is a multiple of 16."""
        row_bytes = self.raw_bytes // self.n_out
        if self.interleaved:
            place = target + first // 16 * (self.packed_bytes // ceil_div(self.n_out, 16))
            pack_matrix(self.type, raw, row_bytes, count, place)
        else:
            ctypes.memmove(target + first * row_bytes, raw, count * row_bytes)

    def unpack(self, packed: int, raw: int) -> None:
        """The inverse of `pack`."""
        if self.interleaved:
            unpack_matrix(self.type, packed, self.raw_bytes // self.n_out, self.n_out, raw)
        else:
            ctypes.memmove(raw, packed, self.raw_bytes)

    def at(self, offset: int) -> Matrix:
        """The matrix for the driver, `offset` bytes into a slot."""
        return Matrix(self.rows_address, self.extra, offset, self.n_in, self.n_out, self.panel)


class ExpertKernel:
    """`FfnKernel` for any mix of types; see `spec.FfnKernel` for the contract."""

    def __init__(self, spec: FfnSpec, *, math: Math, n_threads: int) -> None:
        self.spec = spec
        shapes = ((spec.n_ff, spec.n_embd), (spec.n_ff, spec.n_embd), (spec.n_embd, spec.n_ff))
        self._matrices = tuple(
            PackedMatrix.choose(t, *shape, math=math) for t, shape in zip(spec.types, shapes, strict=True)
        )
        layout = expert_layout(spec.types, spec.n_embd, spec.n_ff, math=math)
        self.raw_bytes, self.raw_is_packed, self.slot_bytes = layout.raw_bytes, layout.raw_is_packed, layout.slot_bytes
        self._offsets = layout.offsets
        kinds = dict.fromkeys(f"{m.type.name.lower()}-{m.arithmetic}" for m in self._matrices)
        self.name = "+".join(kinds)
        views = [m.at(offset) for m, offset in zip(self._matrices, self._offsets, strict=True)]
        self.call = KernelCall(views, limit=spec.limit, n_threads=n_threads)
        self._alone = [KernelCall([view], n_threads=n_threads) for view in views]

    def pack(self, raw: npt.NDArray[np.uint8], slot: int) -> None:
        """See `FfnKernel`."""
        assert raw.dtype == np.uint8
        assert raw.flags.c_contiguous
        assert raw.size == sum(self.raw_bytes)
        source = raw.ctypes.data
        for matrix, offset in zip(self._matrices, self._offsets, strict=True):
            matrix.pack(source, slot + offset)
            source += matrix.raw_bytes

    def pack_matrix(self, which: int, raw: npt.NDArray[np.uint8], slot: int) -> None:
        """See `FfnKernel`."""
        assert raw.dtype == np.uint8
        assert raw.flags.c_contiguous
        assert raw.size == self.raw_bytes[which]
        self._matrices[which].pack(raw.ctypes.data, slot + self._offsets[which])

    def unpack(self, slot: int, raw: npt.NDArray[np.uint8]) -> None:
        """See `FfnKernel`."""
        assert raw.dtype == np.uint8
        assert raw.flags.c_contiguous
        assert raw.size == sum(self.raw_bytes)
        target = raw.ctypes.data
        for matrix, offset in zip(self._matrices, self._offsets, strict=True):
            matrix.unpack(slot + offset, target)
            target += matrix.raw_bytes

    def run(
        self,
        slots: npt.NDArray[np.uint64],
        starts: npt.NDArray[np.int32],
        x_rows: npt.NDArray[np.int32],
        out_rows: npt.NDArray[np.int32],
        x: npt.NDArray[np.float32],
        out: npt.NDArray[np.float32],
    ) -> None:
        """See `FfnKernel`."""
        self.call(slots, starts, x_rows, out_rows, x, out)

    def project(
        self,
        which: int,
        slots: npt.NDArray[np.uint64],
        starts: npt.NDArray[np.int32],
        x_rows: npt.NDArray[np.int32],
        out_rows: npt.NDArray[np.int32],
        x: npt.NDArray[np.float32],
        out: npt.NDArray[np.float32],
    ) -> None:
        """See `FfnKernel`."""
        self._alone[which](slots, starts, x_rows, out_rows, x, out)


def make_kernel(spec: FfnSpec, *, math: Math = "int8", n_threads: int) -> FfnKernel:
    """The fastest kernel for `spec` on this CPU.

    Args:
        math: `int8` quantizes activations to 8 bits as ggml does; `f32` dequantizes weights and is exact but for rounding.
        n_threads: threads to use, including the caller's.

    Raises:
        UnsupportedModelError: a type that ggml can't dequantize, or rows that are not whole blocks.
    """
    return ExpertKernel(spec, math=math, n_threads=n_threads)


def warm_up(types: Iterable[GGMLQuantizationType], *, math: Math = "int8") -> None:
    """Compiles the code for a model with weights of these types, or loads it from the disk cache.

    Creating a kernel does the same for its types; this is for setup, so that later starts compile nothing.
    """
    runner()
    unpack_function()
    for type_ in types:
        PackedMatrix.choose(type_, 256, 256, math=math)
