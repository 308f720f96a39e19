"""Gives memory of experts back to the system while other programs need it, and uses it again afterwards.

The plan leaves some RAM free, but other programs may need more than that after a model was loaded. Without a swap file the kernel
then kills a process, most likely this one. So the free RAM is looked at ten times a second: if it falls below a reserve, the
coldest experts go, their pages return to the system, and their place stays empty until there is room again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from localrun.offload.residency import Residency
from localrun.units import format_size

log = logging.getLogger(__name__)

INTERVAL_S: Final = 0.1
"""Between two looks, which take 0.1 ms. Another program touches new memory at 1 to 3 GB/s per core: 100 to 300 MB meanwhile."""

PATIENCE_S: Final = 5.0
"""How long there must have been room before more is used: programs that allocate and free in turn would have it both ways."""

_LEAST_RESERVE_BYTES, _MOST_RESERVE_BYTES = 256 << 20, 1 << 30


def reserve_bytes(total_bytes: int) -> int:
    """RAM to keep available on a machine with so much: 1/32 of it, 256 MiB to 1 GiB; on a small one at most 1/8 of it."""
    return min(_MOST_RESERVE_BYTES, max(total_bytes // 32, min(_LEAST_RESERVE_BYTES, total_bytes // 8)))


class MemoryWatch:
    """Watches the free RAM for one model. Owns a thread, for the time between answers; `close` ends it.

    What evicts must not run beside compiled code that looks experts up, because it does so without residency's lock. So during a
    decode, whoever has a layer call looks: the decoding thread, or the fetching thread, which has pinned what compiled code
    computes with (`misses.py`). This thread looks while nothing is decoded. Once nothing has been missing for a while, calls pass
    without a look.

    Args:
        residency: whose slots.
        available: bytes that can be allocated without swapping or being killed; None: unknown, nothing happens.
        reserve: bytes to keep available.
    """

    def __init__(self, residency: Residency, available: Callable[[], int | None], reserve: int) -> None:
        self._residency, self._available, self._reserve = residency, available, reserve
        self._keep_bytes = 2 * residency.floor_bytes
        self._decoding = self._has_failed = False
        self._next_look = self._short_at = 0.0
        self._closing = threading.Event()
        self._look_before, residency.look = residency.look, self.look
        self._thread = threading.Thread(target=self._idle, name="localrun-memory", daemon=True)
        self._thread.start()

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Around each `llama_decode` and what belongs to it, on the decoding thread."""
        with self._residency.lock:
            self.look()
            self._decoding = True
        try:
            yield
        finally:
            self._decoding = False

    def look(self) -> None:
        """Gives memory back, or takes some, if it is time to look; the caller holds residency's lock."""
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + INTERVAL_S
        available = self._ask()
        if available is None:
            return
        table = self._residency.table
        if available < self._reserve:
            self._short_at = now
            was_short = table.withheld_bytes > 0
            evicted = table.withhold(self._reserve - available, self._keep_bytes)
            if evicted and not was_short:
                log.info(
                    "other programs need memory: %s of experts given back, until there is room again",
                    format_size(evicted),
                )
        elif table.withheld_bytes and now - self._short_at >= PATIENCE_S:
            # What is free in the table is not taken yet, but soon will be.
            table.use_again(max(0, available - 2 * self._reserve - table.arena.free_bytes))

    def _ask(self) -> int | None:
        """Free bytes; None if unknown. An error is no reason to end an answer: it is logged, the first time."""
        try:
            return self._available()
        except Exception as error:
            if not self._has_failed:
                log.warning("can't tell how much RAM is free, so experts stay whatever other programs need: %s", error)
            self._has_failed = True
            return None

    def _idle(self) -> None:
        while not self._closing.wait(INTERVAL_S):
            if self._decoding:
                continue
            with self._residency.lock:
                if not self._decoding:
                    self.look()

    def close(self) -> None:
        """Ends the thread, and nobody looks any more; the slots stay as they are."""
        self._closing.set()
        self._thread.join()
        with self._residency.lock:
            self._residency.look = self._look_before
