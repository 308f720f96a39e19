"""Gives memory of experts back to the system while other programs need it, and uses it again afterwards.

The plan leaves some RAM free, but other programs may need more than that after a model was loaded. Without a swap file the kernel
then kills a process, most likely this one. So a thread looks at the free RAM, the more often the less there is: if it falls below a
reserve, the coldest experts go, their pages return to the system, and their place stays empty until there is room again.

The kernel's own messages come too late. [m] In a control group of 300 MiB, whose memory another program took at 0.6 to 1 GB/s, all
three levels of `memory.pressure_level` were reached when nothing was left, 60 and 150 ms before the kill; a pressure stall
trigger (50 ms in 2 s) fired 1.5 s after it. So nothing here listens to them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Final

from localrun.offload.residency import Residency
from localrun.units import format_size

log = logging.getLogger(__name__)

MOST_PAUSE_S: Final = 0.1
LEAST_PAUSE_S: Final = 0.01
"""Between two looks, which take 0.02 ms, and up to 0.3 in control groups."""

FASTEST_BYTES_PER_S: Final = 16 * 10**9
"""At which another program may take memory without its getting scarce between two looks. [m] One Zen 4 core touches new
pages at 1.3 to 1.7 GB/s."""

PATIENCE_S: Final = 5.0
"""How long there must have been room before more is used: programs that allocate and free in turn would have it both ways."""

_LEAST_RESERVE_BYTES, _MOST_RESERVE_BYTES = 256 << 20, 1 << 30


def reserve_bytes(total_bytes: int) -> int:
    """RAM to keep available on a machine with so much: 1/32 of it, 256 MiB to 1 GiB; on a small one at most 1/8 of it."""
    return min(_MOST_RESERVE_BYTES, max(total_bytes // 32, min(_LEAST_RESERVE_BYTES, total_bytes // 8)))


def pause_s(available: int, reserve: int) -> float:
    """Until the next look: half of the reserve is to be left even if another program takes memory as fast as can be."""
    return min(MOST_PAUSE_S, max(LEAST_PAUSE_S, (available - reserve / 2) / FASTEST_BYTES_PER_S))


class MemoryWatch:
    """Watches the free RAM for one model. Owns a thread; `close` ends it.

    The thread needs residency's lock to act, and takes it from the decoding thread between two layer calls, or while compiled
    code computes one (`cache/gate.py`). Whoever holds the lock for longer, for a call of many tokens with experts to be read, looks
    itself (`Residency.look`).

    Args:
        residency: whose slots.
        available: bytes that can be allocated without swapping or being killed; None: unknown, nothing happens.
        reserve: bytes to keep available.
    """

    def __init__(self, residency: Residency, available: Callable[[], int | None], reserve: int) -> None:
        self._residency, self._available, self._reserve = residency, available, reserve
        self._keep_bytes = 2 * residency.floor_bytes
        self._has_failed = self._has_warned = False
        self._next_look = self._short_at = 0.0
        self._closing = threading.Event()
        self._look_before, residency.look = residency.look, self.look
        self._thread = threading.Thread(target=self._watch, name="localrun-memory", daemon=True)
        self._thread.start()

    def look(self) -> None:
        """Gives memory back, or takes some, if it is time to look; the caller holds residency's lock."""
        if time.monotonic() < self._next_look:
            return
        available = self._ask()
        if available is not None:
            self._act(available)

    def _act(self, available: int) -> None:
        """The caller holds residency's lock."""
        table, now = self._residency.table, time.monotonic()
        if available < self._reserve:
            self._short_at = now
            was_short = table.withheld_bytes > 0
            evicted = table.withhold(self._reserve - available, self._keep_bytes)
            if evicted and not was_short:
                log.info(
                    "other programs need memory: %s of experts given back, until there is room again",
                    format_size(evicted),
                )
            if not evicted and not self._has_warned and available < self._reserve // 2:
                self._has_warned = True
                log.warning(
                    "other programs need more memory than experts can give back: %s are left, and the system may end a "
                    "program (close some, or load the model with a smaller --context)",
                    format_size(max(0, available)),
                )
        elif table.withheld_bytes and now - self._short_at >= PATIENCE_S:
            # What is free in the table is not taken yet, but soon will be.
            table.use_again(max(0, available - 2 * self._reserve - table.arena.free_bytes))

    def _ask(self) -> int | None:
        """Free bytes; None if unknown. An error is no reason to end an answer: it is logged, the first time."""
        available = None
        try:
            available = self._available()
        except Exception as error:
            if not self._has_failed:
                log.warning("can't tell how much RAM is free, so experts stay whatever other programs need: %s", error)
            self._has_failed = True
        rest = MOST_PAUSE_S if available is None else pause_s(available, self._reserve)
        self._next_look = time.monotonic() + rest
        return available

    def _watch(self) -> None:
        while not self._closing.wait(max(LEAST_PAUSE_S, self._next_look - time.monotonic())):
            if time.monotonic() < self._next_look:
                continue  # somebody else has looked
            available = self._ask()
            if available is None or (available >= self._reserve and not self._residency.table.withheld_bytes):
                continue
            # Whoever has the lock for long looks, too, and then this is old.
            if self._residency.lock.acquire(timeout=LEAST_PAUSE_S):
                try:
                    self._act(available)
                finally:
                    self._residency.lock.release()
            else:
                self._next_look = 0.0

    def close(self) -> None:
        """Ends the thread, and nobody looks any more; the slots stay as they are."""
        self._closing.set()
        self._thread.join()
        with self._residency.lock:
            self._residency.look = self._look_before
