"""Adaptive mode: a missing expert is first served from the base's smaller copy, and its better copy is read later.

Off by default, because the same seed may then give different tokens, depending on the cache. Better copies are read when the
drive is idle, one at a time, for the most recently used experts; between decodes they replace the smaller copies.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping

import numpy as np

from localrun.offload.cache.slots import Slot, SlotTable
from localrun.offload.cache.tickets import Ticket
from localrun.offload.device.view import I32

log = logging.getLogger(__name__)


class Upgrades:
    """Tracks slots to replace. Part of residency: call all methods under its lock, and `step` on the decoding thread.

    Args:
        table: the slots.
        wanted: by layer, the variant that each expert should have.
    """

    def __init__(self, table: SlotTable, wanted: Mapping[int, I32]) -> None:
        self._table = table
        self._wanted: I32 = np.zeros(table.resident.shape, np.int32)  # less what can't be read
        for layer, variants in wanted.items():
            self._wanted[layer, : variants.size] = variants
        self._under_way = False
        self._arrived: deque[Ticket] = deque()
        self.n_done = 0

    def arrived(self, ticket: Ticket) -> None:
        """A better copy's read has ended; any thread."""
        self._arrived.append(ticket)

    def step(self) -> Slot | None:
        """Call between decodes: swaps in what has arrived.

        Returns:
            The most recently used expert to upgrade next; None if nothing should be started.
        """
        while self._arrived:
            ticket = self._arrived.popleft()
            self._under_way = False
            if ticket.error is not None:
                log.warning("can't read a better copy, keeping the smaller one: %s", ticket.error)
                self._wanted[ticket.slot.layer, ticket.slot.expert] = 0
            self._table.end_upgrade(ticket.slot, complete=ticket.error is None)
            self.n_done += ticket.error is None
        if self._under_way:
            return None
        table = self._table
        candidates = np.where((table.resident != 0) & (self._wanted != table.variants), table.stamps, -1)
        layer, expert = divmod(int(candidates.argmax()), candidates.shape[1])
        return table.peek(layer, expert) if candidates[layer, expert] >= 0 else None

    def started(self) -> None:
        """The slot that `step` gave is being read in its better form."""
        self._under_way = True
