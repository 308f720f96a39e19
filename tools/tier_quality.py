"""Tests on the demo model whether solved mixes beat uniform formats at equal size, by KL from the exact model on held-out text.

Usage: python -m tools.tier_quality [MODEL] [--tokens N] [--calibrate own|default|both] [--json OUT.json]

MODEL is an official checkpoint small enough to hold its experts in F32. Every variant's experts are quantized, dequantized and
written to a scratch file as F32, which the engine runs with exact arithmetic: differences are the weights' alone, and any mixture
of formats can be measured without converting. Calibration: the first two fifths of the model's evaluation text, as somebody would
who knows what the model is for, the text that ships with localrun, or both; held-out text: the rest.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType

from localrun.engine.engine import Engine
from localrun.engine.measure.calibrate import Calibration, calibrate
from localrun.engine.measure.calibration_text import CalibrationText, default_text
from localrun.engine.measure.evaluate import Scores, evaluate
from localrun.engine.options import EngineOptions
from localrun.ggml import types
from localrun.offload.model import OffloadOptions, open_offloaded
from localrun.quant.checkpoint.directory import Checkpoint
from localrun.quant.checkpoint.mapping import ConversionOptions, make_plan
from localrun.quant.checkpoint.source import CheckpointSource
from localrun.quant.formats.quantize import dequantize_rows, prepare_weights
from localrun.quant.model.source import DenseReading, Encoding, Extent, Projection
from localrun.quant.precision.error import exact_weights, measure_errors, rounded
from localrun.quant.precision.importance import F32
from localrun.quant.precision.solver import (
    ExpertCosts,
    HotBudget,
    Target,
    bits_per_weight,
    expert_bytes,
    solve_hot,
    solve_target,
)

_T = GGMLQuantizationType
FORMATS = (_T.IQ2_XXS, _T.Q2_K, _T.IQ3_XXS, _T.Q3_K, _T.MXFP4)
OTHERS = (_T.IQ1_S, _T.IQ1_M, _T.TQ2_0, _T.IQ2_XS, _T.IQ2_S)
"""Measured uniformly only: localrun does not convert to the first three, and has no fast kernel for any of them."""
Formats = Callable[[int, int], GGMLQuantizationType]


class SimulatedSource(CheckpointSource):
    """The checkpoint with its experts replaced by what their formats would keep, as F32 in a scratch file."""

    def write_experts(self, path: Path, formats: Formats, calibration: Calibration | None) -> None:
        """Writes the file that `expert` points into from then on; MXFP4 is the checkpoint's own format and exact."""
        original = CheckpointSource.open(self.path)
        self._scratch, self._at = path, {}
        with path.open("wb") as file:
            for layer, moe in self.moe_layers.items():
                for expert in range(moe.n_experts):
                    kind = formats(layer, expert)
                    for number, recipe in enumerate(original.base_expert(layer, expert)):
                        values = exact_weights(original, recipe)
                        weights = calibration.importance.weights(layer, expert, number) if calibration else None
                        kept = values if kind == _T.MXFP4 else _rounded(values, kind, weights)
                        self._at[layer, expert, number] = Extent(0, file.tell(), values.nbytes)
                        file.write(kept.tobytes())

    @property
    def files(self) -> Sequence[Path]:
        return (self._scratch,)

    def base_expert(self, layer: int, expert: int) -> tuple[Projection, Projection, Projection]:
        moe = self.moe_layers[layer]
        shapes = ((moe.n_ff, moe.n_embd), (moe.n_ff, moe.n_embd), (moe.n_embd, moe.n_ff))
        gate, up, down = (
            Projection(_T.F32, *shape, Encoding.GGML, (self._at[layer, expert, i],), 4 * shape[0] * shape[1])
            for i, shape in enumerate(shapes)
        )
        return gate, up, down

    expert = base_expert

    def read_tensor(self, name: str) -> npt.NDArray[np.uint8]:
        return CheckpointSource(self.plan).read_tensor(name)

    def dense_reading(self, name: str, slice_bytes: int) -> DenseReading:
        return CheckpointSource(self.plan).dense_reading(name, slice_bytes)


def _rounded(values: F32, kind: GGMLQuantizationType, weights: F32 | None) -> F32:
    """`precision.error.rounded`, also for what only ggml quantizes."""
    if kind not in OTHERS:
        return rounded(values, kind, weights)
    rows = np.empty(values.shape[0] * types.block_type(kind).row_bytes(values.shape[1]), np.uint8)
    prepared = prepare_weights(weights, values.shape[1], kind, kind.name)
    address = None if prepared is None else prepared.ctypes.data
    n_out, n_in = values.shape
    types.quantize(kind, values.ctypes.data, n_out, n_in, rows.ctypes.data, address)
    return dequantize_rows(rows, kind).reshape(values.shape)


@dataclass(frozen=True, slots=True)
class Variant:
    """A measured model.

    Attributes:
        bits: bits per weight of the copies that are used.
        expected: the solver's expected error, where it has one.
    """

    name: str
    bits: float
    kl: float
    top1: float
    perplexity: float
    expected: float | None = None


class Experiment:
    """One checkpoint, one calibration, one held-out text."""

    def __init__(self, model: Path, folder: Path, n_tokens: int, n_threads: int, calibrate_with: str) -> None:
        self._folder, self._n_threads = folder, n_threads
        checkpoint = Checkpoint.open(model)
        self.exact = CheckpointSource.open(model)
        self._simulated = SimulatedSource(make_plan(checkpoint, ConversionOptions(base=_T.F32)))
        text = (model / "evaluation.txt").read_text("utf-8")
        cut = len(text) * 2 // 5
        own = CalibrationText("evaluation.txt, first part", "", text[:cut])
        both = CalibrationText("both", "", own.text + default_text().text)
        calibration_text = {"own": own, "default": default_text(), "both": both}[calibrate_with]
        self._held_out, self._n_tokens = text[cut:], n_tokens
        with self._open(self.exact, n_batch=512) as engine:
            self.calibration = calibrate(engine, calibration_text)
        self._reference = folder / "reference"
        self._reference.mkdir()
        self.variants: list[Variant] = []

    def _open(self, source: CheckpointSource, *, n_batch: int = 512) -> Engine:
        options = EngineOptions(n_ctx=512, n_batch=n_batch, n_threads=self._n_threads, math="f32", kv_type="f32")
        loaded = open_offloaded(source, OffloadOptions(n_threads=self._n_threads, math="f32", verify=False))
        return Engine._checked(loaded, options, path=source.path, identity="simulated", file_bytes=0)

    def measure(
        self, name: str, formats: Formats, *, expected: float | None = None, with_importance: bool = True
    ) -> Variant:
        """Writes, runs and compares one variant; the first one is the reference."""
        first = not any(self._reference.iterdir())
        self._simulated.write_experts(
            self._folder / "experts.bin", formats, self.calibration if with_importance else None
        )
        with self._open(self._simulated) as engine, engine.session(all_logits=True) as session:
            tokens = engine.tokenizer.encode(self._held_out)[: self._n_tokens]
            begin = engine.vocab.begin
            assert begin is not None
            scores: Scores = evaluate(
                session,
                tokens,
                begin,
                window=512,
                save_folder=self._reference if first else None,
                reference_folder=None if first else self._reference,
            )
        kinds = [formats(layer, e) for layer, moe in self.exact.moe_layers.items() for e in range(moe.n_experts)]
        bits = float(np.mean([bits_per_weight(kind) for kind in kinds]))
        compared = scores.comparison
        kl, top1 = (0.0, 1.0) if compared is None else (compared.kl_mean, compared.top1_agreement)
        variant = Variant(name, bits, kl, top1, scores.perplexity, expected)
        self.variants.append(variant)
        print(
            f"{name:<40}{bits:>7.3f}{variant.kl:>11.6f}{top1:>9.2%}{variant.perplexity:>9.3f}"
            + (f"{expected:>11.6f}" if expected is not None else ""),
            flush=True,
        )
        return variant


def run(model: Path, n_tokens: int, n_threads: int, calibrate_with: str) -> dict[str, Any]:
    """All variants; returns what the JSON holds."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="tier-quality-") as name:
        experiment = Experiment(model, Path(name), n_tokens, n_threads, calibrate_with)
        moe = experiment.exact.moe_layers
        importance = experiment.calibration.importance
        errors = measure_errors(
            experiment.exact, FORMATS, importance, experiment.calibration.samples, n_threads=n_threads
        )
        costs = ExpertCosts.build(moe, FORMATS, importance.route_weights, errors.errors)
        measured_s = time.perf_counter() - started
        print(f"{'':<40}{'bits':>7}{'KL':>11}{'top-1':>9}{'ppl':>9}{'expected':>11}", flush=True)
        experiment.measure("exact (mxfp4)", _lookup({}, _T.MXFP4), expected=0.0)
        for kind in FORMATS[:-1]:
            experiment.measure(f"uniform {kind.name.lower()}", _lookup({}, kind), expected=costs.uniform(kind).error)
        for kind in OTHERS:
            experiment.measure(f"uniform {kind.name.lower()}", _lookup({}, kind))
        experiment.measure("uniform q2_k, no importance", _lookup({}, _T.Q2_K), with_importance=False)
        weights = _layer_weights(experiment, costs)
        weighted = ExpertCosts.build(moe, FORMATS, importance.route_weights, errors.errors, weights)
        for kind in (_T.Q2_K, _T.IQ3_XXS, _T.Q3_K):
            _solved(experiment, costs, kind, "solved")
            _solved(experiment, weighted, kind, "solved, layers weighted")
        _orders(experiment, costs)
    return {
        "model": str(model),
        "n_tokens": n_tokens,
        "calibration_tokens": importance.n_tokens,
        "measuring_s": measured_s,
        "layer_weights": weights,
        "variants": [asdict(variant) for variant in experiment.variants],
    }


def _layer_weights(experiment: Experiment, costs: ExpertCosts) -> dict[int, float]:
    """KL per expected error when one layer alone is in q2_k, relative to the mean of all layers."""
    layers = list(experiment.exact.moe_layers)
    sensitivity = {}
    column = costs.column(_T.Q2_K)
    for number in layers:
        n_experts = experiment.exact.moe_layers[number].n_experts
        expected = sum(float(costs.error[row, column]) for row, key in enumerate(costs.keys) if key[0] == number)
        plan = {number: dict.fromkeys(range(n_experts), _T.Q2_K)}
        variant = experiment.measure(f"q2_k in layer {number} only", _lookup(plan, _T.MXFP4), expected=expected)
        sensitivity[number] = variant.kl / expected
    mean = sum(sensitivity.values()) / len(sensitivity)
    return {number: value / mean for number, value in sensitivity.items()}


def _lookup(plan: Any, base: GGMLQuantizationType) -> Formats:
    return lambda layer, expert: plan.get(layer, {}).get(expert, base)


def _solved(experiment: Experiment, costs: ExpertCosts, like: GGMLQuantizationType, label: str) -> None:
    """The best mixture of all formats at the size of a uniform one."""
    solution = solve_target(costs, Target(vram_bytes=costs.uniform(like).n_bytes))
    name = f"{label}, size of {like.name.lower()}"
    experiment.measure(name, _lookup(solution.plan.formats, solution.base), expected=solution.chosen.error)


def _orders(experiment: Experiment, costs: ExpertCosts) -> None:
    """Three tenths of the experts exact over a base of q2_k: solved, the most used, drawn ones, the least used."""
    moe, importance = experiment.exact.moe_layers, experiment.calibration.importance
    n = len(costs.keys)
    n_kept = round(0.3 * n)
    one = expert_bytes(next(iter(moe.values())), _T.MXFP4)
    solution = solve_hot(costs, _T.Q2_K, [HotBudget(_T.MXFP4, n_kept * one)])
    formats = _lookup(solution.plan.formats, _T.Q2_K)
    experiment.measure("q2_k + 30% mxfp4, solved", formats, expected=solution.chosen.error)
    uses = np.concatenate([importance.route_weights(layer) for layer in moe])
    orders = {
        "most used": np.argsort(-uses, kind="stable"),
        "drawn": np.random.default_rng(0).permutation(n),
        "least used": np.argsort(uses, kind="stable"),
    }
    for name, order in orders.items():
        kept: dict[int, dict[int, GGMLQuantizationType]] = {}
        for row in order[:n_kept]:
            layer, expert = costs.keys[row]
            kept.setdefault(layer, {})[expert] = _T.MXFP4
        experiment.measure(f"q2_k + 30% mxfp4, {name}", _lookup(kept, _T.Q2_K))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", nargs="?", type=Path, default=Path(__file__).parents[1] / "localrun" / "demo")
    parser.add_argument("--tokens", type=int, default=6144, help="held-out tokens (6144)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--calibrate",
        choices=("own", "default", "both"),
        default="own",
        help="with the evaluation text's first part, the text that ships, both",
    )
    parser.add_argument("--json", type=Path, metavar="OUT.json")
    args = parser.parse_args()
    result = run(args.model, args.tokens, args.threads, args.calibrate)
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{result['n_tokens']} tokens, measured errors in {result['measuring_s']:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
