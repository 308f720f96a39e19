"""Which layers of a whole synthetic model have bytes of their own, and whose bytes the others share.

Experts: layer n has those of layer n modulo `own_layers`. Dense matrices: each layer has those of the first layer of its kind, that
is with its compression ratio; the first layer of all has its own (`synthetic_weights` gives its attention another gain). Norms,
routers, biases and tables, all small, differ in each layer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from localrun.errors import UsageError

_DENSE_MATRIX = re.compile(r"layers\.(\d+)\.((?:attn|ffn\.shared_experts)\..*(?<!norm)\.(?:weight|scale))")


def check_own_layers(own_layers: int, n_layers: int) -> None:
    """Raises UsageError: so many layers of a model's can't be those whose experts the others share."""
    if not 0 < own_layers <= n_layers:
        raise UsageError(
            f"--own-layers {own_layers}: the model has {n_layers} layers with experts", hint=f"1 to {n_layers}"
        )


def dense_donor(ratios: Sequence[int], layer: int) -> int:
    """The layer whose dense matrices layer `layer` has; `ratios` are all layers' compression ratios."""
    return next(index for index, ratio in enumerate(ratios) if index == layer or (index and ratio == ratios[layer]))


def is_dense_matrix(name: str) -> bool:
    """Whether a tensor, by its official name, belongs to a dense matrix that layers share."""
    return _DENSE_MATRIX.fullmatch(name) is not None


def donor_name(ratios: Sequence[int], name: str) -> str:
    """Official name of the dense tensor that `name` is equal to: its own where it has bytes of its own, or shares none."""
    match = _DENSE_MATRIX.fullmatch(name)
    if match is None:
        return name
    return f"layers.{dense_donor(ratios, int(match[1]))}.{match[2]}"
