"""Scratch memory grows, is aligned, and belongs to one thread."""

from __future__ import annotations

import threading

from localrun.alignment import LINE_BYTES
from localrun.offload.kernels.workspace import workspace


def test_memory_is_aligned_kept_while_it_is_enough_and_never_shared() -> None:
    found: list[int] = []

    def ask() -> None:
        found.append(workspace(1000))
        found.append(workspace(10))
        found.append(workspace(1200))  # 1000 and a quarter

    threads = [threading.Thread(target=ask) for _ in range(1)]
    for thread in threads:
        thread.start()
        thread.join()
    assert len(set(found)) == 1
    own = workspace(1000)
    assert own % LINE_BYTES == found[0] % LINE_BYTES == 0
    larger = workspace(1 << 20)
    assert larger % LINE_BYTES == 0
    assert workspace(1 << 20) == larger
