"""Compares several models with an exact one on the same text, for conversion reports.

Runs in this process, because the commands that use it calibrate in it anyway. `localrun eval --reference` does the same for one
model in the engine process; both use `evaluate`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

from localrun import paths
from localrun.engine.engine import Engine
from localrun.engine.measure.evaluate import Scores, evaluate_text
from localrun.engine.options import EngineOptions
from localrun.quant.precision.report import Evaluation

Progress = Callable[[str, int, int], None]


def compare_models(
    reference: Path,
    models: Iterable[tuple[str, Path]],
    text: str,
    options: EngineOptions,
    *,
    window: int = 512,
    max_tokens: int = 0,
    progress: Progress | None = None,
) -> list[Evaluation]:
    """Perplexity, KL from the reference and agreement of each named model, in order; the next model is requested after the
    previous one is closed.

    Args:
        options: how to load all of them; the context is as long as a window.
        window: tokens per window; each starts with an empty context.
        max_tokens: only the first ones; 0: all.
        progress: called with (model's name, tokens done, tokens in all).

    Raises:
        UsageError: the text is empty.
        FormatError: the models' vocabularies or tokenizers differ.
        DiskSpaceError: no room for the reference's logits.
    """
    options = replace(options, n_ctx=window, n_batch=min(options.n_batch or window, window))
    with paths.scratch_folder("compare-") as folder:

        def run(label: str, path: Path, **folders: Path) -> Scores:
            tell = partial(progress, label) if progress else None
            with Engine.open(path, options, learn=False) as engine:
                return evaluate_text(engine, text, window=window, max_tokens=max_tokens, progress=tell, **folders)

        run("reference", reference, save_folder=folder)
        return [_evaluation(label, run(label, path, reference_folder=folder)) for label, path in models]


def _evaluation(name: str, scores: Scores) -> Evaluation:
    compared = scores.comparison
    assert compared is not None
    return Evaluation(
        name=name,
        n_tokens=scores.n_tokens,
        perplexity=scores.perplexity,
        reference_perplexity=compared.reference_perplexity,
        kl_mean=compared.kl_mean,
        kl_median=compared.kl_median,
        kl_p99=compared.kl_p99,
        top1_agreement=compared.top1_agreement,
    )
