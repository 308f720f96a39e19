"""Measures a format's effect on an expert's output: quantized against exact weights, on rows that the expert processed.

Weight errors alone mean little: what matters is the output after SwiGLU on real inputs. Per expert and format: mean squared
difference of outputs, relative to the mean squared output of the layer's experts, so that an expert with small outputs counts
as little as it does in the model.

Measuring a big model's experts in all formats would take longer than converting it: above `ALL_BELOW_WEIGHTS` weights an expert,
a sample is measured per layer, half of it the most used experts, half random; the others get the layer's mean and are marked.
Arithmetic is F32 with exact activations; what the kernels' 8-bit activations add is the same for all formats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from localrun.errors import FormatError, StoreError
from localrun.quant.formats.quantize import dequantize_rows, quantize_rows
from localrun.quant.formats.transcode import decode_projection
from localrun.quant.model.activation import swiglu
from localrun.quant.model.shape import shape_of
from localrun.quant.model.source import Encoding, ModelSource, Projection
from localrun.quant.precision.importance import F32, F64, Importance
from localrun.quant.precision.samples import ActivationSamples
from localrun.reading import read_fully

ROWS = 32
"""Rows that an expert is measured on."""
ALL_BELOW_WEIGHTS = 4 << 20
"""Experts of fewer weights are all measured."""
SAMPLED_EXPERTS = 4

_T = GGMLQuantizationType
_Measurement = tuple[dict[GGMLQuantizationType, float], float, int]
"""Mean squared error of the output by format, mean squared output, own rows."""


@dataclass(frozen=True, slots=True)
class LayerErrors:
    """One layer's measurements.

    Attributes:
        relative: format -> (E,) squared output error relative to the layer's mean output power.
        measured: (E,) which experts were measured; the others have the mean of those.
        n_own_rows: (E,) rows of the measurement that were the expert's own.
        power: mean squared output of the measured experts.
    """

    relative: Mapping[GGMLQuantizationType, F64]
    measured: npt.NDArray[np.bool_]
    n_own_rows: npt.NDArray[np.int64]
    power: float


@dataclass(frozen=True, slots=True)
class ErrorTable:
    """Measurements by block number; `real_rows` False: on drawn rows, because no text was run."""

    layers: Mapping[int, LayerErrors]
    real_rows: bool

    @property
    def n_measured(self) -> int:
        return sum(int(layer.measured.sum()) for layer in self.layers.values())

    @property
    def n_experts(self) -> int:
        return sum(layer.measured.size for layer in self.layers.values())

    def to_json(self) -> dict[str, Any]:
        """All measured values, for the report and for resuming a conversion."""
        return {
            "real_rows": self.real_rows,
            "layers": {
                str(number): {
                    "n_experts": layer.measured.size,
                    "power": layer.power,
                    "measured": np.flatnonzero(layer.measured).tolist(),
                    "n_own_rows": layer.n_own_rows[layer.measured].tolist(),
                    "relative": {
                        kind.name.lower(): values[layer.measured].tolist() for kind, values in layer.relative.items()
                    },
                }
                for number, layer in self.layers.items()
            },
        }

    @classmethod
    def from_json(cls, value: Any) -> ErrorTable:
        """Reads what `to_json` wrote. Raises FormatError if it is something else."""
        try:
            return cls(
                {int(n): _layer_from_json(layer) for n, layer in value["layers"].items()}, bool(value["real_rows"])
            )
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise FormatError(f"no table of output errors: {error}") from None

    def errors(self, layer: int, kind: GGMLQuantizationType) -> F64:
        """(E,) for `ExpertCosts.build`."""
        return self.layers[layer].relative[kind]

    def mean(self, layer: int, kind: GGMLQuantizationType) -> float:
        """Mean over the measured experts of a layer."""
        row = self.layers[layer]
        return float(row.relative[kind][row.measured].mean())


def _layer_from_json(value: Any) -> LayerErrors:
    measured, n_own = np.zeros(value["n_experts"], bool), np.zeros(value["n_experts"], np.int64)
    measured[value["measured"]] = True
    n_own[measured] = value["n_own_rows"]
    relative = {
        GGMLQuantizationType[name.upper()]: _spread(measured, np.array(errors, np.float64))
        for name, errors in value["relative"].items()
    }
    return LayerErrors(relative, measured, n_own, float(value["power"]))


def _spread(measured: npt.NDArray[np.bool_], errors: F64) -> F64:
    """Errors of all experts: the measured ones' in ascending order, their mean for the others."""
    result = np.full(measured.size, errors.mean())
    result[measured] = errors
    return result


def measure_errors(
    source: ModelSource,
    types: Sequence[GGMLQuantizationType],
    importance: Importance,
    samples: ActivationSamples,
    *,
    n_threads: int = 1,
    n_rows: int = ROWS,
    sampled_experts: int = SAMPLED_EXPERTS,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> ErrorTable:
    """Measures every layer.

    Args:
        types: formats; an expert's current format is exact and free.
        n_threads: experts measured at once; each needs about twice its F32 weights of one projection.
        seed: chooses the sample of a big model.
        progress: called with (experts measured, total experts to measure).

    Raises:
        StoreError: a file can't be read.
        FormatError: weights that a format can't hold.
    """
    chosen = {
        number: _experts_to_measure(importance, number, moe.n_embd * moe.n_ff * 3, sampled_experts, seed)
        for number, moe in source.moe_layers.items()
    }
    limits = shape_of(source).clamp_limits
    n_total, n_done = sum(map(len, chosen.values())), 0
    layers = {}
    with ThreadPoolExecutor(max(1, n_threads)) as pool:
        for number, moe in source.moe_layers.items():
            limit = limits.get(number, np.inf)

            def measure(expert: int, number: int = number, limit: float = limit) -> _Measurement:
                return _measure(source, number, expert, types, importance, samples, n_rows, limit)

            results = {}
            for expert, result in zip(chosen[number], pool.map(measure, chosen[number]), strict=True):
                results[expert] = result
                n_done += 1
                if progress is not None:
                    progress(n_done, n_total)
            layers[number] = _layer_errors(results, moe.n_experts, types)
    return ErrorTable(layers, samples.real)


def _experts_to_measure(importance: Importance, layer: int, n_weights: int, n: int, seed: int) -> list[int]:
    uses = importance.route_weights(layer)
    if n_weights < ALL_BELOW_WEIGHTS or n >= uses.size:
        return list(range(uses.size))
    hottest = np.argsort(-uses, kind="stable")[: (n + 1) // 2]
    rest = np.setdiff1d(np.arange(uses.size), hottest)
    drawn = np.random.default_rng([seed, layer]).choice(rest, n - hottest.size, replace=False)
    return sorted(int(e) for e in np.concatenate([hottest, drawn]))


def _layer_errors(
    results: Mapping[int, _Measurement], n_experts: int, types: Iterable[GGMLQuantizationType]
) -> LayerErrors:
    measured = np.zeros(n_experts, bool)
    measured[list(results)] = True
    power = float(np.mean([own for _, own, _ in results.values()]))
    n_own = np.zeros(n_experts, np.int64)
    experts = sorted(results)
    n_own[experts] = [results[expert][2] for expert in experts]
    relative = {
        kind: _spread(measured, np.array([results[e][0][kind] / power if power > 0 else 0.0 for e in experts]))
        for kind in types
    }
    return LayerErrors(relative, measured, n_own, power)


def _measure(
    source: ModelSource,
    layer: int,
    expert: int,
    types: Sequence[GGMLQuantizationType],
    importance: Importance,
    samples: ActivationSamples,
    n_rows: int,
    limit: float,
) -> _Measurement:
    """Mean squared error of the output by format, mean squared output, own rows. One projection's weights at a time."""
    x, n_own = samples.rows(layer, expert, n_rows)
    recipes = source.base_expert(layer, expert)
    exact_types = {recipe.type for recipe in recipes}
    inputs: dict[GGMLQuantizationType | None, F32] = dict.fromkeys([None, *types], x)
    gates, ups = (
        _products(source, recipe, inputs, importance.weights(layer, expert, i), (layer, expert, i))
        for i, recipe in enumerate(recipes[:2])
    )
    activated = {kind: swiglu(gates[kind], ups[kind], limit) for kind in inputs}
    outputs = _products(source, recipes[2], activated, importance.weights(layer, expert, 2), (layer, expert, 2))
    exact = outputs[None]
    errors = {
        kind: 0.0 if exact_types == {kind} else float(np.square(outputs[kind] - exact, dtype=np.float64).mean())
        for kind in types
    }
    return errors, float(np.square(exact, dtype=np.float64).mean()), n_own


def _products(
    source: ModelSource,
    recipe: Projection,
    inputs: Mapping[GGMLQuantizationType | None, F32],
    weights: F32 | None,
    where: tuple[int, int, int],
) -> dict[GGMLQuantizationType | None, F32]:
    """inputs[kind] @ W[kind].T for the exact matrix (None) and each format."""
    name = f"blk.{where[0]}, expert {where[1]}, {('gate', 'up', 'down')[where[2]]}"
    exact = exact_weights(source, recipe, name)
    result: dict[GGMLQuantizationType | None, F32] = {}
    for kind, x in inputs.items():
        if kind is None or kind == recipe.type:
            result[kind] = x @ exact.T
        else:
            result[kind] = x @ rounded(exact, kind, weights, name).T
    return result


def rounded(exact: F32, kind: GGMLQuantizationType, weights: F32 | None, where: str = "expert") -> F32:
    """Values (n_out, n_in) that a format keeps of a matrix."""
    if kind == _T.F32:
        return exact
    if kind == _T.BF16:
        bits = exact.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
    rows = quantize_rows(exact, kind, weights, where=where)
    return dequantize_rows(rows.reshape(exact.shape[0], -1), kind).reshape(exact.shape)


def exact_weights(source: ModelSource, recipe: Projection, where: str = "expert") -> F32:
    """A projection's values (n_out, n_in), as the source has them."""
    parts = [_read(source, extent.file, extent.offset, extent.n_bytes) for extent in recipe.extents]
    scale = parts[1] if recipe.encoding is not Encoding.GGML else np.empty(0, np.uint8)
    rows = decode_projection(recipe, parts[0], scale, where)
    if recipe.type == _T.F32:
        values = rows.view(np.float32)
    elif recipe.type == _T.BF16:
        values = (rows.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    elif recipe.type == _T.F16:
        values = rows.view(np.float16).astype(np.float32)
    else:
        values = dequantize_rows(rows.reshape(recipe.n_out, -1), recipe.type)
    return values.reshape(recipe.n_out, recipe.n_in)


def _read(source: ModelSource, file: int, offset: int, n_bytes: int) -> npt.NDArray[np.uint8]:
    path = source.files[file]
    out = np.empty(n_bytes, np.uint8)
    try:
        stream = path.open("rb")
    except OSError as error:
        raise StoreError(f"{path}: can't be read: {error.strerror}") from error
    with stream:
        read_fully(stream.fileno(), path, offset, out.data)
    return out
