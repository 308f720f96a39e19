"""ggml's number formats: sizes, names, and conversion of rows to and from F32 by libggml-base.

Knows nothing about experts, files or our own quantizers. Any type that the installed library can dequantize works, including
new ones. Functions that take addresses don't check them: callers own the memory and know its size.
"""

from __future__ import annotations

import ctypes as C
import functools
from dataclasses import dataclass
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from localrun.errors import IncompatibleLibraryError, UnsupportedModelError
from localrun.ggml.library import base

_ToFloat = C.CFUNCTYPE(None, C.c_void_p, C.c_void_p, C.c_int64)


@dataclass(frozen=True, slots=True)
class BlockType:
    """A ggml type's layout.

    Attributes:
        type: ggml's number and name.
        block_elements, block_bytes: elements and bytes of one block; 1 and the element size for plain floats.
        to_float: address of `void (const void *row, float *out, int64_t n_elements)`; 0 for F32, which needs none.
    """

    type: GGMLQuantizationType
    block_elements: int
    block_bytes: int
    to_float: int

    def row_bytes(self, n_elements: int) -> int:
        """Bytes of a row of `n_elements`.

        Raises:
            UnsupportedModelError: the row is not a whole number of blocks.
        """
        if n_elements <= 0 or n_elements % self.block_elements:
            raise UnsupportedModelError(
                f"a row of {n_elements} values is not a multiple of {self.type.name}'s {self.block_elements}",
                hint="convert the model with another expert type",
            )
        return n_elements // self.block_elements * self.block_bytes


@functools.cache
def block_type(type_: GGMLQuantizationType) -> BlockType:
    """Layout of a ggml type.

    Raises:
        UnsupportedModelError: ggml can't turn this type into floats (integers, retired types).
        IncompatibleLibraryError: ggml and the gguf package mean different things by this number.
    """
    traits = base().ggml_get_type_traits(int(type_))[0]
    to_float = int(traits.to_float or 0)
    if not to_float and type_ != GGMLQuantizationType.F32:
        raise UnsupportedModelError(
            f"ggml can't dequantize type {type_.name}", hint="convert the model with another expert type"
        )
    found = ((traits.type_name or b"").decode().upper(), int(traits.block_elements), int(traits.block_bytes))
    if found != (type_.name, *GGML_QUANT_SIZES[type_]):
        raise IncompatibleLibraryError(
            f"the bundled llama.cpp's type {int(type_)} is {found[0]}, not {type_.name} as gguf knows it"
        )
    return BlockType(type_, found[1], found[2], to_float)


@functools.cache
def needs_importance(type_: GGMLQuantizationType) -> bool:
    """Whether `quantize` must be given importance for this type: ggml aborts the process where it is missing."""
    return bool(base().ggml_quantize_requires_imatrix(int(type_)))


def quantize(
    type_: GGMLQuantizationType, values: int, n_rows: int, n_in: int, out: int, importance: int | None = None
) -> int:
    """ggml's quantizer; releases the interpreter lock and uses one thread.

    It aborts the process on NaN, on rows that are not whole blocks, on missing importance, and where squares of tiny numbers
    underflow.

    Args:
        values: address of (n_rows, n_in) f32, contiguous.
        out: address of the rows' bytes, `block_type(type_).row_bytes(n_in)` each.
        importance: address of (n_in,) f32.

    Returns:
        Bytes written.
    """
    _prepare(type_)
    return int(base().ggml_quantize_chunk(int(type_), values, out, 0, n_rows, n_in, importance))


@functools.cache
def _prepare(type_: GGMLQuantizationType) -> None:
    """Computes the type's tables (some take a second) after a check that it is the type we mean; ggml locks."""
    block_type(type_)
    base().ggml_quantize_init(int(type_))


def dequantize(type_: GGMLQuantizationType, rows: int, n_values: int, out: int) -> None:
    """Whole blocks at address `rows` to `n_values` f32 at `out`; releases the interpreter lock.

    Raises:
        UnsupportedModelError: ggml can't (or, as for F32, need not) turn this type into floats.
    """
    _to_float(type_)(rows, out, n_values)


@functools.cache
def _to_float(type_: GGMLQuantizationType) -> Any:
    address = block_type(type_).to_float
    if not address:
        raise UnsupportedModelError(f"{type_.name} needs no dequantization")
    return _ToFloat(address)
