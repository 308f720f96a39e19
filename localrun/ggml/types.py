"""ggml's own description of its types: block sizes and dequantization to F32, as libggml-base exports them.

Knows nothing about experts. Any type that the installed library can dequantize works, new ones included.
"""

from __future__ import annotations

import ctypes
import functools
import os
from dataclasses import dataclass

import llama_cpp
from gguf import GGMLQuantizationType

from localrun.errors import UnsupportedModelError


class _TypeTraits(ctypes.Structure):
    """`struct ggml_type_traits` of ggml.h (ggml 0.25)."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("block_elements", ctypes.c_int64),
        ("block_interleave", ctypes.c_int64),
        ("block_bytes", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
        ("from_float_ref", ctypes.c_void_p),
    )


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
def _library() -> ctypes.CDLL:
    folder = os.path.join(os.path.dirname(llama_cpp.__file__), "lib")
    names = [name for name in sorted(os.listdir(folder)) if "ggml-base" in name]
    library = ctypes.CDLL(os.path.join(folder, names[0]))
    library.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
    library.ggml_get_type_traits.argtypes = [ctypes.c_int]
    return library


@functools.cache
def block_type(type_: GGMLQuantizationType) -> BlockType:
    """Layout of a ggml type.

    Raises:
        UnsupportedModelError: ggml can't turn this type into floats (integers, retired types).
    """
    traits = _library().ggml_get_type_traits(int(type_))[0]
    to_float = int(traits.to_float or 0)
    if not to_float and type_ != GGMLQuantizationType.F32:
        raise UnsupportedModelError(
            f"ggml can't dequantize type {type_.name}", hint="convert the model with another expert type"
        )
    return BlockType(type_, int(traits.block_elements), int(traits.block_bytes), to_float)
