"""How exact a conversion is: what was measured, and on which model. What was not measured is not guessed.

`localrun eval` measures a model of one's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from gguf import GGMLQuantizationType as Type

MEASURED_ON: Final = "the demo model"

SAME_TOP_TOKEN: Final[Mapping[Type, float]] = {Type.Q3_K: 0.9295, Type.Q2_K: 0.8953, Type.IQ2_XXS: 0.8724}
"""All experts in one format -> how often the most likely token is the checkpoint's. The tables of docs/quantization.md: converted
files, and for IQ2_XXS simulated ones."""


def exactness(kind: Type) -> str:
    """A few words for people about a conversion with all experts in this format."""
    share = SAME_TOP_TOKEN.get(kind)
    return "less accurate answers" if share is None else f"top token agrees {share:.0%} on {MEASURED_ON}"
