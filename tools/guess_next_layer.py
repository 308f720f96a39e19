"""Measures how well the routers of the next layers, applied to this layer's input, predict those layers' experts.

    python -m tools.guess_next_layer [MODEL] [--text FILE] [--max-tokens N]

MODEL defaults to the demo model. Prints per layer the share of the experts actually used that are among the top 6, 9 and 12
predictions, the same for a baseline that always predicts the layer's most used experts, and how many predictions the copy that the
engine ranks by (`offload/routers.py`) shares with the exact matrix. Whether a prediction is worth a
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
from localrun.offload.routers import Routers
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
        routers, name = Routers(source), f"blk.{guessed}.ffn_gate_inp.weight"
        matrix = source.read_tensor(name)  # stays alive: the routers have its address
        routers.adopt(name, matrix.ctypes.data)
        for factor in FACTORS:
            n = round(factor * n_used)
            exact, copied = _top(scores, n), _by_copy(routers, guessed, samples.layers[layer].rows, n)
            most_used = _recall(_top(popular, n), following.chosen)
            print(
                f"layer {layer} -> {guessed}: {n:2} of {scores.shape[1]} guessed: router {_recall(exact, following.chosen):.1%}, "
                f"its copy {_recall(copied, following.chosen):.1%} ({_shared(exact, copied):.1%} of the same), most used "
                f"{most_used:.1%} ({len(scores)} positions)"
            )


def _top(scores: np.ndarray, n: int) -> np.ndarray:
    """(P, n) the highest of each row."""
    return np.argpartition(-scores, n - 1, axis=1)[:, :n]


def _by_copy(routers: Routers, layer: int, rows: np.ndarray, n: int) -> np.ndarray:
    """(P, n) as the engine ranks."""
    likely = [routers.likely(layer, row, n) for row in rows]
    return np.stack([best for best in likely if best is not None])


def _shared(a: np.ndarray, b: np.ndarray) -> float:
    """Of a's (P, n) guesses, the share that are b's, too."""
    return float((a[:, :, None] == b[:, None, :]).any(2).mean())


def _bias(source: ModelSource, layer: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return source.read_tensor(f"blk.{layer}.exp_probs_b.bias").view(np.float32)


def _recall(guessed: np.ndarray, chosen: np.ndarray) -> float:
    return float(np.take_along_axis(chosen, guessed, axis=1).sum() / chosen.sum())


if __name__ == "__main__":
    main()
