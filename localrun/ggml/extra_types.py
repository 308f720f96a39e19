"""Adds ggml types that the bundled llama.cpp supports, but the installed gguf package does not, to the latter's tables.

Everything else takes types from `GGMLQuantizationType` and `GGML_QUANT_SIZES`, so this must be imported before those tables are
used. `localrun.ggml.types.block_type` compares name and sizes with the library before a type is used.
"""

from __future__ import annotations

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

_TYPES = ((42, "Q2_0", 64, 18),)  # ggml-common.h, block_q2_0: one F16 and 64 values of two bits


def _add(number: int, name: str, block: int, block_bytes: int) -> None:
    if number in GGMLQuantizationType._value2member_map_:
        return
    member = int.__new__(GGMLQuantizationType, number)
    member._name_, member._value_ = name, number
    GGMLQuantizationType._member_map_[name] = member
    GGMLQuantizationType._member_names_.append(name)
    GGMLQuantizationType._value2member_map_[number] = member
    GGML_QUANT_SIZES[member] = (block, block_bytes)


for _type in _TYPES:
    _add(*_type)
