"""Sizes of an expert as ggml rows, and in a RAM slot in the layout of this machine's kernels. Compiles nothing."""

from __future__ import annotations

from dataclasses import dataclass

from gguf import GGMLQuantizationType

from localrun.alignment import LINE_BYTES, align_up
from localrun.ggml.types import block_type
from localrun.offload.kernels.interleaved.formats import FORMATS, runnable
from localrun.offload.kernels.spec import Math

ExpertTypes = tuple[GGMLQuantizationType, GGMLQuantizationType, GGMLQuantizationType]


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """Layout of gate, up and down.

    Attributes:
        raw_bytes: sizes as ggml rows.
        raw_is_packed: the slot holds gate|up|down ggml rows back to back.
        offsets: of the packed matrices in the slot.
        slot_bytes: of a packed expert, a multiple of 64.
    """

    raw_bytes: tuple[int, int, int]
    raw_is_packed: bool
    offsets: tuple[int, int, int]
    slot_bytes: int


def is_interleaved(kind: GGMLQuantizationType, math: Math) -> bool:
    """Whether matrices of this type are rearranged for vector code instead of plain ggml rows."""
    return math == "int8" and runnable(kind)


def raw_matrix_bytes(kind: GGMLQuantizationType, n_out: int, n_in: int) -> int:
    """A matrix as ggml rows."""
    return n_out * block_type(kind).row_bytes(n_in)


def packed_matrix_bytes(kind: GGMLQuantizationType, n_out: int, n_in: int, math: Math) -> int:
    """A matrix in a slot."""
    if is_interleaved(kind, math):
        return FORMATS[kind].matrix_bytes(n_out, n_in)
    return raw_matrix_bytes(kind, n_out, n_in)


def expert_layout(types: ExpertTypes, n_embd: int, n_ff: int, *, math: Math = "int8") -> ExpertLayout:
    """The layout of an expert whose gate and up are (n_ff, n_embd) and whose down is (n_embd, n_ff)."""
    shapes = ((n_ff, n_embd), (n_ff, n_embd), (n_embd, n_ff))
    raw_is_packed = not any(is_interleaved(kind, math) for kind in types)
    raw, offsets, end = [], [], 0
    for kind, shape in zip(types, shapes, strict=True):
        raw.append(raw_matrix_bytes(kind, *shape))
        offsets.append(end)
        size = packed_matrix_bytes(kind, *shape, math)
        # Vector code reads aligned slots; raw rows must stay back to back.
        end += size if raw_is_packed else align_up(size, LINE_BYTES)
    return ExpertLayout(
        (raw[0], raw[1], raw[2]), raw_is_packed, (offsets[0], offsets[1], offsets[2]), align_up(end, LINE_BYTES)
    )
