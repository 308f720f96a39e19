"""Memory and cores: this machine's real files, and a made-up tree of /proc and /sys for limits that it does not have."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from localrun.engine import memory
from localrun.engine.engine import Engine
from localrun.errors import BudgetError, UsageError
from localrun.offload.model import OffloadedModel
from tests.engine.conftest import OPTIONS

GIB = 2**30


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """32 GiB, 20 of them available, in a cgroup two levels deep without a limit."""
    proc, group = tmp_path / "proc", tmp_path / "sys/fs/cgroup/user/box"
    (proc / "self").mkdir(parents=True)
    group.mkdir(parents=True)
    (proc / "meminfo").write_text(f"MemTotal: {32 * 2**20} kB\nMemFree: 1 kB\nMemAvailable: {20 * 2**20} kB\n")
    (proc / "self/cgroup").write_text("0::/user/box\n")
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text(f"{3 * GIB}\n")
    (group / "memory.stat").write_text(f"anon {GIB}\nfile {2 * GIB}\n")
    monkeypatch.setattr(memory, "PROC", proc)
    monkeypatch.setattr(memory, "SYS", tmp_path / "sys")
    return tmp_path / "sys/fs/cgroup"


def test_without_a_limit_the_machine_counts(machine: Path) -> None:
    assert memory.total_memory() == 32 * GIB
    assert memory.available_memory() == 20 * GIB
    assert memory.describe() == "20.00 GiB of 32.00 GiB available"


def test_the_tightest_limit_of_all_levels_counts_and_file_cache_is_free(machine: Path) -> None:
    (machine / "user/memory.max").write_text(f"{8 * GIB}\n")
    (machine / "user/box/memory.max").write_text(f"{10 * GIB}\n")
    assert memory.total_memory() == 8 * GIB
    assert memory.available_memory() == 7 * GIB, "8 less 3 in use, of which 2 are file cache"


def test_limits_of_the_first_cgroup_version_count_too(machine: Path) -> None:
    (machine.parents[2] / "proc/self/cgroup").write_text("5:cpu,cpuacct:/box\n4:memory:/docker/1f\n0::/user/box\n")
    group = machine / "memory"  # in a container the mount shows the container's own group as its root
    group.mkdir()
    (group / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert memory.total_memory() == 32 * GIB, "no limit"
    (group / "memory.limit_in_bytes").write_text(f"{6 * GIB}\n")
    (group / "memory.usage_in_bytes").write_text(f"{4 * GIB}\n")
    (group / "memory.stat").write_text(f"cache 5\ntotal_cache {3 * GIB}\ntotal_shmem {GIB}\n")
    assert memory.total_memory() == 6 * GIB
    assert memory.available_memory() == 4 * GIB, "6 less 4 in use, of which 2 are file cache that can be given back"


def test_unknown_machines_are_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "PROC", tmp_path)
    monkeypatch.setattr(memory, "SYS", tmp_path)
    assert memory.total_memory() is None
    assert memory.resident_bytes() == 0
    assert memory.describe() == "unknown"
    assert memory.physical_cores() >= 1


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="Linux only")
def test_this_machine_makes_sense() -> None:
    total, available = memory.total_memory(), memory.available_memory()
    assert total is not None
    assert available is not None
    assert 0 < available <= total
    assert 1 <= memory.physical_cores() <= len(os.sched_getaffinity(0))


def test_resident_size_follows_what_is_touched() -> None:
    before = memory.resident_bytes()
    block = bytearray(os.urandom(1)) * (64 * 2**20)
    assert memory.resident_bytes() - before > 48 * 2**20
    del block


@pytest.mark.parametrize(("cpus", "most"), [(1, 16), (2, 16), (4, 16), (64, 256)])
def test_more_threads_than_do_any_good_are_refused(cpus: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "logical_cores", lambda: cpus)
    memory.check_threads(0)
    memory.check_threads(most)
    with pytest.raises(UsageError, match=f"{most + 1} threads on {cpus} CPUs: the maximum is {most}"):
        memory.check_threads(most + 1)


def test_a_promise_larger_than_the_machine_is_refused_with_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "total_memory", lambda: 8 << 30)
    monkeypatch.setattr(memory, "available_memory", lambda: 5 << 30)
    memory.check_ram(None)
    memory.check_ram(8 << 30)
    with pytest.raises(BudgetError, match=r"--ram 8\.01 GiB: this machine has 8\.00 GiB, of which 5\.00 GiB are free"):
        memory.check_ram((8 << 30) + (11 << 20))
    monkeypatch.setattr(memory, "total_memory", lambda: None)
    memory.check_ram(1 << 50)


def test_tests_do_not_depend_on_what_other_programs_leave(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with 24 GiB, 768 MiB are kept free, and experts would go."""
    monkeypatch.setattr(memory, "_meminfo", {"MemTotal": 24 * GIB, "MemAvailable": 50 << 20}.get)
    monkeypatch.setattr(memory, "_cgroups", lambda: iter(()))
    with Engine.open(model_path, OPTIONS) as engine, engine.session() as session:
        session.feed([1, 2, 3])
        loaded = engine._loaded
        assert isinstance(loaded, OffloadedModel)
        assert len(loaded.pool.residency.table) > 0
        assert loaded.pool.residency.table.withheld_bytes == 0
