"""Figures of an evaluation, by hand and on tiny models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from localrun.engine.measure.compare import compare_models
from localrun.engine.measure.evaluate import Scores, add_rows
from localrun.errors import UsageError
from tests.engine.conftest import OPTIONS
from tests.engine.models import write_chat_model


def test_figures_of_a_comparison() -> None:
    scores = Scores(has_reference=True)
    reference = np.log(np.array([[0.5, 0.5], [0.25, 0.75], [0.9, 0.1]], np.float32))
    logits = np.log(np.array([[0.5, 0.5], [0.75, 0.25], [0.9, 0.1]], np.float32)) + 3
    for rows in (slice(0, 2), slice(2, 3)):
        add_rows(scores, logits[rows], np.array([0, 1, 0])[rows], reference[rows])
    compared = scores.comparison
    assert compared is not None
    kl = 0.25 * np.log(0.25 / 0.75) + 0.75 * np.log(0.75 / 0.25)
    assert compared.kl_mean == pytest.approx(kl / 3)
    assert compared.kl_median == pytest.approx(0, abs=1e-7)
    assert compared.kl_max == pytest.approx(kl)
    assert compared.kl_p99 == pytest.approx(0.98 * kl)
    assert compared.top1_agreement == pytest.approx(2 / 3)
    assert scores.perplexity == pytest.approx((0.5 * 0.25 * 0.9) ** (-1 / 3))
    assert compared.reference_perplexity == pytest.approx((0.5 * 0.75 * 0.9) ** (-1 / 3))


def test_models_are_compared_with_a_reference(chat_model_path: Path, tmp_path: Path) -> None:
    other = write_chat_model(tmp_path / "other.gguf", seed=1)
    text = "One two three four five. " * 9
    same, different = compare_models(
        chat_model_path, [("same", chat_model_path), ("other", other)], text, OPTIONS, window=32, max_tokens=80
    )
    assert (same.name, same.n_tokens, same.kl_mean, same.top1_agreement) == ("same", 80, 0, 1)
    assert same.perplexity == same.reference_perplexity == different.reference_perplexity
    assert different.kl_mean > 0.1
    assert different.kl_p99 > different.kl_median
    with pytest.raises(UsageError, match="empty"):
        compare_models(chat_model_path, [], "", OPTIONS)
