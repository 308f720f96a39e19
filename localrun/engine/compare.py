"""Models against an exact one on the same text, for conversion reports: one after the other, the reference's logits on the disk.

`localrun eval --reference` does the same for one model in a process of its own; here it is one call.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from localrun import paths
from localrun.engine.engine import Engine
from localrun.engine.evaluate import Scores, evaluate
from localrun.engine.protocol import EngineOptions
from localrun.errors import DiskSpaceError, UsageError
from localrun.quant.tier_report import Evaluation
from localrun.units import format_size

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
    """Perplexity, KL from the reference and agreement of each named model, in their order; the next one is asked for when the one
    before is closed.

    Args:
        options: how to load all of them; the context is as long as a window.
        window: tokens per window; each starts with an empty context.
        max_tokens: only the first ones; 0: all.
        progress: called with (model's name, tokens done, tokens in all).

    Raises:
        UsageError: the text is empty.
        FormatError: the models' vocabularies or tokenizers differ.
        DiskSpaceError: no room for the reference's logits in the cache folder.
    """
    options = replace(options, n_ctx=window, n_batch=min(options.n_batch, window))
    parent = paths.cache_dir()
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="compare-", dir=parent) as name:
        folder = Path(name)

        def run(label: str, path: Path, *, save: bool) -> Scores:
            with Engine.open(path, options, learn=False) as engine:
                tokens = engine.tokenizer.encode(text)
                tokens = tokens[:max_tokens] if max_tokens else tokens
                begin = engine.vocab.begin
                if begin is None:
                    raise UsageError(f"{path}: the model has no begin token")
                if save:
                    _check_space(folder, len(tokens), engine.facts.n_vocab)
                with engine.session(all_logits=True) as session:
                    return evaluate(
                        session,
                        tokens,
                        begin,
                        window=min(window, session.n_ctx),
                        save_folder=folder if save else None,
                        reference_folder=None if save else folder,
                        progress=(lambda done, total: progress(label, done, total)) if progress else None,
                    )

        run("reference", reference, save=True)
        return [_evaluation(label, run(label, path, save=False)) for label, path in models]


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


def _check_space(folder: Path, n_tokens: int, n_vocab: int) -> None:
    needed, free = 4 * n_tokens * n_vocab, shutil.disk_usage(folder).free
    if needed > free:
        raise DiskSpaceError(
            f"{folder}: the reference's logits of {n_tokens} tokens take {format_size(needed)}, {format_size(free)} are free",
            hint="compare fewer tokens, or set another LOCALRUN_CACHE_DIR",
        )
