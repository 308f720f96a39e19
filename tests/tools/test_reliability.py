"""A short run of each part of the reliability campaign; `python -m tools.reliability` has the long ones."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from localrun.errors import UsageError
from tools.reliability import faults, kills, outputs
from tools.reliability.kinds import NAMES
from tools.reliability.mutate import Bench
from tools.reliability.tally import Tally


@pytest.mark.parametrize("kind", NAMES)
def test_damaged_files_end_in_a_clear_error_or_are_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CACHE", "DATA", "CONFIG"):
        monkeypatch.setenv(f"LOCALRUN_{name}_DIR", "")  # the bench sets them; they are as before afterwards
    with Bench(kind, seed=5, load=6) as bench:
        outcomes = {bench.case(number) for number in range(12)}
        assert bench.take()["problems"] == []
    assert outcomes & {"refused", "ignored", "found"}


@pytest.mark.parametrize("plain", [False, True])
def test_failed_reads_are_named_or_do_no_harm(plain: bool, tmp_path: Path) -> None:
    tally = Tally("faults", 7)
    tally.figures["checksums"] = not plain
    with faults.Answers(faults.make_model(tmp_path, plain=plain), tally) as answers:
        outcomes = {answers.case(number) for number in range(20)}
    assert tally.problems == []
    assert "named" in outcomes
    assert plain or "other" not in outcomes


def test_killed_writers_lose_nothing_and_leave_nothing_that_looks_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CACHE", "DATA", "CONFIG"):
        monkeypatch.setenv(f"LOCALRUN_{name}_DIR", "")  # as above
    tally = Tally("kills", 11)
    with kills.own_folders() as folder:
        for job in kills.JOBS:
            bench = kills.Bench(job, folder / job, tally)
            for number in range(3):
                bench.case(number)
    assert tally.problems == []
    assert sum(tally.outcomes.values()) == 3 * len(kills.JOBS)


@pytest.mark.parametrize("job", outputs.JOBS)
def test_outputs_are_the_same_after_every_run(job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `full` relies on; small file systems need root."""
    for name in ("CACHE", "DATA", "CONFIG"):
        monkeypatch.setenv(f"LOCALRUN_{name}_DIR", "")
    with kills.own_folders() as folder:
        (folder / "small" / "job").mkdir(parents=True)
        bench = outputs.JOBS[job](folder / "small" / "job")
        acknowledged: list[int] = []
        bench.work(random.Random(1), lambda: acknowledged.append(1))
        assert bench.after(len(acknowledged)) == []
        assert bench.finish() == []
        assert bench.finish() == []


def test_a_run_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    tally = Tally.resume(path, "mutate", 3)
    tally.done, tally.outcomes["refused"] = 7, 5
    tally.problem("a\nproblem")
    tally.save()
    again = Tally.resume(path, "mutate", 3)
    assert (again.done, again.outcomes["refused"], again.problems) == (7, 5, ["a problem"])
    with pytest.raises(UsageError, match="seed 3"):
        Tally.resume(path, "mutate", 4)
