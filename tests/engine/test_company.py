"""Cores that other programs leave: what is counted, and how many threads follow from it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from localrun.engine.company import INTERVAL_S, Company, busy_seconds, threads_at

STAT = """\
cpu  1000 500 300 9000 70 20 10 40 0 0
cpu0 600 400 200 4000 30 10 5 25 0 0
cpu1 400 100 100 5000 40 10 5 15 0 0
intr 1 2 3
"""


def test_busy_time_leaves_out_idle_lower_priority_and_the_kernel(tmp_path: Path) -> None:
    (tmp_path / "stat").write_text(STAT)
    hertz = os.sysconf("SC_CLK_TCK")
    assert busy_seconds({0, 1}, tmp_path / "stat") == (600 + 25 + 400 + 15) / hertz
    assert busy_seconds({1}, tmp_path / "stat") == (400 + 15) / hertz
    assert busy_seconds({0}, tmp_path / "absent") is None


class Machine:
    """A clock that only moves when told, and two counters."""

    def __init__(self) -> None:
        self.now = self.busy = self.own = 0.0

    def company(self, n_cores: int) -> Company:
        return Company(busy=lambda: self.busy, own=lambda: self.own, clock=lambda: self.now, n_cores=n_cores)

    def run(self, seconds: float, *, own: float, others: float) -> None:
        self.now += seconds
        self.own += own * seconds
        self.busy += (own + others) * seconds


@pytest.mark.parametrize(
    ("n_cores", "n_threads", "others", "expected"),
    [
        (2, 2, 0.0, 2),
        (2, 2, 0.3, 2),  # within the tolerance
        (2, 2, 0.5, 1),
        (2, 2, 1.0, 1),
        (2, 2, 2.0, 1),  # never none
        (16, 16, 2.0, 14),
        (16, 8, 2.0, 8),  # room enough for all that were asked for
        (16, 8, 12.0, 4),
    ],
)
def test_threads_are_those_that_find_a_core(n_cores: int, n_threads: int, others: float, expected: int) -> None:
    machine = Machine()
    company = machine.company(n_cores)
    assert company.threads(n_threads) == n_threads
    machine.run(2 * INTERVAL_S, own=1.0, others=others)
    assert company.threads(n_threads) == expected


def test_company_that_leaves_gives_its_cores_back() -> None:
    machine = Machine()
    company = machine.company(2)
    machine.run(1.0, own=1.0, others=1.0)
    assert company.threads(2) == 1
    machine.run(INTERVAL_S / 2, own=2.0, others=0.0)
    assert company.threads(2) == 1  # too early for another look
    machine.run(INTERVAL_S, own=2.0, others=0.0)
    assert company.threads(2) == 2


def test_a_system_that_does_not_tell_changes_nothing() -> None:
    machine = Machine()
    company = Company(busy=lambda: None, own=lambda: machine.own, clock=lambda: machine.now, n_cores=2)
    machine.run(5.0, own=1.0, others=2.0)
    assert company.threads(2) == 2


@pytest.mark.parametrize(
    ("position", "n_threads", "expected", "with_our_attention"),
    [
        (0, 1, 1, 1),
        (0, 2, 1, 1),
        (8191, 2, 1, 1),
        (8192, 2, 2, 1),
        (100_000, 2, 2, 1),
        (8192, 4, 2, 1),
        (40_000, 4, 4, 1),
        (0, 5, 5, 1),
        (100_000, 16, 16, 1),
    ],
)
def test_operations_on_a_token_are_shared_only_with_llamacpps_attention(
    position: int, n_threads: int, expected: int, with_our_attention: int
) -> None:
    assert threads_at(position, n_threads, attention_is_ours=False) == expected
    assert threads_at(position, n_threads, attention_is_ours=True) == with_our_attention


def test_programs_of_lower_priority_count_where_that_is_asked(tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    stat.write_text("cpu0 100 200 3 4 5 6 7 800\n")
    per_second = os.sysconf("SC_CLK_TCK")
    assert busy_seconds({0}, stat) == pytest.approx(900 / per_second)
    assert busy_seconds({0}, stat, low_priority=True) == pytest.approx(1100 / per_second)
