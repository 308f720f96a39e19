"""Reads what a token's next layers will likely need while the drive would be idle: during attention, matrices and experts.

The routers of the next two layers are evaluated early (`routers.py`); for layers routed by token id the prediction is certain.
Predicted experts missing from RAM are read after everything that a call waits for: the store reads such pieces last and few at a
time, whenever a buffer is free. A layer is predicted twice; what the later prediction or the layer itself does not ask for is
cancelled. A correct guess still in flight is awaited, not reread.

The tuning tool is `tools/guess_next_layer.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Final

import numpy as np
import numpy.typing as npt

from localrun.offload.cache.slots import ABSENT, Slot, SlotState
from localrun.offload.cache.telemetry import Counter
from localrun.offload.device.view import F32, I32
from localrun.offload.residency import Residency
from localrun.offload.routers import Routers

REACH: Final = 2
"""Layers to look ahead. A layer takes about as long as one expert's read, and some lack two or three experts. [m] Whole Flash in
MXFP4, two Zen 4 cores, 10 GiB of experts: 73 % of the guesses two layers early are right; with a third layer, 61 % of those, and
a token takes as long."""
ENOUGH: Final = 2
"""Guesses under way with which the drive is busy until the next call looks: no layer further away is asked then, which would
cost reading its router, and guesses that are right less often. Whole Flash with 2-bit experts: one guess in nine is left out, and
as many are used (docs/benchmarks.md)."""
MOST_SLOTS: Final = 12
"""Most slots with guesses that no call has judged yet."""
SLOTS_SHARE: Final = 4
"""At most one slot in so many."""
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
    """Guesses for a model's next layers. For the decoding thread, which holds residency's lock.

    Owns the guesses: slots whose reads it started, until their layer's call shows whether it needs them.

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
        self._guesses: dict[Slot, int] = {}  # how many layers early
        self._left: list[Slot] = []  # of the token before
        self._right: dict[tuple[int, int], float] = {}  # by layer and distance: share of guesses that were right lately
        self._left_out: dict[
            tuple[int, int], int
        ] = {}  # tokens since the last guess, while guesses are not worth reading
        self._token = -1

    def begin_batch(self, token: int) -> None:
        """A batch begins. `token`: its only token, -1 if there are several."""
        self._token = token
        self._left = list(self._guesses)

    def begin(self, layer: int, used: I32) -> None:
        """Call at the start of a layer's call, before its reads: cancels pending guesses that it does not need."""
        self._cancel(layer, set(used.tolist()))

    def _cancel(self, layer: int, needed: set[int]) -> None:
        for slot in list(self._guesses):
            if slot.layer == layer and slot.state is SlotState.LOADING and slot.expert not in needed:
                self._residency.store.abandon(slot)
                self._judge([slot], frozenset())

    def look(self, layer: int, x: F32) -> None:
        """Call once a token's call of `layer` has requested everything it needs: starts reading what the next layers will likely
        need.

        Args:
            x: (D,) input of this layer's experts.
        """
        n_slots = self._residency.n_slots
        if n_slots < LEAST_SLOTS * self._n_used:
            return
        self._judge(self._left, frozenset())
        self._left = []
        for distance in range(1, REACH + 1):
            if distance > 1 and self._n_under_way() >= ENOUGH:
                return
            self._look(layer + distance, distance, x, min(MOST_SLOTS, n_slots // SLOTS_SHARE))

    def _n_under_way(self) -> int:
        return sum(slot.state is SlotState.LOADING for slot in self._guesses)

    def _look(self, layer: int, distance: int, x: F32, most: int) -> None:
        where = self._residency
        moe = where.layers.get(layer)
        if (
            moe is None
            or where.table.resident[layer, : moe.n_experts].all()
            or not self._worth_reading(layer, distance)
        ):
            return
        likely = self._experts(layer, x)
        self._cancel(layer, set(likely))  # what was guessed from a layer further away
        for expert in likely:
            slot = where.table.peek(layer, expert)
            if slot is not None:
                where.table.announce(layer, expert)  # not the next to go while others are read for the same call
            elif not where.on_gpu(layer, expert) and len(self._guesses) < most:
                if (slot := where.reserve(layer, expert, retake=False)) is None:
                    return
                where.read_ahead(slot)
                where.table.announce(layer, expert)
                self._guesses[slot] = distance
                where.telemetry.values[layer, Counter.GUESSES] += 1

    def _worth_reading(self, layer: int, distance: int) -> bool:
        at = (layer, distance)
        if self._right.get(at, 1.0) >= WORTH_READING:
            return True
        self._left_out[at] = (self._left_out.get(at, 0) + 1) % _TRY_EVERY
        return self._left_out[at] == 0

    def _experts(self, layer: int, x: F32) -> list[int]:
        """The likely ones, likeliest first."""
        table = self._tables.get(layer)
        if table is not None:
            experts: list[int] = table[self._token].tolist() if 0 <= self._token < len(table) else []
            return experts
        likely = self._routers.likely(layer, x, self._n_used) if self._routers is not None else None
        return likely.tolist() if likely is not None else []

    def judge(self, layer: int, used: I32) -> None:
        """Call at the end of a layer's call: wrong guesses that were not used since go before others as likely."""
        self._residency.table.end_announced(layer)
        self._judge([slot for slot in self._guesses if slot.layer == layer], set(used.tolist()))

    def _judge(self, guesses: list[Slot], used: Set[int]) -> None:
        table, values = self._residency.table, self._residency.telemetry.values
        for slot in guesses:
            distance = self._guesses.pop(slot, None)
            if distance is None:
                continue
            layer, here = slot.layer, table.peek(slot.layer, slot.expert) is slot
            # Another stamp than its arrival's: the compiled path has used it since.
            right = slot.expert in used or (here and table.stamps[layer, slot.expert] not in (slot.ready_stamp, ABSENT))
            before = self._right.get((layer, distance), 1.0)
            self._right[layer, distance] = before + (right - before) / _REMEMBERED
            if right:
                values[layer, Counter.GUESSES_USED] += 1
            elif slot.state is SlotState.READY:  # others were cancelled
                values[layer, Counter.GUESSES_WASTED] += 1
                table.chill(slot)
