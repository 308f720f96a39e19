"""The experts that get better copies than the base's, and their formats: chosen by the solver, written to the overlay.

Plain values and their JSON; knows nothing about files, budgets or errors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gguf import GGMLQuantizationType

from localrun.errors import FormatError

_T = GGMLQuantizationType

EXPERT_TYPES: Mapping[str, GGMLQuantizationType] = {
    kind.name.lower(): kind
    for kind in (
        *(_T.MXFP4, _T.Q8_0, _T.Q6_K, _T.Q5_K, _T.Q4_K, _T.IQ4_XS, _T.Q3_K, _T.IQ3_S, _T.IQ3_XXS),
        *(_T.Q2_K, _T.IQ2_S, _T.IQ2_XS, _T.IQ2_XXS, _T.BF16, _T.F32),
    )
}
"""What experts may become, in the base and in an overlay, by the name that users write; mxfp4 is exact for FP4 checkpoints."""


@dataclass(frozen=True, slots=True)
class BetterCopies:
    """Better copies by expert. Immutable.

    Attributes:
        formats: layer -> expert -> type of all three projections of its better copy; other experts have only the base's.
    """

    formats: Mapping[int, Mapping[int, GGMLQuantizationType]]

    @property
    def n_experts(self) -> int:
        """How many experts have a better copy."""
        return sum(len(experts) for experts in self.formats.values())

    def experts_by_type(self) -> dict[int, dict[GGMLQuantizationType, tuple[int, ...]]]:
        """Layer -> type -> expert numbers in ascending order, layers and types in ascending order, without empty ones."""
        result: dict[int, dict[GGMLQuantizationType, tuple[int, ...]]] = {}
        for layer, experts in sorted(self.formats.items()):
            for kind in sorted(set(experts.values())):
                result.setdefault(layer, {})[kind] = tuple(sorted(e for e, t in experts.items() if t == kind))
        return result

    def to_json(self) -> dict[str, Any]:
        """Layer -> lower-case type -> expert numbers: `{"3": {"mxfp4": [0, 17]}}`."""
        return {
            str(layer): {kind.name.lower(): list(experts) for kind, experts in by_type.items()}
            for layer, by_type in self.experts_by_type().items()
        }

    @classmethod
    def from_json(cls, value: object, where: str = "tiers") -> BetterCopies:
        """Inverse of `to_json`.

        Args:
            where: name of the value for error messages.

        Raises:
            FormatError: not such an object, an unknown type, or a duplicate expert.
        """
        formats: dict[int, dict[int, GGMLQuantizationType]] = {}
        for layer, by_type in _object(value, where).items():
            experts = formats.setdefault(_number(layer, f"{where}: layer"), {})
            for name, numbers in _object(by_type, f"{where}.{layer}").items():
                kind = _ggml_type(name, f"{where}.{layer}")
                if not isinstance(numbers, list):
                    raise FormatError(f"{where}.{layer}.{name}: expected a list of expert numbers")
                for number in numbers:
                    if type(number) is not int or number < 0:
                        raise FormatError(f"{where}.{layer}.{name}: {number!r} is not an expert number")
                    if number in experts:
                        raise FormatError(f"{where}.{layer}: expert {number} occurs twice")
                    experts[number] = kind
        return cls(formats)


def _object(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise FormatError(f"{where}: expected an object")
    return value


def _number(text: str, where: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 4 and str(int(text)) == text):
        raise FormatError(f"{where} '{text}' is not a number")
    return int(text)


def _ggml_type(name: str, where: str) -> GGMLQuantizationType:
    by_name = {kind.name.lower(): kind for kind in GGMLQuantizationType}
    if name not in by_name:
        raise FormatError(f"{where}: '{name}' is not a type of ggml")
    return by_name[name]
