"""Reads what a token's next layer will likely need while the drive would be idle: during attention and dense matrices.

The next layer's router is evaluated a layer early (`routers.py`); for layers routed by token id the prediction is certain.
Predicted experts missing from RAM are read after everything that a call waits for: `Store` reads such pieces last, few are in
flight at a time, and those that the layer does not need after all are cancelled. A correct guess still in flight is awaited,
not reread.

The tuning tool is `tools/guess_next_layer.py`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Final

import numpy as np
import numpy.typing as npt

from localrun.offload.cache.slots import ABSENT, Slot, SlotState
from localrun.offload.cache.telemetry import Counter
from localrun.offload.device.view import F32, I32
from localrun.offload.residency import Residency
from localrun.offload.routers import Routers

UNDER_WAY: Final = 2
"""Maximum guesses in flight: one hides the other's start; more would occupy buffers that awaited reads need."""
MOST_SLOTS: Final = 8
"""Most slots with guesses that no call has judged yet."""
LEAST_SLOTS: Final = 4
"""How many times a token's experts of one layer must fit in RAM; otherwise guesses would displace what the same token needs."""

WORTH_READING: Final = 1 / 3
"""Minimum share of a layer's recent guesses that must be right. [m] Whole Flash: with a quarter right, a token costs 3 % more
than without guessing, with four fifths right a fifth less."""
_REMEMBERED: Final = 32
"""Guesses that "lately" means."""
_TRY_EVERY: Final = 16
"""Tokens after which a layer whose guesses are not worth reading gets another chance."""


class Foresight:
    """Guesses for a model's next layer. For the decoding thread, which holds residency's lock.

    Owns the guesses: slots whose reads it started, until their layer's call shows whether it needs them.

    Attributes:
        token: the running batch's only token, -1 if there are several.

    Args:
        residency: the experts' residency.
        n_used: experts per token.
        hash_tables: (n_vocab, K) expert ids by layer whose experts follow from the token id.
        routers: rank the experts of other layers.
    """

    def __init__(
        self,
        residency: Residency,
        n_used: int,
        *,
        hash_tables: Mapping[int, npt.NDArray[np.int32]],
        routers: Routers | None,
    ) -> None:
        self._residency = residency
        self._n_used = n_used
        self._tables = hash_tables
        self._routers = routers
        self._guesses: set[Slot] = set()
        self._likely: deque[tuple[int, int]] = deque()  # (layer, expert) to be read, likeliest first
        self._right: dict[int, float] = {}  # by layer: share of its guesses that were right lately
        self._left_out: dict[
            int, int
        ] = {}  # by layer: tokens since the last guess, while guesses are not worth reading
        self.token = -1

    def begin(self, layer: int, used: I32) -> None:
        """Call at the start of a layer's call, before its reads: cancels pending guesses that it does not need."""
        self._likely.clear()
        for slot in self._guesses:
            if slot.layer == layer and slot.state is SlotState.LOADING and slot.expert not in used:
                self._residency.store.abandon(slot)

    def look(self, layer: int, x: F32) -> None:
        """Call once a token's call of `layer` has requested everything it needs: starts reading what the next layer will likely
        need.

        Args:
            x: (D,) input of this layer's experts.
        """
        where, following = self._residency, layer + 1
        if following not in where.layers or where.n_slots < LEAST_SLOTS * self._n_used:
            return
        if where.table.resident[following, : where.layers[following].n_experts].all():
            return
        self.judge(following, np.empty(0, np.int32))  # those of the last token, if compiled code computed this layer
        if not self._worth_reading(following):
            return
        for expert in self._experts(following, x):
            slot = where.table.peek(following, expert)
            if slot is not None:
                where.table.announce(following, expert)  # not the next to go while others are read for the same call
            elif not where.on_gpu(following, expert):
                self._likely.append((following, expert))
        self.go_on()

    def _worth_reading(self, layer: int) -> bool:
        if self._right.get(layer, 1.0) >= WORTH_READING:
            return True
        self._left_out[layer] = (self._left_out.get(layer, 0) + 1) % _TRY_EVERY
        return self._left_out[layer] == 0

    def _experts(self, layer: int, x: F32) -> list[int]:
        """The likely ones, likeliest first."""
        table = self._tables.get(layer)
        if table is not None:
            return [int(e) for e in table[self.token]] if 0 <= self.token < len(table) else []
        likely = self._routers.likely(layer, x, self._n_used) if self._routers is not None else None
        return [int(e) for e in likely] if likely is not None else []

    def go_on(self) -> None:
        """Starts the next reads, if few enough are under way."""
        where = self._residency
        n_loading = sum(slot.state is SlotState.LOADING for slot in self._guesses)
        while self._likely and n_loading < UNDER_WAY and len(self._guesses) < MOST_SLOTS:
            layer, expert = self._likely.popleft()
            if where.is_here(layer, expert):
                continue
            slot = where.reserve(layer, expert)
            if slot is None:
                self._likely.clear()
                return
            where.read_ahead(slot)
            where.table.announce(layer, expert)
            self._guesses.add(slot)
            where.telemetry.values[layer, Counter.GUESSES] += 1
            n_loading += 1

    def judge(self, layer: int, used: I32) -> None:
        """Call at the end of a layer's call: wrong guesses that were not used since go before others as likely."""
        table, row = self._residency.table, self._residency.telemetry.values[layer]
        table.end_announced(layer)
        for slot in [slot for slot in self._guesses if slot.layer == layer]:
            self._guesses.discard(slot)
            here = table.peek(layer, slot.expert) is slot
            # Another stamp than its arrival's: the compiled path has used it since.
            right = slot.expert in used or (here and table.stamps[layer, slot.expert] not in (slot.ready_stamp, ABSENT))
            before = self._right.get(layer, 1.0)
            self._right[layer] = before + (right - before) / _REMEMBERED
            if right:
                row[Counter.GUESSES_USED] += 1
            else:
                row[Counter.GUESSES_WASTED] += 1
                table.chill(slot)
