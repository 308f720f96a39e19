"""Figures of an evaluation, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from localrun.engine.evaluate import Scores, add_rows


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
