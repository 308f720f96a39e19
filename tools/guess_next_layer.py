"""Measures how well the routers of the next layers, applied to this layer's input, predict those layers' experts.

    python -m tools.guess_next_layer [MODEL] [--text FILE] [--max-tokens N]

MODEL defaults to the demo model. Prints per layer the share of the experts actually used that are among the top 6, 9 and 12
predictions, and the same for a baseline that always predicts the layer's most used experts. Whether a prediction is worth a
read is another question: it must not displace anything, so it needs free memory.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import numpy as np

from localrun.api import demo
from localrun.engine.engine import Engine
from localrun.engine.measure.calibrate import ObservedRouter, calibrate
from localrun.engine.measure.calibration_text import default_text, read_calibration_text
from localrun.engine.options import EngineOptions
from localrun.offload.foresight import REACH
from localrun.quant.model.source import ModelSource
from localrun.quant.open import open_model

FACTORS = (1.0, 1.5, 2.0)
"""Guessed experts, as multiples of those that a token uses."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--max-tokens", type=int, default=8192)
    args = parser.parse_args()
    path = args.model or demo.converted()
    text = read_calibration_text(args.text) if args.text else default_text()
    with Engine.open(path, EngineOptions(n_ctx=512, gpu="none"), learn=False) as engine:
        samples = calibrate(engine, text, max_tokens=args.max_tokens).samples
    source = open_model(path)
    for layer, distance in itertools.product(sorted(source.moe_layers), range(1, REACH + 1)):
        guessed = layer + distance
        following = samples.layers.get(guessed)
        router = ObservedRouter.of(source, guessed) if following is not None else None
        if following is None or router is None or f"blk.{guessed}.exp_probs_b.bias" not in source.tensors:
            continue  # the last layer, or one that is routed by token id
        scores = router.probabilities(samples.layers[layer].rows) + _bias(source, guessed)
        popular = np.broadcast_to(following.chosen.mean(0), scores.shape)
        n_used = int(following.chosen[0].sum())
        for factor in FACTORS:
            n = round(factor * n_used)
            print(
                f"layer {layer} -> {guessed}: {n:2} of {scores.shape[1]} guessed: router "
                f"{_recall(scores, following.chosen, n):.1%}, most used {_recall(popular, following.chosen, n):.1%} "
                f"({len(scores)} positions)"
            )


def _bias(source: ModelSource, layer: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return source.read_tensor(f"blk.{layer}.exp_probs_b.bias").view(np.float32)


def _recall(scores: np.ndarray, chosen: np.ndarray, n: int) -> float:
    guessed = np.argpartition(-scores, n - 1, axis=1)[:, :n]
    return float(np.take_along_axis(chosen, guessed, axis=1).sum() / chosen.sum())


if __name__ == "__main__":
    main()
