"""Which dense matrix gets which precision: mixes from the smallest to the exact one, each the best of its size. Pure arithmetic.

A matrix's share of the model's divergence is its measured error times what such an error costs (`SENSITIVITY`), shared out over the
layers that have such a matrix. Steps up each matrix's lower convex hull, in order of divergence less per byte, give the mixes.
Which of them a box should have depends on its experts, too; whoever has both decides (`localrun.engine.measure.choose`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from gguf import GGMLQuantizationType

from localrun.errors import FormatError
from localrun.quant.precision.dense import EMBEDDING, HEAD, TYPES, DenseErrors, kind_of

EXPERTS_SENSITIVITY = 0.23
"""Divergence (KL, nats) per expected error of the experts. [m] docs/quantization.md: 0.16 to 0.29 over eleven mixtures."""

SENSITIVITY: Mapping[str, float] = {
    "attn_q_a": 0.29, "attn_q_b": 0.29, "attn_kv": 0.50, "attn_output_a": 0.38, "attn_output_b": 0.82,
    "attn_compressor_kv": 0.035, "attn_compressor_gate": 0.049, "indexer_compressor_kv": 0.075,
    "indexer_compressor_gate": 0.066, "indexer.attn_q_b": 0.07, "ffn_gate_shexp": 0.22, "ffn_up_shexp": 0.19,
    "ffn_down_shexp": 0.70, HEAD: 8.7, EMBEDDING: 0.70,
}  # fmt: skip
"""The same per relative squared error, all layers' matrices of a kind rounded. [m] tools/dense_quality.py on the demo model, 3,072
tokens: from Q8_0 to Q4_K; below, KL hardly falls. `attn_q_b` and `indexer.attn_q_b` have rows too short there: as `attn_q_a` and
the indexer's others."""


@dataclass(frozen=True, slots=True)
class DenseMix:
    """A type for every matrix that has a choice.

    Attributes:
        types: by name.
        n_bytes: all of them.
        token_bytes: that every token reads: all but the embeddings.
        divergence: expected, in nats.
    """

    types: Mapping[str, GGMLQuantizationType]
    n_bytes: int
    token_bytes: int
    divergence: float

    def by_type(self) -> dict[str, int]:
        """How many matrices have which type, small types first."""
        counts = Counter(self.types.values())
        return {kind.name.lower(): counts[kind] for kind in TYPES if counts[kind]}


def dense_mixes(
    errors: DenseErrors, size: Callable[[str, GGMLQuantizationType], int], *, most: int = 32
) -> list[DenseMix]:
    """Mixes in ascending order of size; at most so many of all that the steps lead to.

    Args:
        size: bytes of a matrix in a type.
    """
    kinds = {name: kind_of(name) or "" for name in errors.relative}
    layers = Counter(kinds.values())
    cost = {
        name: {kind: SENSITIVITY.get(kinds[name], 1.0) / layers[kinds[name]] * error for kind, error in row.items()}
        for name, row in errors.relative.items()
    }
    types = {name: min(row, key=lambda kind: size(name, kind)) for name, row in cost.items()}
    steps = sorted(step for name in cost for step in _steps(name, cost[name], size))
    kept = {round(i) for i in np.linspace(0, len(steps), most)}
    mixes = []
    for number in range(len(steps) + 1):
        if number:
            _, name, _, kind = steps[number - 1]
            types[name] = kind
        if number in kept:
            mixes.append(_mix(types, cost, size))
    return mixes


def _steps(
    name: str,
    cost: Mapping[GGMLQuantizationType, float],
    size: Callable[[str, GGMLQuantizationType], int],
) -> Iterator[tuple[float, str, int, GGMLQuantizationType]]:
    """Up the hull: (change of divergence per byte, name, size, type), each steeper than the next."""
    at = min(cost, key=lambda kind: size(name, kind))
    while True:
        better = [kind for kind in cost if size(name, kind) > size(name, at) and cost[kind] < cost[at]]
        if not better:
            return
        slopes = [((cost[k] - cost[at]) / (size(name, k) - size(name, at)), -size(name, k), k) for k in better]
        slope, _, at = min(slopes)
        yield slope, name, size(name, at), at


def _mix(
    types: Mapping[str, GGMLQuantizationType],
    cost: Mapping[str, Mapping[GGMLQuantizationType, float]],
    size: Callable[[str, GGMLQuantizationType], int],
) -> DenseMix:
    sizes = {name: size(name, kind) for name, kind in types.items()}
    return DenseMix(
        types=dict(types),
        n_bytes=sum(sizes.values()),
        token_bytes=sum(n for name, n in sizes.items() if kind_of(name) != EMBEDDING),
        divergence=sum(cost[name][kind] for name, kind in types.items()),
    )


# --- as text, for manifests -------------------------------------------------------------------------------------------

DENSE_TYPES_OPTION = "dense-types"
"""Of a manifest's options: single matrices' types, where they were chosen."""


def types_as_text(types: Mapping[str, GGMLQuantizationType]) -> str:
    """`q4_k: blk.0.attn_q_a blk.1.attn_q_a; q8_0: output`."""
    parts = []
    for kind in dict.fromkeys(sorted(types.values())):
        names = sorted(name.removesuffix(".weight") for name, other in types.items() if other == kind)
        parts.append(f"{kind.name.lower()}: {' '.join(names)}")
    return "; ".join(parts)


def types_from_text(text: object, where: str) -> dict[str, GGMLQuantizationType]:
    """Reads what `types_as_text` wrote; an empty text is no matrix.

    Raises:
        FormatError: something else.
    """
    known = {kind.name.lower(): kind for kind in TYPES}
    types: dict[str, GGMLQuantizationType] = {}
    for part in str(text).split("; ") if text else ():
        kind, colon, names = part.partition(": ")
        stems = [f"{stem}.weight" for stem in names.split()]
        if not colon or kind not in known or not stems or any(kind_of(name) is None for name in stems):
            raise FormatError(
                f"{where}: types of dense matrices: {part[:60]!r}", hint="update localrun, or convert again"
            )
        types.update(dict.fromkeys(stems, known[kind]))
    return types
