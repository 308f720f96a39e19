"""Memory that is given back is free at once, and nobody is killed: real processes in a control group."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from localrun.errors import LocalrunError
from tools.memory_limit import MemoryLimit

MIB = 1 << 20
PATIENCE_S = 300

DROP = """
import ctypes, sys
from pathlib import Path
from localrun.offload.cache.slots import Arena
from tools.memory_limit import join
folder = Path(sys.argv[1])
join(folder)
def used():
    names = "memory.usage_in_bytes", "memory.current"
    return int(next(p for p in map(folder.joinpath, names) if p.exists()).read_text())
size, slot = 128 << 20, 7602176
arena = Arena(size)
ctypes.memset(arena.address, 1, size)
before = used()
dropped = [at for at in range(arena.address, arena.address + size - slot, 2 * slot)]
for at in dropped:
    arena.drop(at, slot)
print(len(dropped) * slot, before - used())
kept = [at for at in range(arena.address + slot, arena.address + size - slot, 2 * slot)]
assert all(ctypes.string_at(at, slot) == bytes([1]) * slot for at in kept)
assert all(ctypes.string_at(at, slot) == bytes(slot) for at in dropped)
"""

MODEL = """
import ctypes, sys, threading, types
from pathlib import Path
from localrun.engine import memory
from localrun.offload.cache.slots import SlotTable
from localrun.offload.memory_watch import MemoryWatch
from tools.memory_limit import join
join(Path(sys.argv[1]))
table = SlotTable(128 << 20, 4, 32)
for layer in range(4):
    for expert in range(32):
        slot = table.reserve(layer, expert, 1 << 20)
        ctypes.memset(slot.address, 1, slot.size_bytes)
        table.ready(slot)
residency = types.SimpleNamespace(table=table, lock=threading.RLock(), floor_bytes=4 << 20, look=None)
watch = MemoryWatch(residency, memory.available_memory, 24 << 20)
print("ready", flush=True)
sys.stdin.readline()
watch.close()
table.check()
print(table.withheld_bytes, flush=True)
"""

NEIGHBOUR = """
import mmap, sys, time
from pathlib import Path
from localrun.engine import memory
from tools.memory_limit import join
join(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
taken = []
for _ in range(12):
    taken.append(mmap.mmap(-1, 8 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    taken[-1][::4096] = bytes(2048)
    while memory.available_memory() < 16 << 20:  # as fast as the other side can
        time.sleep(0.01)
"""


@pytest.fixture
def group() -> Iterator[MemoryLimit]:
    try:
        limit = MemoryLimit(1 << 30)
        limit.__enter__()
    except LocalrunError as error:
        pytest.skip(str(error))
    yield limit
    limit.__exit__(None, None, None)


def start(script: str, group: MemoryLimit) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, str(group.folder)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_scattered_experts_leave_no_half_used_huge_pages(group: MemoryLimit) -> None:
    with start(DROP, group) as process:
        output = process.communicate(timeout=PATIENCE_S)[0]
        assert process.returncode == 0
    dropped, freed = map(int, output.split())
    assert freed >= dropped - 4 * MIB  # counters of the group are kept per processor


def test_a_neighbour_gets_twice_what_was_free(group: MemoryLimit) -> None:
    """It takes 96 MiB where 48 are free, piece by piece as they become so."""
    with start(MODEL, group) as model, start(NEIGHBOUR, group) as neighbour:
        for process in (model, neighbour):
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        assert group.change(group.anonymous_bytes() + 48 * MIB)
        neighbour.communicate("go\n", timeout=PATIENCE_S)
        output = model.communicate("end\n", timeout=PATIENCE_S)[0]
        assert (neighbour.returncode, model.returncode, group.out_of_memory_kills()) == (0, 0, 0)
    assert int(output) >= 48 * MIB
