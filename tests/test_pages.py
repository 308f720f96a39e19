"""Memory that kernels stream through."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from localrun.pages import HUGE_PAGE_BYTES, anonymous


def test_large_memory_is_zeroed_and_written() -> None:
    memory = np.frombuffer(anonymous(2 * HUGE_PAGE_BYTES), np.uint8)
    assert memory.size == 2 * HUGE_PAGE_BYTES
    assert not memory.any()
    memory[-1] = 7
    assert memory[-1] == 7


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux tells how memory is mapped")
def test_large_memory_is_not_a_shared_mapping() -> None:
    memory = anonymous(64 * HUGE_PAGE_BYTES)
    address = np.frombuffer(memory, np.uint8).ctypes.data
    for entry in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        start, end = (int(part, 16) for part in entry.split(" ", 1)[0].split("-"))
        if start <= address < end:
            flags = re.search(r"^VmFlags: (.*)$", entry, re.MULTILINE)
            assert flags
            assert "sh" not in flags[1].split()
            return
    pytest.fail("the mapping is not listed")
