"""Fetches what compiled layer calls lack, on a thread of its own, so that decoding never enters Python.

Compiled code (`device/compiled_misses.py`) posts a call of few tokens some of whose experts are neither in RAM nor on a GPU, and
computes the others; for a while after such a call it posts a single token's calls that lack nothing, too, only to look ahead. Reads
whose bytes it can find have begun by then (`cache/early.py`). This thread does what `LayerCall` does but for the arithmetic: it
makes room, reads, guesses what the next layers will need, and answers with a word for each expert that is there; readers answer
for what they have read.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from localrun.errors import StoppedError
from localrun.offload.cache.slots import Slot
from localrun.offload.cache.telemetry import Counter, Telemetry
from localrun.offload.cache.tickets import nothing_follows
from localrun.offload.device.compiled_misses import MissRecord
from localrun.offload.device.layouts import MOST_PAIRS
from localrun.offload.device.process import ABORTED_ANSWER, FAILED_ANSWER
from localrun.offload.handover import Handover
from localrun.offload.layer_call import LayerCall
from localrun.offload.readahead import ReadAhead
from localrun.offload.residency import Residency

_POLL_S = 50e-6
LOOKING_CALLS: Final = 1024
"""After a call that lacks an expert, so many calls that lack none are posted, too, to look ahead: some 20 tokens. A model that is
all in RAM is spared."""


class PostedCall(LayerCall):
    """A call that compiled code computes. For the fetching thread; the rest is as in `LayerCall`.

    Compiled code has counted the uses of the call's experts, and marked those in RAM as used now. They stay pinned, like what
    arrives, until the call ends or memory runs out.

    Args:
        record: through which it was posted.
    """

    most_at_once = MOST_PAIRS  # compiled code computes them

    def __init__(self, residency: Residency, ahead: ReadAhead, record: MissRecord, handover: Handover) -> None:
        layer, ids = record.layer, record.ids

        def foresee() -> None:
            if len(ids) == 1:
                ahead.foresight.look(layer, record.x(residency.layers[layer].n_embd))

        super().__init__(residency, ahead, layer, ids, _nothing, check_stop=handover.check_stop, foresee=foresee)
        self._has_gpu = True
        self._record = record
        self._missing = {expert: index for index, expert in enumerate(record.missing)}
        self._told: set[Slot] = set()  # readers answer for them
        self._n_answered = 0
        self._has_answered = False  # for those that were in RAM: until then they have to stay there

    @property
    def n_found(self) -> int:
        """Experts that were missing when the call was posted, and there when it was looked at."""
        return self.n_hits - (self.n_distinct - len(self._missing))

    def _count_uses(self) -> None:
        """Compiled code does."""

    def _touch(self, slot: Slot) -> None:
        if slot.expert in self._missing:
            super()._touch(slot)

    def _start_reads(self) -> None:
        super()._start_reads()
        if (
            self._has_answered and self._todo and not self._awaited and self._pinned
        ):  # no room but that of experts which are soon computed
            while self._record.n_computed <= self._n_answered:
                time.sleep(_POLL_S)
            for i in list(self._pinned):
                self._unpin(i)
            super()._start_reads()

    def _read(self, slot: Slot) -> int:
        self._told.add(slot)
        return self._residency.read(slot, self._answer(slot))

    def _hurry(self, slot: Slot) -> None:
        if self._residency.store.hurry(slot, self._answer(slot)):
            self._told.add(slot)

    def _answer(self, slot: Slot) -> Callable[[], None]:
        index, word = self._missing[slot.expert], slot.address + slot.variant
        return lambda: self._record.answer(index, word)

    def _run_kernel(self, indices: list[int]) -> None:
        self._has_answered = True
        for i in indices:
            slot = self._pinned[i]
            index = self._missing.get(slot.expert)
            if index is None:
                continue
            self._n_answered += 1
            if slot not in self._told:
                self._record.answer(index, slot.address + slot.variant)


def _nothing(*_: object) -> None:
    """Computes."""


class Misses:
    """The fetching thread of one model; `close` ends it, after the model is freed.

    The decoding thread waits until this thread is done with a posted call before the next layer call begins, and before the decode
    ends, so at any time only one of them is in the parts that belong to the decoding thread.
    """

    def __init__(self, residency: Residency, ahead: ReadAhead, handover: Handover, telemetry: Telemetry) -> None:
        self._residency, self._ahead, self._handover, self._telemetry = residency, ahead, handover, telemetry
        self.record = MissRecord(max(moe.n_embd for moe in residency.layers.values()), residency.table.gate.address)
        early = residency.store.early
        if early is not None:
            early.watch(residency.table.loading)
            self.record.use_early(early.address)
        residency.store.ahead_arrived = self.record.ring
        self._n_looks_left = 0
        self._thread = threading.Thread(target=self._serve, name="localrun-misses", daemon=True)
        self._thread.start()
        handover.use_misses(self.record)

    def _learn_places(self) -> None:
        """Tells compiled code where experts are, until a call asks for some: each that is read tells its own place."""
        where = self._residency
        for layer, moe in where.layers.items():
            for expert in range(moe.n_experts):
                if self.record.is_posted:
                    return
                with suppress(Exception):  # whoever reads it will say what is wrong
                    where.store.know(layer, expert, where.variant_to_read(layer, expert))

    def _serve(self) -> None:
        if self._residency.store.early is not None:
            self._learn_places()
        while self.record.next():
            if not self.record.take():  # what was read ahead is here before a call asks for it
                self._residency.settle()
                continue
            status = 0
            try:
                self._fetch()
            except BaseException as error:  # the decoding thread reports it
                self._handover.failed(error)
                status = ABORTED_ANSWER if isinstance(error, StoppedError) else FAILED_ANSWER
            self.record.end(status)

    def _fetch(self) -> None:
        where = self._residency
        with where.lock:
            where.settle()
            if not self.record.n_missing and self.record.n_tokens == 1:
                self._look()
                return
            call = PostedCall(where, self._ahead, self.record, self._handover)
            evictions = where.table.n_evictions
            try:
                call.run()
            finally:
                call.release()
                where.store.drop_early()
            self._ahead.note_call()
            self._look_on(call.n_misses > 0)
            row = self._telemetry.values[self.record.layer]
            if call.n_found:  # of a call that lacks nothing, compiled code may be adding the hits now
                row[Counter.HITS] += call.n_found
            row[Counter.MISSES] += call.n_misses
            row[Counter.BYTES_READ] += call.bytes_read
            row[Counter.EVICTIONS] += where.table.n_evictions - evictions

    def _look(self) -> None:
        """For a token's call that lacks nothing: what `LayerCall` does for the next layers. Its experts stay meanwhile."""
        layer, experts, table = self.record.layer, self.record.ids[0], self._residency.table
        evictions = table.n_evictions
        slots = [slot for expert in set(experts.tolist()) if (slot := table.peek(layer, expert)) is not None]
        for slot in slots:
            table.pin(slot)
        try:
            self._ahead.reached(layer)
            self._ahead.foresight.begin(layer, experts)
            self._ahead.foresight.look(layer, self.record.x(self._residency.layers[layer].n_embd))
            self._residency.look()
            self._ahead.judge(layer, experts)
        finally:
            for slot in slots:
                table.unpin(slot)
        self._ahead.note_call()
        self._look_on(False)
        self._telemetry.values[layer, Counter.EVICTIONS] += table.n_evictions - evictions

    def _look_on(self, has_missed: bool) -> None:
        """Says whether calls that lack nothing are posted from now on."""
        self._n_looks_left = LOOKING_CALLS if has_missed else self._n_looks_left - 1
        self.record.post_all(self._n_looks_left > 0)

    def close(self) -> None:
        """Ends the thread; no compiled call may be running."""
        self._residency.store.ahead_arrived = nothing_follows
        self._handover.use_misses(None)
        self.record.close()
        self._thread.join()
