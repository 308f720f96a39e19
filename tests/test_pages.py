"""Memory that kernels stream through."""

from __future__ import annotations

import ctypes
import mmap
import platform
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from localrun.pages import HUGE_PAGE_BYTES, anonymous, ask_for_huge_pages


def test_large_memory_is_zeroed_and_written() -> None:
    memory = np.frombuffer(anonymous(2 * HUGE_PAGE_BYTES), np.uint8)
    assert memory.size == 2 * HUGE_PAGE_BYTES
    assert not memory.any()
    memory[-1] = 7
    assert memory[-1] == 7


def flags_at(address: int) -> list[str]:
    """Of the mapping that holds the address, proc(5) has their names."""
    for entry in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        start, end = (int(part, 16) for part in entry.split(" ", 1)[0].split("-"))
        if start <= address < end:
            flags = re.search(r"^VmFlags: (.*)$", entry, re.MULTILINE)
            assert flags
            return flags[1].split()
    pytest.fail("the mapping is not listed")


needs_smaps = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux tells how memory is mapped")


@needs_smaps
def test_large_memory_is_not_a_shared_mapping() -> None:
    memory = anonymous(64 * HUGE_PAGE_BYTES)
    assert "sh" not in flags_at(np.frombuffer(memory, np.uint8).ctypes.data)


@needs_smaps
def test_children_get_memory_unless_it_is_kept_from_them() -> None:
    shared, own = (np.frombuffer(anonymous(HUGE_PAGE_BYTES, forked=forked), np.uint8) for forked in (True, False))
    assert "dc" not in flags_at(shared.ctypes.data)
    assert "dc" in flags_at(own.ctypes.data)


@needs_smaps
def test_memory_of_others_is_asked_for_in_huge_pages_within_its_bounds() -> None:
    if not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists():
        pytest.skip("the kernel has no huge pages")
    with mmap.mmap(-1, 4 * HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        view = (ctypes.c_uint8 * len(memory)).from_buffer(memory)
        address = ctypes.addressof(view)
        ask_for_huge_pages(address + 1, 2 * HUGE_PAGE_BYTES)
        flags = [flags_at(address + at) for at in (0, mmap.PAGESIZE, 2 * HUGE_PAGE_BYTES - 1, 2 * HUGE_PAGE_BYTES + 1)]
        assert ["hg" in found for found in flags] == [False, True, True, False]
        ask_for_huge_pages(address + 3 * HUGE_PAGE_BYTES, HUGE_PAGE_BYTES - 1)
        assert "hg" not in flags_at(address + 3 * HUGE_PAGE_BYTES)
        del view


KEPT = """
import ctypes, sys, threading
import numpy as np
from localrun.engine.memory import resident_bytes
from localrun.pages import share_heaps

if sys.argv[1] == "shared":
    share_heaps()
turns = [threading.Event() for _ in range(17)]
end = threading.Event()

def reader(index):
    turns[index].wait()
    for n_bytes in (12 << 20, 8 << 20, 8 << 20):  # the first one teaches the C library not to map such sizes
        np.ones(n_bytes, np.uint8)
    turns[index + 1].set()
    end.wait()

threads = [threading.Thread(target=reader, args=(index,)) for index in range(16)]
for thread in threads:
    thread.start()
before = resident_bytes()
turns[0].set()
turns[16].wait()
print(resident_bytes() - before)
end.set()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries keep memory in other ways")
def test_threads_that_decode_in_turn_keep_little_of_what_they_freed() -> None:
    kept = {
        how: int(subprocess.run([sys.executable, "-c", KEPT, how], capture_output=True, check=True, text=True).stdout)
        for how in ("shared", "own")
    }
    assert kept["shared"] < kept["own"] / 2
    assert kept["shared"] < 5 * (13 << 20)
