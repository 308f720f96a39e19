from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tests.paired import compare, median, same_but_for_rounding, trimmed_mean

F64 = npt.NDArray[np.float64]
TEXTS, POSITIONS = 8, 200


def divergences(rng: np.random.Generator) -> tuple[F64, F64, F64]:
    """Ours, theirs and ours without ties, as a random model's: much in common, a little of each text's own, few ties."""
    shape = (TEXTS, POSITIONS)
    common = 0.002 * np.exp(rng.normal(size=shape))
    ours, theirs = (common * np.exp(rng.normal(0, 0.4, shape) + rng.normal(0, 0.05, (TEXTS, 1))) for _ in range(2))
    smooth = ours.copy()
    for values in (ours, theirs):
        values[rng.random(shape) < 0.02] = 1.3
    return ours, theirs, smooth


def test_equal_arithmetic_is_neither_better_nor_worse() -> None:
    for seed in range(5):
        ours, theirs, _ = divergences(np.random.default_rng(seed))
        result = compare(ours, theirs)
        assert not result.is_worse, result
        assert not result.is_better, result
        assert result.median.low < 1 < result.median.high


def test_an_error_larger_by_a_third_is_seen_on_either_side() -> None:
    for seed in range(5):
        ours, theirs, smooth = divergences(np.random.default_rng(seed))
        assert compare(1.3 * ours, theirs).is_worse
        assert compare(ours / 1.3, theirs).is_better
        assert compare(1.3 * smooth, theirs).is_worse, "though its mean is a tenth of theirs"


def test_ratios_are_those_of_the_whole_and_ties_do_not_decide_them() -> None:
    theirs = np.random.default_rng(1).uniform(0.001, 0.003, (6, 100))
    ours = 0.8 * theirs
    ours[:, 7] = 5.0
    result = compare(ours, theirs)
    np.testing.assert_allclose(result.pairs.value, 0.8)
    assert 0.79 < result.median.value < 0.82
    assert 0.79 < result.trimmed.value < 0.86
    assert ours.mean() > 10 * theirs.mean()
    assert result == compare(ours, theirs), "drawn alike each time"


def test_divergences_of_nothing_are_equal() -> None:
    zeros = np.zeros((3, 5))
    result = compare(zeros, zeros)
    assert (result.median.value, result.pairs.low, result.trimmed.high) == (1, 1, 1)


def test_median_and_mean_without_the_worst_tenth() -> None:
    assert median([[5, 1], [2, 1000]]) == 3.5
    assert trimmed_mean([*range(9), 1000]) == 4
    assert trimmed_mean([3.0]) == 3


def test_wiring_errors_differ_from_rounding() -> None:
    ours, theirs, _ = divergences(np.random.default_rng(3))
    assert same_but_for_rounding(ours[0], theirs[0])
    assert not same_but_for_rounding(4 * ours[0], theirs[0])
    some = ours[0].copy()
    some[::5] = 0.3
    assert not same_but_for_rounding(some, theirs[0]), "a fifth of the positions"
    assert same_but_for_rounding(np.zeros(5), np.zeros(5))
