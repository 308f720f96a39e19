"""The contract between the expert device and its kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from localrun.offload.kernels.tasks import KernelCall

Math = Literal["int8", "f32"]


@dataclass(frozen=True, slots=True)
class FfnSpec:
    """One layer's expert shape.

    Attributes:
        types: ggml types of gate, up, down.
        n_embd: hidden size D (inputs of gate and up, outputs of down).
        n_ff: expert width F.
        limit: clamp of the SwiGLU: gate <= limit and -limit <= up <= limit; `math.inf` for the plain one.
    """

    types: tuple[GGMLQuantizationType, GGMLQuantizationType, GGMLQuantizationType]
    n_embd: int
    n_ff: int
    limit: float


class FfnKernel(Protocol):
    """Arithmetic for one `FfnSpec`. `pack` and `pack_matrix` may run in several threads at once, `run` and `project` in one at a
    time per thread.

    Attributes:
        name: format and instruction set, e.g. `mxfp4-avx512-vnni`.
        slot_bytes: size of one packed expert, a multiple of 64.
        raw_bytes: sizes of gate, up and down as ggml rows.
        raw_is_packed: the packed form is gate|up|down ggml rows back to back, so bytes may be read straight into the slot.
        call: arguments of `run` for compiled callers (`tasks.KernelCall`).
    """

    spec: FfnSpec
    name: str
    slot_bytes: int
    raw_bytes: tuple[int, int, int]
    raw_is_packed: bool
    call: KernelCall

    def pack(self, raw: npt.NDArray[np.uint8], slot: int) -> None:
        """Fills the slot at address `slot` (64-byte aligned) from gate|up|down ggml rows; releases the interpreter lock."""
        ...

    def pack_matrix(self, which: int, raw: npt.NDArray[np.uint8], slot: int) -> None:
        """Fills its part of the slot from one matrix' rows (0 gate, 1 up, 2 down); the slot is full after all three. Releases the
        interpreter lock."""
        ...

    def unpack(self, slot: int, raw: npt.NDArray[np.uint8]) -> None:
        """The inverse of `pack`: gate|up|down ggml rows from the slot at address `slot`; releases the interpreter lock."""
        ...

    def run(
        self,
        slots: npt.NDArray[np.uint64],
        starts: npt.NDArray[np.int32],
        x_rows: npt.NDArray[np.int32],
        out_rows: npt.NDArray[np.int32],
        x: npt.NDArray[np.float32],
        out: npt.NDArray[np.float32],
    ) -> None:
        """`out[out_rows[p]] = FFN_i(x[x_rows[p]])` for pairs p of `starts[i]:starts[i + 1]` and the expert packed at `slots[i]`.

        Args:
            slots: (E,) addresses of packed experts.
            starts: (E + 1,) ascending.
            x_rows, out_rows: (P,) row numbers; no two pairs may share an output row.
            x: (T, n_embd), rows contiguous, any row stride.
            out: (R, n_embd), rows contiguous, any row stride.
        """
        ...

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
        """One projection alone, as `run`: `out[out_rows[p]] = W_i x[x_rows[p]]`; `which` is 0 gate, 1 up, 2 down.

        For architectures with something other than the clamped SwiGLU between the projections.
        """
        ...
