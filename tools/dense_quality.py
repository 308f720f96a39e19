"""What each dense matrix's format costs in quality: the divergence of models in which only one kind of matrix is rounded.

    python -m tools.dense_quality [MODEL] [--tokens 6144] [--json OUT.json]

Converts a checkpoint once per kind and format, everything else exact (experts in MXFP4, dense matrices in BF16), and compares with
the exact model on held-out text. Beside the divergence stands the error that `precision.dense` measures on the calibration text;
their ratio is the kind's `SENSITIVITY`. Calibration: the first two fifths of the model's evaluation text; held-out: the rest.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType

from localrun import cli
from localrun.engine.engine import Engine
from localrun.engine.measure.calibrate import calibrate
from localrun.engine.measure.calibration_text import CalibrationText
from localrun.engine.measure.compare import compare_models
from localrun.engine.options import EngineOptions
from localrun.quant.checkpoint.directory import Checkpoint
from localrun.quant.checkpoint.exact import ExactMatrices
from localrun.quant.checkpoint.mapping import ConversionOptions
from localrun.quant.convert.converter import convert
from localrun.quant.precision.dense import KINDS, TYPES, DenseErrors, kind_of, measure_dense

_T = GGMLQuantizationType
OPTIONS = EngineOptions(gpu="none")


def errors_of(model: Path, text: CalibrationText) -> DenseErrors:
    """Relative errors of all matrices on a text's inputs."""
    matrices = ExactMatrices(Checkpoint.open(model))
    with Engine.open(model, EngineOptions(gpu="none", n_ctx=512, n_batch=512), learn=False) as engine:
        result = calibrate(engine, text)
    names = [name for name in matrices.names if kind_of(name)]
    return measure_dense(matrices, names, result.dense, result.importance)


def models(
    checkpoint: Path, folder: Path, cases: Mapping[str, Mapping[str, GGMLQuantizationType]]
) -> Iterator[tuple[str, Path]]:
    """Converted one after the other, each deleted when the next is asked for."""
    for name, types in cases.items():
        target = folder / "model"
        shutil.rmtree(target, ignore_errors=True)
        convert(checkpoint, target, ConversionOptions(_T.BF16, dense_types=types))
        yield name, target


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=Path(cli.__file__).parent / "demo")
    parser.add_argument("--tokens", type=int, default=6144)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    text = (args.model / "evaluation.txt").read_text("utf-8")
    cut = len(text) * 2 // 5
    errors = errors_of(args.model, CalibrationText("evaluation", "evaluation", text[:cut]))
    cases: dict[str, dict[str, GGMLQuantizationType]] = {"exact": {}}
    for kind in KINDS:
        names = [name for name in errors.relative if kind_of(name) == kind]
        for type_ in TYPES[:-1]:
            if all(type_ in errors.relative[name] for name in names):
                cases[f"{kind} {type_.name.lower()}"] = dict.fromkeys(names, type_)
    with tempfile.TemporaryDirectory(prefix="dense-quality-") as folder:
        exact = next(models(args.model, Path(folder), {"exact": {}}))[1].rename(Path(folder) / "exact")
        scores = compare_models(
            exact, models(args.model, Path(folder), cases), text[cut:], OPTIONS, max_tokens=args.tokens
        )
    rows = []
    print("| matrices | format | relative error | KL (nats) | same top token | KL / error |")
    print("|---|---|---:|---:|---:|---:|")
    for (name, types), score in zip(cases.items(), scores, strict=True):
        error = float(np.mean([errors.relative[n][t] for n, t in types.items()])) if types else 0.0
        ratio = score.kl_mean / error if error else 0.0
        kind, _, type_name = name.partition(" ")
        print(
            f"| {kind} | {type_name} | {error:.2e} | {score.kl_mean:.6f} | {score.top1_agreement:.2%} | {ratio:.2f} |"
        )
        rows.append({"name": name, "error": error, "kl": score.kl_mean, "top1": score.top1_agreement, "ratio": ratio})
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
