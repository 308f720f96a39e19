"""All interleaved formats by ggml type, and which of them this processor can run."""

from __future__ import annotations

from typing import Final

from gguf import GGMLQuantizationType

from localrun.offload.kernels.cpu import Level, level
from localrun.offload.kernels.interleaved import blocks, floats, grids, kquants, parts
from localrun.offload.kernels.interleaved.layout import Format

FORMATS: Final[dict[GGMLQuantizationType, Format]] = {
    f.type: f for f in (*blocks.FORMATS, *parts.FORMATS, *kquants.FORMATS, *grids.FORMATS, *floats.FORMATS)
}


def runnable(type_: GGMLQuantizationType) -> bool:
    """Whether this processor has the instructions for the type's format."""
    if type_ not in FORMATS or level() == Level.GENERIC:
        return False
    if type_ == GGMLQuantizationType.IQ3_XXS:
        return level() in (Level.AVX512, Level.AVX512_VNNI) and grids.has_grid_permutes()
    return True
