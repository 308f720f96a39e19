"""Where control groups are made, what is written into them and read from them, on folders that look like the kernel's.

With the kernel's own: tests/tools/test_bench_vs_llamacpp.py, where the user may make groups.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from localrun.errors import LocalrunError
from tools import memory_limit
from tools.memory_limit import MemoryLimit

LIMIT = 5 << 20
Groups = Callable[[dict[str, str]], Path]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Groups:
    """Given controller -> this process's group: the folder of all groups, empty."""

    def of(groups: dict[str, str]) -> Path:
        monkeypatch.setattr(memory_limit, "ROOT", tmp_path)
        monkeypatch.setattr(memory_limit, "_own_groups", lambda: groups)
        return tmp_path

    return of


def test_version_1(machine: Groups) -> None:
    memory = machine({"memory": "/user", "": "/"}) / "memory"
    (memory / "user").mkdir(parents=True)
    (memory / "memory.limit_in_bytes").touch()
    limit = MemoryLimit(LIMIT)
    limit.__enter__()
    assert limit.folder.parent == memory / "user"
    assert (limit.folder / "memory.limit_in_bytes").read_text() == str(LIMIT)
    assert limit.peak_bytes() is None
    assert limit.out_of_memory_kills() == 0
    (limit.folder / "memory.max_usage_in_bytes").write_text("4096\n")
    (limit.folder / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n")
    (limit.folder / "memory.stat").write_text("cache 10\nrss 20\ntotal_rss 30\n")
    assert (limit.peak_bytes(), limit.out_of_memory_kills(), limit.anonymous_bytes()) == (4096, 2, 30)


def test_version_2_takes_the_nearest_group_that_may_limit_its_children(machine: Groups) -> None:
    root = machine({"": "/a/b"})
    (root / "a/b").mkdir(parents=True)
    (root / "a/cgroup.subtree_control").write_text("cpu memory pids")
    (root / "cgroup.subtree_control").write_text("memory")
    limit = MemoryLimit(LIMIT)
    limit.__enter__()
    assert limit.folder.parent == root / "a"
    assert (limit.folder / "memory.max").read_text() == str(LIMIT)
    assert (limit.folder / "memory.swap.max").read_text() == "0"
    assert limit.change(2 * LIMIT)
    assert (limit.folder / "memory.max").read_text() == str(2 * LIMIT)
    (limit.folder / "memory.peak").write_text("8192")
    (limit.folder / "memory.events").write_text("low 0\noom 1\noom_kill 1\n")
    (limit.folder / "memory.stat").write_text("anon 30\nfile 10\n")
    assert (limit.peak_bytes(), limit.out_of_memory_kills(), limit.anonymous_bytes()) == (8192, 1, 30)
    limit.add(1)
    assert (limit.folder / "cgroup.procs").read_text() == "1"


def test_a_machine_without_groups_says_what_would_do(machine: Groups) -> None:
    machine({"": "/"})
    with pytest.raises(LocalrunError, match="no control groups that limit memory") as caught:
        MemoryLimit(LIMIT)
    assert "systemd-run" in str(caught.value.hint)


def test_a_group_that_may_not_be_made_is_named(machine: Groups) -> None:
    root = machine({"": "/"})
    (root / "cgroup.subtree_control").write_text("memory")
    limit = MemoryLimit(LIMIT)
    limit.folder.mkdir()
    with pytest.raises(LocalrunError, match=r"limited to 5\.00 MiB: File exists"), limit:
        pass
