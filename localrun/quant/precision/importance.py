"""The importance of each input channel of each routed expert, and how often the expert is used, from a calibration text.

Per layer: the sum of squared inputs of gate and up, the same of down, and how many rows each expert saw. A quantizer weights a
weight's squared error by its channel's mean square; the precision solver weights an expert by its use. Knows nothing about the
origin of the sums (`localrun.engine.measure.calibrate`, or a file of llama.cpp's: `imatrix_file`).

For rarely or never used experts, `PRIOR_ROWS` rows of the layer's average are added to every expert's sums: an unused expert
gets the average, while a frequently used one is dominated by its own sums. The stored sums are not modified.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import xxhash

from localrun.errors import FormatError
from localrun.quant.model.source import MoeLayer

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

PRIOR_ROWS = 4.0
"""Rows of the layer's average that every expert's own rows are mixed with."""
RARE_ROWS = 8
"""An expert with fewer rows than this counts as rarely used in reports."""
_LEAST_WEIGHT = 1e-6
"""Smallest weight against the mean of all channels: quantizers divide by sums of weights, which must not be 0."""


@dataclass(frozen=True, slots=True)
class LayerImportance:
    """Sums over one layer's (token, expert) pairs. The big arrays may be mapped files.

    Attributes:
        counts: (E,) pairs of each expert.
        x: (E, D) sums of squares of what gate and up multiply.
        activated: (E, F) sums of squares of what down multiplies.
        route_power: (E,) sums of the squared router weights that the outputs were multiplied with; None: not known.
    """

    counts: F64
    x: F32
    activated: F32
    route_power: F64 | None = None


@dataclass(frozen=True, slots=True)
class DenseImportance:
    """Sums over the rows that one dense matrix was multiplied with.

    Attributes:
        sums: (n_in,) sums of squares.
        count: rows; a matrix of several groups has one of each per token.
    """

    sums: F32
    count: float


@dataclass(frozen=True, slots=True)
class ImportanceSummary:
    """Summary of a calibration for reports.

    Attributes:
        n_tokens: tokens of the text.
        n_experts: experts of all layers.
        n_unused: experts that no token was routed to, which get their layer's average.
        n_rare: experts with some rows, fewer than `RARE_ROWS`.
        unused_by_layer: (block, number) of layers with unused experts.
    """

    n_tokens: int
    n_experts: int
    n_unused: int
    n_rare: int
    unused_by_layer: tuple[tuple[int, int], ...]
    datasets: tuple[str, ...]
    digest: str


class Importance:
    """Sums of all layers of one model. Immutable, thread-safe; implements `localrun.quant.checkpoint.mapping.ImportanceLookup`.

    Args:
        layers: by block number.
        n_tokens: tokens that were run.
        datasets: names of the texts.
        chunk_tokens: tokens per window.
        text_digest: of the calibration text; empty if unknown.
        dense: of dense matrices, by GGUF name; those that are missing have no importance.
    """

    def __init__(
        self,
        layers: Mapping[int, LayerImportance],
        *,
        n_tokens: int,
        datasets: tuple[str, ...] = (),
        chunk_tokens: int = 512,
        text_digest: str = "",
        dense: Mapping[str, DenseImportance] | None = None,
    ) -> None:
        self.layers = dict(sorted(layers.items()))
        self.dense = dict(sorted((dense or {}).items()))
        self.n_tokens = n_tokens
        self.datasets = datasets
        self.chunk_tokens = chunk_tokens
        self.text_digest = text_digest
        self._means = {number: (_mean(layer.x, layer.counts), _mean(layer.activated, layer.counts))
                       for number, layer in self.layers.items()}  # fmt: skip

    @cached_property
    def digest(self) -> str:
        """xxh3_128 of all sums and counts: same digest, same weights."""
        state = xxhash.xxh3_128()
        for number, layer in self.layers.items():
            state.update(f"{number} {layer.x.shape} {layer.activated.shape}\n".encode())
            state.update(layer.counts.astype(np.float64).tobytes())
            for array in (layer.x, layer.activated):
                for row in array:
                    state.update(row.tobytes())
        for name, matrix in self.dense.items():
            state.update(f"{name} {matrix.count}\n".encode())
            state.update(matrix.sums.tobytes())
        return state.hexdigest()

    def weights(self, layer: int, expert: int, projection: int) -> F32 | None:
        """Mean squares (n_in,) of a projection's input channels; None where the whole layer was never used."""
        sums = self.layers[layer]
        average = self._means[layer][projection == 2]
        if not average.any():
            return None
        own = (sums.activated if projection == 2 else sums.x)[expert]
        mean = (own + np.float32(PRIOR_ROWS) * average) / np.float32(sums.counts[expert] + PRIOR_ROWS)
        result: F32 = np.maximum(mean, np.float32(_LEAST_WEIGHT) * mean.mean())
        return result

    def dense_weights(self, name: str) -> F32 | None:
        """Mean squares (n_in,) of a dense matrix's input channels; None where nothing is known."""
        matrix = self.dense.get(name)
        if matrix is None or not matrix.sums.any():
            return None
        mean = matrix.sums / np.float32(max(1.0, matrix.count))
        result: F32 = np.maximum(mean, np.float32(_LEAST_WEIGHT) * mean.mean())
        return result

    def route_weights(self, layer: int) -> F64:
        """(E,) weight of each expert's squared error, summing to 1 over a layer.

        Squared router weights if known, else uses; unused experts count as half a use.
        """
        sums = self.layers[layer]
        uses = sums.counts + 0.5
        if sums.route_power is not None and sums.route_power.sum() > 0:
            per_use = sums.route_power.sum() / sums.counts.sum()
            uses = sums.route_power + 0.5 * per_use
        result: F64 = uses / uses.sum()
        return result

    def summary(self) -> ImportanceSummary:
        """For reports."""
        unused = {number: int((layer.counts == 0).sum()) for number, layer in self.layers.items()}
        return ImportanceSummary(
            n_tokens=self.n_tokens,
            n_experts=sum(layer.counts.size for layer in self.layers.values()),
            n_unused=sum(unused.values()),
            n_rare=sum(int(((layer.counts > 0) & (layer.counts < RARE_ROWS)).sum()) for layer in self.layers.values()),
            unused_by_layer=tuple((number, n) for number, n in unused.items() if n),
            datasets=self.datasets,
            digest=self.digest,
        )

    def check_fits(self, moe_layers: Mapping[int, MoeLayer], where: str) -> None:
        """Raises FormatError if these are sums of a model of other layers or shapes."""
        hint = "use an imatrix made from this model, or calibrate again"
        if set(self.layers) != set(moe_layers):
            missing, extra = sorted(set(moe_layers) - set(self.layers)), sorted(set(self.layers) - set(moe_layers))
            what = f"nothing for layer {missing[0]}" if missing else f"layer {extra[0]}, which the model lacks"
            raise FormatError(f"{where}: importance of another model: it has {what}", hint=hint)
        for number, moe in moe_layers.items():
            layer = self.layers[number]
            got = (layer.counts.size, layer.x.shape[1], layer.activated.shape[1])
            if got != (moe.n_experts, moe.n_embd, moe.n_ff):
                raise FormatError(
                    f"{where}: importance of another model: layer {number} has {got[0]} experts of {got[1]} x {got[2]}, "
                    f"the model {moe.n_experts} of {moe.n_embd} x {moe.n_ff}",
                    hint=hint,
                )


def _mean(sums: F32, counts: F64) -> F32:
    """(n_in,) average of all rows; zeros if there were none."""
    total = np.zeros(sums.shape[1])
    for row in sums:
        total += row
    result: F32 = (total / max(1.0, float(counts.sum()))).astype(np.float32)
    return result
