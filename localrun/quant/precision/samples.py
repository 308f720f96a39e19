"""Input rows of a model's experts, to measure output errors on: real ones from a calibration, or random ones with its variances.

Knows nothing about models or texts; `localrun.engine.measure.calibrate` collects.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from localrun.quant.precision.importance import F32, Importance


@dataclass(frozen=True, slots=True)
class LayerSamples:
    """One layer's sampled positions.

    Attributes:
        rows: (R, D) inputs of gate and up.
        chosen: (R, E) which experts each position was routed to.
    """

    rows: F32
    chosen: npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class ActivationSamples:
    """Sampled rows by block number; `real` is False if they were drawn and not seen."""

    layers: Mapping[int, LayerSamples]
    real: bool = True

    def rows(self, layer: int, expert: int, n: int) -> tuple[F32, int]:
        """Up to `n` rows for an expert, its own first, then others of the layer; also how many are its own.

        Deterministic for the same samples.
        """
        sampled = self.layers[layer]
        own = np.flatnonzero(sampled.chosen[:, expert])[:n]
        others = np.flatnonzero(~sampled.chosen[:, expert])
        # Spread over the text; which ones is arbitrary and must not depend on chance.
        n_others = min(n - own.size, others.size)
        spread = others[np.linspace(0, others.size - 1, n_others).astype(np.int64)] if n_others else others[:0]
        return sampled.rows[np.concatenate([own, spread])], int(own.size)


def drawn_samples(importance: Importance, *, n: int = 64, seed: int = 0) -> ActivationSamples:
    """Gaussian rows with the mean squares of each layer's inputs, where only an imatrix is known: no correlations, no signs."""
    rng = np.random.default_rng(seed)
    layers = {}
    for number, layer in importance.layers.items():
        variance = np.zeros(layer.x.shape[1])
        for row in layer.x:
            variance += row
        variance /= max(1.0, float(layer.counts.sum()))
        rows = (rng.standard_normal((n, variance.size)) * np.sqrt(variance)).astype(np.float32)
        layers[number] = LayerSamples(rows, np.zeros((n, layer.counts.size), bool))
    return ActivationSamples(layers, real=False)
