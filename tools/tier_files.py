"""Tests whether better copies beat uniform formats at equal size, in files written by `localrun convert`, with the CPU kernels.

    python -m tools.tier_files [MODEL] [--tokens 6144] [--json OUT.json]

`tools.tier_quality` simulates mixtures in exact arithmetic; here the command line makes the models (CPU formats only: Q2_K, Q3_K,
MXFP4, Q4_K, Q8_0), and the engine runs them with its 8-bit activations, the exact checkpoint too. Calibration: the first two fifths
of the model's evaluation text; held-out: the rest. For each mixture it says which uniform format would have its KL, by
interpolating linearly between formats, and how many more bytes of experts that takes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType

from localrun import cli
from localrun.engine.measure.compare import compare_models
from localrun.engine.options import EngineOptions
from localrun.quant.checkpoint.directory import Checkpoint
from localrun.quant.checkpoint.mapping import ConversionOptions, make_plan
from localrun.quant.convert.overlay import write_overlay
from localrun.quant.model.source import ModelSource
from localrun.quant.open import open_model
from localrun.quant.precision.copies import BetterCopies
from localrun.quant.precision.imatrix import read_imatrix
from localrun.quant.precision.solver import bits_per_weight, expert_bytes

_T = GGMLQuantizationType
UNIFORM = (_T.Q2_K, _T.Q3_K, _T.MXFP4)
TARGET_BITS = (2.9, 3.2, 3.4375, 3.8)
HOT_SHARE = 0.3


def used_bits(model: ModelSource) -> float:
    """Bits per expert weight of the copies that are used."""
    n_bytes = n_weights = 0
    for layer, moe in model.moe_layers.items():
        n_weights += 3 * moe.n_experts * moe.n_embd * moe.n_ff
        for expert in range(moe.n_experts):
            n_bytes += sum(extent.n_bytes for recipe in model.expert(layer, expert) for extent in recipe.extents)
    return 8 * n_bytes / n_weights


class Files:
    """Makes models of one checkpoint in a scratch folder, with one calibration text."""

    def __init__(self, checkpoint: Path, folder: Path, calibration: str) -> None:
        self._checkpoint, self._folder = checkpoint, folder
        self._text = folder / "calibration.txt"
        self._text.write_text(calibration, "utf-8")
        self.made: list[tuple[str, Path]] = []

    def convert(self, name: str, *options: str, like: Path | None = None) -> Path:
        """`localrun convert` with these options; importance from the text, or from what `like` was made with."""
        target = self._folder / name.replace(" ", "-").replace("%", "")
        learn = ["--calibrate", str(self._text)] if like is None else ["--imatrix", str(like / "imatrix.gguf")]
        words = ["convert", str(self._checkpoint), str(target), *options, *learn]
        if cli.main(words):
            raise SystemExit(f"{name}: convert failed")
        self.made.append((name, target))
        return target

    def add_copies(self, name: str, like: Path, order: list[tuple[int, int]]) -> None:
        """A base of q2_k with these experts in MXFP4, whatever the solver would say."""
        target = self.convert(name, "--base", "q2_k", like=like)
        formats: dict[int, dict[int, GGMLQuantizationType]] = {}
        for layer, expert in order:
            formats.setdefault(layer, {})[expert] = _T.MXFP4
        importance = read_imatrix(like / "imatrix.gguf", open_model(like).moe_layers)
        write_overlay(Checkpoint.open(self._checkpoint), BetterCopies(formats), target, importance)


def make_models(files: Files, checkpoint: Path) -> None:
    """Uniform formats, targets, and better copies of the experts that are used most, least, or drawn."""
    source = open_model(checkpoint)
    plan = make_plan(Checkpoint.open(checkpoint), ConversionOptions())
    dense = sum(tensor.info.n_bytes for tensor in plan.tensors.values() if not tensor.is_experts)
    n_weights = sum(3 * moe.n_experts * moe.n_embd * moe.n_ff for moe in source.moe_layers.values())
    like = files.convert("q2_k", "--base", "q2_k")
    for kind in UNIFORM[1:]:
        files.convert(kind.name.lower(), "--base", kind.name.lower(), like=like)
    for bits in TARGET_BITS:
        files.convert(
            f"target of {bits:g} bits", "--target", f"{dense + int(bits / 8 * n_weights)}B-ram", "--dense", "q8_0"
        )
    keys = [(layer, expert) for layer, moe in source.moe_layers.items() for expert in range(moe.n_experts)]
    n = round(HOT_SHARE * len(keys))
    one = expert_bytes(next(iter(source.moe_layers.values())), _T.MXFP4)
    files.convert("q2_k and 30% mxfp4 by the solver", "--base", "q2_k", "--hot", f"mxfp4:{n * one}B")
    importance = read_imatrix(like / "imatrix.gguf", source.moe_layers)
    weights = np.concatenate([importance.route_weights(layer) for layer in source.moe_layers])
    by_use = [keys[i] for i in np.argsort(-weights, kind="stable")]
    drawn = [keys[i] for i in np.random.default_rng(0).permutation(len(keys))]
    files.add_copies("q2_k and 30% mxfp4, drawn", like, drawn[:n])
    files.add_copies("q2_k and 30% mxfp4, least used", like, by_use[-n:])


def more_bytes(bits: float, kl: float, uniform: list[tuple[float, float]]) -> float | None:
    """How many more bytes a uniform format of this KL takes, relative; None beyond the measured ones."""
    for (low, high_kl), (high, low_kl) in itertools.pairwise(uniform):
        if low_kl <= kl <= high_kl:
            same = low + (high_kl - kl) / (high_kl - low_kl) * (high - low)
            return same / bits - 1
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=Path(cli.__file__).parent / "demo")
    parser.add_argument("--tokens", type=int, default=6144)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    text = (args.model / "evaluation.txt").read_text("utf-8")
    cut = len(text) * 2 // 5
    with tempfile.TemporaryDirectory(prefix="tier-files-") as name:
        files = Files(args.model, Path(name), text[:cut])
        make_models(files, args.model)
        scores = compare_models(args.model, files.made, text[cut:], EngineOptions(gpu="none"), max_tokens=args.tokens)
        bits = [used_bits(open_model(path)) for _, path in files.made]
    n = len(UNIFORM)
    uniform = [(bits_per_weight(kind), score.kl_mean) for kind, score in zip(UNIFORM, scores[:n], strict=True)]
    rows: list[dict[str, Any]] = []
    print("| experts | bits per weight | KL (nats) | same top token | perplexity | a uniform format of this KL takes |")
    print("|---|---:|---:|---:|---:|---:|")
    for number, (size, score) in enumerate(zip(bits, scores, strict=True)):
        more = more_bytes(size, score.kl_mean, uniform) if number >= n else None
        same = f"{more:+.1%}" if more is not None else ""
        print(
            f"| {score.name} | {size:.3f} | {score.kl_mean:.5f} | {score.top1_agreement:.2%} | {score.perplexity:.3f} | {same} |"
        )
        rows.append({**asdict(score), "bits": size, "uniform_takes_more": more})
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
