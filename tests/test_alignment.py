"""Rounding of sizes and addresses."""

from __future__ import annotations

import pytest

from localrun.alignment import align_up, ceil_div


@pytest.mark.parametrize(
    ("n", "quotient", "aligned"), [(0, 0, 0), (1, 1, 64), (64, 1, 64), (65, 2, 128), (1 << 40, 1 << 34, 1 << 40)]
)
def test_rounding_is_exact_at_multiples_and_up_elsewhere(n: int, quotient: int, aligned: int) -> None:
    assert (ceil_div(n, 64), align_up(n, 64)) == (quotient, aligned)


def test_a_multiple_need_not_be_a_power_of_two() -> None:
    assert align_up(100, 48) == 144
